"""Norm sites: segment_adaln, segment_gate_residual, segment_gate_residual_adaln."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rgkernels
from rgkernels import SegmentLayout
from rgkernels.testing import assert_within_reference_error, outputs_and_grads, randn, to_float64

OPS: dict[str, tuple[str, ...]] = {
    "segment_adaln": ("x", "shift", "scale", "weight", "bias"),
    "segment_gate_residual": ("residual", "branch", "gate"),
    "segment_gate_residual_adaln": ("residual", "branch", "gate", "shift", "scale", "weight", "bias"),
}
ROWS, MODULATION, AFFINE = ("x", "residual", "branch"), ("shift", "scale", "gate"), ("weight", "bias")

# batch, segment lengths, channels: ragged, empty, single rows; odd widths, the tuned widths, several rows per tile
SHAPES = {
    "B2-G3-C64": (2, (5, 19, 7), 64),
    "B1-G4-C97-empty": (1, (3, 0, 18, 0), 97),
    "B1-G1-C200": (1, (37,), 200),
    "B2-G2-C513-single": (2, (1, 3), 513),
    "B1-G3-C1000": (1, (1, 3, 2), 1000),
    "B1-G3-C1920": (1, (2, 3, 1), 1920),
    "B1-G2-C3072": (1, (1, 2), 3072),
    "B1-G2-C2047": (1, (2, 1), 2047),
}
every_op = pytest.mark.parametrize("op", OPS)


def layout_of(lengths: tuple[int, ...]) -> SegmentLayout:
    return SegmentLayout(tuple(f"segment{i}" for i in range(len(lengths))), lengths)


def make_inputs(
    op: str, batch: int, lengths: tuple[int, ...], channels: int, dtype: torch.dtype, device: str = "cpu", affine: bool = True
) -> dict[str, Any]:
    """Leaf inputs of an op, all requiring gradients, drawn with a mean so that statistics matter."""
    inputs: dict[str, Any] = {}
    for seed, name in enumerate(OPS[op]):
        if name in AFFINE and not affine:
            continue
        shape = {**dict.fromkeys(ROWS, (batch, sum(lengths), channels)), **dict.fromkeys(AFFINE, (channels,))}
        value = randn(*shape.get(name, (batch, len(lengths), channels)), dtype=dtype, device=device, seed=seed)
        inputs[name] = (value + 0.5 if name in ROWS else value).requires_grad_()
    return inputs | {"layout": layout_of(lengths)}


def make_upstream(op: str, like: Tensor) -> list[Tensor | None]:
    count = 2 if op == "segment_gate_residual_adaln" else 1
    return [randn(*like.shape, dtype=like.dtype, device=str(like.device), seed=100 + i) for i in range(count)]


def rows_of(inputs: dict[str, Any]) -> Tensor:
    return inputs["x"] if "x" in inputs else inputs["residual"]


def run(op: str, inputs: dict[str, Any], upstream: list[Tensor | None], impl: str = "triton") -> dict[str, Tensor]:
    return outputs_and_grads(lambda **kwargs: getattr(rgkernels, op)(**kwargs, impl=impl), inputs, upstream)


def check(op: str, inputs: dict[str, Any], upstream: list[Tensor | None]) -> dict[str, Tensor]:
    """Hold outputs and all gradients to the tolerance rule."""
    actual = run(op, inputs, upstream)
    wide = [None if g is None else g.double() for g in upstream]
    assert_within_reference_error(
        actual, run(op, inputs, upstream, "reference"), run(op, to_float64(inputs), wide, "reference")
    )
    return actual


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


# ---- parity


@every_op
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(op: str, shape: str, device: str, dtype: torch.dtype) -> None:
    """Outputs and all gradients agree with the float64 oracle as well as plain PyTorch does."""
    inputs = make_inputs(op, *SHAPES[shape], dtype, device)
    results = check(op, inputs, make_upstream(op, rows_of(inputs)))
    assert len(results) == len(OPS[op]) + (2 if op == "segment_gate_residual_adaln" else 1)


@pytest.mark.parametrize("op", ["segment_adaln", "segment_gate_residual_adaln"])
@pytest.mark.parametrize("affine", ["none", "weight", "bias", "float32"])
def test_affine_is_optional(op: str, affine: str, device: str, dtype: torch.dtype) -> None:
    """Weight and bias may be absent, one by one, or float32 masters beside half-precision tokens."""
    inputs = make_inputs(op, 1, (3, 6), 70, dtype, device)
    for name in AFFINE:
        if affine in ("none", *AFFINE) and affine != name:
            del inputs[name]
        elif affine == "float32":
            inputs[name] = inputs[name].detach().float().requires_grad_()
    check(op, inputs, make_upstream(op, rows_of(inputs)))


@every_op
def test_large_mean_does_not_cancel(op: str, device: str) -> None:
    """Rows whose mean is 1000 times their spread keep float32 accuracy: the variance is two-pass."""
    inputs = make_inputs(op, 1, (2, 3), 96, torch.float32, device)
    with torch.no_grad():
        rows_of(inputs).add_(1000.0)
    check(op, inputs, make_upstream(op, rows_of(inputs)))


# ---- memory layouts


def strided(name: str, value: Tensor) -> Tensor:
    """The same values in memory that is neither dense nor in order; modulation as a chunk of one wide projection."""
    if name in MODULATION:
        place = MODULATION.index(name)
        wide = value.new_zeros(*value.shape[:-1], 6, value.shape[-1])
        wide[..., place, :] = value
        return wide.flatten(-2).chunk(6, dim=-1)[place]
    if name == "branch":
        return F.pad(value, (8, 24))[..., 8:-24]
    return value.transpose(0, 1).contiguous().transpose(0, 1) if name in ROWS else value


@every_op
def test_strided_inputs_are_read_in_place(op: str, device: str, dtype: torch.dtype) -> None:
    """Chunks of one projection, padded rows and [S, B, C] memory give what contiguous tensors give, bit for bit."""
    plain = make_inputs(op, 2, (3, 4), 64, dtype, device)
    views = {n: strided(n, x.detach()).requires_grad_() if isinstance(x, Tensor) else x for n, x in plain.items()}
    assert not any(views[name].is_contiguous() for name in OPS[op] if name not in AFFINE)
    upstream = make_upstream(op, rows_of(plain))
    assert_equal(run(op, views, upstream), run(op, plain, upstream))


@every_op
def test_expanded_inputs(op: str, device: str) -> None:
    """Batch-expanded rows and modulation (stride 0) are read in place; their gradients stay per element."""
    base = make_inputs(op, 1, (3, 4), 64, torch.float32, device)
    views = {
        n: x.detach().expand(3, -1, -1).requires_grad_() if isinstance(x, Tensor) and x.dim() == 3 else x
        for n, x in base.items()
    }
    check(op, views, make_upstream(op, rows_of(views)))


@every_op
@pytest.mark.parametrize("memory", ["sequence-first", "channels-strided", "expanded-rows", "expanded-channels"])
def test_upstream_of_any_strides(op: str, memory: str, device: str) -> None:
    """Upstream gradients come transposed or expanded from sums, means and views; the result depends on values alone."""
    inputs = make_inputs(op, 2, (3, 4), 64, torch.float32, device)
    views: list[Tensor | None] = []
    for grad in make_upstream(op, rows_of(inputs)):
        assert grad is not None
        views.append(
            {
                "sequence-first": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
                "channels-strided": lambda g: g.transpose(1, 2).contiguous().transpose(1, 2),
                "expanded-rows": lambda g: g[:, :1].expand_as(g),
                "expanded-channels": lambda g: g[:, :, :1].expand_as(g),
            }[memory](grad)
        )
    dense = [None if g is None else g.contiguous() for g in views]
    assert_equal(run(op, inputs, views), run(op, inputs, dense))


@every_op
@pytest.mark.parametrize("place", ["batch", "tile", "row"])
def test_offsets_beyond_int32(op: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that lie 2^31 elements and more apart are reached: offsets are 64 bits wide."""
    executor = pytest.importorskip("triton.runtime.interpreter").GridExecutor
    # the interpreter would copy the storages back onto themselves and touch every page of the untouched gigabytes
    monkeypatch.setattr(executor, "_restore_args_dev", lambda *_: None)
    channels, batch = 64, 2 if place == "batch" else 1
    strides = (2**31 + 64, channels, 1) if place == "batch" else (0, 2**30 + 64, 1)
    # the far row is the third of one tile, or the first of the second segment's tile
    lengths = (3, 0) if place == "tile" else (2, 1)
    plain = make_inputs(op, batch, lengths, channels, torch.float16)
    far = torch.empty(2**31 + 64 + 3 * channels + 128, dtype=torch.float16)  # address space, not memory
    view = far.as_strided((batch, 3, channels), strides)
    view.copy_(rows_of(plain).detach())
    name = "x" if "x" in plain else "residual"
    upstream = make_upstream(op, rows_of(plain))
    assert_equal(run(op, plain | {name: view.requires_grad_()}, upstream), run(op, plain, upstream))
    if name == "residual":
        view = view.detach().copy_(plain["branch"].detach())
        assert_equal(run(op, plain | {"branch": view.requires_grad_()}, upstream), run(op, plain, upstream))


# ---- segments


@every_op
def test_segments_are_independent(op: str, device: str, dtype: torch.dtype) -> None:
    """Changing one segment's modulation and tokens leaves every other segment's outputs and gradients bitwise equal."""
    inputs = make_inputs(op, 2, (3, 4, 2), 64, dtype, device, affine=False)
    middle = inputs["layout"].slice("segment1")
    upstream = make_upstream(op, rows_of(inputs))
    before = run(op, inputs, upstream)
    with torch.no_grad():
        for name in OPS[op]:
            if name in inputs:
                inputs[name][:, middle if name in ROWS else 1] *= 3
    after = run(op, inputs, upstream)
    for name, value in before.items():
        rows = name.startswith("out") or name.removeprefix("grad_") in ROWS
        keep = torch.ones(value.shape[1], dtype=torch.bool)
        keep[middle if rows else 1] = False
        assert torch.equal(after[name][:, keep], value[:, keep]), name
    assert not torch.equal(after["out0"], before["out0"])


@every_op
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_stays_in_its_segment(op: str, device: str) -> None:
    """A NaN in one segment of one sample reaches no row and no modulation gradient of another; without NaN, none appears."""
    inputs = make_inputs(op, 2, (3, 4, 2), 64, torch.float32, device, affine=False)
    upstream = make_upstream(op, rows_of(inputs))
    before = run(op, inputs, upstream)
    with torch.no_grad():
        rows_of(inputs)[1, 4] = float("nan")
    after = run(op, inputs, upstream)
    for name, value in before.items():
        assert torch.isfinite(value).all(), name
        rows = name.startswith("out") or name.removeprefix("grad_") in ROWS
        keep = torch.ones(value.shape[:2], dtype=torch.bool)
        keep[1, inputs["layout"].slice("segment1") if rows else 1] = False
        assert torch.equal(after[name][keep], value[keep]), name
    assert torch.isnan(after["out0"]).any()


@every_op
def test_empty_segment_has_zero_gradients(op: str, device: str) -> None:
    """A segment without tokens gets modulation gradients of exactly 0, and takes nothing from its neighbours."""
    inputs = make_inputs(op, 2, (3, 0, 4), 64, torch.float32, device)
    results = run(op, inputs, make_upstream(op, rows_of(inputs)))
    dense = make_inputs(op, 2, (3, 4), 64, torch.float32, device)
    for name in MODULATION:
        if name in inputs:
            assert not results[f"grad_{name}"][:, 1].any()
            with torch.no_grad():
                dense[name].copy_(inputs[name][:, ::2])
    expected = run(op, dense, make_upstream(op, rows_of(dense)))
    assert torch.equal(results["out0"], expected["out0"])


@every_op
@pytest.mark.parametrize(("batch", "lengths"), [(0, (3, 4)), (2, (0, 0))], ids=["no-batch", "no-tokens"])
def test_nothing_to_do(op: str, batch: int, lengths: tuple[int, ...], device: str) -> None:
    """Empty batches and sequences give empty results and zero gradients for what is left."""
    inputs = make_inputs(op, batch, lengths, 64, torch.float32, device)
    for name, value in run(op, inputs, make_upstream(op, rows_of(inputs))).items():
        assert value.shape == (inputs[name[5:]] if name.startswith("grad_") else rows_of(inputs)).shape
        assert not value.any(), name


def test_many_segments(device: str) -> None:
    """The number of segments is not bounded by the kernels."""
    op = "segment_gate_residual_adaln"
    inputs = make_inputs(op, 1, (1, 0, 2) * 4, 64, torch.float32, device)
    check(op, inputs, make_upstream(op, inputs["residual"]))


# ---- contracts


def test_fused_equals_its_parts(device: str, dtype: torch.dtype) -> None:
    """The fused site returns bit for bit what gate-residual followed by AdaLN returns: it normalises `res` as stored."""
    inputs = make_inputs("segment_gate_residual_adaln", 2, (3, 4), 96, dtype, device)
    res, normed = rgkernels.segment_gate_residual_adaln(**inputs, impl="triton")
    layout = inputs["layout"]
    alone = rgkernels.segment_gate_residual(inputs["residual"], inputs["branch"], inputs["gate"], layout, impl="triton")
    names = ("shift", "scale", "weight", "bias")
    assert torch.equal(res, alone)
    assert torch.equal(normed, rgkernels.segment_adaln(alone, layout=layout, **{n: inputs[n] for n in names}, impl="triton"))


@every_op
def test_repeats_are_bitwise_equal(op: str, device: str, dtype: torch.dtype) -> None:
    """Two runs agree bit for bit, forward and backward: no atomics, sums in a fixed order."""
    inputs = make_inputs(op, 2, (11, 23), 64, dtype, device)
    upstream = make_upstream(op, rows_of(inputs))
    assert_equal(run(op, inputs, upstream), run(op, inputs, upstream))


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_used(used: int, device: str, dtype: torch.dtype) -> None:
    """Either output of the fused site may go unused; what does not depend on the other gets no gradient."""
    op = "segment_gate_residual_adaln"
    inputs = make_inputs(op, 2, (3, 4), 64, dtype, device)
    upstream = make_upstream(op, rows_of(inputs))
    upstream[1 - used] = None
    check(op, inputs, upstream)
    outputs = rgkernels.segment_gate_residual_adaln(**inputs, impl="triton")
    grads = torch.autograd.grad(outputs[used], [inputs[n] for n in OPS[op]], upstream[used], allow_unused=True)
    assert [n for n, g in zip(OPS[op], grads, strict=True) if g is None] == (
        [] if used else ["shift", "scale", "weight", "bias"]
    )


@every_op
def test_only_wanted_gradients_are_computed(op: str, device: str) -> None:
    """Each gradient alone equals, bit for bit, the same gradient among all; a frozen input gets None."""
    inputs = make_inputs(op, 2, (3, 4), 64, torch.float32, device)
    upstream = make_upstream(op, rows_of(inputs))
    full = run(op, inputs, upstream)
    for wanted in OPS[op]:
        frozen = {n: x.detach().requires_grad_(n == wanted) if isinstance(x, Tensor) else x for n, x in inputs.items()}
        alone = run(op, frozen, upstream)
        assert sum(name.startswith("grad_") for name in alone) == 1
        assert torch.equal(alone[f"grad_{wanted}"], full[f"grad_{wanted}"]), wanted


@every_op
def test_inputs_stay_untouched(op: str, device: str) -> None:
    """Nothing is computed in place: inputs and upstream gradients keep their values."""
    inputs = make_inputs(op, 2, (3, 4), 64, torch.float32, device)
    upstream = make_upstream(op, rows_of(inputs))
    kept = {n: x.detach().clone() for n, x in inputs.items() if isinstance(x, Tensor)}
    kept_upstream = [None if g is None else g.clone() for g in upstream]
    run(op, inputs, upstream)
    assert all(torch.equal(inputs[n], x) for n, x in kept.items())
    assert all(torch.equal(a, b) for a, b in zip(upstream, kept_upstream, strict=True) if a is not None and b is not None)


@every_op
def test_second_derivative_raises(op: str, device: str) -> None:
    """There is no double backward, and asking for one says so instead of returning a wrong value."""
    inputs = make_inputs(op, 1, (3,), 64, torch.float32, device)
    out = getattr(rgkernels, op)(**inputs, impl="triton")
    out = out if isinstance(out, Tensor) else out[1]
    modulation = inputs["gate"] if "gate" in inputs else inputs["scale"]
    (grad,) = torch.autograd.grad(out.square().sum(), modulation, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---- the reference and the world outside


def test_one_segment_is_plain_layer_norm() -> None:
    """With one segment the reference is LayerNorm, scaled and shifted."""
    inputs = make_inputs("segment_adaln", 2, (7,), 96, torch.float64)
    x, shift, scale, weight, bias = (inputs[n] for n in OPS["segment_adaln"])
    expected = F.layer_norm(x, (96,), weight, bias, 1e-5) * (1 + scale) + shift
    torch.testing.assert_close(rgkernels.segment_adaln(**inputs, impl="reference"), expected)


def test_reference_is_cogvideox_block() -> None:
    """The reference reproduces diffusers' norm1, gated residual and norm2 of a CogVideoX block, text before video."""
    pytest.importorskip("diffusers")
    from diffusers.models.normalization import CogVideoXLayerNormZero

    channels, text, video = 48, 5, 7
    norms = [CogVideoXLayerNormZero(16, channels).double() for _ in range(2)]
    for norm in norms:
        torch.nn.init.normal_(norm.norm.weight)
        torch.nn.init.normal_(norm.norm.bias)
    temb, hidden, branch = (torch.randn(*s, dtype=torch.float64) for s in ((2, 16), (2, 12, channels), (2, 12, channels)))
    layout = SegmentLayout.of(text=text, video=video)

    def modulation(norm: torch.nn.Module) -> list[Tensor]:
        shift, scale, gate, enc_shift, enc_scale, enc_gate = norm.linear(norm.silu(temb)).chunk(6, dim=1)
        return [torch.stack(pair, dim=1) for pair in ((enc_shift, shift), (enc_scale, scale), (enc_gate, gate))]

    (shift1, scale1, gate1), (shift2, scale2, _) = map(modulation, norms)
    affine1, affine2 = ({"weight": n.norm.weight, "bias": n.norm.bias, "impl": "reference"} for n in norms)
    normed1 = rgkernels.segment_adaln(hidden, shift1, scale1, layout, **affine1)
    res, normed2 = rgkernels.segment_gate_residual_adaln(hidden, branch, gate1, shift2, scale2, layout, **affine2)

    # CogVideoXBlock.forward, with `branch` in place of attention's output
    encoder, video_states = hidden.split([text, video], dim=1)
    norm_video, norm_text, gate_msa, enc_gate_msa = norms[0](video_states, encoder, temb)
    torch.testing.assert_close(normed1, torch.cat([norm_text, norm_video], dim=1))
    video_states = video_states + gate_msa * branch[:, text:]
    encoder = encoder + enc_gate_msa * branch[:, :text]
    torch.testing.assert_close(res, torch.cat([encoder, video_states], dim=1))
    norm_video, norm_text, _, _ = norms[1](video_states, encoder, temb)
    torch.testing.assert_close(normed2, torch.cat([norm_text, norm_video], dim=1))


# ---- errors


def _replace(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda inputs: inputs | {n: change(inputs[n]) if callable(change) else change for n, change in changes.items()}


ERRORS = {
    "rank": (_replace(residual=lambda x: x[0]), ValueError, r"residual must have 3 dimensions \[B, S, C\], got shape \[7, 8\]"),
    "branch-shape": (
        _replace(branch=lambda x: x[:, :6]),
        ValueError,
        r"branch must have shape \[B, S, C\] = \[2, 7, 8\], got \[2, 6, 8\]",
    ),
    "gate-shape": (
        _replace(gate=lambda x: x[:, :1]),
        ValueError,
        r"gate must have shape \[B, G, C\] = \[2, 2, 8\], got \[2, 1, 8\]",
    ),
    "shift-dtype": (
        _replace(shift=lambda x: x.half()),
        ValueError,
        "shift must have dtype torch.float32 .*, got torch.float16",
    ),
    "scale-device": (
        _replace(scale=lambda x: x.to("meta")),
        ValueError,
        "scale must be on cpu like the first tensor, got meta",
    ),
    "stride": (
        _replace(residual=lambda x: x.detach().transpose(1, 2).contiguous().transpose(1, 2)),
        ValueError,
        r"residual must have a contiguous last dim \(stride 1\), got strides \[56, 1, 7\]",
    ),
    "dtype": (
        _replace(residual=lambda x: x.long()),
        ValueError,
        "residual must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    "not-a-tensor": (_replace(branch=3.0), TypeError, "branch must be a tensor, got float"),
    "weight-shape": (_replace(weight=lambda x: x[:4]), ValueError, r"weight must have shape \[C\] = \[8\], got \[4\]"),
    "bias-device": (_replace(bias=lambda x: x.to("meta")), ValueError, "bias must be on cpu like the first tensor, got meta"),
    "layout-type": (_replace(layout=(3, 4)), TypeError, "layout must be a SegmentLayout, got tuple"),
    "layout-sum": (_replace(layout=SegmentLayout.of(a=3, b=5)), ValueError, r"must sum to residual's S = 7, got 8"),
    "eps": (_replace(eps=-1.0), ValueError, "eps must be >= 0, got -1.0"),
    "impl": (_replace(impl="cuda"), ValueError, r"impl must be one of \('auto', 'triton', 'reference'\), got 'cuda'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument_and_both_values(case: str) -> None:
    """Every wrong argument is refused before anything runs, with its name, what it must be and what it is."""
    change, error, message = ERRORS[case]
    inputs = make_inputs("segment_gate_residual_adaln", 2, (3, 4), 8, torch.float32)
    with pytest.raises(error, match=message):
        rgkernels.segment_gate_residual_adaln(**change(inputs))


@every_op
def test_float64_is_for_the_reference(op: str, device: str) -> None:
    """The kernels refuse float64 instead of computing it in float32."""
    with pytest.raises(NotImplementedError, match=r"supports float16, bfloat16 and float32, got torch\.float64"):
        getattr(rgkernels, op)(**make_inputs(op, 1, (3,), 8, torch.float64, device), impl="triton")


def test_triton_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by name where it cannot run, the Triton implementation raises; "auto" takes the reference there."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = make_inputs("segment_adaln", 1, (3,), 8, torch.float32)
    with pytest.raises(RuntimeError, match="needs CUDA tensors, got cpu tensors"):
        rgkernels.segment_adaln(**inputs, impl="triton")
    assert torch.equal(rgkernels.segment_adaln(**inputs), rgkernels.segment_adaln(**inputs, impl="reference"))
