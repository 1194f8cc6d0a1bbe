"""Attention over segments, where some (query segment, key segment) pairs are blocked.

Letters: B batch, H heads, S joint sequence, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rgkernels import reference
from rgkernels._checks import check_layout, check_layout_type, check_rank, check_tensor
from rgkernels._impl import ATTENTION_IMPLS, resolve
from rgkernels.segments import SegmentLayout


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SegmentLayout,
    *,
    query_segments: Sequence[str] | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which the layout's blocked pairs are never computed.

        o[i] = sum_j softmax_j(softmax_scale * q[i] . k[j]) v[j]    over keys j whose segment i's segment may see
        lse[i] = log(sum_j exp(softmax_scale * q[i] . k[j]))

    Args:
        q: Queries, [B, H, Sq, D], float16 / bfloat16 / float32; any strides with a contiguous last dim. Sq = S, or the rows of
            `query_segments` alone.
        k: Keys, [B, H, S, D], dtype and device of `q`. B and H may be expanded (stride 0).
        v: Values, as `k`.
        layout: Segment lengths (they must sum to S) and blocked pairs.
        query_segments: Names of the segments whose rows `q` holds, in that order; None = all of the layout's.
        softmax_scale: Factor on the scores; None = 1 / sqrt(D).
        return_lse: Also return the log-sum-exp of each row.
        impl: "auto" picks "triton" for CUDA tensors (compute capability 8.0 or newer) and "reference" otherwise; "flash-attn"
            makes split calls into that library. A named choice never falls back.

    Returns:
        o, [B, H, Sq, D], dtype and memory order of `q`; with `return_lse` (o, lse), lse [B, H, Sq] float32. A query that sees
        no key gives o = 0, lse = -inf and zero gradients. Gradients for q, k, v.

    Raises:
        ValueError: A shape, stride, dtype or device disagrees, or a segment is unknown.
        NotImplementedError: Valid input that the chosen implementation does not support.
        RuntimeError: The chosen implementation cannot run here.

    Note:
        Softmax and accumulation in float32 (the reference: what PyTorch's scaled_dot_product_attention does); no S x S tensor,
        except for the lse of the reference. Under `torch.autocast` q, k and v are cast as scaled_dot_product_attention's are.

    Source:
        RealGeneral's Frame-Condition Decoupling; FlashAttention-2 (arXiv 2307.08691).
    """
    check_layout_type(layout)
    if isinstance(query_segments, str):
        raise TypeError(f"query_segments must be a sequence of names, got the string {query_segments!r}")
    if softmax_scale is not None and not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    q, k, v = (_as_autocast_would(x) for x in (q, k, v))
    names = layout.names if query_segments is None else tuple(query_segments)
    _check_attention(q, k, v, layout, names)
    scale = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else float(softmax_scale)
    chosen = resolve(impl, q.device, ATTENTION_IMPLS)
    if chosen == "triton":
        from rgkernels._triton import attention

        o, lse = attention.segment_attention(q, k, v, layout, names, scale)
        return (o, lse) if return_lse else o
    if chosen == "flash-attn":
        from rgkernels import _flash_attn

        o, lse = _flash_attn.segment_attention(q, k, v, layout, names, scale)
        return (o, lse) if return_lse else o
    o = reference.segment_attention(q, k, v, layout, names, scale)
    if not return_lse:
        return o
    return o, reference.segment_attention_lse(q, k, layout, names, scale)


def _as_autocast_would(x: Tensor) -> Tensor:
    """Cast one of q, k, v as autocast casts those of scaled_dot_product_attention: any floating dtype but float64."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    kind = x.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x.to(torch.get_autocast_dtype(kind)) if enabled else x


def _check_attention(q: Tensor, k: Tensor, v: Tensor, layout: SegmentLayout, names: tuple[str, ...]) -> None:
    check_rank("q", q, "B, H, S, D")
    check_rank("k", k, "B, H, S, D")
    batch, heads, _, head_dim = q.shape
    check_tensor("k", k, (batch, heads, k.shape[2], head_dim), "B, H, S, D", like=q)
    check_tensor("v", v, tuple(k.shape), "B, H, S, D", like=q)
    check_layout(layout, k.shape[2], "k")
    if len(set(names)) != len(names):
        raise ValueError(f"query_segments must be unique, got {names}")
    rows = sum(layout.length(name) for name in names)
    check_tensor("q", q, (batch, heads, rows, head_dim), "B, H, Sq, D")
    if head_dim == 0:
        raise ValueError("D must be at least 1, got 0")
