"""Forward kernel of the norm sites: gated residual and adaptive LayerNorm, each optional, in one pass over the tokens.

    res    = x + gate[g] * branch                                    rounded to the tokens' dtype, and only then normalised
    normed = (res - mean) * rstd * W + T,    W = weight * (1 + scale[g]),    T = bias * (1 + scale[g]) + shift[g]

A program owns BLOCK_S rows of one (sample, segment), so one row of each modulation vector serves all its tokens and a NaN
never crosses a boundary. mean and rstd are stored in float32: 8 bytes per row, against two more reductions over the row in
the backward pass. Letters: B batch, S joint sequence, C channels, G segments.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rgkernels._triton import launch_table
from rgkernels._triton.common import architecture, device_guard, encode_lengths, rows_contiguous, segment_of, tile_offsets


@triton.jit
def normalise(x, mask_c, eps, CHANNELS: tl.constexpr):
    """Two-pass statistics of the rows of x: (xhat, mean, rstd). Masked columns hold 0 and stay out of the variance."""
    mean = tl.sum(x, axis=1) / CHANNELS
    centred = tl.where(mask_c[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / CHANNELS + eps)
    return centred * rstd[:, None], mean, rstd


@triton.jit
def modulated_affine(weight_ptr, bias_ptr, shift, scale, cols, mask_c):
    """Fold LayerNorm's affine and a segment's modulation into one pair: (W, T) of the module docstring."""
    factor = 1.0 + scale
    weight, offset = factor, shift
    if bias_ptr is not None:
        offset += tl.load(bias_ptr + cols, mask=mask_c, other=0.0).to(tl.float32) * factor
    if weight_ptr is not None:
        weight *= tl.load(weight_ptr + cols, mask=mask_c, other=0.0).to(tl.float32)
    return weight, offset


@triton.jit(do_not_specialize=["seq_len", "tiles"])
def _adaln_fwd_kernel(
    res_ptr,  # [B, S, C] contiguous, None without a gate
    normed_ptr,  # [B, S, C] contiguous, None without a norm
    mean_ptr,  # [B, S] float32
    rstd_ptr,
    x_ptr,  # [B, S, C]: the tokens, or the residual stream where there is a gate
    branch_ptr,  # [B, S, C]
    gate_ptr,  # [B, G, C]
    shift_ptr,
    scale_ptr,
    weight_ptr,  # [C] or None
    bias_ptr,
    lengths,  # encoded, one per segment
    seq_len,
    tiles,  # programs per sample
    stride_xb,
    stride_xs,
    stride_branch_b,
    stride_branch_s,
    stride_gate_b,
    stride_gate_g,
    stride_shift_b,
    stride_shift_g,
    stride_scale_b,
    stride_scale_g,
    eps,
    CHANNELS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    batch = (pid // tiles).to(tl.int64)
    segment, row_start, row_stop, index, _ = segment_of(pid % tiles, lengths, BLOCK_S)
    segment = segment.to(tl.int64)

    row = row_start + index * BLOCK_S
    cols = tl.arange(0, BLOCK_C)
    offs_s = tl.arange(0, BLOCK_S)
    mask_s, mask_c = row + offs_s < row_stop, cols < CHANNELS
    mask = mask_s[:, None] & mask_c[None, :]
    row = row.to(tl.int64)
    row_out = batch * seq_len + row
    offs_out = tile_offsets(CHANNELS, cols, BLOCK_S)

    x_ptrs = x_ptr + batch * stride_xb + row * stride_xs + tile_offsets(stride_xs, cols, BLOCK_S)
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    if gate_ptr is not None:
        branch_row_ptr = branch_ptr + batch * stride_branch_b + row * stride_branch_s
        branch_ptrs = branch_row_ptr + tile_offsets(stride_branch_s, cols, BLOCK_S)
        branch = tl.load(branch_ptrs, mask=mask, other=0.0).to(tl.float32)
        gate_ptrs = gate_ptr + batch * stride_gate_b + segment * stride_gate_g + cols
        gate = tl.load(gate_ptrs, mask=mask_c, other=0.0).to(tl.float32)
        res = (x + gate[None, :] * branch).to(res_ptr.dtype.element_ty)
        tl.store(res_ptr + row_out * CHANNELS + offs_out, res, mask=mask)
        x = res.to(tl.float32)

    if normed_ptr is not None:
        scale_ptrs = scale_ptr + batch * stride_scale_b + segment * stride_scale_g + cols
        shift_ptrs = shift_ptr + batch * stride_shift_b + segment * stride_shift_g + cols
        scale = tl.load(scale_ptrs, mask=mask_c, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptrs, mask=mask_c, other=0.0).to(tl.float32)
        weight, offset = modulated_affine(weight_ptr, bias_ptr, shift, scale, cols, mask_c)

        xhat, mean, rstd = normalise(x, mask_c, eps, CHANNELS)
        normed = xhat * weight[None, :] + offset[None, :]
        tl.store(normed_ptr + row_out * CHANNELS + offs_out, normed.to(normed_ptr.dtype.element_ty), mask=mask)
        tl.store(mean_ptr + row_out + offs_s, mean, mask=mask_s)
        tl.store(rstd_ptr + row_out + offs_s, rstd, mask=mask_s)


def launch_fwd(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    lengths: Sequence[int],
    eps: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Run one norm site: (res, normed, mean, rstd), with None for the half that was not asked for.

    A gate brings `res`, a scale brings `normed` and the float32 statistics [B, S].
    """
    batch, seq_len, channels = x.shape
    x, branch = rows_contiguous(x), None if branch is None else rows_contiguous(branch)
    gate, shift, scale = (None if m is None else rows_contiguous(m) for m in (gate, shift, scale))
    res = None if gate is None else torch.empty((batch, seq_len, channels), dtype=x.dtype, device=x.device)
    normed = mean = rstd = None
    if scale is not None:
        normed = torch.empty((batch, seq_len, channels), dtype=x.dtype, device=x.device)
        mean = torch.empty((batch, seq_len), dtype=torch.float32, device=x.device)
        rstd = torch.empty((batch, seq_len), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return res, normed, mean, rstd

    block_c = triton.next_power_of_2(channels)
    launch = launch_table.find("adaln_fwd", architecture(x.device), x.dtype, block_c)
    tiles = sum(triton.cdiv(n, launch.block_s) for n in lengths)
    with device_guard(x):
        _adaln_fwd_kernel[(batch * tiles,)](
            res_ptr=res,
            normed_ptr=normed,
            mean_ptr=mean,
            rstd_ptr=rstd,
            x_ptr=x,
            branch_ptr=branch,
            gate_ptr=gate,
            shift_ptr=shift,
            scale_ptr=scale,
            weight_ptr=weight,
            bias_ptr=bias,
            lengths=encode_lengths(lengths),
            seq_len=seq_len,
            tiles=tiles,
            stride_xb=x.stride(0),
            stride_xs=x.stride(1),
            stride_branch_b=0 if branch is None else branch.stride(0),
            stride_branch_s=0 if branch is None else branch.stride(1),
            stride_gate_b=0 if gate is None else gate.stride(0),
            stride_gate_g=0 if gate is None else gate.stride(1),
            stride_shift_b=0 if shift is None else shift.stride(0),
            stride_shift_g=0 if shift is None else shift.stride(1),
            stride_scale_b=0 if scale is None else scale.stride(0),
            stride_scale_g=0 if scale is None else scale.stride(1),
            eps=eps,
            CHANNELS=channels,
            BLOCK_S=launch.block_s,
            BLOCK_C=block_c,
            **launch.options(),
        )
    return res, normed, mean, rstd
