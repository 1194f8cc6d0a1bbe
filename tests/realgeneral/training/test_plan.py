"""Runs over mixed data: several sizes and numbers of conditions, resumed exactly, and settings that do not fit."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from realgeneral.errors import Failure, UsageError
from realgeneral.generation.bases import load_for_data
from realgeneral.settings.data import DataSettings
from realgeneral.settings.train import TrainConfig
from realgeneral.training import train as train_module
from realgeneral.training.plan import Plan, run_tasks
from realgeneral.training.train import train
from tests.realgeneral.helpers.datasets import picture, write_folder
from tests.realgeneral.helpers.pictures import encoded, make_photo
from tests.realgeneral.helpers.runs import assert_same_weights, losses, rows, train_until

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def config(bases: dict[str, Path], tmp_path: Path) -> Callable[..., TrainConfig]:
    shapes = [(48, 32), (48, 32), (32, 48), (32, 48), (40, 40)]
    listed: list[dict[str, Any]] = [
        {"target": encoded(make_photo(*shape, i)), "prompt": "a red pot"} for i, shape in enumerate(shapes)
    ]
    listed[0]["condition"], listed[3]["condition"] = [picture(20), picture(21)], [picture(22)]
    listed[0]["task"] = listed[3]["task"] = "canny"
    data = write_folder(tmp_path / "data", listed)

    def make(output: str, **changes: Any) -> TrainConfig:
        fixed: dict[str, Any] = {
            "base": str(bases["5b"]), "data": data, "tasks": ["canny", "inpainting"], "output": str(tmp_path / output),
            "buckets": ["16x32", "32x16", "32x32"], "rank": 2, "steps": 6, "batch_size": 2, "warmup_steps": 1, "save_every": 2,
            "keep_checkpoints": 9, "sample_count": 0, "learning_rate": 1e-2,
        }  # fmt: skip
        return TrainConfig(**{**fixed, **changes})

    return make


def test_batches_of_a_run(config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run meets every size and number of conditions, each batch of one."""
    seen = set()
    original = train_module.training_loss

    def spy(pipe: Any, model: Any, texts: Any, batch: Any, *args: Any) -> Any:
        seen.add((tuple(batch.target.shape[2:]), batch.conditions.shape[1]))
        return original(pipe, model, texts, batch, *args)

    monkeypatch.setattr(train_module, "training_loss", spy)
    assert math.isfinite(train(config("run"))["loss"])
    assert seen == {((16, 32), 1), ((16, 32), 2), ((32, 16), 1), ((32, 32), 1)}


def test_resumed_equals_uninterrupted(config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of an epoch of buckets with two micro-steps: losses, tasks and weights of a whole run."""
    train(config("whole", gradient_accumulation_steps=2))
    train_until(config("broken", gradient_accumulation_steps=2), 5, monkeypatch)
    train(config("broken", gradient_accumulation_steps=2, resume=True))
    whole, broken = Path(config("whole").output), Path(config("broken").output)
    assert losses(broken) == losses(whole)
    assert [row["tasks"] for row in rows(broken)] == [row["tasks"] for row in rows(whole)]
    assert_same_weights(broken / "adapter", whole / "adapter")


def test_without_buckets_mixed_conditions_are_refused(config: Callable[..., TrainConfig]) -> None:
    """The error names the option that groups them; one bucket is enough to do it."""
    with pytest.raises(Failure, match=r"must have the same number of conditions, got \[1, 2\]; --buckets groups such rows"):
        train(config("run", buckets=[], height=16, width=32, steps=9))
    assert math.isfinite(train(config("one", buckets=["16x32"]))["loss"])


def test_buckets_must_be_those_of_the_run_to_resume(config: Callable[..., TrainConfig]) -> None:
    """Other buckets are other batches."""
    train(config("run", steps=2, lr_schedule="constant"))
    with pytest.raises(UsageError, match=r"buckets must be \['16x32', '32x16', '32x32'\] as in the run to resume"):
        train(config("run", lr_schedule="constant", resume=True, buckets=["16x32"]))


def test_standard_buckets_of_each_base(bases: dict[str, Path], config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """At the real ones' sample sizes: around 480x720 for 1.0, 768x1360 for 1.5; the area of --height --width if given."""
    for geometry, sample, expected in (
        ("5b", (60, 90), (720, 480)),
        ("2b", (60, 90), (720, 480)),
        ("1.5", (300, 300), (1360, 768)),
    ):
        folder = tmp_path / f"base-{geometry}"
        shutil.copytree(bases[geometry], folder)
        path = folder / "transformer" / "config.json"
        described = json.loads(path.read_text())
        described["sample_height"], described["sample_width"] = sample
        path.write_text(json.dumps(described))
        pipe = load_for_data(str(folder))
        # without buckets too: the one size of training, samples, generation and evaluation
        assert pipe.image_size() == expected[::-1]
        sizes = Plan.of(config("run", buckets=["standard"]), pipe).buckets
        assert {expected, expected[::-1]} <= set(sizes)
        assert len(sizes) == (7 if geometry == "1.5" else 9)
        smaller = Plan.of(config("run", buckets=["standard"], height=512, width=512), pipe).buckets
        assert (512, 512) in smaller
        assert len(smaller) >= 7
        assert all(0.8 < w * h / 512**2 < 1.25 for w, h in smaller)
    assert (64, 64) in Plan.of(config("run", buckets=["standard"]), load_for_data("nano")).buckets


@pytest.mark.parametrize("geometry", ["2b", "1.5"])
def test_other_geometries(bases: dict[str, Path], config: Callable[..., TrainConfig], geometry: str) -> None:
    """Sin-cos positions and two-frame patches take mixed sizes too."""
    assert math.isfinite(train(config("run", base=str(bases[geometry]), steps=4))["loss"])


def test_warm_up_longer_than_the_run_is_said(config: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]) -> None:
    """The learning rate that was asked for is then never reached."""
    train(config("run", steps=2, warmup_steps=8))
    told = "warmup_steps is 8 and the run has 2 steps: the learning rate ends at 0.25 of --learning-rate"
    assert told in capsys.readouterr().out
    train(config("other", steps=2, warmup_steps=2))
    assert "warmup_steps" not in capsys.readouterr().out


def test_default_tasks() -> None:
    """Nano data has its six tasks, other data the paper's seven."""
    assert len(run_tasks(DataSettings())) == 6
    assert len(run_tasks(DataSettings(data="/folder"))) == 7
