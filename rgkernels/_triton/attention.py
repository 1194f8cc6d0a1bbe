"""Segment attention in Triton: two registered ops with fake implementations, and autograd around them.

The layout travels as integers (`Problem`); schedules are made where the real op runs, so tracing needs none. Schemas are
functional. Saved for the backward: q, k, v, o, and lse in float32. Kernels: attention_fwd.py, attention_bwd.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from rgkernels._triton.attention_bwd import launch_bwd
from rgkernels._triton.attention_fwd import launch_fwd
from rgkernels._triton.attention_schedule import Problem
from rgkernels._triton.attention_tiles import HEAD_DIMS
from rgkernels._triton.common import FusedFunction, check_not_float64, empty_in_memory_order, register_kernel
from rgkernels.segments import SegmentLayout

_LIB = torch.library.Library("rgkernels", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)

_LIB.define(
    "segment_attention(Tensor q, Tensor k, Tensor v, SymInt[] lengths, int[] blocked, int[] rows, float softmax_scale)"
    " -> (Tensor, Tensor)",
    tags=_TAGS,
)
_LIB.define(
    "segment_attention_backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, SymInt[] lengths,"
    " int[] blocked, int[] rows, float softmax_scale, bool needs_q, bool needs_kv) -> Tensor[]",
    tags=_TAGS,
)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], blocked: Sequence[int], rows: Sequence[int], softmax_scale: float
) -> tuple[Tensor, Tensor]:
    return launch_fwd(q, k, v, Problem(tuple(lengths), tuple(blocked), tuple(rows)), softmax_scale)


def _backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    blocked: Sequence[int],
    rows: Sequence[int],
    softmax_scale: float,
    needs_q: bool,
    needs_kv: bool,
) -> list[Tensor]:
    problem = Problem(tuple(lengths), tuple(blocked), tuple(rows))
    return launch_bwd(do, dlse, q, k, v, o, lse, problem, softmax_scale, needs_q, needs_kv)


register_kernel(_LIB, "segment_attention", _forward)
register_kernel(_LIB, "segment_attention_backward", _backward)


@torch.library.register_fake("rgkernels::segment_attention", lib=_LIB)
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_in_memory_order(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("rgkernels::segment_attention_backward", lib=_LIB)
def _(do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *args: Any) -> list[Tensor]:
    needs_q, needs_kv = args[-2:]
    return [empty_in_memory_order(x) for x, needed in ((q, needs_q), (k, needs_kv), (v, needs_kv)) if needed]


@register_flop_formula(torch.ops.rgkernels.segment_attention)
def _(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    lengths: Sequence[int],
    blocked: Sequence[int],
    rows: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    """Two products, as PyTorch counts its own attention, over the scores that are computed."""
    batch, heads, _rows, head_dim = q_shape
    return 2 * 2 * head_dim * batch * heads * Problem(tuple(lengths), tuple(blocked), tuple(rows)).num_scores


@register_flop_formula(torch.ops.rgkernels.segment_attention_backward)
def _(do_shape: Sequence[int], dlse_shape: Any, q_shape: Sequence[int], *args: Any, **__: Any) -> int:
    """Scores and dP, dq, dk and dv: five products where all three gradients are wanted."""
    lengths, blocked, rows, _, needs_q, needs_kv = args[-6:]
    batch, heads, _, head_dim = q_shape
    scores = batch * heads * Problem(tuple(lengths), tuple(blocked), tuple(rows)).num_scores
    return 2 * (2 + needs_q + 2 * needs_kv) * head_dim * scores


class _SegmentAttention(FusedFunction):
    @staticmethod
    def forward(ctx, q, k, v, problem, softmax_scale):
        o, lse = torch.ops.rgkernels.segment_attention(q, k, v, *problem, softmax_scale)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.problem, ctx.softmax_scale = problem, softmax_scale
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dlse):
        q, k, v, o, lse = ctx.saved_tensors
        needs_q, needs_kv = ctx.needs_input_grad[0], ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        if do is None and dlse is None:
            return None, None, None, None, None
        do = torch.zeros_like(o) if do is None else do
        grads = torch.ops.rgkernels.segment_attention_backward(
            do, dlse, q, k, v, o, lse, *ctx.problem, ctx.softmax_scale, needs_q, needs_kv
        )
        dq = grads[0] if needs_q else None
        dk, dv = grads[-2:] if needs_kv else (None, None)
        return dq, dk, dv, None, None


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: SegmentLayout, query_segments: tuple[str, ...], softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Run the kernels on checked arguments: (o, lse)."""
    check_not_float64("segment_attention", q)
    if q.shape[-1] not in HEAD_DIMS:
        raise NotImplementedError(f"segment_attention with impl='triton' supports D in {HEAD_DIMS}, got {q.shape[-1]}")
    blocked = [index for pair in sorted(layout.blocked) for index in (layout.index(pair[0]), layout.index(pair[1]))]
    problem = Problem(layout.lengths, tuple(blocked), tuple(layout.index(name) for name in query_segments))
    return _SegmentAttention.apply(q, k, v, problem, softmax_scale)
