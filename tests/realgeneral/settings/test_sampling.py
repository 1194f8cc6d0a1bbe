"""Steps and guidance that fit a base."""

from __future__ import annotations

from typing import Any

import pytest

from realgeneral.settings.evaluate import EvaluateConfig
from realgeneral.settings.sampling import DemoConfig, GenerateConfig, sampling


@pytest.mark.parametrize(
    ("base", "task", "fitting"),
    [
        ("nano", "deblurring:radius=16", (10, 1.5, 1.5)),
        ("nano", "customization", (10, 2.0, 2.0)),
        ("THUDM/CogVideoX-5b", "customization", (50, 6.0, 1.0)),
    ],
)
def test_sampler_that_fits(base: str, task: str, fitting: tuple[int, float, float]) -> None:
    """Steps and guidance that are not given are nano's own for nano, as in its demo and its table; what is given stays."""
    common: dict[str, Any] = {"prompt": "a", "task": task, "base": base}
    made = GenerateConfig(**common)
    assert (made.steps, made.guidance_scale, made.image_guidance_scale) == fitting
    if base == "nano":
        assert {sampling(c, task) for c in (DemoConfig(), EvaluateConfig())} == {fitting}
    assert sampling(EvaluateConfig(base=base, protocol="canny", data="pictures"), task) == fitting
    given = GenerateConfig(**common, steps=7, guidance_scale=0.0, image_guidance_scale=2.0)
    assert (given.steps, given.guidance_scale, given.image_guidance_scale) == (7, 0.0, 2.0)
    assert sampling(EvaluateConfig(guidance_scale=0.0, image_guidance_scale=2.0), task)[1:] == (0.0, 2.0)
