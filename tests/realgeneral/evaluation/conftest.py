"""Encoders of the metrics, as folders on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.realgeneral.helpers.encoders_on_disk import save_clip, save_depth, save_dino, save_resnet


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder with one of each; tests only read it."""
    folder = tmp_path_factory.mktemp("encoders")
    save_clip(folder / "clip")
    save_dino(folder / "dino")
    save_resnet(folder / "resnet")
    save_depth(folder / "depth")
    return folder
