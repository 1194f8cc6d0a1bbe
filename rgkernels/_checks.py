"""Argument checks that the public ops share. Every message names the argument and both values."""

from __future__ import annotations

import torch
from torch import Tensor

from rgkernels.segments import SegmentLayout

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, x: Tensor, shape: tuple[int, ...], letters: str, like: Tensor | None = None) -> None:
    """Check shape, contiguous last dim, and dtype and device against `like` (or a floating dtype if there is none)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape [{letters}] = {list(shape)}, got {list(x.shape)}")
    if x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name} must have a contiguous last dim (stride 1), got strides {list(x.stride())}")
    if like is None:
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        return
    if x.dtype != like.dtype:
        raise ValueError(f"{name} must have dtype {like.dtype} like the first tensor, got {x.dtype}")
    check_device(name, x, like)


def check_device(name: str, x: Tensor, like: Tensor) -> None:
    """Check that two tensors are on one device."""
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the first tensor, got {x.device}")


def check_rank(name: str, x: Tensor, letters: str) -> None:
    """Check the number of dimensions of the tensor that fixes all other shapes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    rank = len(letters.split(", "))
    if x.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions [{letters}], got shape {list(x.shape)}")


def check_affine(name: str, x: Tensor | None, size: int, letter: str, like: Tensor) -> None:
    """Check an optional norm parameter: its dtype may be wider than the tokens' (float32 masters)."""
    if x is None:
        return
    check_tensor(name, x, (size,), letter)
    check_device(name, x, like)


def check_layout_type(layout: SegmentLayout) -> None:
    """Check that it is a layout."""
    if not isinstance(layout, SegmentLayout):
        raise TypeError(f"layout must be a SegmentLayout, got {type(layout).__name__}")


def check_layout(layout: SegmentLayout, seq_len: int, name: str) -> None:
    """Check that a layout's lengths sum to the sequence length of the tensor `name`."""
    check_layout_type(layout)
    if layout.seq_len != seq_len:
        raise ValueError(f"layout lengths {layout.lengths} must sum to {name}'s S = {seq_len}, got {layout.seq_len}")


def check_eps(eps: float) -> None:
    """Check a LayerNorm epsilon."""
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
