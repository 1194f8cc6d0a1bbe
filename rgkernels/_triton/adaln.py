"""Norm sites in Triton: registered ops with fake implementations, and autograd around them.

Three forward ops, one per public op, over one kernel (adaln_fwd.py); one backward op for all three (adaln_bwd.py and
adaln_sums.py), which computes only the gradients that are asked for. All schemas are functional. Saved for backward: the
normalised rows (the output `res`, or the input `x`), `branch` if the gate is trained, the modulation vectors, and mean and rstd
in float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rgkernels._triton.adaln_bwd import launch_bwd
from rgkernels._triton.adaln_fwd import launch_fwd
from rgkernels._triton.adaln_sums import Needs
from rgkernels._triton.common import FusedFunction, check_not_float64, register_kernel
from rgkernels.segments import SegmentLayout

_LIB = torch.library.Library("rgkernels", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)

_LIB.define(
    "segment_adaln(Tensor x, Tensor shift, Tensor scale, Tensor? weight, Tensor? bias, SymInt[] lengths, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_LIB.define("segment_gate_residual(Tensor residual, Tensor branch, Tensor gate, SymInt[] lengths) -> Tensor", tags=_TAGS)
_LIB.define(
    "segment_gate_residual_adaln(Tensor residual, Tensor branch, Tensor gate, Tensor shift, Tensor scale, Tensor? weight,"
    " Tensor? bias, SymInt[] lengths, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_LIB.define(
    "adaln_backward(Tensor? dres, Tensor? dnormed, Tensor? x, Tensor? branch, Tensor? gate, Tensor? scale, Tensor? weight,"
    " Tensor? bias, Tensor? mean, Tensor? rstd, SymInt[] lengths, bool[] needs) -> Tensor[]",
    tags=_TAGS,
)


def _adaln(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, lengths: Sequence[int], eps: float
) -> tuple[Tensor | None, ...]:
    return launch_fwd(x, None, None, shift, scale, weight, bias, lengths, eps)[1:]


def _gate_residual(residual: Tensor, branch: Tensor, gate: Tensor, lengths: Sequence[int]) -> Tensor | None:
    return launch_fwd(residual, branch, gate, None, None, None, None, lengths, 0.0)[0]


def _gate_residual_adaln(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lengths: Sequence[int],
    eps: float,
) -> tuple[Tensor | None, ...]:
    return launch_fwd(residual, branch, gate, shift, scale, weight, bias, lengths, eps)


register_kernel(_LIB, "segment_adaln", _adaln)
register_kernel(_LIB, "segment_gate_residual", _gate_residual)
register_kernel(_LIB, "segment_gate_residual_adaln", _gate_residual_adaln)
register_kernel(_LIB, "adaln_backward", launch_bwd)


def _empty_rows(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _empty_stats(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float32)


@torch.library.register_fake("rgkernels::segment_adaln", lib=_LIB)
def _(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _empty_rows(x), _empty_stats(x), _empty_stats(x)


@torch.library.register_fake("rgkernels::segment_gate_residual", lib=_LIB)
def _(residual: Tensor, *_: Any) -> Tensor:
    return _empty_rows(residual)


@torch.library.register_fake("rgkernels::segment_gate_residual_adaln", lib=_LIB)
def _(residual: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _empty_rows(residual), _empty_rows(residual), _empty_stats(residual), _empty_stats(residual)


@torch.library.register_fake("rgkernels::adaln_backward", lib=_LIB)
def _(
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
    like = dres if dnormed is None else dnormed
    assert like is not None
    want = Needs(*needs)
    modulation = (like.shape[0], len(lengths), like.shape[2])
    grads = [like.new_empty(like.shape) for wanted in (want.x, want.branch) if wanted]
    grads += [like.new_empty(modulation) for wanted in (want.gate, want.shift, want.scale) if wanted]
    affine = ((want.weight, weight), (want.bias, bias))
    return grads + [p.new_empty(p.shape) for wanted, p in affine if wanted and p is not None]


def _backward(
    dres: Tensor | None,
    dnormed: Tensor | None,
    saved: Sequence[Tensor | None],
    lengths: Sequence[int],
    needs: Needs,
) -> list[Tensor | None]:
    """The gradients in the order of `Needs`, None where none is wanted or where the used outputs do not depend on it."""
    if dnormed is None:
        needs = needs._replace(shift=False, scale=False, weight=False, bias=False)
    if not any(needs) or (dres is None and dnormed is None):
        return [None] * len(needs)
    # a plain list: torch.compile of torch 2.11 does not pass a named tuple on
    grads = iter(torch.ops.rgkernels.adaln_backward(dres, dnormed, *saved, lengths, [*needs]))
    return [next(grads) if wanted else None for wanted in needs]


class _SegmentAdaLN(FusedFunction):
    @staticmethod
    def forward(ctx, x, shift, scale, weight, bias, lengths, eps):
        y, mean, rstd = torch.ops.rgkernels.segment_adaln(x, shift, scale, weight, bias, lengths, eps)
        ctx.save_for_backward(x, None, None, scale, weight, bias, mean, rstd)
        ctx.lengths = lengths
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, shift, scale, weight, bias, _, _ = ctx.needs_input_grad
        needs = Needs(x, False, False, shift, scale, weight, bias)
        dx, _, _, *others = _backward(None, dy, ctx.saved_tensors, ctx.lengths, needs)
        return dx, *others, None, None


class _SegmentGateResidual(FusedFunction):
    @staticmethod
    def forward(ctx, residual, branch, gate, lengths):
        _, needs_branch, needs_gate, _ = ctx.needs_input_grad
        ctx.save_for_backward(branch if needs_gate else None, gate if needs_branch else None)
        ctx.lengths = lengths
        ctx.set_materialize_grads(False)
        return torch.ops.rgkernels.segment_gate_residual(residual, branch, gate, lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx, dres):
        residual, branch, gate, _ = ctx.needs_input_grad
        needs = Needs(False, branch, gate, False, False, False, False)
        saved = (None, *ctx.saved_tensors, *[None] * 5)
        # the residual's gradient is the upstream gradient itself: no kernel, no copy
        return dres if residual else None, *_backward(dres, None, saved, ctx.lengths, needs)[1:3], None


class _SegmentGateResidualAdaLN(FusedFunction):
    @staticmethod
    def forward(ctx, residual, branch, gate, shift, scale, weight, bias, lengths, eps):
        res, normed, mean, rstd = torch.ops.rgkernels.segment_gate_residual_adaln(
            residual, branch, gate, shift, scale, weight, bias, lengths, eps
        )
        _, needs_branch, needs_gate, *_ = ctx.needs_input_grad
        kept = branch if needs_gate else None, gate if needs_branch else None
        ctx.save_for_backward(res, *kept, scale, weight, bias, mean, rstd)
        ctx.lengths = lengths
        ctx.set_materialize_grads(False)
        return res, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, dres, dnormed):
        needs = Needs(*ctx.needs_input_grad[:7])
        return *_backward(dres, dnormed, ctx.saved_tensors, ctx.lengths, needs), None, None


def segment_adaln(
    x: Tensor, shift: Tensor, scale: Tensor, layout: SegmentLayout, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """See `rgkernels.segment_adaln`."""
    check_not_float64("segment_adaln", x)
    return _SegmentAdaLN.apply(x, shift, scale, weight, bias, layout.lengths, eps)


def segment_gate_residual(residual: Tensor, branch: Tensor, gate: Tensor, layout: SegmentLayout) -> Tensor:
    """See `rgkernels.segment_gate_residual`."""
    check_not_float64("segment_gate_residual", residual)
    return _SegmentGateResidual.apply(residual, branch, gate, layout.lengths)


def segment_gate_residual_adaln(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    layout: SegmentLayout,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See `rgkernels.segment_gate_residual_adaln`."""
    check_not_float64("segment_gate_residual_adaln", residual)
    return _SegmentGateResidualAdaLN.apply(residual, branch, gate, shift, scale, weight, bias, layout.lengths, eps)
