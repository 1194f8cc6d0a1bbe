"""Data sets in every format that holds rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.realgeneral.helpers.datasets import WRITERS, Writer


@pytest.fixture(params=sorted(WRITERS))
def write(request: pytest.FixtureRequest) -> Writer:
    return WRITERS[request.param]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where sizes of pictures are kept, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"
