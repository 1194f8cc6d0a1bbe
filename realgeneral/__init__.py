"""RealGeneral: image generation as next-frame prediction with a video diffusion transformer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from realgeneral.generation.pipeline import RealGeneralPipeline
    from realgeneral.model.adapter import save_adapter
    from realgeneral.model.cogvideox import RealGeneralTransformer3DModel
    from realgeneral.model.lora import merge_lora, unmerge_lora
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
    "RealGeneralPipeline": "realgeneral.generation.pipeline",
    "RealGeneralTransformer3DModel": "realgeneral.model.cogvideox",
    "merge_lora": "realgeneral.model.lora",
    "save_adapter": "realgeneral.model.adapter",
    "unmerge_lora": "realgeneral.model.lora",
    "__version__": "rgkernels",
    # a saved pipeline names this module, and diffusers asks it for this class to learn how to load the transformer
    "ModelMixin": "diffusers.models",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'realgeneral' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
