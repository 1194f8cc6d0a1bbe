"""Fixtures for realgeneral: tiny checkpoints on disk, one folder per geometry, read through the real loading code."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# before anything imports huggingface_hub: no test may touch the network
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from checkpoints import GEOMETRIES, save_checkpoint
from PIL import Image

from realgeneral import RealGeneralPipeline
from realgeneral.settings.train import TrainConfig


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # tiny tensors: more threads only fight each other
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoint folders by geometry; tests only read them."""
    root = tmp_path_factory.mktemp("bases")
    return {geometry: save_checkpoint(root / geometry, geometry) for geometry in GEOMETRIES}


@pytest.fixture(params=GEOMETRIES)
def geometry(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(bases: dict[str, Path], geometry: str) -> Path:
    """One test per geometry."""
    return bases[geometry]


@pytest.fixture
def open_pipeline() -> Callable[..., RealGeneralPipeline]:
    def open_(folder: Path, **kwargs: Any) -> RealGeneralPipeline:
        pipe = RealGeneralPipeline.from_pretrained(folder, **kwargs)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return open_


@pytest.fixture
def pipe(bases: dict[str, Path], open_pipeline: Callable[..., RealGeneralPipeline]) -> RealGeneralPipeline:
    """A fresh 5B-like pipeline."""
    return open_pipeline(bases["5b"])


@pytest.fixture
def photo() -> Image.Image:
    """A picture with edges, colour and no symmetry."""
    return make_photo()


def make_photo(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    coarse = (torch.rand(5, 7, 3, generator=generator) * 255).byte().numpy()
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its settings per process; a trainer with other settings needs them gone."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def reset() -> None:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._reset_state()

    reset()
    yield
    reset()


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
