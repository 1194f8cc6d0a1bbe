"""The least bytes and floating-point operations of an op at a workload, whoever computes it.

Rates of predictions are this work over a time; the ratio of the two is an op's place on a roofline.
"""

from __future__ import annotations

from benchmarks.harness.shapes import Shape

MODES = ("forward", "backward")
# vectors of one token that an op must move, forward and backward, and its arithmetic operations per element
VECTORS = {
    "segment_adaln": (2, 3),
    "segment_gate_residual": (3, 3),
    "segment_gate_residual_adaln": (4, 6),
    "qk_norm_rope": (4, 6),
    "segment_attention": (4, 8),
}
OPERATIONS = {
    "segment_adaln": (8, 14),
    "segment_gate_residual": (2, 3),
    "segment_gate_residual_adaln": (10, 17),
    "qk_norm_rope": (22, 44),
}


def least_work(op: str, mode: str, shape: Shape, itemsize: int) -> tuple[int, int]:
    """(bytes, FLOP) of one op in one direction; see `VECTORS` and `OPERATIONS`, and for attention 4 D per visible score."""
    backward = MODES.index(mode)
    elements = shape.batch * shape.seq_len * shape.channels
    moved = VECTORS[op][backward] * elements * itemsize
    if op != "segment_attention":
        return moved, OPERATIONS[op][backward] * elements
    scores = round(shape.seq_len**2 * shape.layout.visible_fraction) * shape.batch * shape.heads
    return moved, round(4 * shape.head_dim * scores * (1.0, 2.5)[backward])
