"""Triton kernels for image-conditioned video diffusion transformers, forward and backward.

`rgkernels.patch(pipe)` runs a stock diffusers CogVideoX on them; the ops below build other models. Importing needs torch
alone: Triton is imported when a Triton implementation is asked for.
"""

from __future__ import annotations

from typing import Any

from rgkernels.adaln import segment_adaln, segment_gate_residual, segment_gate_residual_adaln
from rgkernels.attention import segment_attention
from rgkernels.qk_norm_rope import qk_norm_rope
from rgkernels.segments import SegmentLayout

__version__ = "0.1.0"

__all__ = [
    "SegmentLayout",
    "__version__",
    "patch",
    "qk_norm_rope",
    "segment_adaln",
    "segment_attention",
    "segment_gate_residual",
    "segment_gate_residual_adaln",
    "unpatch",
]


def patch(model_or_pipeline: Any, *, impl: str = "auto") -> Any:
    """Run a stock diffusers CogVideoX on these ops: outputs agree with the stock model within rounding.

    Args:
        model_or_pipeline: A `CogVideoXTransformer3DModel`, or a pipeline whose transformer is one (2B, 5B, I2V, 1.5). Changed
            in place; parameters keep their names and identity. LoRA, caches, processors, hooks and offloads may come before
            or after: docs/inference.md lists what each of them gets.
        impl: Of the ops: "auto" (Triton on CUDA, else the PyTorch reference), "triton" or "reference".

    Returns:
        `model_or_pipeline`. Patching again only sets `impl`.

    Raises:
        TypeError: Not a CogVideoX transformer, or no pipeline with one.
        ValueError: Unknown `impl`, a block without QK-norm, or one whose forward was replaced by hand.

    Note:
        Outputs agree with stock's within rounding: norms and rotation run in float32 with one rounding at the end. A pass
        raises NotImplementedError for a hook on a norm that the ops would go past.

    Source:
        diffusers `CogVideoXBlock`; needs diffusers, which importing `rgkernels` does not.
    """
    from rgkernels import _patch

    return _patch.patch(model_or_pipeline, impl=impl)


def unpatch(model_or_pipeline: Any) -> Any:
    """Undo `patch`: the model computes bit for bit what it did before, and one that was not patched stays as it is.

    Args:
        model_or_pipeline: As for `patch`.

    Returns:
        `model_or_pipeline`.

    Raises:
        TypeError: Not a CogVideoX transformer, or no pipeline with one; or a block that was wrapped after `patch` (FSDP2).
    """
    from rgkernels import _patch

    return _patch.unpatch(model_or_pipeline)
