"""Latents to tokens and back, for one image per frame index; also what sizes a transformer takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from realgeneral.layout import Geometry


def image_tokens(patch_embed: Any, geometry: Geometry, latents: Tensor, frames: tuple[int, ...]) -> Tensor:
    """Patch embedding with positions, one frame index per image.

    Args:
        patch_embed: diffusers' `CogVideoXPatchEmbed`.
        geometry: Of the transformer.
        latents: [B, F, C, h, w]; F = len(frames) * `geometry.frames_per_image`.
        frames: Frame index of each image.

    Returns:
        [B, len(frames) * N, d].
    """
    batch, _, _, height, width = latents.shape
    p, p_t = geometry.patch_size, geometry.patch_size_t
    if p_t is None:
        tokens = patch_embed.proj(latents.flatten(0, 1)).flatten(2).transpose(1, 2)
    else:
        # (F, p_t), (h, p), (w, p) patches; features in the order (C, p_t, p, p), as diffusers' CogVideoXPatchEmbed
        patches = latents.unflatten(4, (-1, p)).unflatten(3, (-1, p)).unflatten(1, (-1, p_t))
        tokens = patch_embed.proj(patches.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4))
    tokens = tokens.reshape(batch, -1, geometry.dim)
    positions = geometry.sincos_table(height, width, frames, tokens.device, tokens.dtype)
    return tokens if positions is None else tokens + positions


def unpatchify(geometry: Geometry, tokens: Tensor, shape: torch.Size) -> Tensor:
    """[B, N, features] of one image -> its latents [B, F, C, h, w] = `shape`."""
    rows, columns = geometry.grid(shape[-2], shape[-1])
    p, p_t = geometry.patch_size, geometry.frames_per_image
    patches = tokens.reshape(shape[0], -1, rows, columns, shape[2], p_t, p, p)
    return patches.permute(0, 1, 5, 4, 2, 6, 3, 7).reshape(shape)


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
