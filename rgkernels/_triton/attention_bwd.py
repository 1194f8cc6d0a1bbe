"""Segment attention, backward: no atomics, so the same bits every time.

    delta[i] = o[i] . do[i] - dlse[i]                                    (one pass, float32)
    p[i, j]  = exp(s[i, j] - lse[i]),  ds[i, j] = p[i, j] (do[i] . v[j] - delta[i])
    dq[i]    = softmax_scale * sum_j ds[i, j] k[j]                       (query tiles walk key ranges)
    dv[j]    = sum_i p[i, j] do[i],  dk[j] = softmax_scale * sum_i ds[i, j] q[i]     (key tiles walk query ranges)

Letters: B batch, H heads, S joint sequence, Sq query rows, D head size. Scores are computed twice, 7 matrix products against
5 of the fused form, which would need atomics on dq. Saved by the forward: q, k, v, o and lse (float32).
Source: FlashAttention-2 (arXiv 2307.08691), the split of the Triton tutorial.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rgkernels._triton import launch_table
from rgkernels._triton.attention_schedule import Problem, schedule
from rgkernels._triton.attention_tiles import (
    LOG2_E,
    descriptor,
    load_range,
    load_rows,
    load_tile,
    padded,
    scores,
    sizes,
    store_rows,
    strides,
    tiles_for,
    use_tma,
)
from rgkernels._triton.common import architecture, device_guard, empty_in_memory_order, rows_contiguous


@triton.jit(do_not_specialize=["num_blocks", "num_heads", "num_rows", "stride_dlseb", "stride_dlseh", "stride_dlses"])
def _attn_bwd_delta_kernel(
    delta_ptr,
    o_ptr,
    do_ptr,
    dlse_ptr,
    num_blocks,
    num_heads,
    num_rows,
    stride_ob,
    stride_oh,
    stride_os,
    stride_dob,
    stride_doh,
    stride_dos,
    stride_dlseb,
    stride_dlseh,
    stride_dlses,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    """delta = rowsum(o * do) - dlse for one block of rows of one head."""
    pid = tl.program_id(0)
    row = pid % num_blocks * BLOCK_M
    head = pid // num_blocks
    b64, h64 = (head // num_heads).to(tl.int64), (head % num_heads).to(tl.int64)
    o_head = o_ptr + b64 * stride_ob + h64 * stride_oh
    do_head = do_ptr + b64 * stride_dob + h64 * stride_doh
    o = load_rows(o_head, row, num_rows, stride_os, HEAD_DIM, BLOCK_D, BLOCK_M, True)
    do = load_rows(do_head, row, num_rows, stride_dos, HEAD_DIM, BLOCK_D, BLOCK_M, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    offs_m = row + tl.arange(0, BLOCK_M)
    mask_m = offs_m < num_rows
    if HAS_DLSE:
        dlse_ptrs = dlse_ptr + b64 * stride_dlseb + h64 * stride_dlseh + offs_m.to(tl.int64) * stride_dlses
        delta -= tl.load(dlse_ptrs, mask=mask_m, other=0.0)
    tl.store(delta_ptr + head.to(tl.int64) * num_rows + offs_m, delta, mask=mask_m)


@triton.jit
def _log2_p(qk, lse, scale, scale_log2, WIDE: tl.constexpr):
    """log2 of the softmax weights from raw scores and lse; `lse` has the shape of `qk` but for a 1."""
    if WIDE:
        return (qk * scale - lse) * LOG2_E
    else:
        # one fused multiply-add per score; its rounding is far below that of half-precision inputs
        return qk * scale_log2 - lse * LOG2_E


@triton.jit
def _dkdv_step(q, do, lse, delta, k, v, dk, dv, scale, scale_log2, PRECISION: tl.constexpr):
    """Add one query tile to dk and dv. Rows that are not there have q = do = delta = 0 and lse = inf, hence p = 0."""
    qk_t = scores(k, q, PRECISION)
    p_t = tl.math.exp2(_log2_p(qk_t, lse[None, :], scale, scale_log2, q.dtype == tl.float32))
    dv = tl.dot(p_t.to(do.dtype), do, dv, input_precision=PRECISION)
    dp_t = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    ds_t = p_t * (dp_t - delta[None, :])
    dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["num_tiles", "num_heads", "num_rows"])
def _attn_bwd_dkdv_kernel(
    dk_ptr,
    dv_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    q_desc,
    do_desc,
    tiles_ptr,
    ranges_ptr,
    num_tiles,
    num_heads,
    num_rows,
    stride_dkb,
    stride_dkh,
    stride_dks,
    stride_dvb,
    stride_dvh,
    stride_dvs,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_dob,
    stride_doh,
    stride_dos,
    scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One key tile of one head: dk and dv over the query ranges that see it."""
    pid = tl.program_id(0)
    key, key_stop, range_first, range_last = load_tile(tiles_ptr, pid % num_tiles)
    head = pid // num_tiles
    b, h = head // num_heads, head % num_heads
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    q_head = q_ptr + b64 * stride_qb + h64 * stride_qh
    do_head = do_ptr + b64 * stride_dob + h64 * stride_doh
    lse_head = lse_ptr + head.to(tl.int64) * num_rows
    delta_head = delta_ptr + head.to(tl.int64) * num_rows

    k = load_rows(k_ptr + b64 * stride_kb + h64 * stride_kh, key, key_stop, stride_ks, HEAD_DIM, BLOCK_D, BLOCK_N, True)
    v = load_rows(v_ptr + b64 * stride_vb + h64 * stride_vh, key, key_stop, stride_vs, HEAD_DIM, BLOCK_D, BLOCK_N, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for r in range(range_first, range_last):
        lo, full, _ = load_range(ranges_ptr, r, BLOCK_M)
        for start in range(lo, full, BLOCK_M):
            if USE_TMA:
                q = q_desc.load([b, h, start, 0]).reshape(BLOCK_M, BLOCK_D)
                do = do_desc.load([b, h, start, 0]).reshape(BLOCK_M, BLOCK_D)
            else:
                q = load_rows(q_head, start, full, stride_qs, HEAD_DIM, BLOCK_D, BLOCK_M, False)
                do = load_rows(do_head, start, full, stride_dos, HEAD_DIM, BLOCK_D, BLOCK_M, False)
            offs_m = start + tl.arange(0, BLOCK_M)
            lse = tl.load(lse_head + offs_m)
            delta = tl.load(delta_head + offs_m)
            dk, dv = _dkdv_step(q, do, lse, delta, k, v, dk, dv, scale, scale_log2, PRECISION)
    for r in range(range_first, range_last):
        _, full, hi = load_range(ranges_ptr, r, BLOCK_M)
        for start in tl.range(full, hi, BLOCK_TAIL, num_stages=1):
            q = load_rows(q_head, start, hi, stride_qs, HEAD_DIM, BLOCK_D, BLOCK_TAIL, True)
            do = load_rows(do_head, start, hi, stride_dos, HEAD_DIM, BLOCK_D, BLOCK_TAIL, True)
            offs_m = start + tl.arange(0, BLOCK_TAIL)
            lse = tl.load(lse_head + offs_m, mask=offs_m < hi, other=float("inf"))
            delta = tl.load(delta_head + offs_m, mask=offs_m < hi, other=0.0)
            dk, dv = _dkdv_step(q, do, lse, delta, k, v, dk, dv, scale, scale_log2, PRECISION)

    dk_head = dk_ptr + b64 * stride_dkb + h64 * stride_dkh
    store_rows(dk_head, dk * scale, key, key_stop, stride_dks, HEAD_DIM, BLOCK_D, BLOCK_N)
    dv_head = dv_ptr + b64 * stride_dvb + h64 * stride_dvh
    store_rows(dv_head, dv, key, key_stop, stride_dvs, HEAD_DIM, BLOCK_D, BLOCK_N)


@triton.jit
def _dq_step(q, do, lse, delta, k, v, mask_n, dq, scale, scale_log2, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Add one key tile to dq."""
    qk = scores(q, k, PRECISION)
    log2_p = _log2_p(qk, lse[:, None], scale, scale_log2, q.dtype == tl.float32)
    if MASKED:
        # a key that is not there scores 0, and exp(0 - lse) can overflow
        log2_p = tl.where(mask_n[None, :], log2_p, float("-inf"))
    p = tl.math.exp2(log2_p)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_tiles", "num_heads", "num_rows"])
def _attn_bwd_dq_kernel(
    dq_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    k_desc,
    v_desc,
    tiles_ptr,
    ranges_ptr,
    num_tiles,
    num_heads,
    num_rows,
    stride_dqb,
    stride_dqh,
    stride_dqs,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_dob,
    stride_doh,
    stride_dos,
    scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One query tile of one head: dq over the key ranges that it sees."""
    pid = tl.program_id(0)
    row, row_stop, range_first, range_last = load_tile(tiles_ptr, pid % num_tiles)
    head = pid // num_tiles
    b, h = head // num_heads, head % num_heads
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    k_head = k_ptr + b64 * stride_kb + h64 * stride_kh
    v_head = v_ptr + b64 * stride_vb + h64 * stride_vh

    q = load_rows(q_ptr + b64 * stride_qb + h64 * stride_qh, row, row_stop, stride_qs, HEAD_DIM, BLOCK_D, BLOCK_M, True)
    do_head = do_ptr + b64 * stride_dob + h64 * stride_doh
    do = load_rows(do_head, row, row_stop, stride_dos, HEAD_DIM, BLOCK_D, BLOCK_M, True)
    offs_m = row + tl.arange(0, BLOCK_M)
    mask_m = offs_m < row_stop
    rows = head.to(tl.int64) * num_rows + offs_m
    lse = tl.load(lse_ptr + rows, mask=mask_m, other=float("inf"))
    delta = tl.load(delta_ptr + rows, mask=mask_m, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for r in range(range_first, range_last):
        lo, full, _ = load_range(ranges_ptr, r, BLOCK_N)
        for start in range(lo, full, BLOCK_N):
            if USE_TMA:
                k = k_desc.load([b, h, start, 0]).reshape(BLOCK_N, BLOCK_D)
                v = v_desc.load([b, h, start, 0]).reshape(BLOCK_N, BLOCK_D)
            else:
                k = load_rows(k_head, start, full, stride_ks, HEAD_DIM, BLOCK_D, BLOCK_N, False)
                v = load_rows(v_head, start, full, stride_vs, HEAD_DIM, BLOCK_D, BLOCK_N, False)
            dq = _dq_step(q, do, lse, delta, k, v, None, dq, scale, scale_log2, False, PRECISION)
    for r in range(range_first, range_last):
        _, full, hi = load_range(ranges_ptr, r, BLOCK_N)
        for start in tl.range(full, hi, BLOCK_TAIL, num_stages=1):
            k = load_rows(k_head, start, hi, stride_ks, HEAD_DIM, BLOCK_D, BLOCK_TAIL, True)
            v = load_rows(v_head, start, hi, stride_vs, HEAD_DIM, BLOCK_D, BLOCK_TAIL, True)
            mask_n = start + tl.arange(0, BLOCK_TAIL) < hi
            dq = _dq_step(q, do, lse, delta, k, v, mask_n, dq, scale, scale_log2, True, PRECISION)

    dq_head = dq_ptr + b64 * stride_dqb + h64 * stride_dqh
    store_rows(dq_head, dq * scale, row, row_stop, stride_dqs, HEAD_DIM, BLOCK_D, BLOCK_M)


def launch_bwd(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    problem: Problem,
    softmax_scale: float,
    needs_q: bool,
    needs_kv: bool,
) -> list[Tensor]:
    """[dq] if `needs_q`, then [dk, dv] if `needs_kv`, each in the memory order of its tensor."""
    do = rows_contiguous(do)
    delta = _launch_delta(do, dlse, o)
    grads = []
    if needs_q:
        grads.append(_launch_dq(do, delta, q, k, v, lse, problem, softmax_scale))
    if needs_kv:
        grads.extend(_launch_dkdv(do, delta, q, k, v, lse, problem, softmax_scale))
    return grads


def _launch_delta(do: Tensor, dlse: Tensor | None, o: Tensor) -> Tensor:
    batch, heads, num_rows, head_dim = o.shape
    delta = torch.empty((batch, heads, num_rows), dtype=torch.float32, device=o.device)
    if delta.numel() == 0:
        return delta
    launch = launch_table.find("attn_bwd_delta", architecture(o.device), o.dtype, padded(head_dim))
    num_blocks = triton.cdiv(num_rows, launch.block_s)
    with device_guard(o):
        _attn_bwd_delta_kernel[(batch * heads * num_blocks,)](
            delta_ptr=delta,
            o_ptr=o,
            do_ptr=do,
            dlse_ptr=dlse,
            num_blocks=num_blocks,
            num_heads=heads,
            num_rows=num_rows,
            **strides(o=o, do=do, dlse=delta if dlse is None else dlse),
            HEAD_DIM=head_dim,
            BLOCK_D=padded(head_dim),
            BLOCK_M=launch.block_s,
            HAS_DLSE=dlse is not None,
            **launch.options(),
        )
    return delta


def _launch_dkdv(
    do: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, problem: Problem, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    batch, heads, num_rows, _ = q.shape
    dk, dv = empty_in_memory_order(k), empty_in_memory_order(v)
    tma = use_tma(q, do)
    tiles = tiles_for("attn_bwd_dkdv", q, tma)
    work = schedule(problem, tiles.block_n, q.device, by_key=True)
    if batch * heads * work.num_tiles == 0:
        return dk, dv
    with device_guard(q):
        _attn_bwd_dkdv_kernel[(batch * heads * work.num_tiles,)](
            dk_ptr=dk,
            dv_ptr=dv,
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            do_ptr=do,
            lse_ptr=lse,
            delta_ptr=delta,
            q_desc=descriptor(q, tiles.block_m) if tma else None,
            do_desc=descriptor(do, tiles.block_m) if tma else None,
            tiles_ptr=work.tiles,
            ranges_ptr=work.ranges,
            num_tiles=work.num_tiles,
            num_heads=heads,
            num_rows=num_rows,
            **strides(dk=dk, dv=dv, q=q, k=k, v=v, do=do),
            scale=softmax_scale,
            scale_log2=softmax_scale * LOG2_E.value,
            USE_TMA=tma,
            **sizes(q, tiles),
        )
    return dk, dv


def _launch_dq(
    do: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, problem: Problem, softmax_scale: float
) -> Tensor:
    batch, heads, num_rows, _ = q.shape
    dq = empty_in_memory_order(q)
    tma = use_tma(k, v)
    tiles = tiles_for("attn_bwd_dq", q, tma)
    work = schedule(problem, tiles.block_m, q.device)
    if batch * heads * work.num_tiles == 0:
        return dq
    with device_guard(q):
        _attn_bwd_dq_kernel[(batch * heads * work.num_tiles,)](
            dq_ptr=dq,
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            do_ptr=do,
            lse_ptr=lse,
            delta_ptr=delta,
            k_desc=descriptor(k, tiles.block_n) if tma else None,
            v_desc=descriptor(v, tiles.block_n) if tma else None,
            tiles_ptr=work.tiles,
            ranges_ptr=work.ranges,
            num_tiles=work.num_tiles,
            num_heads=heads,
            num_rows=num_rows,
            **strides(dq=dq, q=q, k=k, v=v, do=do),
            scale=softmax_scale,
            scale_log2=softmax_scale * LOG2_E.value,
            USE_TMA=tma,
            **sizes(q, tiles),
        )
    return dq
