"""qk_norm_rope: LayerNorm of query and key heads, then rotary embedding of the tokens after the text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rgkernels
from rgkernels.testing import assert_within_reference_error, outputs_and_grads, randn, to_float64

PARAMETERS = ("q_weight", "q_bias", "k_weight", "k_bias")
LEAVES = ("q", "k", *PARAMETERS)

# batch, heads, tokens, head size, rope_start: one and many heads, tiles that do not divide, all or no tokens rotated
SHAPES = {
    "B2-H3-S7-D64": (2, 3, 7, 64, 3),
    "B1-H30-S3-D64-all": (1, 30, 3, 64, 0),
    "B1-H18-S5-D32": (1, 18, 5, 32, 1),
    "B2-H1-S19-D128": (2, 1, 19, 128, 8),
    "B1-H5-S9-D64-none": (1, 5, 9, 64, 9),
    "B1-H2-S6-D80": (1, 2, 6, 80, 2),
    "B1-H4-S3-D96": (1, 4, 3, 96, 1),
}


def make_inputs(
    batch: int, heads: int, seq_len: int, head_dim: int, rope_start: int, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Any]:
    """Leaf inputs, all but the tables requiring gradients; the tables are no rotation, so that every entry matters."""
    inputs: dict[str, Any] = {}
    for seed, name in enumerate(LEAVES):
        shape = (batch, heads, seq_len, head_dim) if len(name) == 1 else (head_dim,)
        value = randn(*shape, dtype=dtype, device=device, seed=seed)
        inputs[name] = (value + 0.5 if len(name) == 1 else value).requires_grad_()
    if head_dim % 2 == 0:
        for seed, name in enumerate(("cos", "sin"), start=10):
            inputs[name] = randn(seq_len - rope_start, head_dim, dtype=torch.float32, device=device, seed=seed)
    return inputs | {"rope_start": rope_start if head_dim % 2 == 0 else 0}


def make_upstream(inputs: dict[str, Any]) -> list[Tensor | None]:
    q = inputs["q"]
    return [randn(*q.shape, dtype=q.dtype, device=str(q.device), seed=100 + i) for i in range(2)]


def run(inputs: dict[str, Any], upstream: list[Tensor | None], impl: str = "triton") -> dict[str, Tensor]:
    return outputs_and_grads(lambda **kwargs: rgkernels.qk_norm_rope(**kwargs, impl=impl), inputs, upstream)


def check(inputs: dict[str, Any], upstream: list[Tensor | None]) -> dict[str, Tensor]:
    """Hold outputs and all gradients to the tolerance rule."""
    actual = run(inputs, upstream)
    wide = [None if g is None else g.double() for g in upstream]
    assert_within_reference_error(actual, run(inputs, upstream, "reference"), run(to_float64(inputs), wide, "reference"))
    return actual


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def packed(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs with q and k as views of one packed projection [B, S, 3, H, D]."""
    q, k = (inputs[name].detach().transpose(1, 2) for name in "qk")
    projection = torch.stack((q, k, torch.full_like(q, float("nan"))), dim=2)
    views = {name: projection[:, :, i].transpose(1, 2).requires_grad_() for i, name in enumerate("qk")}
    return inputs | views


# ---- parity


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape: str, device: str, dtype: torch.dtype) -> None:
    """Outputs and all gradients agree with the float64 oracle as well as plain PyTorch does."""
    inputs = packed(make_inputs(*SHAPES[shape], dtype, device))
    assert len(check(inputs, make_upstream(inputs))) == 2 + len(LEAVES)


@pytest.mark.parametrize("absent", ["tables", "parameters", "q_weight", "k_bias"])
def test_optional_arguments(absent: str, device: str, dtype: torch.dtype) -> None:
    """Rotation and norm parameters may be absent, all of them or one by one."""
    inputs = make_inputs(1, 3, 5, 64, 2, dtype, device)
    for name in {"tables": ("cos", "sin"), "parameters": PARAMETERS}.get(absent, (absent,)):
        del inputs[name]
    check(inputs, make_upstream(inputs))


def test_odd_head_size_without_rotation(device: str, dtype: torch.dtype) -> None:
    """A head size that holds no pairs is normalised all the same."""
    inputs = make_inputs(1, 3, 4, 33, 0, dtype, device)
    check(inputs, make_upstream(inputs))


def test_float32_parameters_of_half_tokens(device: str) -> None:
    """Norm parameters may be float32 masters; their gradients are float32."""
    inputs = make_inputs(1, 3, 5, 64, 2, torch.float16, device)
    inputs |= {name: inputs[name].detach().float().requires_grad_() for name in PARAMETERS}
    results = check(inputs, make_upstream(inputs))
    assert all(results[f"grad_{name}"].dtype == torch.float32 for name in PARAMETERS)


# ---- memory layouts


@pytest.mark.parametrize("memory", ["packed", "token-major", "head-major", "mixed", "table-rows"])
def test_strides_in_and_memory_order_out(memory: str, device: str, dtype: torch.dtype) -> None:
    """q and k are read in place from any layout; results and gradients keep each one's memory order, values their bits."""
    plain = make_inputs(2, 3, 7, 64, 3, dtype, device)
    views = packed(plain)
    if memory in ("token-major", "mixed"):
        views["q"] = views["q"].detach().clone().requires_grad_()
        assert views["q"].stride() == (1344, 64, 192, 1)
    if memory == "token-major":
        views["k"] = views["k"].detach().clone().requires_grad_()
    if memory in ("head-major", "mixed"):
        views["k"] = plain["k"]
    if memory == "head-major":
        views["q"] = plain["q"]
    if memory == "table-rows":
        views["cos"], views["sin"] = torch.stack((plain["cos"], plain["sin"]), dim=1).unbind(1)
    results = run(views, make_upstream(plain))
    assert_equal(results, run(plain, make_upstream(plain)))
    for name, like in (("out0", "q"), ("out1", "k"), ("grad_q", "q"), ("grad_k", "k")):
        token_major = views[like].stride(1) < views[like].stride(2)
        dense = results[name].transpose(1, 2) if token_major else results[name]
        assert dense.is_contiguous(), name
    reference = rgkernels.qk_norm_rope(**views, impl="reference")
    assert [out.stride() for out in reference] == [results[name].stride() for name in ("out0", "out1")]


@pytest.mark.parametrize("memory", ["token-major", "channels-strided", "expanded-tokens", "expanded-channels"])
def test_upstream_of_any_strides(memory: str, device: str) -> None:
    """Attention's backward hands over gradients in its own memory order; the result depends on values alone."""
    inputs = packed(make_inputs(2, 3, 4, 64, 1, torch.float32, device))
    views = [
        {
            "token-major": lambda g: g.transpose(1, 2).contiguous().transpose(1, 2),
            "channels-strided": lambda g: g.transpose(2, 3).contiguous().transpose(2, 3),
            "expanded-tokens": lambda g: g[:, :, :1].expand_as(g),
            "expanded-channels": lambda g: g[..., :1].expand_as(g),
        }[memory](grad)
        for grad in make_upstream(inputs)
    ]
    assert_equal(run(inputs, views), run(inputs, [g.contiguous() for g in views]))


@pytest.mark.parametrize("stride", ["batch", "head", "token"])
def test_offsets_beyond_int32(stride: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads that lie 2^31 elements and more apart are reached: offsets are 64 bits wide."""
    executor = pytest.importorskip("triton.runtime.interpreter").GridExecutor
    # the interpreter would copy the storages back onto themselves and touch every page of the untouched gigabytes
    monkeypatch.setattr(executor, "_restore_args_dev", lambda *_: None)
    shape = {"batch": (2, 1, 3, 64), "head": (1, 3, 1, 64), "token": (1, 1, 3, 64)}[stride]
    strides = {
        "batch": (2**31 + 64, 0, 64, 1),
        "head": (0, 2**30 + 64, 0, 1),
        "token": (0, 0, 2**30 + 64, 1),
    }[stride]
    plain = make_inputs(*shape, 0, torch.float16)
    far = torch.empty(2**31 + 64 + 3 * 64 + 128, dtype=torch.float16)  # address space, not memory
    view = far.as_strided(shape, strides)
    for name in "qk":
        view = view.detach().copy_(plain[name].detach())
        upstream = make_upstream(plain)
        assert_equal(run(plain | {name: view.requires_grad_()}, upstream), run(plain, upstream))


# ---- properties


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_text_tokens_are_not_rotated(device: str) -> None:
    """Tokens before rope_start get LayerNorm alone, and the tables do not reach them."""
    inputs = make_inputs(1, 3, 7, 64, 3, torch.float32, device)
    tables = {name: torch.full_like(inputs[name], float("inf")) for name in ("cos", "sin")}
    plain = {name: value for name, value in inputs.items() if name not in ("cos", "sin")}
    for actual, expected in zip(
        rgkernels.qk_norm_rope(**inputs | tables, impl="triton"),
        rgkernels.qk_norm_rope(**plain, impl="triton"),
        strict=True,
    ):
        assert torch.equal(actual[:, :, :3], expected[:, :, :3])


def test_rotation_preserves_norms(device: str) -> None:
    """With true cosines and sines the rotation keeps every pair's length, and backward undoes it."""
    inputs = make_inputs(1, 3, 6, 64, 0, torch.float32, device)
    angle = randn(6, 32, dtype=torch.float32, device=device, seed=20).repeat_interleave(2, dim=-1)
    plain = {name: value for name, value in inputs.items() if name not in ("cos", "sin")}
    upstream = make_upstream(inputs)
    rotated = run(inputs | {"cos": angle.cos(), "sin": angle.sin()}, upstream)
    straight = run(plain, upstream)
    for name in ("out0", "out1"):
        lengths = [r[name].unflatten(-1, (-1, 2)).norm(dim=-1) for r in (rotated, straight)]
        torch.testing.assert_close(*lengths)


def test_q_and_k_are_independent(device: str) -> None:
    """q's results do not depend on k, nor on k's parameters."""
    inputs = make_inputs(1, 3, 5, 64, 2, torch.float32, device)
    upstream = make_upstream(inputs)
    before = run(inputs, upstream)
    changed = {n: inputs[n].detach().mul(2).requires_grad_() for n in ("k", "k_weight", "k_bias")}
    after = run(inputs | changed, [upstream[0], None if upstream[1] is None else upstream[1] * 2])
    for name in ("out0", "grad_q", "grad_q_weight", "grad_q_bias"):
        assert torch.equal(after[name], before[name]), name


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_stays_in_its_head(device: str) -> None:
    """A NaN in one head of one token reaches no other head's output or gradient."""
    inputs = make_inputs(2, 3, 5, 64, 2, torch.float32, device)
    upstream = make_upstream(inputs)
    before = run(inputs, upstream)
    with torch.no_grad():
        inputs["q"][1, 2, 3, 7] = float("nan")
    after = run(inputs, upstream)
    keep = torch.ones(2, 3, 5, dtype=torch.bool)
    keep[1, 2, 3] = False
    for name in ("out0", "grad_q"):
        assert torch.equal(after[name][keep], before[name][keep]), name
    for name in ("out1", "grad_k", "grad_k_weight", "grad_k_bias"):
        assert torch.equal(after[name], before[name]), name


def test_repeats_are_bitwise_equal(device: str, dtype: torch.dtype) -> None:
    """Two runs agree bit for bit, forward and backward: no atomics, sums in a fixed order."""
    inputs = make_inputs(1, 3, 41, 64, 2, dtype, device)
    upstream = make_upstream(inputs)
    assert_equal(run(inputs, upstream), run(inputs, upstream))


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_used(used: int, device: str, dtype: torch.dtype) -> None:
    """q or k may go unused: the other's gradients are right and the unused half gets none."""
    inputs = make_inputs(1, 3, 5, 64, 2, dtype, device)
    upstream = make_upstream(inputs)
    upstream[1 - used] = None
    check(inputs, upstream)
    outputs = rgkernels.qk_norm_rope(**inputs, impl="triton")
    grads = torch.autograd.grad(outputs[used], [inputs[n] for n in LEAVES], upstream[used], allow_unused=True)
    assert [n for n, g in zip(LEAVES, grads, strict=True) if g is not None] == [n for n in LEAVES if n[0] == "qk"[used]]


def test_only_wanted_gradients_are_computed(device: str) -> None:
    """Each gradient alone equals the same gradient among all; a frozen input gets None."""
    inputs = make_inputs(1, 3, 5, 64, 2, torch.float32, device)
    upstream = make_upstream(inputs)
    full = run(inputs, upstream)
    for wanted in LEAVES:
        frozen = {n: x.detach().requires_grad_(n == wanted) if n in LEAVES else x for n, x in inputs.items()}
        alone = run(frozen, upstream)
        assert [name for name in alone if name.startswith("grad_")] == [f"grad_{wanted}"]
        assert torch.equal(alone[f"grad_{wanted}"], full[f"grad_{wanted}"]), wanted


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_eps_of_zero(device: str) -> None:
    """Without eps, lanes beyond the last head and token have no variance, and leave no trace in the parameter gradients."""
    inputs = make_inputs(1, 3, 5, 64, 2, torch.float32, device)
    check(inputs | {"eps": 0.0}, make_upstream(inputs))


@pytest.mark.parametrize("shape", [(0, 3, 4, 64, 1), (2, 3, 0, 64, 0)], ids=["no-batch", "no-tokens"])
def test_nothing_to_do(shape: tuple[int, ...], device: str) -> None:
    """Empty batches and sequences give empty results and zero parameter gradients."""
    inputs = make_inputs(*shape, torch.float32, device)
    for name, value in run(inputs, make_upstream(inputs)).items():
        assert value.shape == (inputs[name[5:]] if name.startswith("grad_") else inputs["q"]).shape
        assert not value.any(), name


# ---- the reference and the world outside


def test_reference_is_cogvideox_attention() -> None:
    """The reference reproduces diffusers' norm_q, norm_k and apply_rotary_emb on the tokens after the text."""
    pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import Attention
    from diffusers.models.embeddings import apply_rotary_emb, get_3d_rotary_pos_embed

    text, head_dim = 5, 32
    attention = Attention(query_dim=96, dim_head=head_dim, heads=3, qk_norm="layer_norm", eps=1e-6, bias=True)
    for norm in (attention.norm_q, attention.norm_k):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    cos, sin = get_3d_rotary_pos_embed(head_dim, ((0, 0), (4, 6)), (4, 6), temporal_size=2)
    hidden = torch.randn(2, text + 2 * 4 * 6, 96)
    q, k = (to(hidden).unflatten(-1, (3, head_dim)).transpose(1, 2) for to in (attention.to_q, attention.to_k))
    actual = rgkernels.qk_norm_rope(
        q, k, q_weight=attention.norm_q.weight, q_bias=attention.norm_q.bias, k_weight=attention.norm_k.weight,
        k_bias=attention.norm_k.bias, cos=cos, sin=sin, rope_start=text, impl="reference",
    )  # fmt: skip

    # CogVideoXAttnProcessor2_0
    for got, x, norm in zip(actual, (q, k), (attention.norm_q, attention.norm_k), strict=True):
        expected = norm(x).clone()
        expected[:, :, text:] = apply_rotary_emb(expected[:, :, text:], (cos, sin))
        torch.testing.assert_close(got, expected)


# ---- errors


ERRORS = {
    "rank": (lambda i: {"q": i["q"][0]}, ValueError, r"q must have 4 dimensions \[B, H, S, D\], got shape \[3, 5, 8\]"),
    "k-shape": (lambda i: {"k": i["k"][:, :, 1:]}, ValueError, r"k must have shape .* = \[2, 3, 5, 8\], got \[2, 3, 4, 8\]"),
    "k-dtype": (lambda i: {"k": i["k"].half()}, ValueError, "k must have dtype torch.float32 .*, got torch.float16"),
    "k-device": (lambda i: {"k": i["k"].to("meta")}, ValueError, "k must be on cpu like the first tensor, got meta"),
    "q-stride": (
        lambda i: {"q": i["q"].detach().mT.contiguous().mT},
        ValueError,
        r"q must have a contiguous last dim .*got strides",
    ),
    "q-dtype": (lambda i: {"q": i["q"].int()}, ValueError, "q must be float16, bfloat16, float32 or float64, got torch.int32"),
    "not-a-tensor": (lambda i: {"k": None}, TypeError, "k must be a tensor, got NoneType"),
    "weight-shape": (
        lambda i: {"q_weight": i["q_weight"][:4]},
        ValueError,
        r"q_weight must have shape \[D\] = \[8\], got \[4\]",
    ),
    "bias-device": (lambda i: {"k_bias": i["k_bias"].to("meta")}, ValueError, "k_bias must be on cpu .*, got meta"),
    "one-table": (lambda i: {"sin": None}, ValueError, "cos and sin must be given together"),
    "table-shape": (lambda i: {"cos": i["cos"][1:]}, ValueError, r"cos must have shape .* = \[3, 8\], got \[2, 8\]"),
    "rope-start": (lambda i: {"rope_start": 6}, ValueError, r"rope_start must be in 0..S = 0..5, got 6"),
    "eps": (lambda i: {"eps": float("nan")}, ValueError, "eps must be >= 0, got nan"),
    "impl": (lambda i: {"impl": "flash-attn"}, ValueError, "impl must be one of .*, got 'flash-attn'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument_and_both_values(case: str) -> None:
    """Every wrong argument is refused before anything runs, with its name, what it must be and what it is."""
    change, error, message = ERRORS[case]
    inputs = make_inputs(2, 3, 5, 8, 2, torch.float32)
    with pytest.raises(error, match=message):
        rgkernels.qk_norm_rope(**inputs | change(inputs))


def test_pairs_need_an_even_head_size() -> None:
    """Rotation of an odd head size is refused."""
    q = torch.randn(1, 1, 2, 7)
    table = torch.randn(2, 7)
    with pytest.raises(ValueError, match="D must be even to rotate pairs, got 7"):
        rgkernels.qk_norm_rope(q, q, cos=table, sin=table)


def test_float64_is_for_the_reference(device: str) -> None:
    """The kernels refuse float64 instead of computing it in float32."""
    with pytest.raises(NotImplementedError, match=r"supports float16, bfloat16 and float32, got torch\.float64"):
        rgkernels.qk_norm_rope(**make_inputs(1, 1, 2, 8, 0, torch.float64, device), impl="triton")


def test_second_derivative_raises(device: str) -> None:
    """There is no double backward, and asking for one says so instead of returning a wrong value."""
    inputs = make_inputs(1, 1, 2, 64, 0, torch.float32, device)
    q, _ = rgkernels.qk_norm_rope(**inputs, impl="triton")
    (grad,) = torch.autograd.grad(q.square().sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
