"""RealGeneral: image generation as next-frame prediction with a video diffusion transformer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from realgeneral.adapter import merge_lora, save_adapter, unmerge_lora
    from realgeneral.pipeline import RealGeneralPipeline
    from realgeneral.transformer import RealGeneralTransformer3DModel
    from rgkernels import __version__

__all__ = [
    "RealGeneralPipeline",
    "RealGeneralTransformer3DModel",
    "__version__",
    "merge_lora",
    "save_adapter",
    "unmerge_lora",
]

# torch, diffusers and transformers take seconds to import; `realgeneral --help` does without them
_LAZY = {
    "RealGeneralPipeline": "realgeneral.pipeline",
    "RealGeneralTransformer3DModel": "realgeneral.transformer",
    "merge_lora": "realgeneral.adapter",
    "save_adapter": "realgeneral.adapter",
    "unmerge_lora": "realgeneral.adapter",
    "__version__": "rgkernels",
    # a saved pipeline names this module, and diffusers asks it for this class to learn how to load the transformer
    "ModelMixin": "diffusers.models",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'realgeneral' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
