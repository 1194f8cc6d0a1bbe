"""Run a stock diffusers CogVideoX on the ops: `patch(pipe)`, and back: `unpatch(pipe)`.

Patching swaps the class of each transformer block and sets two hooks on the model: modules, parameters, state-dict keys, LoRA
layers and their names stay what they are. A patched block takes and returns diffusers' two streams. Inside one pass of the
model, two neighbours that nothing watches go without them: the joint sequence goes over as one tensor, with the feed-forward
branch still to be added (`_Pending`). Before every pass the model's hook finds these neighbours (`_plan`): so hooks, caches
and changes of the list of blocks have their effect whenever they come.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any, NamedTuple

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import Tensor, nn

from rgkernels._hooks import refuse_hooks, watching_hooks
from rgkernels._impl import OP_IMPLS
from rgkernels.attention import segment_attention
from rgkernels.cogvideox import (
    Modulation,
    Rotary,
    finish,
    norm_site,
    project_out,
    project_qkv,
    replaces_attention,
    stack_modulation,
)
from rgkernels.segments import SegmentLayout


class _Pending(NamedTuple):
    """What goes from one patched block to the next in the place of diffusers' text stream."""

    branch: Tensor
    gate: Tensor
    text_length: int


class FusedCogVideoXBlock(CogVideoXBlock):  # type: ignore[misc]
    """`CogVideoXBlock` with its forward on the ops; made by `patch`, never constructed.

    Attributes:
        rgkernels_impl: Implementation of the ops; None runs the stock forward, for hooks that kept ours after `unpatch`.
        rgkernels_flows: The next block takes this one's output as `_Pending`.
    """

    rgkernels_impl: str | None
    rgkernels_flows: bool

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | _Pending,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor | _Pending]:
        """Same meaning as the stock block."""
        impl = self.__dict__.get("rgkernels_impl")
        if impl is None:
            return CogVideoXBlock.forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_kwargs)  # type: ignore[no-any-return]
        if attention_kwargs:
            raise NotImplementedError(f"attention_kwargs must be empty in a patched block, got {sorted(attention_kwargs)}")
        if isinstance(encoder_hidden_states, _Pending):
            residual, (branch, gate, text_length) = hidden_states, encoder_hidden_states
        else:
            text_length = encoder_hidden_states.shape[1]
            residual, branch, gate = torch.cat([encoder_hidden_states, hidden_states], dim=1), None, None
        layout = SegmentLayout(("text", "target"), (text_length, residual.shape[1] - text_length))
        cos, sin = image_rotary_emb if image_rotary_emb is not None else (None, None)
        norm1, norm2 = (self._modulation(norm, temb) for norm in (self.norm1, self.norm2))
        residual, normed = norm_site(self.norm1.norm, residual, branch, gate, norm1, layout, impl)
        attended = self._attention(normed, Rotary(cos, sin, text_length), layout, impl)
        residual, normed = norm_site(self.norm2.norm, residual, attended, norm1.gate, norm2, layout, impl)
        branch = self.ff(normed)
        if self.rgkernels_flows:
            return residual, _Pending(branch, norm2.gate, text_length)
        text, video = finish(residual, branch, norm2.gate, layout, impl).split(layout.lengths, dim=1)
        return video, text

    @staticmethod
    def _modulation(norm: Any, temb: Tensor) -> Modulation:
        parts = norm.linear(norm.silu(temb)).chunk(6, dim=1)
        return stack_modulation([parts[3:], parts[:3]])

    def _attention(self, normed: Tensor, rotary: Rotary, layout: SegmentLayout, impl: str) -> Tensor:
        """On the ops; as stock calls it where a processor or a hook asks for that."""
        if not replaces_attention(self.attn1):
            q, k, v = project_qkv(self.attn1, normed, rotary, impl)
            attended = segment_attention(q, k, v, layout, impl=impl)
            assert isinstance(attended, Tensor)
            return project_out(self.attn1, attended)
        text, video = normed.split(layout.lengths, dim=1)
        tables = None if rotary.cos is None else (rotary.cos, rotary.sin)
        video, text = self.attn1(hidden_states=video, encoder_hidden_states=text, image_rotary_emb=tables)
        return torch.cat([text, video], dim=1)


# diffusers' caches ask what a block's class takes and returns
_metadata = copy.copy(TransformerBlockRegistry.get(CogVideoXBlock))
TransformerBlockRegistry.register(FusedCogVideoXBlock, _metadata)


def patch(model_or_pipeline: Any, *, impl: str = "auto") -> Any:
    """Run a stock CogVideoX transformer on the ops of this package; `rgkernels.patch` describes it."""
    if impl not in OP_IMPLS:
        raise ValueError(f"impl must be one of {OP_IMPLS}, got {impl!r}")
    model = _transformer(model_or_pipeline)
    for i, block in enumerate(model.transformer_blocks):
        _check_block(i, block)
    for block in model.transformer_blocks:
        block.__class__ = FusedCogVideoXBlock
        block.rgkernels_impl, block.rgkernels_flows = impl, False
        for holder, name in _kept_forwards(block):
            holder[name] = MethodType(FusedCogVideoXBlock.forward, block)
    if _plan not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_plan)
        model.register_forward_hook(_end, always_call=True)
    # models that call the ops themselves (RealGeneral) keep their choice in `impl`
    if hasattr(model, "impl"):
        model._impl_before_patch = getattr(model, "_impl_before_patch", model.impl)
        model.impl = impl
    return model_or_pipeline


def unpatch(model_or_pipeline: Any) -> Any:
    """Undo `patch`: the model computes bit for bit what it did before. Unpatched models stay as they are."""
    model = _transformer(model_or_pipeline)
    for i, block in enumerate(model.transformer_blocks):
        if isinstance(block, FusedCogVideoXBlock) and type(block) is not FusedCogVideoXBlock:
            raise TypeError(f"transformer_blocks[{i}] must be unpatched before it is wrapped, got {type(block).__name__}")
    for block in model.transformer_blocks:
        if isinstance(block, FusedCogVideoXBlock):
            block.__class__ = CogVideoXBlock
            del block.rgkernels_impl, block.rgkernels_flows
    for hooks, ours in ((model._forward_pre_hooks, _plan), (model._forward_hooks, _end)):
        for key in [key for key, hook in hooks.items() if hook is ours]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)
    if hasattr(model, "_impl_before_patch"):
        model.impl = model._impl_before_patch
        del model._impl_before_patch
    return model_or_pipeline


def _plan(model: Any, args: Any) -> None:
    """Before a pass: find the neighbours between which the joint tensor may go over as it is, and what would be gone past."""
    blocks = list(model.transformer_blocks)
    # checkpointing keeps what goes between blocks, one tensor instead of two; the reentrant kind sees no tensors in a tuple
    checkpointed = model.gradient_checkpointing and torch.is_grad_enabled()
    alone = [checkpointed or not isinstance(block, FusedCogVideoXBlock) or bool(watching_hooks(block)) for block in blocks]
    for i, block in enumerate(blocks):
        if isinstance(block, FusedCogVideoXBlock):
            for name in ("norm1", "norm2"):
                refuse_hooks(f"transformer_blocks[{i}].{name}", getattr(block, name))
            block.rgkernels_flows = i + 1 < len(blocks) and not alone[i] and not alone[i + 1]


def _end(model: Any, args: Any, output: Any) -> None:
    """After a pass: a block that is called by itself returns diffusers' two streams."""
    for block in model.transformer_blocks:
        if isinstance(block, FusedCogVideoXBlock):
            block.rgkernels_flows = False


def _kept_forwards(block: Any) -> list[tuple[dict[str, Any], str]]:
    """Where hooks of diffusers and accelerate keep the forward of a block that they go around."""
    registry = block.__dict__.get("_diffusers_hook")
    holders = [block.__dict__, *(vars(reference) for reference in (registry._fn_refs if registry is not None else []))]
    ours = (CogVideoXBlock.forward, FusedCogVideoXBlock.forward)
    names = ("forward", "_old_forward", "original_forward")
    return [(holder, name) for holder in holders for name in names if getattr(holder.get(name), "__func__", None) in ours]


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
    if "forward" in block.__dict__ and not _kept_forwards(block):
        raise ValueError(f"transformer_blocks[{index}] must not have a forward replaced by other than diffusers or accelerate")
    if block.attn1.norm_q is None:
        raise ValueError(f"attention of block {index} must have QK-norm, got none")
