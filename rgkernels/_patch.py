"""Run a stock diffusers CogVideoX on the ops: `patch(pipe)`, and back: `unpatch(pipe)`.

Patching swaps the class of each transformer block and nothing else: modules, parameters, state-dict keys, LoRA layers and their
names stay what they are. Between patched blocks the joint sequence travels as one tensor, with the feed-forward branch of the
block before still to be added (`_Pending`); the first block makes it from diffusers' two streams and the last one ends it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import Tensor, nn

from rgkernels._impl import OP_IMPLS
from rgkernels.cogvideox import Rotary, block_forward, finish, stack_modulation
from rgkernels.segments import SegmentLayout

_PROCESSORS = (CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0)


class _Pending(NamedTuple):
    """What travels between patched blocks in the place of diffusers' text stream."""

    branch: Tensor
    gate: Tensor
    text_length: int


class _BlockState(NamedTuple):
    """Where a patched block stands, and what it runs on."""

    is_first: bool
    is_last: bool
    impl: str


class FusedCogVideoXBlock(CogVideoXBlock):  # type: ignore[misc]
    """`CogVideoXBlock` with its forward on the ops; made by `patch`, never constructed."""

    _rgkernels: _BlockState

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | _Pending,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor | _Pending]:
        """Same meaning as the stock block for the first input and the last output; joint tensors in between."""
        if attention_kwargs:
            raise NotImplementedError(f"attention_kwargs must be empty in a patched block, got {sorted(attention_kwargs)}")
        state = self._rgkernels
        if self.norm1.norm.weight is not None and self.norm1.norm.weight.is_meta:
            raise NotImplementedError("a patched block must hold its weights, got meta ones (sequential offload)")
        if isinstance(encoder_hidden_states, _Pending):
            residual, branch, gate = hidden_states, encoder_hidden_states.branch, encoder_hidden_states.gate
            text_length = encoder_hidden_states.text_length
        else:
            text_length = encoder_hidden_states.shape[1]
            residual, branch, gate = torch.cat([encoder_hidden_states, hidden_states], dim=1), None, None
        layout = SegmentLayout(("text", "target"), (text_length, residual.shape[1] - text_length))
        cos, sin = image_rotary_emb if image_rotary_emb is not None else (None, None)
        norm1, norm2 = (self._modulation(norm, temb) for norm in (self.norm1, self.norm2))
        residual, branch, _ = block_forward(
            self, residual, branch, gate, norm1, norm2, layout, layout, Rotary(cos, sin, text_length), impl=state.impl
        )
        if not state.is_last:
            return residual, _Pending(branch, norm2.gate, text_length)
        joint = finish(residual, branch, norm2.gate, layout, state.impl)
        return joint[:, text_length:], joint[:, :text_length]

    @staticmethod
    def _modulation(norm: Any, temb: Tensor) -> Any:
        parts = norm.linear(norm.silu(temb)).chunk(6, dim=1)
        return stack_modulation([parts[3:], parts[:3]])


def patch(model_or_pipeline: Any, *, impl: str = "auto") -> Any:
    """Run a stock CogVideoX transformer on the ops of this package.

    Args:
        model_or_pipeline: A diffusers `CogVideoXTransformer3DModel`, or a pipeline whose transformer is one (2B, 5B, I2V,
            1.5; with LoRA, fused QKV projections, gradient checkpointing or a LoRA scale). Changed in place.
        impl: Implementation of the ops: "auto" is Triton on CUDA and the PyTorch reference elsewhere.

    Returns:
        `model_or_pipeline`. Patching a patched model only sets `impl`.

    Raises:
        TypeError: Not a CogVideoX transformer, or no pipeline with one.
        ValueError: Unknown impl, or a block that cannot be swapped: custom attention processor, or a hooked forward.
            Sequential offload is not supported: it moves single weights that the ops read directly.

    Note:
        Outputs agree with the stock model within rounding: norms and rotation run in float32 with one rounding at the end.
    """
    if impl not in OP_IMPLS:
        raise ValueError(f"impl must be one of {OP_IMPLS}, got {impl!r}")
    model = _transformer(model_or_pipeline)
    blocks = list(model.transformer_blocks)
    for i, block in enumerate(blocks):
        _check_block(i, block)
    for i, block in enumerate(blocks):
        block.__class__ = FusedCogVideoXBlock
        block._rgkernels = _BlockState(i == 0, i == len(blocks) - 1, impl)
    # models that call the ops themselves (RealGeneral) keep their choice in `impl`
    if hasattr(model, "impl"):
        model._impl_before_patch = getattr(model, "_impl_before_patch", model.impl)
        model.impl = impl
    return model_or_pipeline


def unpatch(model_or_pipeline: Any) -> Any:
    """Undo `patch`: the model computes bit for bit what it did before. Unpatched models stay as they are."""
    model = _transformer(model_or_pipeline)
    for block in model.transformer_blocks:
        if isinstance(block, FusedCogVideoXBlock):
            block.__class__ = CogVideoXBlock
            del block._rgkernels
    if hasattr(model, "_impl_before_patch"):
        model.impl = model._impl_before_patch
        del model._impl_before_patch
    return model_or_pipeline


def _transformer(model_or_pipeline: Any) -> Any:
    model = model_or_pipeline
    if not isinstance(model, nn.Module):
        model = getattr(model_or_pipeline, "transformer", None)
    if not isinstance(model, CogVideoXTransformer3DModel):
        raise TypeError(
            "model_or_pipeline must be a CogVideoXTransformer3DModel or a pipeline whose transformer is one, "
            f"got {type(model_or_pipeline).__name__}" + ("" if model is None else f" with {type(model).__name__}")
        )
    return model


def _check_block(index: int, block: Any) -> None:
    if type(block) not in (CogVideoXBlock, FusedCogVideoXBlock):
        raise TypeError(f"transformer_blocks[{index}] must be a CogVideoXBlock, got {type(block).__name__}")
    if "forward" in block.__dict__:
        raise ValueError(f"transformer_blocks[{index}] must not have a forward replaced by a hook (offload)")
    processor = block.attn1.processor
    if type(processor) not in _PROCESSORS:
        raise ValueError(f"attention processor of block {index} must be CogVideoX's own, got {type(processor).__name__}")
    if block.attn1.norm_q is None:
        raise ValueError(f"attention of block {index} must have QK-norm, got none")
