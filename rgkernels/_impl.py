"""Choosing an implementation, in the open: a named choice never falls back, "auto" follows the device."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

OP_IMPLS = ("auto", "triton", "reference")
ATTENTION_IMPLS = (*OP_IMPLS, "flash-attn")
# asked once: torch.compile of torch 2.11 does not trace the question
HAS_TRITON = importlib.util.find_spec("triton") is not None
# older ones (Turing, Volta) have neither bfloat16 nor asynchronous copies, and no row in the launch table
MIN_CAPABILITY = (8, 0)


def resolve(impl: str, device: torch.device, choices: tuple[str, ...] = OP_IMPLS) -> str:
    """Name the implementation that will run: "triton", "reference" or "flash-attn".

    Args:
        impl: What the caller asked for; "auto" means Triton on CUDA tensors (compute capability 8.0 or newer) and the
            reference elsewhere.
        device: Where the tensors are.
        choices: The names that this op knows.

    Raises:
        ValueError: Unknown name.
        RuntimeError: The choice cannot run here; the message says what is missing.
    """
    if impl not in choices:
        raise ValueError(f"impl must be one of {choices}, got {impl!r}")
    if impl == "auto":
        impl = "triton" if device.type == "cuda" and not _capability_below(device) else "reference"
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
    found = _capability_below(device)
    if found:
        raise RuntimeError(
            f"impl='triton' needs compute capability 8.0 or newer, got {found} on {device}: choose impl='reference'"
        )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _capability_below(device: torch.device) -> str:
    """The capability of a device that is too old for the kernels, such as "7.5"; "" for one that is not."""
    # AMD's numbers mean something else, and fake CUDA tensors are traced on machines without CUDA
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return ""
    found = _capability(device)
    return "" if found >= MIN_CAPABILITY else ".".join(map(str, found))


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
