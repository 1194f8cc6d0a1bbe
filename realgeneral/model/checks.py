"""What a base and the inputs of its transformer must be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from realgeneral.model.condition import ConditionCache
from realgeneral.model.embedding import Embedded
from realgeneral.model.geometry import Geometry
from realgeneral.model.presets import Preset


def check_base(config: Any) -> None:
    """ValueError unless a transformer's config is that of a text-to-video CogVideoX."""
    if config.in_channels != config.out_channels or config.ofs_embed_dim or config.use_learned_positional_embeddings:
        raise ValueError(
            "the base must be a text-to-video CogVideoX (in_channels = out_channels, no ofs_embed_dim, no learned positions), "
            f"got in_channels {config.in_channels}, out_channels {config.out_channels}, ofs_embed_dim {config.ofs_embed_dim}, "
            f"use_learned_positional_embeddings {config.use_learned_positional_embeddings}"
        )


def check_target(latents: Tensor, geometry: Geometry, channels: int) -> tuple[int, int]:
    """Token grid of the target's latents; ValueError if their shape does not fit."""
    frames = geometry.frames_per_image
    if latents.dim() != 5 or latents.shape[1] != frames or latents.shape[2] != channels:
        raise ValueError(f"hidden_states must have shape [B, {frames}, {channels}, h, w], got {list(latents.shape)}")
    return geometry.grid(latents.shape[-2], latents.shape[-1])


def check_conditions(latents: Tensor, target: torch.Size) -> None:
    """ValueError unless condition latents are [B, K >= 1, C, h, w] for a target of shape [B, F, C, h, w]."""
    (batch, *_), rest = target, list(target[2:])
    if latents.dim() != 5 or not latents.shape[1] or [latents.shape[0], *latents.shape[2:]] != [batch, *rest]:
        expected = f"[B, K, C, h, w] = [{batch}, K >= 1, {', '.join(map(str, rest))}]"
        raise ValueError(f"condition_latents must have shape {expected}, got {list(latents.shape)}")


def check_joint(
    latents: Tensor, embedded: Embedded, cache: ConditionCache | None, geometry: Geometry, channels: int, preset: Preset
) -> int:
    """Number of condition images; ValueError if target, embedded inputs and cache do not fit each other."""
    grid, batch = check_target(latents, geometry, channels), latents.shape[0]
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
