"""CogVideoX's token grids and positions: from latents to tokens and back.

Positions are explicit: the K conditions are frames 0..K-1 and the target is frame K, as in a clip whose next frame is
predicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_sincos_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor

from realgeneral.model.presets import remembered

# CogVideoX 1.5 was trained on sides of 768 to 1360 pixels; 768 x 1360 is its standard size
NEWER_SIDES = (768, 1360)


@dataclass(frozen=True)
class Geometry:
    """The part of a CogVideoX transformer's config that fixes sizes, token counts and positions.

    `height` and `width` of the methods are in latent pixels, sizes in pixels where the VAE's `factor` is asked for. CogVideoX
    1.0 makes one token of a `patch_size` square of one latent frame; 1.5 (`patch_size_t = 2`) of two latent frames, hence
    `frames_per_image`.
    """

    patch_size: int
    patch_size_t: int | None
    head_dim: int
    dim: int
    channels: int
    text_dim: int
    text_window: int
    sample_height: int
    sample_width: int
    rotary: bool
    spatial_interpolation_scale: float
    temporal_interpolation_scale: float

    @classmethod
    def of(cls, config: Any) -> Geometry:
        """Read a transformer's config."""
        return cls(
            patch_size=config.patch_size,
            patch_size_t=config.patch_size_t,
            head_dim=config.attention_head_dim,
            dim=config.attention_head_dim * config.num_attention_heads,
            channels=config.in_channels,
            text_dim=config.text_embed_dim,
            text_window=config.max_text_seq_length,
            sample_height=config.sample_height,
            sample_width=config.sample_width,
            rotary=config.use_rotary_positional_embeddings,
            spatial_interpolation_scale=config.spatial_interpolation_scale,
            temporal_interpolation_scale=config.temporal_interpolation_scale,
        )

    @property
    def frames_per_image(self) -> int:
        """Latent frames of one image: 1, or 2 identical ones for 1.5, whose patches span two."""
        return self.patch_size_t or 1

    @property
    def trained_sides(self) -> tuple[int, int] | None:
        """Least and greatest side in pixels that the base was trained on, if it was trained on several sizes."""
        return NEWER_SIDES if self.patch_size_t else None

    def default_size(self, factor: int) -> tuple[int, int]:
        """(height, width) in pixels that the base was trained on."""
        size = self.sample_height * factor, self.sample_width * factor
        # 1.5's sample size is the end of its position table, not what it was trained on
        return (min(size[0], NEWER_SIDES[0]), min(size[1], NEWER_SIDES[1])) if self.patch_size_t else size

    def largest_size(self, factor: int) -> tuple[int, int] | None:
        """Greatest (height, width) in pixels, where the position tables end; None = any."""
        return (self.sample_height * factor, self.sample_width * factor) if self.patch_size_t else None

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Tokens per column and row; ValueError if the latent size does not fit."""
        p = self.patch_size
        if height < p or width < p or height % p or width % p:
            raise ValueError(f"latent height and width must be multiples of patch_size {p}, got {height} x {width}")
        grid = height // p, width // p
        limit = self.sample_height // p, self.sample_width // p
        if self.rotary and self.patch_size_t and (grid[0] > limit[0] or grid[1] > limit[1]):
            raise ValueError(f"latent size must be at most {self.sample_height} x {self.sample_width}, got {height} x {width}")
        return grid

    def rotary_tables(
        self, height: int, width: int, frames: tuple[int, ...], device: torch.device
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """cos and sin, [len(frames) * N, head_dim] float32, of the tokens of the given frame indices; None without RoPE."""
        if not self.rotary:
            return None, None
        return _rotary(self, *self.grid(height, width), frames, str(device))

    def sincos_table(
        self, height: int, width: int, frames: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> Tensor | None:
        """Additive positions (2B), [len(frames) * N, dim], of the tokens of the given frame indices; None with RoPE."""
        if self.rotary:
            return None
        return _sincos(self, *self.grid(height, width), frames, str(device), dtype)


# the cached tables outlive the mode that a first caller may be in: training cannot save inference tensors, nor run on fake ones
@remembered
@torch.inference_mode(False)
def _rotary(geometry: Geometry, rows: int, columns: int, frames: tuple[int, ...], device: str) -> tuple[Tensor, Tensor]:
    p = geometry.patch_size
    base_height, base_width = geometry.sample_height // p, geometry.sample_width // p
    if geometry.patch_size_t is None:
        grid = {"crops_coords": get_resize_crop_region_for_grid((rows, columns), base_width, base_height)}
    else:
        grid = {"crops_coords": None, "grid_type": "slice", "max_size": (base_height, base_width)}
    tables = get_3d_rotary_pos_embed(
        geometry.head_dim, grid_size=(rows, columns), temporal_size=max(frames) + 1, device=torch.device(device), **grid
    )
    cos, sin = (t.unflatten(0, (-1, rows * columns))[list(frames)].flatten(0, 1).contiguous() for t in tables)
    return cos, sin


@remembered
@torch.inference_mode(False)
def _sincos(geometry: Geometry, rows: int, columns: int, frames: tuple[int, ...], device: str, dtype: torch.dtype) -> Tensor:
    table = get_3d_sincos_pos_embed(
        geometry.dim,
        (columns, rows),
        max(frames) + 1,
        geometry.spatial_interpolation_scale,
        geometry.temporal_interpolation_scale,
        device=torch.device(device),
        output_type="pt",
    )
    return table[list(frames)].flatten(0, 1).to(dtype)


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
