"""What the attention kernels share: the rule for tensor descriptors, arguments of a launch, loading rows, and scores."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rgkernels._triton import launch_table
from rgkernels._triton.common import architecture
from rgkernels._triton.launch_table import ScoreTile

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

HEAD_DIMS = (32, 64, 96, 128)

# with a tensor memory accelerator and warp-group matrix instructions that read what it loads
TMA_ARCHITECTURES = ("sm_90", "sm_100", "interpreter")


def tiles_for(kernel: str, q: Tensor, tma: bool) -> ScoreTile:
    """The launch of "attn_fwd", "attn_bwd_dkdv" or "attn_bwd_dq" for the device, dtype and head size of `q`."""
    arch = architecture(q.device)
    tiles: ScoreTile = launch_table.find(kernel, arch, q.dtype, padded(q.shape[-1]))
    # rows of these architectures fit loads by descriptors; pointers need registers of their own
    return tiles._replace(maxnreg=255) if arch in TMA_ARCHITECTURES and q.dtype != torch.float32 and not tma else tiles


def padded(head_dim: int) -> int:
    """The power of two that holds a head: 96 runs as 128, the rest as it is."""
    return 1 << (head_dim - 1).bit_length()


def precision(x: Tensor) -> str:
    """How float32 matrix products run: as TF32 where torch's settings, old or new, ask for it. Half precision has no choice.

    Else as three TF32 products of high and low parts, as PyTorch's attention does: nearer to the truth than one chain of
    float32 multiply-adds ("ieee") as long as a head, or as the keys are many.
    """
    if x.dtype != torch.float32 or x.device.type != "cuda" or torch.version.hip is not None:
        return "ieee"
    # the new setting also answers for the old one (allow_tf32); asking the old one after the new one was set raises
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def use_tma(*tensors: Tensor) -> bool:
    """Whether a kernel loads these [B, H, S, D] tensors by tensor descriptors; else by pointers, with the same results.

    The hardware asks for a 16-byte aligned base and strides that are positive multiples of 16 bytes; expanded tensors (stride
    0) are read by pointers. float32 has no use for it: its products do not read shared memory directly.
    """
    if architecture(tensors[0].device) not in TMA_ARCHITECTURES or tensors[0].dtype == torch.float32:
        return False
    return all(_describable(x) for x in tensors)


def _describable(x: Tensor) -> bool:
    steps = [stride * x.element_size() for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    return x.numel() > 0 and x.data_ptr() % 16 == 0 and all(0 < step < 2**40 and step % 16 == 0 for step in steps)


def descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Describe [B, H, S, D] for loads of [rows, padded D] tiles; columns past D read as 0."""
    # the stride of a dim of size 1 is never used, yet the hardware checks it: any legal number will do
    strides = [stride if size > 1 else x.shape[-1] for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, padded(x.shape[-1])])


def strides(**tensors: Tensor) -> dict[str, int]:
    """Kernel arguments `stride_XXb, stride_XXh, stride_XXs` of [B, H, S, D] tensors named XX."""
    return {
        f"stride_{name}{letter}": stride
        for name, x in tensors.items()
        for letter, stride in zip("bhs", x.stride(), strict=False)
    }


def sizes(x: Tensor, tiles: ScoreTile) -> dict[str, Any]:
    """Kernel arguments that every attention kernel takes: head and tile sizes."""
    return {
        "HEAD_DIM": x.shape[-1],
        "BLOCK_D": padded(x.shape[-1]),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_TAIL": tiles.tail,
        "PRECISION": precision(x),
        **tiles.options(),
    }


@triton.jit
def scores(a, b, PRECISION: tl.constexpr):
    """a @ b^T of [M, D] and [N, D] tiles; the backward must make them as the forward did, for its lse to fit.

    Tensor cores cut off what does not fit when they add up. In float32 that moves scores far from 0 all to one side, and lse
    with them; two sums of half the size lose a quarter as much. Heads of more than 64 have no registers for it.
    """
    if PRECISION == "tf32x3" and a.shape[1] <= 64:
        even_a, odd_a = tl.split(tl.reshape(a, (a.shape[0], a.shape[1] // 2, 2)))
        even_b, odd_b = tl.split(tl.reshape(b, (b.shape[0], b.shape[1] // 2, 2)))
        even = tl.dot(even_a, tl.trans(even_b), input_precision=PRECISION)
        return even + tl.dot(odd_a, tl.trans(odd_b), input_precision=PRECISION)
    else:
        return tl.dot(a, tl.trans(b), input_precision=PRECISION)


@triton.jit
def load_tile(tiles_ptr, tile):
    """Row `tile` of a schedule: first row, end of the rows, first range, end of the ranges."""
    ptr = tiles_ptr + 4 * tile
    return tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3)


@triton.jit
def load_range(ranges_ptr, r, BLOCK: tl.constexpr):
    """Range `r` of a schedule: start, end of its last full tile, stop."""
    lo = tl.load(ranges_ptr + 2 * r)
    hi = tl.load(ranges_ptr + 2 * r + 1)
    return lo, lo + (hi - lo) // BLOCK * BLOCK, hi


@triton.jit
def load_rows(
    head_ptr,
    start,
    stop,
    stride_s,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows [start, start + BLOCK_S) of one head, [BLOCK_S, BLOCK_D]; with MASKED, rows from `stop` on are 0 and not read."""
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    # int64 before the products: a stride times a row can pass 2^31; the tile's own offsets stay the same in a loop
    ptrs = head_ptr + tl.cast(start, tl.int64) * stride_s + (offs_s.to(tl.int64)[:, None] * stride_s + offs_d[None, :])
    mask_d = (offs_d < HEAD_DIM)[None, :]
    if MASKED:
        return tl.load(ptrs, mask=(start + offs_s < stop)[:, None] & mask_d, other=0.0)
    elif HEAD_DIM != BLOCK_D:
        return tl.load(ptrs, mask=mask_d, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store_rows(
    head_ptr,
    values,
    start,
    stop,
    stride_s,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Write rows [start, min(start + BLOCK_S, stop)) of one head."""
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = head_ptr + tl.cast(start, tl.int64) * stride_s + (offs_s.to(tl.int64)[:, None] * stride_s + offs_d[None, :])
    mask = (start + offs_s < stop)[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(ptrs, values.to(head_ptr.dtype.element_ty), mask=mask)
