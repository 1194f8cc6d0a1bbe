"""RealGeneral: image generation as next-frame prediction with a video diffusion transformer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rgkernels import __version__

if TYPE_CHECKING:
    from realgeneral.pipeline import RealGeneralPipeline
    from realgeneral.transformer import RealGeneralTransformer3DModel

__all__ = ["RealGeneralPipeline", "RealGeneralTransformer3DModel", "__version__"]

_LAZY = {"RealGeneralPipeline": "realgeneral.pipeline", "RealGeneralTransformer3DModel": "realgeneral.transformer"}


def __getattr__(name: str) -> Any:
    # diffusers and transformers take seconds to import; `realgeneral --help` does without them
    if name not in _LAZY:
        raise AttributeError(f"module 'realgeneral' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
