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
    """Run a stock diffusers CogVideoX (model or pipeline) on these ops; see `rgkernels._patch.patch`."""
    from rgkernels import _patch

    return _patch.patch(model_or_pipeline, impl=impl)


def unpatch(model_or_pipeline: Any) -> Any:
    """Undo `patch`, bit for bit."""
    from rgkernels import _patch

    return _patch.unpatch(model_or_pipeline)
