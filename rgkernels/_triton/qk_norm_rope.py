"""qk_norm_rope in Triton: registered ops with fake implementations, and autograd around them.

Kernels: qk_norm_rope_fwd.py, qk_norm_rope_bwd.py. All schemas are functional. Saved for backward: q and k as given (views of a
packed projection stay views), the norm parameters and the tables; statistics are recomputed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rgkernels._triton.common import FusedFunction, check_not_float64, empty_in_memory_order, register_kernel
from rgkernels._triton.qk_norm_rope_bwd import Needs, launch_bwd
from rgkernels._triton.qk_norm_rope_fwd import launch_fwd

_LIB = torch.library.Library("rgkernels", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_PARAMETERS = "Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, Tensor? cos, Tensor? sin"

_LIB.define(
    f"qk_norm_rope(Tensor q, Tensor k, {_PARAMETERS}, SymInt rope_start, float eps) -> (Tensor, Tensor)",
    tags=_TAGS,
)
_LIB.define(
    f"qk_norm_rope_backward(Tensor? dq_out, Tensor? dk_out, Tensor q, Tensor k, {_PARAMETERS}, SymInt rope_start, float eps,"
    " bool[] needs) -> Tensor[]",
    tags=_TAGS,
)
register_kernel(_LIB, "qk_norm_rope", launch_fwd)
register_kernel(_LIB, "qk_norm_rope_backward", launch_bwd)


@torch.library.register_fake("rgkernels::qk_norm_rope", lib=_LIB)
def _(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_in_memory_order(q), empty_in_memory_order(k)


@torch.library.register_fake("rgkernels::qk_norm_rope_backward", lib=_LIB)
def _(
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
    want = Needs(*needs)
    grads = [empty_in_memory_order(x) for wanted, x in ((want.q, q), (want.k, k)) if wanted]
    affine = zip((q_weight, q_bias, k_weight, k_bias), want[2:], strict=True)
    return grads + [torch.empty_like(p) for p, wanted in affine if wanted and p is not None]


class _QKNormRope(FusedFunction):
    @staticmethod
    def forward(ctx, q, k, q_weight, q_bias, k_weight, k_bias, cos, sin, rope_start, eps):
        ctx.save_for_backward(q, k, q_weight, q_bias, k_weight, k_bias, cos, sin)
        ctx.rope_start, ctx.eps = rope_start, eps
        ctx.set_materialize_grads(False)
        return torch.ops.rgkernels.qk_norm_rope(q, k, q_weight, q_bias, k_weight, k_bias, cos, sin, rope_start, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_out, dk_out):
        needs = Needs(*ctx.needs_input_grad[:6])
        if dq_out is None:
            needs = needs._replace(q=False, q_weight=False, q_bias=False)
        if dk_out is None:
            needs = needs._replace(k=False, k_weight=False, k_bias=False)
        if not any(needs):
            return (None,) * 10
        # a plain list: torch.compile of torch 2.11 does not pass a named tuple on
        grads = iter(
            torch.ops.rgkernels.qk_norm_rope_backward(dq_out, dk_out, *ctx.saved_tensors, ctx.rope_start, ctx.eps, [*needs])
        )
        return *(next(grads) if wanted else None for wanted in needs), None, None, None, None


def qk_norm_rope(
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
    """See `rgkernels.qk_norm_rope`."""
    check_not_float64("qk_norm_rope", q)
    return _QKNormRope.apply(q, k, q_weight, q_bias, k_weight, k_bias, cos, sin, rope_start, eps)
