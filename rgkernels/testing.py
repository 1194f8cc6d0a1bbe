"""Input factories and the one tolerance rule, shared by tests and benchmarks.

The rule: an implementation may be at most twice as far from a float64 oracle as plain PyTorch is in the same dtype, plus one
rounding of the output. Nothing is hand-picked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Results = Mapping[str, Tensor | None]


def randn(*shape: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal values drawn on the CPU in float32, so that every device and dtype sees the same numbers before rounding."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(device=device, dtype=dtype)


def outputs_and_grads(
    fn: Callable[..., Any], inputs: Mapping[str, Any], upstream: Sequence[Tensor | None]
) -> dict[str, Tensor]:
    """Outputs of `fn(**inputs)` as "out0", "out1", ... and the gradient of every input that requires one as "grad_NAME".

    Args:
        fn: Returns a tensor or a tuple of tensors.
        inputs: Keyword arguments; leaf tensors with requires_grad get gradients.
        upstream: The gradient of each output, None to leave an output out; cast to the output's dtype.
    """
    outputs = fn(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"out{i}": out.detach() for i, out in enumerate(outputs)}
    wanted = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, upstream, strict=True) if g is not None and o.requires_grad]
    if wanted and pairs:
        outs, grads = zip(*pairs, strict=True)
        found = torch.autograd.grad(outs, list(wanted.values()), grads, allow_unused=True)
        for (name, x), grad in zip(wanted.items(), found, strict=True):
            results[f"grad_{name}"] = torch.zeros_like(x) if grad is None else grad
    return results


def to_float64(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs with every floating-point tensor in float64, gradients wanted where they were."""
    return {
        name: x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }


def assert_within_reference_error(actual: Results, reference: Results, oracle: Results) -> None:
    """Hold results to the tolerance rule: error <= 2 x the reference's error + one rounding, in the maximum and in the mean.

    Args:
        actual: Results of the implementation under test, such as `outputs_and_grads` returns.
        reference: Results of plain PyTorch in the same dtype.
        oracle: Results of plain PyTorch in float64.

    Raises:
        AssertionError: Names the result, both errors, the bound and the worst index.
    """
    assert actual.keys() == oracle.keys() == reference.keys(), (list(actual), list(reference), list(oracle))
    for name, truth in oracle.items():
        got, ref = actual[name], reference[name]
        assert got is not None and ref is not None and truth is not None, name
        assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
        assert got.dtype == ref.dtype, f"{name}: dtype {got.dtype}, expected {ref.dtype}"
        _assert_close(name, got.double().cpu(), ref.double().cpu(), truth.double().cpu(), torch.finfo(got.dtype).eps)


def _assert_close(name: str, got: Tensor, ref: Tensor, truth: Tensor, eps: float) -> None:
    if truth.numel() == 0:
        return
    infinite = torch.isinf(truth)
    assert torch.equal(got[infinite], truth[infinite]), f"{name}: infinities differ"
    finite = truth.masked_fill(infinite, 0.0)
    error = (got.masked_fill(infinite, 0.0) - finite).abs()
    ref_error = (ref.masked_fill(infinite, 0.0) - finite).abs()
    assert not torch.isnan(error).any(), f"{name}: NaN at {_index(torch.isnan(error))}"
    for kind, reduce in (("largest", torch.max), ("mean", torch.mean)):
        bound = 2 * reduce(ref_error) + eps * reduce(finite.abs())
        assert reduce(error) <= bound, (
            f"{name}: {kind} error {reduce(error).item():.3e} > bound {bound.item():.3e} "
            f"(reference error {reduce(ref_error).item():.3e}); worst at {_index(error == error.max())}"
        )


def _index(where: Tensor) -> list[int]:
    return [int(i) for i in where.nonzero()[0]]
