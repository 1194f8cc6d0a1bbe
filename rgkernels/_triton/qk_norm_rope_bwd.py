"""Backward kernels of qk_norm_rope: token gradients in one pass over q and k, parameter gradients from float32 partials.

    dn = dy * cos + unswap(dy * sin)  with  unswap(t)[2i] = t[2i + 1],  unswap(t)[2i + 1] = -t[2i]    (the transpose)
    dx = rstd * (dn * weight - mean_D(dn * weight) - xhat * mean_D(dn * weight * xhat))
    dweight = sum dn * xhat           dbias = sum dn                    over batch, heads and tokens

The statistics are recomputed: a row is one head, 64 values, and storing 8 bytes for each would add 6 % to the traffic. A
program walks many tiles and keeps its sums in registers; they go through one float32 row per program and a fixed-order second
stage, so that two runs agree bit for bit. Letters: B batch, H heads, S tokens, D head size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rgkernels._triton import launch_table
from rgkernels._triton.common import (
    add_partials,
    architecture,
    device_guard,
    empty_in_memory_order,
    num_sms,
    rows_contiguous,
)
from rgkernels._triton.qk_norm_rope_fwd import (
    exchange_pairs,
    load_table,
    load_vector,
    normalise_heads,
    strides,
    tile_index,
    tile_launch,
    tile_pointers,
)

# with parameter sums the kernel needs more registers, and fewer of its programs fit a multiprocessor
KERNEL, KERNEL_TRAINED = "qk_norm_rope_bwd", "qk_norm_rope_bwd_trained"


class Needs(NamedTuple):
    """Which gradients the caller wants, in the order in which `launch_bwd` returns them."""

    q: bool
    k: bool
    q_weight: bool
    q_bias: bool
    k_weight: bool
    k_bias: bool


@triton.jit
def norm_rope_bwd(dy, x, weight, cos, sin, mask_d, eps, HEAD_DIM: tl.constexpr, HAS_ROPE: tl.constexpr):
    """(dx, dn, xhat) of one tile, in float32."""
    xhat, rstd = normalise_heads(x, mask_d, eps, HEAD_DIM)
    dn = dy
    if HAS_ROPE:
        dn = dy * cos + exchange_pairs(dy * sin, 1.0, -1.0)
    wdn = dn * weight
    mean_wdn = tl.sum(wdn, axis=2, keep_dims=True) / HEAD_DIM
    mean_wdn_xhat = tl.sum(wdn * xhat, axis=2, keep_dims=True) / HEAD_DIM
    return rstd * (wdn - mean_wdn - xhat * mean_wdn_xhat), dn, xhat


@triton.jit
def _bwd_half(
    dx_ptr,
    dy_ptr,
    x_ptr,
    weight,
    batch,
    offs_s,
    offs_h,
    offs_d,
    mask,
    mask_d,
    cos,
    sin,
    stride_dxb,
    stride_dxh,
    stride_dxs,
    stride_dyb,
    stride_dyh,
    stride_dys,
    stride_xb,
    stride_xh,
    stride_xs,
    eps,
    HEAD_DIM: tl.constexpr,
    HAS_ROPE: tl.constexpr,
):
    """q's or k's half of a tile: stores dx, returns the terms (dn * xhat, dn) of the parameter sums, [S, H, D].

    Lanes outside the tensor hold dn = 0, but dn * xhat = NaN if eps is 0: their variance is.
    """
    dy_ptrs = tile_pointers(dy_ptr, batch, offs_s, offs_h, offs_d, stride_dyb, stride_dyh, stride_dys)
    x_ptrs = tile_pointers(x_ptr, batch, offs_s, offs_h, offs_d, stride_xb, stride_xh, stride_xs)
    dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    dx, dn, xhat = norm_rope_bwd(dy, x, weight, cos, sin, mask_d, eps, HEAD_DIM, HAS_ROPE)
    if dx_ptr is not None:
        dx_ptrs = tile_pointers(dx_ptr, batch, offs_s, offs_h, offs_d, stride_dxb, stride_dxh, stride_dxs)
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    return dn * xhat, dn


@triton.jit(do_not_specialize=["seq_len", "heads", "tiles", "tiles_s", "tiles_h", "rope_start"])
def _qk_norm_rope_bwd_kernel(
    dq_ptr,  # [B, H, S, D], memory order of q, or None
    dk_ptr,
    partial_ptr,  # [programs, N, D] float32, or None; N rows: dn * xhat and dn of q, then of k, as needed
    dq_out_ptr,  # [B, H, S, D], or None: upstream of q
    dk_out_ptr,
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    seq_len,
    heads,
    tiles,
    tiles_s,
    tiles_h,
    rope_start,
    stride_dqb,
    stride_dqh,
    stride_dqs,
    stride_dkb,
    stride_dkh,
    stride_dks,
    stride_dq_out_b,
    stride_dq_out_h,
    stride_dq_out_s,
    stride_dk_out_b,
    stride_dk_out_h,
    stride_dk_out_s,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_cos_s,
    stride_sin_s,
    eps,
    HEAD_DIM: tl.constexpr,
    Q_SUMS: tl.constexpr,
    K_SUMS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    HAS_ROPE: tl.constexpr = cos_ptr is not None
    pid = tl.program_id(0)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    q_weight, k_weight = 1.0, 1.0
    if q_weight_ptr is not None:
        q_weight = load_vector(q_weight_ptr, offs_d, mask_d)
    if k_weight_ptr is not None:
        k_weight = load_vector(k_weight_ptr, offs_d, mask_d)
    dq_weight = tl.zeros((BLOCK_S, BLOCK_H, BLOCK_D), dtype=tl.float32)
    dq_bias = tl.zeros((BLOCK_S, BLOCK_H, BLOCK_D), dtype=tl.float32)
    dk_weight = tl.zeros((BLOCK_S, BLOCK_H, BLOCK_D), dtype=tl.float32)
    dk_bias = tl.zeros((BLOCK_S, BLOCK_H, BLOCK_D), dtype=tl.float32)

    for tile in tl.range(pid, tiles, tl.num_programs(0), num_stages=NUM_STAGES):
        batch, offs_s, offs_h = tile_index(tile, tiles_s, tiles_h, BLOCK_S, BLOCK_H)
        mask_sd = (offs_s < seq_len)[:, None] & mask_d[None, :]
        mask = mask_sd[:, None, :] & (offs_h < heads)[None, :, None]
        cos, sin = 1.0, 0.0
        if HAS_ROPE:
            cos = load_table(cos_ptr, stride_cos_s, offs_s, offs_d, rope_start, mask_sd, 1.0)
            sin = load_table(sin_ptr, stride_sin_s, offs_s, offs_d, rope_start, mask_sd, 0.0)
        if dq_out_ptr is not None:
            dn_xhat, dn = _bwd_half(
                dq_ptr, dq_out_ptr, q_ptr, q_weight, batch, offs_s, offs_h, offs_d, mask, mask_d, cos, sin,
                stride_dqb, stride_dqh, stride_dqs, stride_dq_out_b, stride_dq_out_h, stride_dq_out_s,
                stride_qb, stride_qh, stride_qs, eps, HEAD_DIM, HAS_ROPE,
            )  # fmt: skip
            if Q_SUMS:
                dq_weight += tl.where(mask, dn_xhat, 0.0)
                dq_bias += dn
        if dk_out_ptr is not None:
            dn_xhat, dn = _bwd_half(
                dk_ptr, dk_out_ptr, k_ptr, k_weight, batch, offs_s, offs_h, offs_d, mask, mask_d, cos, sin,
                stride_dkb, stride_dkh, stride_dks, stride_dk_out_b, stride_dk_out_h, stride_dk_out_s,
                stride_kb, stride_kh, stride_ks, eps, HEAD_DIM, HAS_ROPE,
            )  # fmt: skip
            if K_SUMS:
                dk_weight += tl.where(mask, dn_xhat, 0.0)
                dk_bias += dn

    if Q_SUMS or K_SUMS:
        partial_ptrs = partial_ptr + pid.to(tl.int64) * (2 * Q_SUMS + 2 * K_SUMS) * HEAD_DIM + offs_d
        if Q_SUMS:
            tl.store(partial_ptrs, tl.sum(tl.sum(dq_weight, axis=0), axis=0), mask=mask_d)
            tl.store(partial_ptrs + HEAD_DIM, tl.sum(tl.sum(dq_bias, axis=0), axis=0), mask=mask_d)
        if K_SUMS:
            tl.store(partial_ptrs + 2 * Q_SUMS * HEAD_DIM, tl.sum(tl.sum(dk_weight, axis=0), axis=0), mask=mask_d)
            tl.store(partial_ptrs + (2 * Q_SUMS + 1) * HEAD_DIM, tl.sum(tl.sum(dk_bias, axis=0), axis=0), mask=mask_d)


@triton.jit(do_not_specialize=["programs"])
def _qk_norm_rope_bwd_reduce_kernel(
    dq_weight_ptr,  # [D], or None; likewise the others
    dq_bias_ptr,
    dk_weight_ptr,
    dk_bias_ptr,
    partial_ptr,  # [programs, N, D] float32
    programs,
    HEAD_DIM: tl.constexpr,
    Q_SUMS: tl.constexpr,
    K_SUMS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    stride = (2 * Q_SUMS + 2 * K_SUMS) * HEAD_DIM
    total = add_partials(partial_ptr + row * HEAD_DIM + offs_d, programs, mask_d, stride, BLOCK_P, BLOCK_D)
    # program i owns row i: the others' stores have no columns
    if Q_SUMS:
        if dq_weight_ptr is not None:
            mask = offs_d < tl.where(row == 0, HEAD_DIM, 0)
            tl.store(dq_weight_ptr + offs_d, total.to(dq_weight_ptr.dtype.element_ty), mask=mask)
        if dq_bias_ptr is not None:
            mask = offs_d < tl.where(row == 1, HEAD_DIM, 0)
            tl.store(dq_bias_ptr + offs_d, total.to(dq_bias_ptr.dtype.element_ty), mask=mask)
    if K_SUMS:
        if dk_weight_ptr is not None:
            mask = offs_d < tl.where(row == 2 * Q_SUMS, HEAD_DIM, 0)
            tl.store(dk_weight_ptr + offs_d, total.to(dk_weight_ptr.dtype.element_ty), mask=mask)
        if dk_bias_ptr is not None:
            mask = offs_d < tl.where(row == 2 * Q_SUMS + 1, HEAD_DIM, 0)
            tl.store(dk_bias_ptr + offs_d, total.to(dk_bias_ptr.dtype.element_ty), mask=mask)


def launch_bwd(
    dq_out: Tensor | None,
    dk_out: Tensor | None,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    rope_start: int,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients that `needs` (a `Needs`) asks for, in its order; an absent upstream's half may not be asked for."""
    want = Needs(*needs)
    q_sums, k_sums = want.q_weight or want.q_bias, want.k_weight or want.k_bias
    # a half of which nothing is wanted is left out: its upstream pointer is a constexpr None
    dq_out, dk_out = (dq_out if want.q or q_sums else None), (dk_out if want.k or k_sums else None)
    affine = {"q_weight": q_weight, "q_bias": q_bias, "k_weight": k_weight, "k_bias": k_bias}
    grads: dict[str, Tensor] = {}
    if want.q:
        grads["q"] = empty_in_memory_order(q)
    if want.k:
        grads["k"] = empty_in_memory_order(k)
    grads |= {name: torch.empty_like(p) for name, p in affine.items() if p is not None and getattr(want, name)}

    launch, (block_s, block_h, block_d) = tile_launch(KERNEL_TRAINED if q_sums or k_sums else KERNEL, q)
    tiles = q.shape[0] * triton.cdiv(q.shape[2], block_s) * triton.cdiv(q.shape[1], block_h)
    programs = min(tiles, launch.programs_per_sm * num_sms(q.device)) if q.numel() else 0
    partial = None
    if q_sums or k_sums:
        shape = (programs, 2 * q_sums + 2 * k_sums, q.shape[3])
        partial = torch.empty(shape, dtype=torch.float32, device=q.device)
    with device_guard(q):
        if programs and (dq_out is not None or dk_out is not None):
            _launch_tiles(grads, partial, dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, rope_start, eps, programs, want)
        if partial is not None:
            reduce = launch_table.find("qk_norm_rope_bwd_reduce", architecture(q.device), q.dtype, block_d)
            _qk_norm_rope_bwd_reduce_kernel[(2 * q_sums + 2 * k_sums,)](
                dq_weight_ptr=grads.get("q_weight"),
                dq_bias_ptr=grads.get("q_bias"),
                dk_weight_ptr=grads.get("k_weight"),
                dk_bias_ptr=grads.get("k_bias"),
                partial_ptr=partial,
                programs=programs,
                HEAD_DIM=q.shape[3],
                Q_SUMS=q_sums,
                K_SUMS=k_sums,
                BLOCK_P=reduce.block_s,
                BLOCK_D=block_d,
                **reduce.options(),
            )
    return list(grads.values())


def _launch_tiles(
    grads: dict[str, Tensor],
    partial: Tensor | None,
    dq_out: Tensor | None,
    dk_out: Tensor | None,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    rope_start: int,
    eps: float,
    programs: int,
    want: Needs,
) -> None:
    """First stage: token gradients, and a float32 row of parameter sums per program."""
    batch, heads, seq_len, head_dim = q.shape
    q_sums, k_sums = want.q_weight or want.q_bias, want.k_weight or want.k_bias
    launch, (block_s, block_h, block_d) = tile_launch(KERNEL_TRAINED if q_sums or k_sums else KERNEL, q)
    tiles_s, tiles_h = triton.cdiv(seq_len, block_s), triton.cdiv(heads, block_h)
    dq_out, dk_out, cos, sin = (None if x is None else rows_contiguous(x) for x in (dq_out, dk_out, cos, sin))
    q, k = rows_contiguous(q), rows_contiguous(k)
    stride_dq, stride_dk, stride_dq_out, stride_dk_out, stride_q, stride_k = map(
        strides, (grads.get("q"), grads.get("k"), dq_out, dk_out, q, k)
    )
    _qk_norm_rope_bwd_kernel[(programs,)](
        dq_ptr=grads.get("q"),
        dk_ptr=grads.get("k"),
        partial_ptr=partial,
        dq_out_ptr=dq_out,
        dk_out_ptr=dk_out,
        q_ptr=q,
        k_ptr=k,
        q_weight_ptr=q_weight,
        k_weight_ptr=k_weight,
        cos_ptr=cos,
        sin_ptr=sin,
        seq_len=seq_len,
        heads=heads,
        tiles=batch * tiles_s * tiles_h,
        tiles_s=tiles_s,
        tiles_h=tiles_h,
        rope_start=rope_start,
        stride_dqb=stride_dq[0],
        stride_dqh=stride_dq[1],
        stride_dqs=stride_dq[2],
        stride_dkb=stride_dk[0],
        stride_dkh=stride_dk[1],
        stride_dks=stride_dk[2],
        stride_dq_out_b=stride_dq_out[0],
        stride_dq_out_h=stride_dq_out[1],
        stride_dq_out_s=stride_dq_out[2],
        stride_dk_out_b=stride_dk_out[0],
        stride_dk_out_h=stride_dk_out[1],
        stride_dk_out_s=stride_dk_out[2],
        stride_qb=stride_q[0],
        stride_qh=stride_q[1],
        stride_qs=stride_q[2],
        stride_kb=stride_k[0],
        stride_kh=stride_k[1],
        stride_ks=stride_k[2],
        stride_cos_s=0 if cos is None else cos.stride(0),
        stride_sin_s=0 if sin is None else sin.stride(0),
        eps=eps,
        HEAD_DIM=head_dim,
        Q_SUMS=q_sums,
        K_SUMS=k_sums,
        BLOCK_S=block_s,
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        NUM_STAGES=launch.num_stages,
        **launch.options(),
    )
