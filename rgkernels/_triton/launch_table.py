"""How kernels are launched: which row of `launch_data.py` a kernel takes. Nothing is tuned while the library runs.

A row is found by (kernel, architecture, dtype, size):

1. the size class: the smallest size listed for the kernel that holds the padded width (channels for the norm sites, head size
   elsewhere);
2. in that class the first of (architecture, dtype), (architecture, "any"), ("any", dtype), ("any", "any").

An architecture or dtype without a row of its own therefore gets the "any" row, which is right everywhere and measured nowhere.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from rgkernels._triton.launch_data import LAUNCHES

# Triton 3.10 stops fusing multiplications into additions unless asked: the kernels count on it, for registers and for speed
FP_FUSION = {"enable_fp_fusion": True}


class RowTile(NamedTuple):
    """Rows of a tile, and the warps that share them."""

    block_s: int
    num_warps: int

    def options(self) -> dict[str, Any]:
        """Compiler options of the launch."""
        return {"num_warps": self.num_warps, **FP_FUSION}


class RowLoop(NamedTuple):
    """A norm site's backward: programs that walk many rows.

    Args:
        block_s: Rows per tile.
        num_warps: Warps per program.
        num_stages: Depth of the row loop's pipeline at most; less where rows are too wide for shared memory.
        programs_per_sm: Programs per multiprocessor at most: more hide each other's reductions, fewer leave fewer partial sums.
        maxnreg: Cap on registers per thread, None for ptxas' choice.
    """

    block_s: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    maxnreg: int | None

    def options(self) -> dict[str, Any]:
        """Compiler options of the launch; the pipeline's depth is an argument of the kernel."""
        return {"num_warps": self.num_warps, "maxnreg": self.maxnreg, **FP_FUSION}


class SumTile(NamedTuple):
    """A second stage: partial rows and columns per step."""

    block_p: int
    block_c: int
    num_warps: int

    def options(self) -> dict[str, Any]:
        """Compiler options of the launch."""
        return {"num_warps": self.num_warps, **FP_FUSION}


class HeadTile(NamedTuple):
    """qk_norm_rope: a tile of tokens x heads.

    Args:
        elements: Elements of q, and as many of k, per tile; 8 per lane are one 16-byte access, and leave nothing to exchange
            between warps.
        max_heads: Heads per tile at most.
        num_warps: Warps per program.
        num_stages: Depth of the backward's pipeline over tiles; the forward has one tile per program.
        programs_per_sm: Programs per multiprocessor of the backward.
    """

    elements: int
    max_heads: int
    num_warps: int
    num_stages: int
    programs_per_sm: int

    def options(self) -> dict[str, Any]:
        """Compiler options of the launch; the pipeline's depth is an argument of the kernel."""
        return {"num_warps": self.num_warps, **FP_FUSION}


class ScoreTile(NamedTuple):
    """Attention: a tile of the score matrix.

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
    maxnreg: int | None

    def options(self) -> dict[str, Any]:
        """Compiler options of the launch."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, **FP_FUSION}
        return options if self.maxnreg is None else options | {"maxnreg": self.maxnreg}


Launch = RowTile | RowLoop | SumTile | HeadTile | ScoreTile

KINDS: dict[str, type[Launch]] = {
    "adaln_fwd": RowTile,
    "adaln_bwd": RowLoop,
    "adaln_bwd_reduce": SumTile,
    "adaln_bwd_affine": SumTile,
    "qk_norm_rope_fwd": HeadTile,
    "qk_norm_rope_bwd": HeadTile,
    "qk_norm_rope_bwd_trained": HeadTile,
    "qk_norm_rope_bwd_reduce": RowTile,
    "attn_fwd": ScoreTile,
    "attn_bwd_dkdv": ScoreTile,
    "attn_bwd_dq": ScoreTile,
    "attn_bwd_delta": RowTile,
}


@functools.cache
def find(kernel: str, architecture: str, dtype: torch.dtype, size: int) -> Any:
    """The launch of a kernel.

    Args:
        kernel: A key of `KINDS`; the result is of the kind that it names.
        architecture: As `common.architecture` names it.
        dtype: Of the tokens.
        size: The padded width that the kernel works on.

    Raises:
        LookupError: No row holds this width.
    """
    rows, listed = LAUNCHES[kernel], size_class(kernel, size)
    for arch in (architecture, "any"):
        for kind in (dtype_class(dtype), "any"):
            if (arch, kind, listed) in rows:
                return KINDS[kernel]._make(rows[arch, kind, listed])
    raise LookupError(f"{kernel} has no launch for {architecture}, {dtype}, size {size}")


def size_class(kernel: str, size: int) -> int:
    """The smallest size listed for a kernel that holds a padded width."""
    listed = [wide for _, _, wide in LAUNCHES[kernel] if wide >= size]
    if not listed:
        raise LookupError(f"{kernel} has no launch for size {size}")
    return min(listed)


def dtype_class(dtype: torch.dtype) -> str:
    """Name a dtype as the table does: "half" for both 16-bit types, which need the same registers and shared memory."""
    return "float32" if dtype == torch.float32 else "half"
