"""Fixtures of the fault tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.realgeneral.helpers.accelerate import reset_accelerate


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # tiny tensors: more threads only fight each other
    torch.set_num_threads(1)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate's settings of the process, gone before and after."""
    reset_accelerate()
    yield
    reset_accelerate()
