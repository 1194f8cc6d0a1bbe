"""Which implementation runs where, and what is said where none can: capabilities, TF32 settings, CPU tensors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rgkernels
from rgkernels import SegmentLayout, _impl

CUDA = torch.device("cuda", 0)


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that there is a CUDA device of some capability."""

    def pretend(*found: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
        monkeypatch.setattr(torch.version, "hip", None)
        _impl._capability.cache_clear()

    yield pretend
    _impl._capability.cache_clear()


@pytest.mark.parametrize("found", [(7, 0), (7, 5)])
def test_old_gpus_take_the_reference(found: tuple[int, int], capability: Any) -> None:
    """No kernel is picked that cannot run there, and a named choice says what it needs and what it found."""
    pytest.importorskip("triton")
    capability(*found)
    assert _impl.resolve("auto", CUDA) == "reference"
    with pytest.raises(RuntimeError, match=rf"needs compute capability 8.0 or newer, got {found[0]}.{found[1]} on cuda:0"):
        _impl.resolve("triton", CUDA)


@pytest.mark.parametrize("found", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_new_gpus_take_triton(found: tuple[int, int], capability: Any) -> None:
    pytest.importorskip("triton")
    capability(*found)
    assert _impl.resolve("auto", CUDA) == _impl.resolve("triton", CUDA) == "triton"


def test_amd_has_capabilities_of_another_kind(capability: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch reports gfx906 as 9.0 and gfx1100 as 11.0: nothing follows from the numbers."""
    pytest.importorskip("triton")
    capability(6, 0)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert _impl.resolve("auto", CUDA) == "triton"


def test_fake_cuda_tensors_are_traced_without_cuda() -> None:
    """A model can be traced for a GPU on a machine without one."""
    pytest.importorskip("triton")
    with FakeTensorMode():
        x, gate = torch.empty(1, 4, 8, device="cuda"), torch.empty(1, 1, 8, device="cuda")
        assert rgkernels.segment_gate_residual(x, x, gate, SegmentLayout.of(a=4)).device.type == "cuda"


@pytest.fixture
def matmul() -> Iterator[Any]:
    """PyTorch's settings of float32 products, restored afterwards."""
    kept = torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    yield torch.backends.cuda.matmul
    torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision = kept


def test_tf32_is_asked_for_in_three_ways(matmul: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's old flag, its new setting of matmul and its new setting of everything; the new ones make the old one raise."""
    pytest.importorskip("triton")
    from rgkernels._triton.attention_tiles import precision

    monkeypatch.setattr(torch.version, "hip", None)
    x: Any = SimpleNamespace(dtype=torch.float32, device=CUDA)
    assert precision(x) == "tf32x3"
    matmul.fp32_precision = "tf32"
    assert precision(x) == "tf32"
    matmul.fp32_precision = "ieee"
    assert precision(x) == "tf32x3"
    matmul.fp32_precision, torch.backends.fp32_precision = "none", "tf32"
    assert precision(x) == "tf32"
    torch.backends.fp32_precision = "none"
    matmul.allow_tf32 = True
    assert precision(x) == "tf32"
    matmul.allow_tf32 = False
    assert precision(x) == "tf32x3"
    assert precision(SimpleNamespace(dtype=torch.float16, device=CUDA)) == "ieee"  # type: ignore[arg-type]


def test_a_raw_op_on_the_cpu_says_what_is_missing() -> None:
    """A checkpoint policy or an exported graph may name an op: "0 active drivers" would be all that Triton says."""
    pytest.importorskip("triton")
    code = (
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        "import torch, rgkernels._triton.adaln, rgkernels._triton.attention, rgkernels._triton.qk_norm_rope\n"
        "ops = torch.ops.rgkernels\n"
        "x = torch.randn(1, 4, 32)\n"
        "q = x[None]\n"
        "for call in (lambda: ops.segment_gate_residual(x, x, x[:, :1], [4]),\n"
        "             lambda: ops.segment_attention(q, q, q, [4], [], [0], 1.0),\n"
        "             lambda: ops.qk_norm_rope(q, q, *[None] * 6, 0, 1e-6)):\n"
        "    try:\n"
        "        call()\n"
        "    except RuntimeError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("impl='triton' needs CUDA tensors, got cpu tensors (TRITON_INTERPRET=1") for line in lines)
