"""Gradient checkpointing: which activations of a block are kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# the costly ops of a block whose outputs are small: recomputing one costs S^2, keeping it S * d
ATTENTION_OPS = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "rgkernels::segment_attention",
        "flash_attn::_flash_attn_forward",
    }
)


def checkpointing(kind: Literal["full", "selective"]) -> Callable[..., Any]:
    """A function for diffusers' `enable_gradient_checkpointing`: runs a block and keeps little of it.

    Args:
        kind: "full" keeps a block's inputs and runs it again in the backward pass; "selective" also keeps the outputs of
            attention, which is then not run again.

    Returns:
        `function(block, *args) -> block(*args)`.

    Note:
        Gradients are bit-equal to those without checkpointing.
    """
    if kind == "full":
        return partial(checkpoint, use_reentrant=False)
    return partial(checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, _policy))


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op.name() in ATTENTION_OPS else CheckpointPolicy.PREFER_RECOMPUTE
