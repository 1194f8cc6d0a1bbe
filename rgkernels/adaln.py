"""Norm sites of a transformer block over segments: adaptive LayerNorm, gated residual, and both in one pass.

Letters: B batch, S joint sequence, C channels, G segments; g(s) is the segment of token s.
"""

from __future__ import annotations

from torch import Tensor

from rgkernels import reference
from rgkernels._checks import check_affine, check_eps, check_layout, check_rank, check_tensor
from rgkernels._impl import resolve
from rgkernels.segments import SegmentLayout


def segment_adaln(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    layout: SegmentLayout,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    """Adaptive LayerNorm with one (shift, scale) per segment.

        y[s] = LayerNorm(x[s]) * (1 + scale[g(s)]) + shift[g(s)]

    Args:
        x: Tokens, [B, S, C], float16 / bfloat16 / float32; any strides with a contiguous last dim.
        shift: Per-segment shift, [B, G, C], dtype and device of `x`; a strided chunk is read in place.
        scale: Per-segment scale, as `shift`.
        layout: Segment lengths; they must sum to S.
        weight: LayerNorm weight, [C], dtype of `x` or float32; None = 1.
        bias: LayerNorm bias, as `weight`; None = 0.
        eps: Added to the variance.
        impl: "auto" picks "triton" for CUDA tensors and "reference" otherwise. A named choice never falls back.

    Returns:
        [B, S, C], contiguous, dtype of `x`. Gradients for x, shift, scale, weight, bias.

    Raises:
        ValueError: A shape, stride, dtype or device disagrees (the message names the argument and both values).
        TypeError: An argument is not of its type.
        RuntimeError: `impl="triton"` cannot run here.

    Note:
        Statistics and arithmetic in float32, one rounding at the output; deterministic forward and backward.

    Source:
        RealGeneral's Separated Condition AdaLN; diffusers `CogVideoXLayerNormZero` for two segments.
    """
    _check_site("x", x, layout, {"shift": shift, "scale": scale}, weight, bias, eps)
    if resolve(impl, x.device) == "triton":
        from rgkernels._triton import adaln

        return adaln.segment_adaln(x, shift, scale, layout, weight, bias, eps)
    return reference.segment_adaln(x, shift, scale, layout, weight, bias, eps)


def segment_gate_residual(
    residual: Tensor, branch: Tensor, gate: Tensor, layout: SegmentLayout, *, impl: str = "auto"
) -> Tensor:
    """Gated residual with one gate per segment.

        res[s] = residual[s] + gate[g(s)] * branch[s]

    Args:
        residual: Tokens, [B, S, C], float16 / bfloat16 / float32; any strides with a contiguous last dim.
        branch: Output of attention or feed-forward, as `residual`.
        gate: Per-segment gate, [B, G, C], dtype and device of `residual`; a strided chunk is read in place.
        layout: Segment lengths; they must sum to S.
        impl: "auto", "triton" or "reference", as in `segment_adaln`.

    Returns:
        [B, S, C], contiguous, dtype of `residual`. Gradients for residual, branch, gate.

    Raises:
        ValueError: A shape, stride, dtype or device disagrees (the message names the argument and both values).
        RuntimeError: `impl="triton"` cannot run here.

    Note:
        Arithmetic in float32, one rounding at the output; deterministic forward and backward.

    Source:
        diffusers `CogVideoXBlock` (`hidden_states + gate_msa * attn_hidden_states`, per stream).
    """
    _check_site("residual", residual, layout, {"gate": gate})
    check_tensor("branch", branch, tuple(residual.shape), "B, S, C", like=residual)
    if resolve(impl, residual.device) == "triton":
        from rgkernels._triton import adaln

        return adaln.segment_gate_residual(residual, branch, gate, layout)
    return reference.segment_gate_residual(residual, branch, gate, layout)


def segment_gate_residual_adaln(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    layout: SegmentLayout,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The whole norm site between two sublayers: gated residual, then adaptive LayerNorm of the result.

        res[s]    = residual[s] + gate[g(s)] * branch[s]
        normed[s] = LayerNorm(res[s]) * (1 + scale[g(s)]) + shift[g(s)]

    Args:
        residual: Tokens, [B, S, C], float16 / bfloat16 / float32; any strides with a contiguous last dim.
        branch: Output of the sublayer before, as `residual`.
        gate: Gate of the sublayer before, [B, G, C], dtype and device of `residual`.
        shift: Shift of the sublayer after, as `gate`.
        scale: Scale of the sublayer after, as `gate`.
        layout: Segment lengths; they must sum to S.
        weight: LayerNorm weight, [C], dtype of `residual` or float32; None = 1.
        bias: LayerNorm bias, as `weight`; None = 0.
        eps: Added to the variance.
        impl: "auto", "triton" or "reference", as in `segment_adaln`.

    Returns:
        (res, normed), each [B, S, C], contiguous, dtype of `residual`; gradients for every tensor argument.

    Raises:
        ValueError: A shape, stride, dtype or device disagrees (the message names the argument and both values).
        RuntimeError: `impl="triton"` cannot run here.

    Note:
        LayerNorm sees `res` as stored (rounded to its dtype), so the fused op equals `segment_gate_residual` followed by
        `segment_adaln`. Statistics and arithmetic in float32; deterministic forward and backward.

    Source:
        diffusers `CogVideoXBlock`: the gate of one sublayer joins the norm of the next.
    """
    _check_site("residual", residual, layout, {"gate": gate, "shift": shift, "scale": scale}, weight, bias, eps)
    check_tensor("branch", branch, tuple(residual.shape), "B, S, C", like=residual)
    if resolve(impl, residual.device) == "triton":
        from rgkernels._triton import adaln

        return adaln.segment_gate_residual_adaln(residual, branch, gate, shift, scale, layout, weight, bias, eps)
    res = reference.segment_gate_residual(residual, branch, gate, layout)
    return res, reference.segment_adaln(res, shift, scale, layout, weight, bias, eps)


def _check_site(
    name: str,
    x: Tensor,
    layout: SegmentLayout,
    modulation: dict[str, Tensor],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    check_rank(name, x, "B, S, C")
    batch, seq_len, channels = x.shape
    check_tensor(name, x, (batch, seq_len, channels), "B, S, C")
    check_layout(layout, seq_len, name)
    for key, value in modulation.items():
        check_tensor(key, value, (batch, layout.num_segments, channels), "B, G, C", like=x)
    check_affine("weight", weight, channels, "C", x)
    check_affine("bias", bias, channels, "C", x)
    check_eps(eps)
