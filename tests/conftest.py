"""Fixtures for all tests: where kernels run, seeds, and poisoned buffers.

Without a CUDA device the kernels run in Triton's interpreter on CPU tensors; that is decided here, before anything imports
Triton. A test that takes `device` (and `dtype`) runs on both machines: on the CPU in float32 and float16, and marked `gpu` on
CUDA in bfloat16 too, which the interpreter cannot do.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

# before anything imports huggingface_hub: no test may touch the network
os.environ["HF_HUB_OFFLINE"] = "1"

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# looks the factory functions up, once: they must be the originals, not those of `_poison`, or "meta" would allocate memory
with torch.device("meta"):
    torch.empty(0)

# a failed assertion of theirs is explained as one of a test is
pytest.register_assert_rewrite("tests.realgeneral.helpers")

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" not in metafunc.fixturenames:
        return
    if "dtype" not in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
        return
    cases = [("cpu", torch.float32), ("cpu", torch.float16)]
    cases += [("cuda", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    metafunc.parametrize(
        ("device", "dtype"),
        [
            pytest.param(device, dtype, marks=[pytest.mark.gpu] if device == "cuda" else [], id=f"{device}-{str(dtype)[6:]}")
            for device, dtype in cases
        ],
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    callspec = getattr(item, "callspec", None)
    if callspec is not None and callspec.params.get("device") == "cpu" and not INTERPRETING:
        pytest.skip("CPU kernels need TRITON_INTERPRET=1")


def pytest_unconfigure() -> None:
    # a process or thread that outlives the tests would hold this one for ever: show what waits, and fail
    faulthandler.dump_traceback_later(120, exit=True, file=sys.__stderr__)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what rgkernels allocates without initialising it with NaN, so that a forgotten store shows."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("rgkernels") and type(out) is torch.Tensor and out.is_floating_point() and not out.is_meta:
            out.fill_(float("nan"))
        return out

    return wrapper
