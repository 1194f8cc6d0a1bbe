"""What the Triton implementations share: launching on the right device, allocating outputs, finding a program's segment.

Letters: B batch, S joint sequence, H heads, D head size, G segments.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rgkernels._impl import require_triton

# "multiprocessors" where there is no GPU: few, so that the interpreter's tests walk loops of several rows per program
INTERPRETER_SMS = 4
# and the architecture whose launches it takes
INTERPRETER_ARCHITECTURE = "interpreter"


def device_guard(x: Tensor) -> contextlib.AbstractContextManager:
    """Make the device of `x` current: Triton launches on the current device, whatever device its arguments are on."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def num_sms(device: torch.device) -> int:
    """Number of streaming multiprocessors; asked once per device, at the first launch and never at import."""
    if device.type != "cuda":
        return INTERPRETER_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def architecture(device: torch.device) -> str:
    """The architecture of a device, as the launch table names it; asked once per device, at the first launch, not at import."""
    if device.type != "cuda":
        return INTERPRETER_ARCHITECTURE
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) in ((8, 6), (8, 9)):
        return f"sm_{major}{minor}"
    # consumer Blackwell (12.x) has the multiprocessor of 8.9: synchronous matrix instructions, 99 KiB of shared memory
    return {9: "sm_90", 10: "sm_100", 11: "sm_100", 12: "sm_89"}.get(major, "sm_80")


class FusedFunction(torch.autograd.Function):
    """Autograd around an op, which the transforms of `torch.func` cannot enter: kernels have one batch dim and reverse mode."""

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        """PyTorch's own; its error under a transform would ask the reader to change this class."""
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                "ops with impl='triton' must not run inside torch.func transforms (grad, vmap, jvp, ...), got one: "
                "use torch.autograd.grad, fold a mapped dim into B, or choose impl='reference'"
            )
        return super().apply(*args, **kwargs)


def register_kernel(lib: torch.library.Library, op: str, launch: Callable[..., Any]) -> None:
    """Register the launch of an op: for CUDA tensors, and for CPU ones where Triton interprets."""

    def on_cpu(*args: Any) -> Any:
        require_triton(torch.device("cpu"))
        return launch(*args)

    lib.impl(op, launch, "CUDA")
    lib.impl(op, on_cpu, "CPU")


def check_not_float64(op: str, x: Tensor) -> None:
    """float64 exists in the reference only: it is the oracle of the tests."""
    if x.dtype == torch.float64:
        raise NotImplementedError(f"{op} with impl='triton' supports float16, bfloat16 and float32, got {x.dtype}")


def rows_contiguous(x: Tensor) -> Tensor:
    """`x` itself if its last dim is contiguous (strided and expanded rows are read in place), else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def empty_in_memory_order(like: Tensor) -> Tensor:
    """Uninitialised [B, H, S, D] in the memory order of `like`: `reference.keep_memory_order` as an allocation."""
    batch, heads, seq_len, head_dim = like.shape
    if like.stride(1) < like.stride(2):
        return torch.empty((batch, seq_len, heads, head_dim), dtype=like.dtype, device=like.device).transpose(1, 2)
    return torch.empty((batch, heads, seq_len, head_dim), dtype=like.dtype, device=like.device)


def encode_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """Segment lengths as a kernel argument that never recompiles: n travels as 2n + 3.

    Triton specialises the elements of a tuple on 1 and on divisibility by 16, `do_not_specialize` or not (3.6 to 3.9). An odd
    number above 1 is neither, so one binary serves every length; only the number of segments is part of it.
    """
    return tuple(2 * n + 3 for n in lengths)


@triton.jit
def decode_length(code):
    """The inverse of `encode_lengths`, for one element."""
    return (code - 3) // 2


@triton.jit
def segment_of(pid, lengths, ROWS):
    """Find the segment of program `pid` where a segment of n rows has ceil(n / ROWS) programs, an empty one none.

    Returns (segment, first row, one past the last row, the program's index in its segment, programs of that segment).
    """
    segment, row_start, row_stop, index, programs = 0, 0, 0, 0, 1
    start, first = 0, 0
    for g in tl.static_range(len(lengths)):
        length = decode_length(lengths[g])
        count = tl.cdiv(length, ROWS)
        here = (pid >= first) & (pid < first + count)
        segment = tl.where(here, g, segment)
        row_start = tl.where(here, start, row_start)
        row_stop = tl.where(here, start + length, row_stop)
        index = tl.where(here, pid - first, index)
        programs = tl.where(here, count, programs)
        start += length
        first += count
    return segment, row_start, row_stop, index, programs


@triton.jit
def programs_of(segment, lengths, ROWS):
    """Where the programs of a segment lie under `segment_of`'s numbering: (first program, number of programs)."""
    first, count = 0, 0
    before = 0
    for g in tl.static_range(len(lengths)):
        here = tl.cdiv(decode_length(lengths[g]), ROWS)
        first = tl.where(segment == g, before, first)
        count = tl.where(segment == g, here, count)
        before += here
    return first, count


@triton.jit
def tile_offsets(stride, cols, BLOCK_S: tl.constexpr):
    """Offsets of a [BLOCK_S, len(cols)] tile from its first row: the row's address stays a scalar, outside the tile.

    One row per tile needs no 64-bit arithmetic per element, which saves a register pair per access.
    """
    if BLOCK_S == 1:
        return cols[None, :]
    else:
        return tl.arange(0, BLOCK_S).to(tl.int64)[:, None] * stride + cols[None, :]


@triton.jit
def sum_pair(a0, b0, a1, b1):
    """Combine function of `tl.reduce` that adds two tensors along an axis at once: one trip through shared memory."""
    return a0 + a1, b0 + b1


@triton.jit
def add_partials(ptrs, count, mask, stride, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sum `count` float32 rows that lie `stride` apart, in a fixed order: the second stage of every column sum."""
    total = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for start in tl.range(0, count, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        rows = ptrs[None, :] + offs_p.to(tl.int64)[:, None] * stride
        total += tl.load(rows, mask=(offs_p < count)[:, None] & mask[None, :], other=0.0)
    return tl.sum(total, axis=0)
