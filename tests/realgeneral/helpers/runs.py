"""Training runs in tests: how they are started, made to die, and compared."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from realgeneral.model.adapter import CONDITION_FILE, LORA_FILE
from realgeneral.settings.train import TrainConfig
from realgeneral.training import train as train_module
from realgeneral.training.progress import tracking
from realgeneral.training.train import train


def rows(run: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path | str) -> list[float]:
    return [row["loss"] for row in rows(run)]


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return {**load_file(Path(folder) / LORA_FILE), **load_file(Path(folder) / CONDITION_FILE)}


def assert_same_weights(a: Path | str, b: Path | str) -> None:
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


class Killed(BaseException):
    """Stands for SIGKILL in-process: nothing catches it."""


def train_until(config: TrainConfig, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run and die right after the row of `step` is logged."""
    original = tracking.MetricsLog.step

    def dying(self: Any, done: int, *args: Any) -> None:
        original(self, done, *args)
        if done == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(tracking.MetricsLog, "step", dying)
        with pytest.raises(Killed):
            train(config)


def command(config: TrainConfig, *more: str) -> list[str]:
    arguments = [sys.executable, "-m", "realgeneral", "train"]
    for name in ("base", "data", "output", "height", "width", "rank", "alpha", "steps", "batch_size", "learning_rate"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    arguments += ["--tasks", *config.tasks, "--sample-count", "0", "--warmup-steps", "2", *more]
    return arguments


def environment(**changes: str | None) -> dict[str, str]:
    root = str(Path(train_module.__file__).parents[2])
    merged = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **changes}
    return {k: v for k, v in merged.items() if v is not None}
