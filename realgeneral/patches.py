"""Latents to tokens and back, for one image per frame index."""

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
