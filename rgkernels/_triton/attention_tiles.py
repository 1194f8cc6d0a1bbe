"""What the attention kernels share: launch tables, the rule for tensor descriptors, and loading rows."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

HEAD_DIMS = (32, 64, 96, 128)

# architectures with a tensor memory accelerator and warp-group matrix instructions that read what it loads
TMA_FAMILIES = ("sm_90", "sm_100", "interpreter")


class Tiles(NamedTuple):
    """One launch: tile sizes, and how the compiler is to build it.

    Args:
        block_m: Query rows per tile.
        block_n: Keys per tile.
        tail: Rows per step at the ragged end of a range. Small steps need few registers, and the kernel has as many as its
            hungriest part.
        num_warps: Warps per program.
        num_stages: Tiles in flight.
        maxnreg: Cap on registers per thread: where a few fewer let one more program run on a multiprocessor, or (255, the
            hardware's own) where ptxas would spill to reach an occupancy that it prefers.
    """

    block_m: int
    block_n: int
    tail: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    def launch_options(self) -> dict[str, int]:
        """Keyword arguments of a kernel launch."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.maxnreg is None else options | {"maxnreg": self.maxnreg}


# Not yet measured on a GPU: chosen from ptxas' register, spill and shared-memory counts (docs/kernels-attention.md).
# TABLE[kernel][row][padded head size]
_EVERY_HEAD = (32, 64, 128)
TABLE: dict[str, dict[str, dict[int, Tiles]]] = {
    "fwd": {
        "sm_80": {32: Tiles(128, 64, 32, 8, 3), 64: Tiles(128, 64, 32, 8, 3), 128: Tiles(128, 32, 16, 8, 3)},
        # head size 64: 128 registers let two programs of 8 warps share a multiprocessor, one computing exp while one multiplies
        "sm_90": {32: Tiles(128, 64, 32, 8, 3), 64: Tiles(128, 64, 32, 8, 3, maxnreg=128), 128: Tiles(128, 64, 32, 8, 3)},
        "sm_100": {32: Tiles(128, 64, 32, 8, 3), 64: Tiles(128, 64, 32, 8, 3), 128: Tiles(128, 64, 32, 8, 2)},
        "gfx942": dict.fromkeys(_EVERY_HEAD, Tiles(128, 64, 32, 4, 1)),
        "float32": {
            **dict.fromkeys((32, 64), Tiles(32, 32, 16, 4, 1, maxnreg=255)),
            128: Tiles(16, 16, 16, 4, 1, maxnreg=255),
        },
        "gfx942-float32": {**dict.fromkeys((32, 64), Tiles(32, 32, 16, 4, 1)), 128: Tiles(32, 16, 16, 4, 1)},
        "interpreter": dict.fromkeys(_EVERY_HEAD, Tiles(64, 32, 16, 4, 1)),
    },
    "dkdv": {
        "sm_80": {32: Tiles(64, 64, 32, 4, 3), 64: Tiles(32, 128, 16, 8, 3), 128: Tiles(64, 64, 16, 8, 2)},
        "sm_90": {32: Tiles(64, 128, 32, 8, 3), 64: Tiles(64, 128, 32, 8, 3), 128: Tiles(32, 64, 16, 8, 2)},
        "sm_100": {32: Tiles(64, 64, 16, 4, 3, maxnreg=168), 64: Tiles(64, 128, 32, 8, 2), 128: Tiles(32, 64, 16, 8, 2)},
        "gfx942": {32: Tiles(32, 64, 16, 4, 1), 64: Tiles(64, 64, 16, 4, 1), 128: Tiles(32, 64, 16, 4, 1)},
        "float32": {
            32: Tiles(32, 32, 16, 4, 1, maxnreg=255),
            64: Tiles(16, 32, 16, 4, 1, maxnreg=255),
            128: Tiles(16, 16, 16, 4, 1, maxnreg=255),
        },
        "gfx942-float32": {**dict.fromkeys((32, 64), Tiles(32, 32, 16, 4, 1)), 128: Tiles(16, 16, 16, 4, 1)},
        "interpreter": dict.fromkeys(_EVERY_HEAD, Tiles(32, 64, 16, 4, 1)),
    },
    "dq": {
        "sm_80": {32: Tiles(128, 64, 16, 8, 2, maxnreg=168), 64: Tiles(128, 64, 16, 8, 3), 128: Tiles(128, 32, 16, 8, 2)},
        "sm_90": {32: Tiles(128, 64, 32, 8, 3), 64: Tiles(128, 64, 32, 8, 3, maxnreg=128), 128: Tiles(128, 64, 16, 8, 2)},
        "sm_100": {32: Tiles(128, 64, 32, 8, 2, maxnreg=128), 64: Tiles(128, 64, 32, 8, 2), 128: Tiles(128, 64, 16, 8, 2)},
        "gfx942": dict.fromkeys(_EVERY_HEAD, Tiles(64, 64, 16, 4, 1)),
        "float32": {
            **dict.fromkeys((32, 64), Tiles(32, 32, 16, 4, 1, maxnreg=255)),
            128: Tiles(16, 16, 16, 4, 1, maxnreg=255),
        },
        "gfx942-float32": {**dict.fromkeys((32, 64), Tiles(32, 32, 16, 4, 1)), 128: Tiles(16, 16, 16, 4, 1)},
        "interpreter": dict.fromkeys(_EVERY_HEAD, Tiles(64, 32, 16, 4, 1)),
    },
}


def family(device: torch.device) -> str:
    """The architecture family of a device, as the launch tables name it."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    # consumer Blackwell (12.x) has the multiprocessor of 8.x: synchronous matrix instructions, 99 KiB of shared memory
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def tiles_for(kernel: str, q: Tensor, tma: bool) -> Tiles:
    """Look up the launch of "fwd", "dkdv" or "dq" for the device, dtype and head size of `q`."""
    name = family(q.device)
    if q.dtype == torch.float32 and name != "interpreter":
        name = "gfx942-float32" if name == "gfx942" else "float32"
    tiles = TABLE[kernel][name][padded(q.shape[-1])]
    # rows of these families fit loads by descriptors; pointers need registers of their own
    return tiles._replace(maxnreg=255) if name in TMA_FAMILIES and not tma else tiles


def padded(head_dim: int) -> int:
    """The power of two that holds a head: 96 runs as 128, the rest as it is."""
    return 1 << (head_dim - 1).bit_length()


def precision(x: Tensor) -> str:
    """How float32 matrix products run: exactly, unless torch's own setting allows TF32. Half precision has no choice."""
    tf32 = x.dtype == torch.float32 and torch.version.hip is None and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


def use_tma(*tensors: Tensor) -> bool:
    """Whether a kernel loads these [B, H, S, D] tensors by tensor descriptors; else by pointers, with the same results.

    The hardware asks for a 16-byte aligned base and strides that are positive multiples of 16 bytes; expanded tensors (stride
    0) are read by pointers. float32 has no use for it: its products do not read shared memory directly.
    """
    if family(tensors[0].device) not in TMA_FAMILIES or tensors[0].dtype == torch.float32:
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


def sizes(x: Tensor, tiles: Tiles) -> dict[str, Any]:
    """Kernel arguments that every attention kernel takes: head and tile sizes."""
    return {
        "HEAD_DIM": x.shape[-1],
        "BLOCK_D": padded(x.shape[-1]),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_TAIL": tiles.tail,
        "PRECISION": precision(x),
        **tiles.launch_options(),
    }


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
