"""Training runs: a few captioned pictures and a few small steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from realgeneral.settings.train import TrainConfig
from tests.realgeneral.helpers.pictures import make_photo


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six captioned pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(6):
        make_photo(48, 32, i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(["a red pot", "blue cat", "a fox on the table"][i % 3])
    return folder


@pytest.fixture
def config(bases: dict[str, Path], data: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """A few small steps on the 5B-like base, with changes."""

    def make(output: str = "run", **changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "base": str(bases["5b"]), "data": str(data), "tasks": ["canny", "colouring"], "output": str(tmp_path / output),
            "height": 16, "width": 32, "rank": 2, "alpha": 4.0, "steps": 6, "batch_size": 2, "warmup_steps": 2, "save_every": 2,
            "keep_checkpoints": 9, "sample_count": 0, "learning_rate": 1e-2,
        }  # fmt: skip
        return TrainConfig(**{**settings, **changes})

    return make
