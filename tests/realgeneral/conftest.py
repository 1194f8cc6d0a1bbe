"""Fixtures for realgeneral: tiny checkpoints on disk, one folder per geometry, read through the real loading code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from realgeneral import RealGeneralPipeline
from realgeneral.model.vae import fold_single_frame
from tests.realgeneral.helpers.accelerate import reset_accelerate
from tests.realgeneral.helpers.checkpoints import GEOMETRIES, save_checkpoint
from tests.realgeneral.helpers.nano_like import save_nano_like, shorten_captions
from tests.realgeneral.helpers.pictures import make_photo


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


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    reset_accelerate()
    yield
    reset_accelerate()


@pytest.fixture(scope="session")
def nano() -> RealGeneralPipeline:
    """The packaged model with its adapter; tests only read it."""
    pipe = RealGeneralPipeline.from_pretrained("nano", adapter="nano")
    pipe.set_progress_bar_config(disable=True)
    fold_single_frame(pipe.vae)
    return pipe


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like nano's; tests only read it."""
    return save_nano_like(tmp_path_factory.mktemp("assets"))


@pytest.fixture
def _captions_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_captions(monkeypatch)
