"""Norm-site and qk_norm_rope launches for the static report, and the budgets that their binaries must keep.

`variants` yields (name, target, launches); variants_attention.py does the same for attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from benchmarks.launches.binaries import TARGETS
from benchmarks.launches.record import Launch, record_launches
from rgkernels import SegmentLayout
from rgkernels._triton import adaln, qk_norm_rope

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CHANNELS = (1920, 3072)  # CogVideoX 2B and 5B
HEAD_DIMS = (64, 128)
# lengths, token counts and batch sizes are run-time values: any will do
LAYOUT = SegmentLayout.of(text=226, target=337, condition=337)


class Budget(NamedTuple):
    """What a kernel's sm_90 binary may use.

    Args:
        registers: Per thread, for half-precision tokens; chosen so that the intended programs fit a multiprocessor.
        registers_float32: The same for float32 tokens.
        narrow_loads: Global loads below 16 bytes: statistics, tables and small vectors, never a row of tokens.
    """

    registers: int
    registers_float32: int
    narrow_loads: int


# 65,536 registers per multiprocessor: 128 x 128 threads = 4 programs, 168 = 3, 96 = 5, 72 = 7; 128 x 256 threads = 2, 48 = 5
BUDGETS = {
    "_adaln_fwd_kernel": Budget(128, 168, 0),
    "_adaln_bwd_kernel": Budget(128, 128, 6),  # mean and rstd, in three places of the pipelined loop
    "_adaln_bwd_reduce_kernel": Budget(64, 64, 2),  # weight and bias, 64 columns
    "_adaln_bwd_affine_kernel": Budget(80, 80, 0),
    "_qk_norm_rope_fwd_kernel": Budget(72, 48, 2),  # cosines, which a tile of 4 warps exchanges
    "_qk_norm_rope_bwd_kernel": Budget(128, 128, 4),  # one token's cosines are less than 16 bytes per thread
    "_qk_norm_rope_bwd_reduce_kernel": Budget(128, 128, 0),
}
# with frozen parameters three programs of 8 warps share a multiprocessor, or five of 4
QK_BACKWARD_FROZEN_REGISTERS = 96


def norm_site_launches(channels: int, dtype: torch.dtype, trained: bool, target: str = "sm_90") -> dict[str, list[Launch]]:
    """Forward and backward of the three norm-site ops with a trained or frozen affine, by op."""
    rows = (2, LAYOUT.seq_len, channels)
    x, branch = (torch.zeros(rows, dtype=dtype, requires_grad=True) for _ in range(2))
    projection = torch.zeros((2, LAYOUT.num_segments, 3 * channels), dtype=dtype, requires_grad=True)
    shift, scale, gate = projection.chunk(3, dim=-1)
    weight, bias = (torch.zeros(channels, dtype=dtype, requires_grad=trained) for _ in range(2))
    upstream = torch.zeros(rows, dtype=dtype)
    calls = {
        "adaln": lambda: adaln.segment_adaln(x, shift, scale, LAYOUT, weight, bias, 1e-5),
        "gate-residual": lambda: adaln.segment_gate_residual(x, branch, gate, LAYOUT),
        "gate-residual-adaln": lambda: adaln.segment_gate_residual_adaln(
            x, branch, gate, shift, scale, LAYOUT, weight, bias, 1e-5
        ),
    }
    found = {}
    for name, call in calls.items():
        with record_launches(architecture=target) as launches:
            outputs = call()
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.autograd.grad(outputs, [x, projection], [upstream] * len(outputs), retain_graph=True)
        found[name] = launches
    return found


def qk_launches(head_dim: int, dtype: torch.dtype, trained: bool, target: str = "sm_90") -> list[Launch]:
    """Forward and backward of qk_norm_rope on a packed projection, norm parameters trained or frozen."""
    projection = torch.zeros((2, LAYOUT.seq_len, 3, 30, head_dim), dtype=dtype, requires_grad=True)
    q, k, _ = (x.transpose(1, 2) for x in projection.unbind(2))
    norms = [torch.zeros(head_dim, dtype=dtype, requires_grad=trained) for _ in range(4)]
    tables = [torch.zeros(LAYOUT.seq_len - 226, head_dim) for _ in range(2)]
    with record_launches(architecture=target) as launches:
        outputs = qk_norm_rope.qk_norm_rope(q, k, *norms, *tables, 226, 1e-6)
        wanted = [projection, *norms] if trained else [projection]
        torch.autograd.grad(outputs, wanted, [torch.zeros_like(out) for out in outputs])
    return launches


def variants() -> Iterator[tuple[str, str, list[Launch]]]:
    """(name, target, launches) of every norm-site and qk_norm_rope kernel that ships."""
    for dtype in DTYPES:
        label = str(dtype)[6:]
        for target in TARGETS:
            for channels in CHANNELS:
                yield from _norm_sites(target, channels, dtype, label)
            for head_dim in HEAD_DIMS:
                yield f"qk-D{head_dim}-{label}-frozen", target, qk_launches(head_dim, dtype, False, target)
                # the forward kernel does not know what is trained
                yield f"qk-D{head_dim}-{label}-trained", target, qk_launches(head_dim, dtype, True, target)[1:]


def _norm_sites(target: str, channels: int, dtype: torch.dtype, label: str) -> Iterator[tuple[str, str, list[Launch]]]:
    for op, launches in norm_site_launches(channels, dtype, False, target).items():
        yield f"{op}-C{channels}-{label}", target, launches
    for op, launches in norm_site_launches(channels, dtype, True, target).items():
        if op != "gate-residual":
            # only the second stage knows what is trained
            yield f"{op}-C{channels}-{label}-trained", target, launches[2:]
