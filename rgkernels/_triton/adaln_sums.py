"""Backward of the norm sites, second stage: parameter gradients from the first stage's partial rows, in a fixed order.

    A, Bs, G = sums of a (sample, segment)'s partial rows        dshift = Bs        dgate = G
    dscale = weight * A + bias * Bs
    dweight = sum_{b,g} (1 + scale) * A        dbias = sum_{b,g} (1 + scale) * Bs          (a third launch, only if trained)

A segment without tokens has no partial rows and gets zeros. Letters: B batch, C channels, G segments, N the sums per program.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rgkernels._triton import launch_table
from rgkernels._triton.common import add_partials, architecture, encode_lengths, programs_of


class Needs(NamedTuple):
    """Which gradients of a norm site the caller wants, in the order in which they are returned."""

    x: bool
    branch: bool
    gate: bool
    shift: bool
    scale: bool
    weight: bool
    bias: bool


class Sums(NamedTuple):
    """Which column sums the first stage keeps: A and Bs, and G."""

    norm: bool
    gate: bool

    @property
    def num_rows(self) -> int:
        """Partial rows of one program (N)."""
        return 2 * self.norm + self.gate


class Programs(NamedTuple):
    """How the first stage split the rows: segment lengths, rows per program, programs per sample."""

    lengths: tuple[int, ...]
    rows: int
    per_sample: int


@triton.jit(do_not_specialize=["programs", "rows_per_program"])
def _adaln_bwd_reduce_kernel(
    dshift_ptr,  # [B, G, C] contiguous, or None; likewise the next two
    dscale_ptr,
    dgate_ptr,
    sums_ptr,  # [B, G, 2, C] float32, or None: A and Bs for the affine kernel
    partial_ptr,  # [B * programs, N, C] float32
    weight_ptr,
    bias_ptr,
    lengths,
    programs,
    rows_per_program,
    CHANNELS: tl.constexpr,
    NORM_SUMS: tl.constexpr,
    GATE_SUM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    NUM_SUMS: tl.constexpr = 2 * NORM_SUMS + GATE_SUM
    site = (tl.program_id(0) // tl.cdiv(CHANNELS, BLOCK_C)).to(tl.int64)
    batch = site // len(lengths)
    first, count = programs_of(site % len(lengths), lengths, rows_per_program)

    cols = (tl.program_id(0) % tl.cdiv(CHANNELS, BLOCK_C)) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = cols < CHANNELS
    stride = NUM_SUMS * CHANNELS
    partial_ptrs = partial_ptr + (batch * programs + first) * stride + cols
    offs_out = site * CHANNELS + cols

    if NORM_SUMS:
        sum_dy_xhat = add_partials(partial_ptrs, count, mask_c, stride, BLOCK_P, BLOCK_C)
        sum_dy = add_partials(partial_ptrs + CHANNELS, count, mask_c, stride, BLOCK_P, BLOCK_C)
        if sums_ptr is not None:
            tl.store(sums_ptr + 2 * site * CHANNELS + cols, sum_dy_xhat, mask=mask_c)
            tl.store(sums_ptr + (2 * site + 1) * CHANNELS + cols, sum_dy, mask=mask_c)
        if dshift_ptr is not None:
            tl.store(dshift_ptr + offs_out, sum_dy.to(dshift_ptr.dtype.element_ty), mask=mask_c)
        if dscale_ptr is not None:
            dscale = sum_dy_xhat
            if weight_ptr is not None:
                dscale *= tl.load(weight_ptr + cols, mask=mask_c, other=0.0).to(tl.float32)
            if bias_ptr is not None:
                dscale += tl.load(bias_ptr + cols, mask=mask_c, other=0.0).to(tl.float32) * sum_dy
            tl.store(dscale_ptr + offs_out, dscale.to(dscale_ptr.dtype.element_ty), mask=mask_c)
    if GATE_SUM:
        sum_gate = add_partials(partial_ptrs + 2 * NORM_SUMS * CHANNELS, count, mask_c, stride, BLOCK_P, BLOCK_C)
        tl.store(dgate_ptr + offs_out, sum_gate.to(dgate_ptr.dtype.element_ty), mask=mask_c)


@triton.jit(do_not_specialize=["sites"])
def _adaln_bwd_affine_kernel(
    dweight_ptr,  # [C], or None
    dbias_ptr,
    sums_ptr,  # [B, G, 2, C] float32
    scale_ptr,  # [B, G, C]
    sites,  # B * G
    stride_scale_b,
    stride_scale_g,
    CHANNELS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = cols < CHANNELS
    dweight = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for start in tl.range(0, sites, BLOCK_P):
        site = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        mask = (site < sites)[:, None] & mask_c[None, :]
        offs_scale = (site // SEGMENTS) * stride_scale_b + (site % SEGMENTS) * stride_scale_g
        factor = 1.0 + tl.load(scale_ptr + offs_scale[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        sums_ptrs = sums_ptr + 2 * site[:, None] * CHANNELS + cols[None, :]
        dweight += factor * tl.load(sums_ptrs, mask=mask, other=0.0)
        dbias += factor * tl.load(sums_ptrs + CHANNELS, mask=mask, other=0.0)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + cols, tl.sum(dweight, axis=0).to(dweight_ptr.dtype.element_ty), mask=mask_c)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + cols, tl.sum(dbias, axis=0).to(dbias_ptr.dtype.element_ty), mask=mask_c)


def launch_sums(
    grads: dict[str, Tensor | None],
    partial: Tensor,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    batch: int,
    programs: Programs,
    sums: Sums,
) -> None:
    """Fill the wanted ones of grads["gate" | "shift" | "scale" | "weight" | "bias"] from `partial` [B * programs, N, C]."""
    channels, sites = partial.shape[2], batch * len(programs.lengths)
    affine = grads["weight"] is not None or grads["bias"] is not None
    site_sums = torch.empty((sites, 2, channels), dtype=torch.float32, device=partial.device) if affine else None
    arch, width = architecture(partial.device), triton.next_power_of_2(channels)
    if sites:
        launch = launch_table.find("adaln_bwd_reduce", arch, partial.dtype, width)
        _adaln_bwd_reduce_kernel[(sites * triton.cdiv(channels, launch.block_c),)](
            dshift_ptr=grads["shift"],
            dscale_ptr=grads["scale"],
            dgate_ptr=grads["gate"],
            sums_ptr=site_sums,
            partial_ptr=partial,
            weight_ptr=None if grads["scale"] is None else weight,
            bias_ptr=None if grads["scale"] is None else bias,
            lengths=encode_lengths(programs.lengths),
            programs=programs.per_sample,
            rows_per_program=programs.rows,
            CHANNELS=channels,
            NORM_SUMS=sums.norm,
            GATE_SUM=sums.gate,
            BLOCK_P=launch.block_p,
            BLOCK_C=launch.block_c,
            **launch.options(),
        )
    if affine:
        assert scale is not None
        launch = launch_table.find("adaln_bwd_affine", arch, partial.dtype, width)
        _adaln_bwd_affine_kernel[(triton.cdiv(channels, launch.block_c),)](
            dweight_ptr=grads["weight"],
            dbias_ptr=grads["bias"],
            sums_ptr=site_sums,
            scale_ptr=scale,
            sites=sites,
            stride_scale_b=scale.stride(0),
            stride_scale_g=scale.stride(1),
            CHANNELS=channels,
            SEGMENTS=len(programs.lengths),
            BLOCK_P=launch.block_p,
            BLOCK_C=launch.block_c,
            **launch.options(),
        )
