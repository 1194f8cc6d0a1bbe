"""Segment attention, forward: one program per query tile walks the key ranges that its segment sees.

    s[i, j] = softmax_scale * q[i] . k[j]        for keys j in the tile's ranges
    o[i]    = sum_j exp(s[i, j] - lse[i]) v[j],  lse[i] = log(sum_j exp(s[i, j]))

Letters: B batch, H heads, S joint sequence, Sq query rows, D head size. The running maximum is kept on the raw scores, and the
scale enters in fp32 before exp2. Saved for the backward: lse, float32.
Source: FlashAttention-2 (arXiv 2307.08691), online softmax.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rgkernels._triton.attention_schedule import Problem, schedule
from rgkernels._triton.attention_tiles import (
    LN_2,
    LOG2_E,
    descriptor,
    load_range,
    load_rows,
    load_tile,
    scores,
    sizes,
    store_rows,
    strides,
    tiles_for,
    use_tma,
)
from rgkernels._triton.common import device_guard, empty_in_memory_order

# a scale of 0 would turn the -inf of masked scores into NaN; this one is 0 to every finite score
TINY_SCALE = torch.finfo(torch.float32).tiny


@triton.jit
def _softmax_step(q, k, v, mask_n, row_max, row_sum, acc, scale_log2, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Add one key tile to the running maximum, sum and output of the online softmax."""
    qk = scores(q, k, PRECISION)
    if MASKED:
        qk = tl.where(mask_n[None, :], qk, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(qk, 1))
    alpha = tl.math.exp2((row_max - new_max) * scale_log2)
    if v.dtype == tl.float32:
        p = tl.math.exp2((qk - new_max[:, None]) * scale_log2)
    else:
        # one fused multiply-add per score; its rounding is far below that of half-precision inputs
        p = tl.math.exp2(qk * scale_log2 - (new_max * scale_log2)[:, None])
    row_sum = row_sum * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return new_max, row_sum, acc


@triton.jit(do_not_specialize=["num_tiles", "num_heads", "num_rows"])
def _attn_fwd_kernel(
    o_ptr,
    lse_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    k_desc,
    v_desc,
    tiles_ptr,
    ranges_ptr,
    num_tiles,
    num_heads,
    num_rows,
    stride_ob,
    stride_oh,
    stride_os,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
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
    """One query tile of one head. `tiles_ptr` [num_tiles, 4] int32, `ranges_ptr` [*, 2] int32, as `Schedule` describes them."""
    pid = tl.program_id(0)
    row, row_stop, range_first, range_last = load_tile(tiles_ptr, pid % num_tiles)
    head = pid // num_tiles
    b, h = head // num_heads, head % num_heads
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    k_head = k_ptr + b64 * stride_kb + h64 * stride_kh
    v_head = v_ptr + b64 * stride_vb + h64 * stride_vh

    q_head = q_ptr + b64 * stride_qb + h64 * stride_qh
    q = load_rows(q_head, row, row_stop, stride_qs, HEAD_DIM, BLOCK_D, BLOCK_M, True)
    # the maximum of the raw scores is the maximum of the scaled ones only for a positive scale; negating q is exact
    q = tl.where(scale < 0, -q, q)
    scale, scale_log2 = tl.abs(scale), tl.abs(scale_log2)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for r in range(range_first, range_last):
        lo, full, _ = load_range(ranges_ptr, r, BLOCK_N)
        for start in range(lo, full, BLOCK_N):
            if USE_TMA:
                k = k_desc.load([b, h, start, 0]).reshape(BLOCK_N, BLOCK_D)
                v = v_desc.load([b, h, start, 0]).reshape(BLOCK_N, BLOCK_D)
            else:
                k = load_rows(k_head, start, full, stride_ks, HEAD_DIM, BLOCK_D, BLOCK_N, False)
                v = load_rows(v_head, start, full, stride_vs, HEAD_DIM, BLOCK_D, BLOCK_N, False)
            row_max, row_sum, acc = _softmax_step(q, k, v, None, row_max, row_sum, acc, scale_log2, False, PRECISION)
    # then the ragged ends. Keys past an end are 0, never what lies there: it may be NaN, and 0 * NaN would reach the output
    for r in range(range_first, range_last):
        _, full, hi = load_range(ranges_ptr, r, BLOCK_N)
        for start in tl.range(full, hi, BLOCK_TAIL, num_stages=1):
            k = load_rows(k_head, start, hi, stride_ks, HEAD_DIM, BLOCK_D, BLOCK_TAIL, True)
            v = load_rows(v_head, start, hi, stride_vs, HEAD_DIM, BLOCK_D, BLOCK_TAIL, True)
            mask_n = start + tl.arange(0, BLOCK_TAIL) < hi
            row_max, row_sum, acc = _softmax_step(q, k, v, mask_n, row_max, row_sum, acc, scale_log2, True, PRECISION)

    # a segment that sees no key has no ranges: its sum is 0 and its maximum -inf, so o = 0 and lse = -inf
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    o = acc / row_sum[:, None]
    lse = row_max * scale + tl.math.log2(row_sum) * LN_2

    offs_m = row + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + head.to(tl.int64) * num_rows + offs_m, lse, mask=offs_m < row_stop)
    o_head = o_ptr + b64 * stride_ob + h64 * stride_oh
    store_rows(o_head, o, row, row_stop, stride_os, HEAD_DIM, BLOCK_D, BLOCK_M)


def launch_fwd(q: Tensor, k: Tensor, v: Tensor, problem: Problem, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """o [B, H, Sq, D] in the memory order of `q`, and lse [B, H, Sq] float32."""
    batch, heads, num_rows, _ = q.shape
    o = empty_in_memory_order(q)
    lse = torch.empty((batch, heads, num_rows), dtype=torch.float32, device=q.device)
    tma = use_tma(k, v)
    tiles = tiles_for("attn_fwd", q, tma)
    work = schedule(problem, tiles.block_m, q.device)
    if batch * heads * work.num_tiles == 0:
        return o, lse
    scale = math.copysign(max(abs(softmax_scale), TINY_SCALE), softmax_scale)
    with device_guard(q):
        _attn_fwd_kernel[(batch * heads * work.num_tiles,)](
            o_ptr=o,
            lse_ptr=lse,
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            k_desc=descriptor(k, tiles.block_n) if tma else None,
            v_desc=descriptor(v, tiles.block_n) if tma else None,
            tiles_ptr=work.tiles,
            ranges_ptr=work.ranges,
            num_tiles=work.num_tiles,
            num_heads=heads,
            num_rows=num_rows,
            **strides(o=o, q=q, k=k, v=v),
            scale=scale,
            scale_log2=scale * LOG2_E.value,
            USE_TMA=tma,
            **sizes(q, tiles),
        )
    return o, lse
