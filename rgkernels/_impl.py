"""Choosing an implementation, in the open: a named choice never falls back, "auto" follows the device."""

from __future__ import annotations

import importlib.util
import os

import torch

OP_IMPLS = ("auto", "triton", "reference")
ATTENTION_IMPLS = (*OP_IMPLS, "flash-attn")
# asked once: torch.compile of torch 2.11 does not trace the question
HAS_TRITON = importlib.util.find_spec("triton") is not None


def resolve(impl: str, device: torch.device, choices: tuple[str, ...] = OP_IMPLS) -> str:
    """Name the implementation that will run: "triton", "reference" or "flash-attn".

    Args:
        impl: What the caller asked for; "auto" means Triton on CUDA tensors and the reference elsewhere.
        device: Where the tensors are.
        choices: The names that this op knows.

    Raises:
        ValueError: Unknown name.
        RuntimeError: The choice cannot run here; the message says what is missing.
    """
    if impl not in choices:
        raise ValueError(f"impl must be one of {choices}, got {impl!r}")
    if impl == "auto":
        impl = "triton" if device.type == "cuda" else "reference"
    if impl == "triton":
        require_triton(device)
    return impl


def require_triton(device: torch.device) -> None:
    """Raise a RuntimeError that says what is missing if Triton kernels cannot run on `device`."""
    if not HAS_TRITON:
        raise RuntimeError("impl='triton' needs the triton package, found none: pip install triton")
    if device.type not in ("cuda", "meta") and not interpreting():
        raise RuntimeError(
            f"impl='triton' needs CUDA tensors, got {device.type} tensors "
            "(TRITON_INTERPRET=1 in the environment before Python starts runs the kernels in Triton's interpreter)"
        )


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
