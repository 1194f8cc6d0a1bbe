"""DeepSpeed in tests: where it is missing, its example of settings, and its helper that is compiled at the first start."""

from __future__ import annotations

import functools
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

NEEDS_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the package deepspeed")
ZERO2 = Path(__file__).parents[3] / "examples" / "deepspeed_zero2.json"


@functools.cache
def compile_for_deepspeed() -> None:
    """On a CPU DeepSpeed compiles a helper at its first start: not within the time that a group of processes has."""
    build = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"
    subprocess.run([sys.executable, "-c", build], check=True, capture_output=True)
