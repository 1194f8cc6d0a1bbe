"""Fixtures for the recipes: a tiny base, and a trainer that starts anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.realgeneral.helpers.accelerate import reset_accelerate
from tests.realgeneral.helpers.checkpoints import save_checkpoint


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # tiny tensors: more threads only fight each other
    torch.set_num_threads(1)


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 5B-like checkpoint folder."""
    return save_checkpoint(tmp_path_factory.mktemp("base"), "5b")


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    reset_accelerate()
    yield
    reset_accelerate()
