"""Forward kernel of qk_norm_rope, and the pieces that its backward shares.

    xhat = (x - mean) * rstd          n = xhat * weight + bias          y = n * cos + swap(n) * sin
    swap(n)[2i] = -n[2i + 1],  swap(n)[2i + 1] = n[2i];  tokens before rope_start have cos = 1, sin = 0

A program takes a tile of BLOCK_S tokens x BLOCK_H heads of q and the same tile of k, so that both use one load of the cosines.
Partners of a pair are exchanged in registers (split and join). Letters: B batch, H heads, S tokens, D head size.
"""

import triton
import triton.language as tl
from torch import Tensor

from rgkernels._triton import launch_table
from rgkernels._triton.common import architecture, device_guard, empty_in_memory_order, rows_contiguous
from rgkernels._triton.launch_table import HeadTile


def tile_launch(kernel: str, q: Tensor) -> tuple[HeadTile, tuple[int, int, int]]:
    """The launch of one of the two kernels, and its (BLOCK_S, BLOCK_H, BLOCK_D)."""
    heads, head_dim = q.shape[1], q.shape[3]
    block_d = triton.next_power_of_2(head_dim)
    launch = launch_table.find(kernel, architecture(q.device), q.dtype, block_d)
    block_h = min(triton.next_power_of_2(heads), launch.max_heads)
    return launch, (max(1, min(16, launch.elements // (block_h * block_d))), block_h, block_d)


@triton.jit
def normalise_heads(x, mask_d, eps, HEAD_DIM: tl.constexpr):
    """Two-pass LayerNorm over the last axis of x [S, H, D]: (xhat, rstd)."""
    mean = tl.sum(x, axis=2, keep_dims=True) / HEAD_DIM
    centred = tl.where(mask_d[None, None, :], x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=2, keep_dims=True) / HEAD_DIM + eps)
    return centred * rstd, rstd


@triton.jit
def exchange_pairs(x, SIGN_EVEN: tl.constexpr, SIGN_ODD: tl.constexpr):
    """Swap the partners (2i, 2i + 1) of the last axis and multiply the two results by their signs."""
    BLOCK_S: tl.constexpr = x.shape[0]
    BLOCK_H: tl.constexpr = x.shape[1]
    BLOCK_D: tl.constexpr = x.shape[2]
    even, odd = tl.split(tl.reshape(x, (BLOCK_S, BLOCK_H, BLOCK_D // 2, 2)))
    return tl.reshape(tl.join(SIGN_EVEN * odd, SIGN_ODD * even), (BLOCK_S, BLOCK_H, BLOCK_D))


@triton.jit
def load_vector(ptr, offs_d, mask_d):
    """A norm parameter [D] as float32 [1, 1, D]."""
    return tl.load(ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, None, :]


@triton.jit
def load_table(ptr, stride, offs_s, offs_d, rope_start, mask, other):
    """Cosines or sines as float32 [S, 1, D], with `other` for the tokens that are not rotated."""
    ptrs = ptr + (offs_s - rope_start).to(tl.int64)[:, None] * stride + offs_d[None, :]
    table = tl.load(ptrs, mask=mask & (offs_s >= rope_start)[:, None], other=other)
    return table.to(tl.float32)[:, None, :]


@triton.jit
def tile_index(tile, tiles_s, tiles_h, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr):
    """Heads fastest, then tokens, then batch: (batch, tokens [BLOCK_S], heads [BLOCK_H])."""
    offs_h = (tile % tiles_h) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_s = (tile // tiles_h % tiles_s) * BLOCK_S + tl.arange(0, BLOCK_S)
    return tl.cast(tile // tiles_h // tiles_s, tl.int64), offs_s, offs_h


@triton.jit
def tile_pointers(ptr, batch, offs_s, offs_h, offs_d, stride_b, stride_h, stride_s):
    """Pointers [S, H, D] into a [B, H, S, D] tensor of any strides with a contiguous last dim."""
    rows = offs_h.to(tl.int64)[None, :, None] * stride_h + offs_s.to(tl.int64)[:, None, None] * stride_s
    return ptr + batch * stride_b + rows + offs_d[None, None, :]


@triton.jit
def norm_rope(x, weight_ptr, bias_ptr, cos, sin, offs_d, mask_d, eps, HEAD_DIM: tl.constexpr, HAS_ROPE: tl.constexpr):
    """The forward formula on one tile, in float32."""
    y, _ = normalise_heads(x, mask_d, eps, HEAD_DIM)
    if weight_ptr is not None:
        y *= load_vector(weight_ptr, offs_d, mask_d)
    if bias_ptr is not None:
        y += load_vector(bias_ptr, offs_d, mask_d)
    if HAS_ROPE:
        y = y * cos + exchange_pairs(y, -1.0, 1.0) * sin
    return y


@triton.jit(do_not_specialize=["seq_len", "heads", "tiles_s", "tiles_h", "rope_start"])
def _qk_norm_rope_fwd_kernel(
    q_out_ptr,  # [B, H, S, D], memory order of q
    k_out_ptr,
    q_ptr,
    k_ptr,
    q_weight_ptr,  # [D] or None
    q_bias_ptr,
    k_weight_ptr,
    k_bias_ptr,
    cos_ptr,  # [S - rope_start, D] or None
    sin_ptr,
    seq_len,
    heads,
    tiles_s,
    tiles_h,
    rope_start,
    stride_q_out_b,
    stride_q_out_h,
    stride_q_out_s,
    stride_k_out_b,
    stride_k_out_h,
    stride_k_out_s,
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
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    HAS_ROPE: tl.constexpr = cos_ptr is not None
    batch, offs_s, offs_h = tile_index(tl.program_id(0), tiles_s, tiles_h, BLOCK_S, BLOCK_H)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    mask_sd = (offs_s < seq_len)[:, None] & mask_d[None, :]
    mask = mask_sd[:, None, :] & (offs_h < heads)[None, :, None]

    q_ptrs = tile_pointers(q_ptr, batch, offs_s, offs_h, offs_d, stride_qb, stride_qh, stride_qs)
    k_ptrs = tile_pointers(k_ptr, batch, offs_s, offs_h, offs_d, stride_kb, stride_kh, stride_ks)
    q = tl.load(q_ptrs, mask=mask, other=0.0).to(tl.float32)
    k = tl.load(k_ptrs, mask=mask, other=0.0).to(tl.float32)
    cos, sin = 1.0, 0.0
    if HAS_ROPE:
        cos = load_table(cos_ptr, stride_cos_s, offs_s, offs_d, rope_start, mask_sd, 1.0)
        sin = load_table(sin_ptr, stride_sin_s, offs_s, offs_d, rope_start, mask_sd, 0.0)

    q = norm_rope(q, q_weight_ptr, q_bias_ptr, cos, sin, offs_d, mask_d, eps, HEAD_DIM, HAS_ROPE)
    q_ptrs = tile_pointers(q_out_ptr, batch, offs_s, offs_h, offs_d, stride_q_out_b, stride_q_out_h, stride_q_out_s)
    tl.store(q_ptrs, q.to(q_out_ptr.dtype.element_ty), mask=mask)
    k = norm_rope(k, k_weight_ptr, k_bias_ptr, cos, sin, offs_d, mask_d, eps, HEAD_DIM, HAS_ROPE)
    k_ptrs = tile_pointers(k_out_ptr, batch, offs_s, offs_h, offs_d, stride_k_out_b, stride_k_out_h, stride_k_out_s)
    tl.store(k_ptrs, k.to(k_out_ptr.dtype.element_ty), mask=mask)


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """Strides of [B, H, S], zeros for an absent tensor."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))


def launch_fwd(
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
) -> tuple[Tensor, Tensor]:
    """Normalise and rotate q and k [B, H, S, D]; each result has the memory order of its input."""
    batch, heads, seq_len, head_dim = q.shape
    q_out, k_out = empty_in_memory_order(q), empty_in_memory_order(k)
    if q.numel() == 0:
        return q_out, k_out
    q, k = rows_contiguous(q), rows_contiguous(k)
    cos, sin = (None if table is None else rows_contiguous(table) for table in (cos, sin))
    launch, (block_s, block_h, block_d) = tile_launch("qk_norm_rope_fwd", q)
    tiles_s, tiles_h = triton.cdiv(seq_len, block_s), triton.cdiv(heads, block_h)
    stride_q_out, stride_k_out, stride_q, stride_k = map(strides, (q_out, k_out, q, k))
    with device_guard(q):
        _qk_norm_rope_fwd_kernel[(batch * tiles_s * tiles_h,)](
            q_out_ptr=q_out,
            k_out_ptr=k_out,
            q_ptr=q,
            k_ptr=k,
            q_weight_ptr=q_weight,
            q_bias_ptr=q_bias,
            k_weight_ptr=k_weight,
            k_bias_ptr=k_bias,
            cos_ptr=cos,
            sin_ptr=sin,
            seq_len=seq_len,
            heads=heads,
            tiles_s=tiles_s,
            tiles_h=tiles_h,
            rope_start=rope_start,
            stride_q_out_b=stride_q_out[0],
            stride_q_out_h=stride_q_out[1],
            stride_q_out_s=stride_q_out[2],
            stride_k_out_b=stride_k_out[0],
            stride_k_out_h=stride_k_out[1],
            stride_k_out_s=stride_k_out[2],
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
            BLOCK_S=block_s,
            BLOCK_H=block_h,
            BLOCK_D=block_d,
            **launch.options(),
        )
    return q_out, k_out
