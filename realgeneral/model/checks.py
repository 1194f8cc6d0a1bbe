"""What the inputs of a transformer must be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from realgeneral.model.condition import ConditionCache, Embedded
from realgeneral.model.presets import Preset


def check_target(latents: Tensor, geometry: Any) -> tuple[int, int]:
    """Token grid of the target's latents; ValueError if their shape does not fit."""
    frames, channels = geometry.frames_per_image, geometry.channels
    if latents.dim() != 5 or latents.shape[1] != frames or latents.shape[2] != channels:
        raise ValueError(f"hidden_states must have shape [B, {frames}, {channels}, h, w], got {list(latents.shape)}")
    return geometry.grid(latents.shape[-2], latents.shape[-1])


def check_conditions(latents: Tensor, target: torch.Size) -> None:
    """ValueError unless condition latents are [B, K >= 1, C, h, w] for a target of shape [B, F, C, h, w]."""
    (batch, *_), rest = target, list(target[2:])
    if latents.dim() != 5 or not latents.shape[1] or [latents.shape[0], *latents.shape[2:]] != [batch, *rest]:
        expected = f"[B, K, C, h, w] = [{batch}, K >= 1, {', '.join(map(str, rest))}]"
        raise ValueError(f"condition_latents must have shape {expected}, got {list(latents.shape)}")


def check_joint(latents: Tensor, embedded: Embedded, cache: ConditionCache | None, geometry: Any, preset: Preset) -> int:
    """Number of condition images; ValueError if target, embedded inputs and cache do not fit each other."""
    grid, batch = check_target(latents, geometry), latents.shape[0]
    if embedded.text.shape[0] != batch:
        raise ValueError(f"encoder_hidden_states must have batch {batch}, got {embedded.text.shape[0]}")
    if cache is None:
        name, given = "condition_latents", embedded.condition
        assert given is not None
        shared, got, count = given.shape[0], embedded.grid, embedded.conditions
    else:
        if not preset.cacheable:
            raise ValueError(f"condition_cache needs preset 'cached', got {preset.name!r}")
        name, shared, got, count = "condition_cache", cache.batch, cache.grid, cache.conditions
    if got != grid:
        raise ValueError(f"{name} must be of a {grid} token grid, got {got}")
    if batch % shared:
        raise ValueError(f"{name} must have batch 1 or a divisor of {batch}, got {shared}")
    return count
