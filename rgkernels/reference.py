"""Every op in plain PyTorch: the specification, on one page.

Arithmetic runs in float32 for half-precision and float32 tensors and in float64 for float64 ones, with one rounding at
each output. float64 exists only here: it is the oracle of the tests. Letters: B batch, S joint sequence, C channels, G
segments, H heads, D head size.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rgkernels.segments import SegmentLayout


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and arithmetic for tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_token(modulation: Tensor, layout: SegmentLayout) -> Tensor:
    """Repeat each segment's row for each of its tokens: [B, G, C] -> [B, S, C]."""
    parts = [modulation[:, g : g + 1].expand(-1, n, -1) for g, n in enumerate(layout.lengths)]
    return torch.cat(parts, dim=1)


def segment_adaln(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    layout: SegmentLayout,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """y = LayerNorm(x) * (1 + scale[g]) + shift[g]."""
    wide = compute_dtype(x.dtype)
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    normed = F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps)
    y = normed * (1 + per_token(scale.to(wide), layout)) + per_token(shift.to(wide), layout)
    return y.to(x.dtype)


def segment_gate_residual(residual: Tensor, branch: Tensor, gate: Tensor, layout: SegmentLayout) -> Tensor:
    """res = residual + gate[g] * branch."""
    wide = compute_dtype(residual.dtype)
    res = residual.to(wide) + per_token(gate.to(wide), layout) * branch.to(wide)
    return res.to(residual.dtype)


def qk_norm_rope(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    rope_start: int,
    eps: float,
) -> Tensor:
    """LayerNorm over D, then rotate the pairs (2i, 2i + 1) of tokens from `rope_start` on. One of q, k."""
    wide = compute_dtype(x.dtype)
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    y = F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps)
    if cos is not None and sin is not None:
        plain, rotated = y[:, :, :rope_start], y[:, :, rope_start:]
        even, odd = rotated.unflatten(-1, (-1, 2)).unbind(-1)
        swapped = torch.stack((-odd, even), dim=-1).flatten(-2)
        y = torch.cat((plain, rotated * cos.to(wide) + swapped * sin.to(wide)), dim=2)
    return keep_memory_order(y.to(x.dtype), x)


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: SegmentLayout, query_segments: tuple[str, ...], softmax_scale: float
) -> Tensor:
    """Split SDPA: one unmasked scaled_dot_product_attention per query segment over its visible keys."""
    q, softmax_scale = positive_scale(q, softmax_scale)
    outputs = [q[:, :, :0]]
    for name, rows in zip(query_segments, q.split([layout.length(n) for n in query_segments], dim=2), strict=True):
        ranges = layout.key_ranges(name)
        if not ranges:
            # zeros that stay in the graph: the gradient is zero, not missing, and a NaN query does not show
            outputs.append(rows.masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0.0))
            continue
        keys, values = _gather(k, ranges), _gather(v, ranges)
        outputs.append(F.scaled_dot_product_attention(rows, keys, values, scale=softmax_scale))
    return keep_memory_order(torch.cat(outputs, dim=2), q)


def segment_attention_lse(
    q: Tensor, k: Tensor, layout: SegmentLayout, query_segments: tuple[str, ...], softmax_scale: float
) -> Tensor:
    """lse = log(sum(exp(softmax_scale * q @ k))) over the visible keys, [B, H, Sq]; -inf where none is visible."""
    wide = compute_dtype(q.dtype)
    parts = [q[:, :, :0, 0].to(wide)]
    for name, rows in zip(query_segments, q.split([layout.length(n) for n in query_segments], dim=2), strict=True):
        keys = _gather(k, layout.key_ranges(name))
        with _no_autocast(q.device.type):
            scores = (rows.to(wide) @ keys.to(wide).transpose(-1, -2)) * softmax_scale
        parts.append(scores.logsumexp(dim=-1))
    return torch.cat(parts, dim=2)


def positive_scale(q: Tensor, softmax_scale: float) -> tuple[Tensor, float]:
    """Queries and a positive scale with exactly the same scores: fused kernels that scale after the maximum give NaN else."""
    if softmax_scale > 0:
        return q, softmax_scale
    return (-q, -softmax_scale) if softmax_scale < 0 else (q * 0, 1.0)


def keep_memory_order(x: Tensor, like: Tensor) -> Tensor:
    """`x` [B, H, S, D] in the memory order of `like`: [B, S, H, D] if heads lie inside tokens, else [B, H, S, D]."""
    if like.stride(1) < like.stride(2):
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.contiguous()


def _no_autocast(kind: str) -> AbstractContextManager[Any]:
    """Keep a product in the dtype of its factors: autocast would make it in half precision."""
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _gather(x: Tensor, ranges: list[tuple[int, int]]) -> Tensor:
    if not ranges:
        return x[:, :, :0]
    parts = [x[:, :, start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
