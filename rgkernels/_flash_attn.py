"""Segment attention by split calls into the flash-attn package: one call per query segment over its visible keys.

Letters: B batch, H heads, S joint sequence, Sq query rows, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rgkernels.reference import keep_memory_order, positive_scale
from rgkernels.segments import SegmentLayout

DTYPES = (torch.float16, torch.bfloat16)


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: SegmentLayout, query_segments: tuple[str, ...], softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Run the split calls on checked arguments.

    Returns:
        o, [B, H, Sq, D] in the memory order of `q`, and lse, [B, H, Sq] float32, which has no gradient.

    Raises:
        RuntimeError: The package is missing.
        NotImplementedError: A dtype that it does not support, or a gradient that reaches lse.
    """
    flash_attn_func = _load()
    if q.dtype not in DTYPES:
        raise NotImplementedError(f"segment_attention with impl='flash-attn' supports float16 and bfloat16, got {q.dtype}")
    q, softmax_scale = positive_scale(q, softmax_scale)
    outputs, lses = [q[:, :, :0]], [q[:, :, :0, 0].float()]
    for name, rows in zip(query_segments, q.split([layout.length(n) for n in query_segments], dim=2), strict=True):
        ranges = layout.key_ranges(name)
        if not ranges or rows.numel() == 0:
            # zeros that stay in the graph: the gradient is zero, not missing, and a NaN query does not show
            outputs.append(rows.masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0.0))
            lses.append(torch.full(rows.shape[:3], float("-inf"), dtype=torch.float32, device=q.device))
            continue
        keys, values = _visible(k, ranges), _visible(v, ranges)
        o, lse, _ = flash_attn_func(
            rows.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            softmax_scale=softmax_scale,
            deterministic=True,
            return_attn_probs=True,
        )
        outputs.append(o.transpose(1, 2))
        lses.append(lse)
    return keep_memory_order(torch.cat(outputs, dim=2), q), _NoGradient.apply(torch.cat(lses, dim=2))  # type: ignore[no-untyped-call]


def _load() -> Callable[..., Any]:
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise RuntimeError(
            f"impl='flash-attn' needs the flash-attn package ({error}): pip install flash-attn, or choose impl='triton'"
        ) from error
    return flash_attn_func  # type: ignore[no-any-return]


def _visible(x: Tensor, ranges: list[tuple[int, int]]) -> Tensor:
    parts = [x[:, :, start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class _NoGradient(torch.autograd.Function):
    """Identity whose gradient is an error: flash-attn itself would drop the gradient of lse without a word."""

    @staticmethod
    def forward(ctx: Any, lse: Tensor) -> Tensor:
        return lse.view_as(lse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise NotImplementedError("impl='flash-attn' has no gradient for lse; impl='triton' and impl='reference' have one")
