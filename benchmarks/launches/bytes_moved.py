"""The byte counter: what launched kernels must move, from their arguments.

Every tensor argument of a launch is read or written once, in full: its distinct elements (an expanded dim counts once) times
its element size. A vector is one read or write of one token's C values. Shared by the tests, which hold a block to 12 vectors
per token forward and 18 backward, and by the benchmarks, which divide bytes by time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from torch import Tensor

from benchmarks.launches.record import Launch, tensors

PARAMETERS = {
    "gate_ptr", "shift_ptr", "scale_ptr", "weight_ptr", "bias_ptr", "dgate_ptr", "dshift_ptr", "dscale_ptr", "dweight_ptr",
    "dbias_ptr", "q_weight_ptr", "q_bias_ptr", "k_weight_ptr", "k_bias_ptr", "dq_weight_ptr", "dq_bias_ptr", "dk_weight_ptr",
    "dk_bias_ptr",
}  # fmt: skip
STATISTICS = {"mean_ptr", "rstd_ptr"}
TABLES = {"cos_ptr", "sin_ptr"}
SCRATCH = {"partial_ptr", "sums_ptr"}
TOKENS = {
    "x_ptr", "branch_ptr", "res_ptr", "normed_ptr", "dres_ptr", "dnormed_ptr", "dx_ptr", "dbranch_ptr",
    "q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr", "dq_ptr", "dk_ptr", "dq_out_ptr", "dk_out_ptr",
}  # fmt: skip


@dataclass
class Bytes:
    """Bytes by kind.

    Args:
        tokens: Rows of C values, one per token: what the design counts in vectors.
        parameters: Modulation, norm parameters and their gradients.
        statistics: Stored mean and rstd.
        tables: Cosines and sines.
        scratch: Partial column sums, written by one kernel and read by the next.
    """

    tokens: int = 0
    parameters: int = 0
    statistics: int = 0
    tables: int = 0
    scratch: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, field.name) for field in fields(self))

    def vectors(self, like: Tensor) -> float:
        """Token bytes as vectors per token of `like` [B, S, C]."""
        return self.tokens / (like.numel() * like.element_size())


def bytes_moved(launches: Iterable[Launch]) -> Bytes:
    """Add up the bytes of norm-site and qk_norm_rope launches; a tensor argument of unknown kind is an error."""
    found = Bytes()
    for launch in launches:
        for name, tensor in tensors(launch).items():
            kind = _kind(launch.name, name)
            setattr(found, kind, getattr(found, kind) + distinct_bytes(tensor))
    return found


def distinct_bytes(x: Tensor) -> int:
    """Bytes of a tensor's distinct elements: an expanded dim counts once."""
    numel = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        numel *= size if stride or not size else 1
    return numel * x.element_size()


def _kind(kernel: str, name: str) -> str:
    kinds = {"tokens": TOKENS, "parameters": PARAMETERS, "statistics": STATISTICS, "tables": TABLES, "scratch": SCRATCH}
    for kind, names in kinds.items():
        if name in names:
            return kind
    raise ValueError(f"{kernel}: argument {name} must be listed in benchmarks/launches/bytes_moved.py, got no kind for it")
