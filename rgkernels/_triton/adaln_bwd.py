"""Backward of the norm sites, first stage: token gradients in one pass, and column sums in float32 partial rows.

With xhat = (res - mean) * rstd, dy = dnormed, W = weight * (1 + scale[g]), per row and then per (sample, segment):

    dtotal = dres + rstd * (dy * W - mean_C(dy * W) - xhat * mean_C(dy * W * xhat))
    dx = dtotal        dbranch = gate[g] * dtotal
    A = sum_s dy * xhat        Bs = sum_s dy        G = sum_s dtotal * branch

Three column sums carry the five parameter gradients (adaln_sums.py). A program owns rows of one (sample, segment), strided so
that programs that run together read neighbouring rows; it keeps its sums in registers and writes them once, as float32 rows of
a scratch buffer. No atomics: two runs agree bit for bit.
Letters: B batch, S joint sequence, C channels, G segments, N the column sums that are kept (A and Bs, and G, as needed).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rgkernels._triton import launch_table
from rgkernels._triton.adaln_sums import Needs, Programs, Sums, launch_sums
from rgkernels._triton.common import (
    architecture,
    device_guard,
    encode_lengths,
    num_sms,
    rows_contiguous,
    segment_of,
    sum_pair,
    tile_offsets,
)
from rgkernels._triton.launch_table import RowLoop

# Shared memory for rows in flight, per program: two programs fit a multiprocessor of every GPU since sm_80, three on an H100
BUFFER_BYTES = 64 * 1024
# Several programs share a multiprocessor where each of them still owns at least this many rows, so that the scratch stays under
# a tenth of the tokens' bytes
MIN_ROWS_SHARED = 20


class Site(NamedTuple):
    """The tensors of one norm site's backward pass; see `_adaln_bwd_kernel` for shapes."""

    dres: Tensor | None
    dnormed: Tensor | None
    x: Tensor | None
    branch: Tensor | None
    gate: Tensor | None
    scale: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None


def bwd_launch(channels: int, device: torch.device, dtype: torch.dtype) -> tuple[int, RowLoop]:
    """(BLOCK_C, launch) of the backward kernel for a hidden size."""
    block_c = triton.next_power_of_2(channels)
    return block_c, launch_table.find("adaln_bwd", architecture(device), dtype, block_c)


def num_stages(deepest: int, row_tensors: int, tile_bytes: int) -> int:
    """Depth of the row loop's pipeline: n stages keep n - 1 tiles of every row tensor in shared memory."""
    return 1 + min(deepest - 1, BUFFER_BYTES // (row_tensors * tile_bytes))


@functools.lru_cache(maxsize=1024)
def rows_per_program(lengths: tuple[int, ...], batch: int, sms: int, block_s: int, programs_per_sm: int) -> int:
    """Smallest number of rows per program that keeps the programs of all samples and segments resident at once."""
    total = batch * sum(lengths)
    target = max(1, min(programs_per_sm, total // (sms * MIN_ROWS_SHARED))) * sms
    rows = max(block_s, triton.cdiv(total, target))
    # every segment rounds its programs up, so the quotient can be a little small; the longest segment ends the search
    while batch * sum(triton.cdiv(n, rows) for n in lengths) > target and rows < max(lengths):
        rows += max(1, rows // 32)
    return rows


@triton.jit
def norm_bwd(dy, xhat, rstd, weight, CHANNELS: tl.constexpr):
    """Gradient of LayerNorm's input; both row sums in one reduction. dy holds 0 in masked lanes."""
    wdy = dy * weight[None, :]
    sum_wdy, sum_wdy_xhat = tl.reduce((wdy, wdy * xhat), 1, sum_pair)
    mean_wdy, mean_wdy_xhat = sum_wdy / CHANNELS, sum_wdy_xhat / CHANNELS
    return rstd[:, None] * (wdy - mean_wdy[:, None] - xhat * mean_wdy_xhat[:, None])


@triton.jit(do_not_specialize=["seq_len", "programs", "rows_per_program"])
def _adaln_bwd_kernel(
    dx_ptr,  # [B, S, C] contiguous, or None
    dbranch_ptr,  # [B, S, C] contiguous, or None
    partial_ptr,  # [B * programs, N, C] float32, or None
    dres_ptr,  # [B, S, C], or None: upstream of res
    dnormed_ptr,  # [B, S, C], or None: upstream of normed
    x_ptr,  # [B, S, C]: what was normalised; None without dnormed
    branch_ptr,  # [B, S, C], or None: only dgate needs it
    gate_ptr,  # [B, G, C], or None: only dbranch needs it
    scale_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    lengths,  # encoded, one per segment
    seq_len,
    programs,  # per sample
    rows_per_program,
    stride_dres_b,
    stride_dres_s,
    stride_dnormed_b,
    stride_dnormed_s,
    stride_xb,
    stride_xs,
    stride_branch_b,
    stride_branch_s,
    stride_gate_b,
    stride_gate_g,
    stride_scale_b,
    stride_scale_g,
    CHANNELS: tl.constexpr,
    NORM_SUMS: tl.constexpr,  # keep A and Bs
    GATE_SUM: tl.constexpr,  # keep G
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    TOKEN_GRADS: tl.constexpr = GATE_SUM or dx_ptr is not None or dbranch_ptr is not None
    pid = tl.program_id(0).to(tl.int64)
    batch = pid // programs
    segment, row_start, row_stop, index, step = segment_of((pid % programs).to(tl.int32), lengths, rows_per_program)
    segment = segment.to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    mask_c = cols < CHANNELS

    if dnormed_ptr is not None:
        scale_ptrs = scale_ptr + batch * stride_scale_b + segment * stride_scale_g + cols
        weight = 1.0 + tl.load(scale_ptrs, mask=mask_c, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            weight *= tl.load(weight_ptr + cols, mask=mask_c, other=0.0).to(tl.float32)
    if dbranch_ptr is not None:
        gate_ptrs = gate_ptr + batch * stride_gate_b + segment * stride_gate_g + cols
        gate = tl.load(gate_ptrs, mask=mask_c, other=0.0).to(tl.float32)

    sum_dy_xhat = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float32)
    sum_dy = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float32)
    sum_gate = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float32)
    offs_s = tl.arange(0, BLOCK_S)
    offs_out = tile_offsets(CHANNELS, cols, BLOCK_S)
    for row in tl.range(row_start + index * BLOCK_S, row_stop, step * BLOCK_S, num_stages=NUM_STAGES):
        mask_s, mask = offs_s >= 0, mask_c[None, :]  # the loop's bound keeps a tile of one row inside
        if BLOCK_S > 1:
            mask_s = row + offs_s < row_stop
            mask = mask_s[:, None] & mask_c[None, :]
        row_in = tl.cast(row, tl.int64)  # the interpreter counts in Python integers
        row_out = batch * seq_len + row_in
        dtotal = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float32)

        if dnormed_ptr is not None:
            dy_row_ptr = dnormed_ptr + batch * stride_dnormed_b + row_in * stride_dnormed_s
            x_row_ptr = x_ptr + batch * stride_xb + row_in * stride_xs
            dy = tl.load(dy_row_ptr + tile_offsets(stride_dnormed_s, cols, BLOCK_S), mask=mask, other=0.0).to(tl.float32)
            x = tl.load(x_row_ptr + tile_offsets(stride_xs, cols, BLOCK_S), mask=mask, other=0.0).to(tl.float32)
            mean = tl.load(mean_ptr + row_out + offs_s, mask=mask_s, other=0.0)
            rstd = tl.load(rstd_ptr + row_out + offs_s, mask=mask_s, other=0.0)
            xhat = (x - mean[:, None]) * rstd[:, None]
            if NORM_SUMS:
                sum_dy_xhat += dy * xhat
                sum_dy += dy
            if TOKEN_GRADS:
                dtotal = norm_bwd(dy, xhat, rstd, weight, CHANNELS)

        if dres_ptr is not None:
            dres_row_ptr = dres_ptr + batch * stride_dres_b + row_in * stride_dres_s
            dres = tl.load(dres_row_ptr + tile_offsets(stride_dres_s, cols, BLOCK_S), mask=mask, other=0.0)
            dtotal += dres.to(tl.float32)
        if GATE_SUM:
            branch_row_ptr = branch_ptr + batch * stride_branch_b + row_in * stride_branch_s
            branch = tl.load(branch_row_ptr + tile_offsets(stride_branch_s, cols, BLOCK_S), mask=mask, other=0.0)
            sum_gate += dtotal * branch.to(tl.float32)
        if dx_ptr is not None:
            dx = dtotal.to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + row_out * CHANNELS + offs_out, dx, mask=mask)
        if dbranch_ptr is not None:
            dbranch = (dtotal * gate[None, :]).to(dbranch_ptr.dtype.element_ty)
            tl.store(dbranch_ptr + row_out * CHANNELS + offs_out, dbranch, mask=mask)

    if NORM_SUMS or GATE_SUM:
        partial_ptrs = partial_ptr + pid * (2 * NORM_SUMS + GATE_SUM) * CHANNELS + cols
        if NORM_SUMS:
            tl.store(partial_ptrs, tl.sum(sum_dy_xhat, axis=0), mask=mask_c)
            tl.store(partial_ptrs + CHANNELS, tl.sum(sum_dy, axis=0), mask=mask_c)
        if GATE_SUM:
            tl.store(partial_ptrs + 2 * NORM_SUMS * CHANNELS, tl.sum(sum_gate, axis=0), mask=mask_c)


def launch_bwd(
    dres: Tensor | None,
    dnormed: Tensor | None,
    x: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    lengths: Sequence[int],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of one norm site, those that `needs` (a `Needs`) asks for, in its order.

    Without `dnormed` the norm half is absent and only x, branch, gate may be asked for; `x` is what was normalised.
    """
    want = Needs(*needs)
    upstream = dres if dnormed is None else dnormed
    assert upstream is not None and (dnormed is not None or not any(want[3:]))
    dres, dnormed, x, branch, gate, scale = (
        None if t is None else rows_contiguous(t) for t in (dres, dnormed, x, branch, gate, scale)
    )
    site = Site(dres, dnormed, x, branch, gate, scale, weight, bias, mean, rstd)
    sums = Sums(norm=any(want[3:]), gate=want.gate)
    grads = _empty_grads(want, site, upstream, len(lengths))

    batch, _, channels = upstream.shape
    _, launch = bwd_launch(channels, upstream.device, upstream.dtype)
    rows = rows_per_program(tuple(lengths), batch, num_sms(upstream.device), launch.block_s, launch.programs_per_sm)
    programs = Programs(tuple(lengths), rows, sum(triton.cdiv(n, rows) for n in lengths))
    partial = None
    if any(sums):
        shape = (batch * programs.per_sample, sums.num_rows, channels)
        partial = torch.empty(shape, dtype=torch.float32, device=upstream.device)
    with device_guard(upstream):
        if upstream.numel() and (want.x or want.branch or any(sums)):
            _launch_rows(grads, partial, site, upstream, programs, sums)
        if partial is not None and channels:
            launch_sums(grads, partial, scale, weight, bias, batch, programs, sums)
    return [grad for grad in grads.values() if grad is not None]


def _empty_grads(want: Needs, site: Site, like: Tensor, segments: int) -> dict[str, Tensor | None]:
    batch, _, channels = like.shape
    grads: dict[str, Tensor | None] = {}
    for name, wanted in want._asdict().items():
        shape: tuple[int, ...] = (batch, segments, channels)
        dtype = like.dtype
        if name in ("x", "branch"):
            shape = tuple(like.shape)
        elif name in ("weight", "bias"):
            affine = getattr(site, name)
            shape, dtype = (channels,), like.dtype if affine is None else affine.dtype
        grads[name] = torch.empty(shape, dtype=dtype, device=like.device) if wanted else None
    return grads


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def _launch_rows(
    grads: dict[str, Tensor | None],
    partial: Tensor | None,
    site: Site,
    like: Tensor,
    programs: Programs,
    sums: Sums,
) -> None:
    batch, seq_len, channels = like.shape
    block_c, launch = bwd_launch(channels, like.device, like.dtype)
    # what no wanted gradient needs is not passed: a None pointer is a constexpr, and its loads do not exist
    if site.dnormed is None:
        site = site._replace(x=None, scale=None, weight=None, mean=None, rstd=None)
    if not sums.gate:
        site = site._replace(branch=None)
    if grads["branch"] is None:
        site = site._replace(gate=None)
    row_tensors = sum(t is not None for t in site[:4])
    stride_dres, stride_dnormed, stride_x, stride_branch = map(_strides, site[:4])
    stride_gate, stride_scale = map(_strides, site[4:6])
    _adaln_bwd_kernel[(batch * programs.per_sample,)](
        dx_ptr=grads["x"],
        dbranch_ptr=grads["branch"],
        partial_ptr=partial,
        dres_ptr=site.dres,
        dnormed_ptr=site.dnormed,
        x_ptr=site.x,
        branch_ptr=site.branch,
        gate_ptr=site.gate,
        scale_ptr=site.scale,
        weight_ptr=site.weight,
        mean_ptr=site.mean,
        rstd_ptr=site.rstd,
        lengths=encode_lengths(programs.lengths),
        seq_len=seq_len,
        programs=programs.per_sample,
        rows_per_program=programs.rows,
        stride_dres_b=stride_dres[0],
        stride_dres_s=stride_dres[1],
        stride_dnormed_b=stride_dnormed[0],
        stride_dnormed_s=stride_dnormed[1],
        stride_xb=stride_x[0],
        stride_xs=stride_x[1],
        stride_branch_b=stride_branch[0],
        stride_branch_s=stride_branch[1],
        stride_gate_b=stride_gate[0],
        stride_gate_g=stride_gate[1],
        stride_scale_b=stride_scale[0],
        stride_scale_g=stride_scale[1],
        CHANNELS=channels,
        NORM_SUMS=sums.norm,
        GATE_SUM=sums.gate,
        BLOCK_S=launch.block_s,
        BLOCK_C=block_c,
        NUM_STAGES=num_stages(launch.num_stages, row_tensors, launch.block_s * block_c * like.element_size()),
        **launch.options(),
    )
