"""Calls of a tiny pipeline whose images can be compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from realgeneral import RealGeneralPipeline

OpenPipeline = Callable[..., RealGeneralPipeline]
TASKS = ("canny", "customization")
PROMPTS = ["a red pot", "blue cat on the table"]


def alive(pipe: RealGeneralPipeline, preset: str = "cached") -> RealGeneralPipeline:
    """A condition branch that does something, so that mixed-up rows show."""
    pipe.transformer.configure_condition(TASKS, preset)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in pipe.transformer.condition_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return pipe


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def call(pipe: RealGeneralPipeline, *args: Any, **kwargs: Any) -> torch.Tensor:
    defaults: dict[str, Any] = {"task": "canny", "num_inference_steps": 2, "output_type": "pt", "height": 64, "width": 96}
    return pipe(*args, **{**defaults, **kwargs}).images


def assert_same(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal up to what another batch size changes in the order of float32 sums."""
    assert actual.shape == wanted.shape
    assert (actual - wanted).abs().max() <= 2e3 * torch.finfo(torch.float32).eps
