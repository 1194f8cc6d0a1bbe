"""What the attention binaries use, read without a GPU: registers, spills, shared memory, matrix and descriptor instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.launches.variants_attention import BUDGETS, MAX_SHARED

ROOT = Path(__file__).parents[2]
KERNELS = ("_attn_fwd_kernel", "_attn_bwd_delta_kernel", "_attn_bwd_dq_kernel", "_attn_bwd_dkdv_kernel")

Report = dict[str, dict[str, int]]


def compiled(target: str, head_dim: int = 64, dtype: str = "bfloat16", **variant: bool) -> Report:
    """Compile one forward and backward pass where Triton compiles: the test process itself interprets."""
    code = (
        "import json, sys, torch\n"
        "from benchmarks.launches.variants_attention import attention_figures\n"
        "target, head_dim, dtype, variant = json.loads(sys.argv[1])\n"
        "print(json.dumps(attention_figures(target, head_dim, getattr(torch, dtype), **variant)))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, json.dumps([target, head_dim, dtype, variant])]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report: Report = json.loads(done.stdout.splitlines()[-1])
    assert tuple(report) == KERNELS
    return report


def assert_no_spills(report: Report, target: str) -> None:
    """No register goes to memory, and shared memory suffices. AMD may park scalars in lanes of vector registers."""
    for kernel, found in report.items():
        assert found["stack"] == 0, kernel
        assert found["spills"] == 0 or target == "gfx942", kernel
        assert found["shared"] <= MAX_SHARED[target], kernel


def test_hopper_keeps_its_budgets() -> None:
    """Head size 64 in bfloat16: warp-group instructions, not serialised, fed by descriptors, within registers and memory."""
    report = compiled("sm_90")
    assert_no_spills(report, "sm_90")
    for kernel, budget in BUDGETS.items():
        found = report[kernel]
        assert found["registers"] <= budget.registers, kernel
        assert found["shared"] <= budget.shared, kernel
        assert found["wgmma"] >= budget.wgmma, kernel
        assert found["tma"] >= budget.tma, kernel
        assert found["serialized"] <= budget.serialized, kernel


def test_hopper_pointer_variant() -> None:
    """What tensors with unsuitable strides get: the same instructions without descriptors, no spills either."""
    report = compiled("sm_90", tma=False)
    assert_no_spills(report, "sm_90")
    for kernel in BUDGETS:
        assert report[kernel]["tma"] == 0, kernel
        assert report[kernel]["wgmma"] >= BUDGETS[kernel].wgmma, kernel
        assert report[kernel]["serialized"] == 0, kernel


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_100", "gfx942"])
def test_other_targets_compile_without_spills(target: str) -> None:
    """The same source, each target's own tiles."""
    report = compiled(target)
    assert_no_spills(report, target)
    for kernel in BUDGETS:
        assert report[kernel]["mma"] > 0, kernel
        assert target not in ("sm_80", "sm_86", "sm_89") or report[kernel]["async_loads"] > 0, kernel
        assert target != "sm_100" or report[kernel]["tma"] > 0, kernel


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["plain", "tf32", "pointers"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942"])
def test_everything_that_ships_compiles_without_spills(target: str, head_dim: int, dtype: str, variant: str) -> None:
    """Every target, dtype, head size and variant."""
    if (variant == "tf32" and (dtype != "float32" or target == "gfx942")) or (
        variant == "pointers" and (dtype == "float32" or target not in ("sm_90", "sm_100"))
    ):
        pytest.skip("no such variant")
    report = compiled(target, head_dim, dtype, tma=variant != "pointers", tf32=variant == "tf32")
    assert_no_spills(report, target)
    for kernel, found in report.items():
        assert found.get("serialized", 0) == 0, kernel
