"""Which launch a kernel takes."""

from __future__ import annotations

from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from rgkernels._triton import common
from rgkernels._triton.launch_data import LAUNCHES, MEASURED
from rgkernels._triton.launch_table import KINDS, dtype_class, find, size_class

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942", "interpreter")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("kernel", KINDS)
def test_every_device_and_dtype_finds_a_launch(kernel: str) -> None:
    """No hole in the table: a row for one architecture never takes the default from another."""
    widths = (32, 64, 128) if kernel.startswith("attn") else (1, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    for arch, dtype, width in product(ARCHITECTURES, DTYPES, widths):
        assert isinstance(find(kernel, arch, dtype, width), KINDS[kernel])


def test_the_most_specific_row_wins() -> None:
    assert find("adaln_bwd", "sm_100", torch.bfloat16, 3072).num_warps == 16
    assert find("adaln_bwd", "sm_90", torch.bfloat16, 3072).num_warps == 8
    assert find("attn_fwd", "sm_90", torch.float32, 64) == find("attn_fwd", "sm_100", torch.float32, 64)
    assert find("attn_fwd", "gfx942", torch.float32, 64) != find("attn_fwd", "sm_90", torch.float32, 64)
    # what an architecture says of any dtype comes before what any architecture says of a dtype
    assert find("attn_fwd", "interpreter", torch.float32, 64) == find("attn_fwd", "interpreter", torch.float16, 64)
    # an architecture that is not listed takes the default
    assert find("adaln_fwd", "sm_75", torch.float16, 100) == find("adaln_fwd", "sm_90", torch.float16, 128)


def test_size_classes() -> None:
    assert [size_class("adaln_fwd", width) for width in (1, 128, 129, 3072, 10**6)] == [128, 128, 256, 4096, 2**20]
    with pytest.raises(LookupError, match="attn_fwd has no launch for size 256"):
        size_class("attn_fwd", 256)
    with pytest.raises(LookupError, match="attn_fwd has no launch for size 256"):
        find("attn_fwd", "sm_90", torch.float16, 256)
    with pytest.raises(LookupError, match="attn_fwd has no launch for sm_75"):
        find("attn_fwd", "sm_75", torch.float16, 64)


def test_rows_are_well_formed() -> None:
    """Every kernel is known, every row has its kind's fields, every measurement has its row."""
    assert LAUNCHES.keys() == KINDS.keys()
    for kernel, rows in LAUNCHES.items():
        for (arch, dtype, size), row in rows.items():
            assert arch in (*ARCHITECTURES, "any")
            assert dtype in ("half", "float32", "any")
            assert size & (size - 1) == 0
            assert len(row) == len(KINDS[kernel]._fields)
            assert all(value is None or value > 0 for value in row)
            assert KINDS[kernel]._make(row).options()["enable_fp_fusion"] is True
    assert all(key in LAUNCHES[kernel] for kernel, rows in MEASURED.items() for key in rows)


def test_dtype_classes() -> None:
    assert [dtype_class(dtype) for dtype in DTYPES] == ["float32", "half", "half"]


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_80"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),
        ((11, 0), "sm_100"),
        ((12, 0), "sm_89"),
    ],
)
def test_architecture_of_a_device(capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    common.architecture.cache_clear()
    try:
        assert common.architecture(torch.device("cuda", 0)) == expected
        assert common.architecture(torch.device("cpu")) == "interpreter"
    finally:
        common.architecture.cache_clear()
