"""`--fused-kernels`: a named choice runs or says what is missing."""

from __future__ import annotations

import pytest
import torch

from realgeneral import RealGeneralPipeline
from realgeneral.errors import UsageError
from realgeneral.generation.bases import use_kernels

CPU = torch.device("cpu")


def test_reference_unless_asked(pipe: RealGeneralPipeline) -> None:
    """Without the option the model runs on plain PyTorch."""
    use_kernels(pipe.transformer, False, CPU)
    assert pipe.transformer.impl == "reference"


def test_missing_parts_are_named(pipe: RealGeneralPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CUDA and interpreter, or without Triton, the error says what is missing, and the model stays as it was."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UsageError, match="--fused-kernels cannot run here: impl='triton' needs CUDA tensors, got cpu tensors"):
        use_kernels(pipe.transformer, True, CPU)
    monkeypatch.setattr("rgkernels._impl.HAS_TRITON", False)
    with pytest.raises(UsageError, match=r"--fused-kernels cannot run here: .*triton package, found none"):
        use_kernels(pipe.transformer, True, CPU)
    assert pipe.transformer.impl == "reference"


def test_interpreter_counts(pipe: RealGeneralPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """With TRITON_INTERPRET=1 kernels run on CPU tensors."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    use_kernels(pipe.transformer, True, CPU)
    assert pipe.transformer.impl == "triton"
