"""Presets: which segments of the joint sequence see each other, and the condition's timestep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from rgkernels import SegmentLayout

P = ParamSpec("P")
R = TypeVar("R")


def remembered(function: Callable[P, R]) -> Callable[P, R]:
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


@remembered
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


@remembered
def sublayout(layout: SegmentLayout, names: tuple[str, ...]) -> SegmentLayout:
    """The layout of some segments alone, with the blocked pairs among them."""
    blocked = frozenset(pair for pair in layout.blocked if pair[0] in names and pair[1] in names)
    return SegmentLayout(names, tuple(layout.length(name) for name in names), blocked)
