"""Runs of several processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from realgeneral.settings.train import TrainConfig
from tests.realgeneral.helpers.deepspeed import ZERO2


@pytest.fixture
def config(config: Callable[..., TrainConfig]) -> Callable[..., TrainConfig]:
    """One sample per process and micro-step, gradients clipped by nothing."""

    def make(output: str = "run", **changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "steps": 4, "batch_size": 1, "max_grad_norm": 1e9, "ema_decay": 0.5,
            "deepspeed_config": str(ZERO2) if changes.get("engine") == "deepspeed" else "",
        }  # fmt: skip
        return config(output, **{**settings, **changes})

    return make
