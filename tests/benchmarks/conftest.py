"""Fixtures of the benchmarks' tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def ended() -> Callable[[int], bool]:
    """Whether a killed process is gone within ten seconds: on a busy machine it dies when it next runs."""

    def wait(pid: int) -> bool:
        for _ in range(100):
            status = Path(f"/proc/{pid}/stat")
            if not status.exists() or status.read_text().split()[2] == "Z":
                return True
            time.sleep(0.1)
        return False

    return wait
