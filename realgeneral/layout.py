"""From latent sizes to the joint sequence: presets, segment layouts and position tables.

The joint order is `[text | target | condition ...]`, so that each segment sees contiguous keys. Positions are explicit: the K
conditions are frames 0..K-1 and the target is frame K, as in a clip whose next frame is predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_sincos_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from rgkernels import SegmentLayout

# CogVideoX 1.5 was trained on sides of 768 to 1360 pixels; 768 x 1360 is its standard size
NEWER_SIDES = (768, 1360)

P = ParamSpec("P")
R = TypeVar("R")


def _remembered(function: Callable[P, R]) -> Callable[P, R]:
    """lru_cache, except under torch.compile, which would trace the function anyway and warn that it ignores the cache."""
    cached = lru_cache(maxsize=256)(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with unset_fake_temporarily():  # type: ignore[no-untyped-call]
            return cached(*args, **kwargs)  # type: ignore[arg-type]

    return call


@dataclass(frozen=True)
class Preset:
    """How condition tokens take part in a step. A model is sampled in the preset that it was trained in.

    Args:
        name: "paper", "cached" or "open".
        decoupled: Text and condition do not see each other, nor do two conditions (Frame-Condition Decoupling).
        condition_sees_target: Condition queries attend to target keys.
        condition_time_zero: The condition branch is modulated with timestep 0 instead of the target's timestep.
    """

    name: str
    decoupled: bool
    condition_sees_target: bool
    condition_time_zero: bool

    @property
    def cacheable(self) -> bool:
        """Whether the condition's keys and values are the same in every step, for every prompt and target."""
        return self.decoupled and self.condition_time_zero and not self.condition_sees_target


PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("paper", decoupled=True, condition_sees_target=True, condition_time_zero=False),
        Preset("cached", decoupled=True, condition_sees_target=False, condition_time_zero=True),
        # nothing blocked, one time: stock CogVideoX attention on the clip; for ablations and the step-0 property test
        Preset("open", decoupled=False, condition_sees_target=True, condition_time_zero=False),
    )
}


def get_preset(name: str) -> Preset:
    """Look a preset up by name; ValueError with the known names otherwise."""
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {tuple(PRESETS)}, got {name!r}")
    return PRESETS[name]


def condition_names(count: int) -> tuple[str, ...]:
    """Segment names of `count` condition images: "condition", or "condition_0", "condition_1", ..."""
    return ("condition",) if count == 1 else tuple(f"condition_{i}" for i in range(count))


@_remembered
def joint_layout(preset: Preset, text: int, image: int, conditions: int) -> SegmentLayout:
    """Layout of the joint sequence.

    Args:
        preset: Which pairs are blocked.
        text: Number of text tokens.
        image: Number of tokens of the target and of each condition image.
        conditions: Number of condition images.
    """
    names = condition_names(conditions)
    blocked: set[tuple[str, str]] = set()
    for name in names:
        if preset.decoupled:
            blocked |= {("text", name), (name, "text")}
            blocked |= {(name, other) for other in names if other != name}
        if not preset.condition_sees_target:
            blocked.add((name, "target"))
    return SegmentLayout(("text", "target", *names), (text, *[image] * (1 + conditions)), frozenset(blocked))


@_remembered
def sublayout(layout: SegmentLayout, names: tuple[str, ...]) -> SegmentLayout:
    """The layout of some segments alone, with the blocked pairs among them."""
    blocked = frozenset(pair for pair in layout.blocked if pair[0] in names and pair[1] in names)
    return SegmentLayout(names, tuple(layout.length(name) for name in names), blocked)


@dataclass(frozen=True)
class Geometry:
    """The part of a CogVideoX transformer's config that fixes token counts and positions.

    Sizes `height` and `width` of the methods are in latent pixels. CogVideoX 1.0 makes one token of a `patch_size` square of
    one latent frame; 1.5 (`patch_size_t = 2`) of two latent frames, hence `frames_per_image`.
    """

    patch_size: int
    patch_size_t: int | None
    head_dim: int
    dim: int
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
@_remembered
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


@_remembered
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
