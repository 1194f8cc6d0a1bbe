"""The log of a run: what a row holds, and what reaches a tracker."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from realgeneral.errors import UsageError
from realgeneral.settings.train import TrainConfig
from realgeneral.training.progress.tracking import MetricsLog, StepRecord, check_tracker, timestep_bucket


class Bar:
    def set_postfix(self, **values: Any) -> None:
        self.values = values


def record(*losses: float, timesteps: tuple[float, ...] = (0.05, 0.95, 0.999)) -> StepRecord:
    return StepRecord(losses, ("canny", "colouring", "canny"), timesteps, 0.5, 1e-4, 2.0, 3 * 2**30)


def test_row_has_losses_by_task_and_by_timestep(tmp_path: Path) -> None:
    """Means over the samples of each task and of each tenth of the timesteps; tenths without a sample are left out."""
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, TrainConfig())
    log.step(1, record(1.0, 2.0, 4.0), Bar())
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row == {
        "step": 1, "loss": 7 / 3, "learning_rate": 1e-4, "gradient_norm": 2.0, "samples_per_second": 6.0, "memory_gib": 3.0,
        "tasks": {"canny": 2.5, "colouring": 2.0}, "timesteps": {"0.0-0.1": 1.0, "0.9-1.0": 3.0},
    }  # fmt: skip


def test_buckets_cover_all_timesteps() -> None:
    """Ten buckets of a hundred of the thousand timesteps each."""
    names = [timestep_bucket(t / 1000) for t in range(1000)]
    assert len(set(names)) == 10
    assert all(names.count(name) == 100 for name in names[::100])
    assert (names[0], names[99], names[100], names[999]) == ("0.0-0.1", "0.0-0.1", "0.1-0.2", "0.9-1.0")


def test_tensorboard_gets_means_since_the_last_point(tmp_path: Path) -> None:
    """Curves are means over `log_every` steps, by task and by timestep too."""
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, TrainConfig(tracker="tensorboard", log_every=2))
    for step, value in enumerate((1.0, 3.0, 7.0, 9.0), 1):
        log.step(step, record(value, value, value), Bar())
    log.summary(4, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "loss/canny", "loss_by_timestep/0.9-1.0"):
        assert [(event.step, event.value) for event in events.Scalars(name)] == [(2, 2.0), (4, 8.0)]
    assert events.Scalars("memory_gib")[0].value == 3.0


def test_short_runs_have_a_point(tmp_path: Path) -> None:
    """The last steps make a point even if they are fewer than `log_every`; the bar shows a loss from the first step on."""
    log, bar = MetricsLog(tmp_path / "metrics.jsonl", 0, TrainConfig(tracker="tensorboard", log_every=10, steps=3)), Bar()
    for step, value in enumerate((1.0, 3.0, 8.0), 1):
        log.step(step, record(value, value, value), bar)
        assert bar.values["loss"] == f"{(1.0, 2.0, 4.0)[step - 1]:.4f}"
    log.summary(3, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 4.0)]


class Wandb(ModuleType):
    """Stands for wandb: keeps what it is told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.points: list[tuple[int, float]] = []
        self.id, self.finished = "abc", False

    def init(self, **settings: Any) -> Wandb:
        self.started.append(settings)
        return self

    def log(self, curves: dict[str, float], step: int) -> None:
        self.points.append((step, curves["loss"]))

    def finish(self) -> None:
        self.finished = True


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh run lets wandb choose an id, a resumed one gives it that id."""
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = TrainConfig(tracker="wandb", log_every=1)
    for start in (0, 1):
        log = MetricsLog(tmp_path / "metrics.jsonl", start, config)
        log.step(start + 1, record(1.0, 1.0, 1.0), Bar())
        log.summary(1, tmp_path)
    assert [started["id"] for started in wandb.started] == [None, "abc"]
    assert wandb.started[0]["config"]["log_every"] == 1
    assert wandb.points == [(1, 1.0), (2, 1.0)]
    assert wandb.finished


def test_wandb_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before a model is loaded."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--tracker wandb needs the package wandb, found none: pip install wandb"):
        check_tracker(TrainConfig(tracker="wandb"))
    check_tracker(TrainConfig(tracker="tensorboard"))
