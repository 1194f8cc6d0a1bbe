"""One CogVideoX block on the ops: serves patched stock models (two segments) and RealGeneral (three and more).

The joint sequence stays one tensor through all blocks, and the feed-forward gate of a block is applied in the first norm
site of the next: a block takes (residual, branch, gate) and returns the next (residual, branch). Works on any module with the
submodules of diffusers' `CogVideoXBlock`; diffusers itself is not imported here.

Letters: B batch, S tokens of this pass, C channels, G segments, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rgkernels._hooks import watching_hooks, with_affine
from rgkernels.adaln import segment_adaln, segment_gate_residual, segment_gate_residual_adaln
from rgkernels.attention import segment_attention
from rgkernels.qk_norm_rope import qk_norm_rope
from rgkernels.segments import SegmentLayout

# diffusers' own, by name
PROCESSOR, FUSED_PROCESSOR = "CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"


class Modulation(NamedTuple):
    """Shift, scale and gate of one norm site, each [B, G, C] in the layout's segment order."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class Rotary(NamedTuple):
    """Rotary tables of the tokens from `start` on: cos and sin [S - start, D], float32; None = no rotation."""

    cos: Tensor | None = None
    sin: Tensor | None = None
    start: int = 0


class KeyValue(NamedTuple):
    """Keys (after norm and rotation) and values, each [B, H, S, D]."""

    k: Tensor
    v: Tensor


def stack_modulation(rows: Sequence[Sequence[Tensor]]) -> Modulation:
    """Modulation from one (shift, scale, gate) of [B, C] tensors per segment."""
    return Modulation(*(torch.stack(parts, dim=1) for parts in zip(*rows, strict=True)))


def select_segments(modulation: Modulation, layout: SegmentLayout, names: Sequence[str]) -> Modulation:
    """The modulation of some segments, in the order given."""
    index = [layout.index(name) for name in names]
    return Modulation(*(part[:, index] for part in modulation))


def norm_site(
    norm: Any,
    residual: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    modulation: Modulation,
    layout: SegmentLayout,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Add the pending gated branch, if there is one, and normalise: (residual, normed)."""
    # under autocast linear layers give half precision beside float32 tokens
    shift, scale, _ = (_widened(part, residual) for part in modulation)

    def site(weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        affine: dict[str, Any] = {"weight": weight, "bias": bias, "eps": eps, "impl": impl}
        if branch is None or gate is None:
            return residual, segment_adaln(residual, shift, scale, layout, **affine)
        pending = _widened(branch, residual), _widened(gate, residual)
        return segment_gate_residual_adaln(residual, *pending, shift, scale, layout, **affine)

    return with_affine(norm, site)  # type: ignore[no-any-return]


def project_qkv(attn: Any, normed: Tensor, rotary: Rotary, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys after norm and rotation, and values, each a [B, H, S, D] view of [B, S, H, D] memory."""
    # diffusers leaves `fused_projections` set when it takes the fused processor off again
    if getattr(attn, "fused_projections", False) and type(attn.processor).__name__ != PROCESSOR:
        projected = attn.to_qkv(normed).chunk(3, dim=-1)
    else:
        projected = (attn.to_q(normed), attn.to_k(normed), attn.to_v(normed))
    q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)
    cos, sin, start = rotary

    def norm_and_rotate(
        q_weight: Tensor | None, q_bias: Tensor | None, eps: float, k_weight: Tensor | None, k_bias: Tensor | None, _: float
    ) -> tuple[Tensor, Tensor]:
        affine = {"q_weight": q_weight, "q_bias": q_bias, "k_weight": k_weight, "k_bias": k_bias}
        return qk_norm_rope(q, k, **affine, cos=cos, sin=sin, rope_start=start, eps=eps, impl=impl)

    q, k = with_affine(attn.norm_q, lambda *of_q: with_affine(attn.norm_k, lambda *of_k: norm_and_rotate(*of_q, *of_k)))
    return q, k, v


def project_out(attn: Any, attended: Tensor) -> Tensor:
    """The output projection of attention: [B, H, S, D] -> [B, S, C]."""
    x = attended.transpose(1, 2).flatten(2)
    for module in attn.to_out:
        x = module(x)
    return x


def replaces_attention(attn: Any) -> list[str]:
    """Names of the processor and hooks that ask for another attention than the ops'; none for a stock module."""
    processor = type(getattr(attn, "processor", None)).__name__
    names = [] if processor in (PROCESSOR, FUSED_PROCESSOR, "NoneType") else [processor]
    return names + [name for module in (attn, attn.norm_q, attn.norm_k) for name in watching_hooks(module)]


def block_forward(
    block: Any,
    residual: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    norm1: Modulation,
    norm2: Modulation,
    rows: SegmentLayout,
    joint: SegmentLayout,
    rotary: Rotary,
    *,
    cached: KeyValue | None = None,
    keep: Sequence[str] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, KeyValue]:
    """One transformer block over a joint sequence.

        residual += gate * branch;  a = attention(AdaLN1(residual));  residual += gate1 * a;  f = feed_forward(AdaLN2(residual))

    Args:
        block: A module with `norm1.norm`, `attn1`, `norm2.norm` and `ff` as in diffusers' `CogVideoXBlock`.
        residual: Tokens of this pass, [B, S, C].
        branch: Feed-forward output of the block before, [B, S, C]; None in the first block.
        gate: Its gate, [B, G, C]; None in the first block.
        norm1: Modulation before attention; its gate is applied to the attention output.
        norm2: Modulation before the feed-forward; its gate is left to the next block.
        rows: Layout of the tokens of this pass.
        joint: Layout of all keys: `rows` itself, or `rows` followed by the segments of `cached`.
        rotary: Rotary tables for the tokens of this pass.
        cached: Keys and values of segments that are not in this pass, batch b; sample i of the pass uses sample i % b.
        keep: Names of the segments that are still needed after the attention of this block; None = all of `rows`, () = only
            keys and values are.
        impl: Implementation of the ops.

    Returns:
        residual and the feed-forward output, [B, S or rows of `keep`, C], and this pass' keys and values.

    Raises:
        NotImplementedError: A hook or a processor would be gone past; hooks that only place or cast parameters work.

    Source:
        diffusers `CogVideoXBlock` and `CogVideoXAttnProcessor2_0`; RealGeneral's Unified Stream DiT block.
    """
    others = replaces_attention(block.attn1)
    if others:
        raise NotImplementedError(f"attn1 must have diffusers' own processor and no hooks here, got {others}")
    residual, normed = norm_site(block.norm1.norm, residual, branch, gate, norm1, rows, impl)
    q, k, v = project_qkv(block.attn1, normed, rotary, impl)
    own = KeyValue(k, v)
    if keep is not None and not keep:
        return residual[:, :0], normed[:, :0], own
    if cached is not None:
        k = torch.cat([k, _tile(cached.k, k)], dim=2)
        v = torch.cat([v, _tile(cached.v, v)], dim=2)
    if keep is not None:
        q, residual = (
            torch.cat([x.narrow(d, rows.offset(n), rows.length(n)) for n in keep], d) for x, d in ((q, 2), (residual, 1))
        )
        norm1, norm2 = select_segments(norm1, rows, keep), select_segments(norm2, rows, keep)
        rows = SegmentLayout(tuple(keep), tuple(rows.length(name) for name in keep))

    attended = segment_attention(q, k, v, joint, query_segments=rows.names, impl=impl)
    assert isinstance(attended, Tensor)
    attended = project_out(block.attn1, attended)

    residual, normed = norm_site(block.norm2.norm, residual, attended, norm1.gate, norm2, rows, impl)
    return residual, block.ff(normed), own


def _tile(x: Tensor, like: Tensor) -> Tensor:
    """Bring [b, ...] to the batch and device of `like`; one shared sample is expanded, not copied."""
    batch, x = like.shape[0], x.to(like.device, non_blocking=True)
    return x.expand(batch, -1, -1, -1) if x.shape[0] == 1 else x.repeat(batch // x.shape[0], 1, 1, 1)


def finish(residual: Tensor, branch: Tensor, gate: Tensor, layout: SegmentLayout, impl: str) -> Tensor:
    """Apply the last block's pending gate: residual + gate * branch."""
    return segment_gate_residual(residual, _widened(branch, residual), _widened(gate, residual), layout, impl=impl)


def _widened(x: Tensor, tokens: Tensor) -> Tensor:
    """Half precision becomes that of the tokens if these are wider."""
    return x.to(tokens.dtype) if x.element_size() < tokens.element_size() else x
