"""`--fused-kernels`: which implementation of the ops a model runs on."""

from __future__ import annotations

import torch

from realgeneral.errors import UsageError
from realgeneral.model.transformer import RealGeneralTransformer3DModel
from rgkernels._impl import require_triton


def check_kernels(fused: bool, device: torch.device) -> None:
    """UsageError that says what is missing if kernels are asked for where they cannot run."""
    if fused:
        try:
            require_triton(device)
        except RuntimeError as error:
            raise UsageError(f"--fused-kernels cannot run here: {error}") from None


def use_kernels(transformer: RealGeneralTransformer3DModel, fused: bool, device: torch.device) -> None:
    """Run the model on Triton kernels, or on plain PyTorch; UsageError as `check_kernels`."""
    check_kernels(fused, device)
    transformer.impl = "triton" if fused else "reference"
