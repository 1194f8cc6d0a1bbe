"""segment_attention in Triton against split SDPA, and both against a dense mask in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rgkernels import SegmentLayout, segment_attention
from rgkernels.testing import assert_within_reference_error, outputs_and_grads, randn, to_float64

of = SegmentLayout.of
BOTH = [("text", "condition"), ("condition", "text")]
# key tiles have 32 rows and query tiles 64 in the interpreter, 128 and 64 or 128 on a GPU
LAYOUTS = {
    "paper": of(text=37, target=70, condition=65, blocked=BOTH),
    "cached": of(text=37, target=70, condition=65, blocked=[*BOTH, ("condition", "target")]),
    "conditions": of(
        text=9, target=70, c1=40, c2=41,
        blocked=[(a, b) for a in ("text", "c1", "c2") for b in ("text", "c1", "c2") if a != b],
    ),
    "one-way": of(text=33, target=64, condition=31, blocked=[("text", "condition")]),
    "gaps": of(a=70, b=5, c=33, d=66, blocked=[("a", "b"), ("a", "d"), ("c", "a"), ("d", "c"), ("b", "c")]),
    "below": of(text=31, target=63, condition=127, blocked=BOTH),
    "exact": of(text=32, target=64, condition=128, blocked=BOTH),
    "above": of(text=33, target=65, condition=129, blocked=BOTH),
    "single": of(text=1, target=1, condition=1, blocked=BOTH),
    "single-long": of(text=1, target=130, condition=1, blocked=BOTH),
    "empty": of(text=0, target=40, condition=33, other=0, blocked=[*BOTH, ("other", "target")]),
    "unseen": of(a=34, b=40, c=3, blocked=[("a", "a"), ("a", "b"), ("a", "c"), ("b", "c"), ("c", "c")]),
    "plain": of(a=97),
    "nothing": of(a=0, b=0),
}  # fmt: skip
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SegmentLayout,
    query_segments: tuple[str, ...] | None = None,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The oracle: all scores, a dense mask, rows that see nothing taken out by hand."""
    rows = [
        i
        for name in (layout.names if query_segments is None else query_segments)
        for i in range(*layout.slice(name).indices(layout.seq_len))
    ]
    mask = layout.mask(q.device)[rows]
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    scores = scores.masked_fill(~mask, -math.inf)
    seen = mask.any(-1, keepdim=True)
    weights = torch.where(seen, scores, 0.0).softmax(-1) * seen
    return weights @ v, torch.where(seen[:, 0], torch.where(seen, scores, 0.0).logsumexp(-1), -math.inf)


def make_inputs(
    layout: SegmentLayout,
    dtype: torch.dtype,
    device: str = "cpu",
    batch: int = 1,
    heads: int = 1,
    head_dim: int = 64,
    scale: float = 1.0,
) -> dict[str, Any]:
    """q, k, v as [B, H, S, D] views of [B, S, H, D] memory, as a transformer makes them."""
    shape = (batch, layout.seq_len, heads, head_dim)
    qkv = {name: randn(*shape, dtype=dtype, device=device, seed=seed, scale=scale) for seed, name in enumerate("qkv")}
    return {name: x.transpose(1, 2).requires_grad_() for name, x in qkv.items()} | {"layout": layout}


def make_upstream(q: Tensor) -> list[Tensor | None]:
    """Gradients of o and lse."""
    return [
        randn(*q.shape, dtype=torch.float32, device=str(q.device), seed=90),
        randn(*q.shape[:3], dtype=torch.float32, device=str(q.device), seed=91),
    ]


def run(inputs: dict[str, Any], upstream: list[Tensor | None], impl: str = "triton") -> dict[str, Tensor]:
    return outputs_and_grads(lambda **kw: segment_attention(**kw, return_lse=True, impl=impl), inputs, upstream)


def check(inputs: dict[str, Any], upstream: list[Tensor | None] | None = None) -> dict[str, Tensor]:
    """Hold o, lse, dq, dk, dv to the tolerance rule against the dense float64 oracle."""
    upstream = make_upstream(inputs["q"]) if upstream is None else upstream
    actual = run(inputs, upstream)
    # what the half-precision inputs lead to: lse has no gradient where nothing is seen
    oracle = outputs_and_grads(dense, to_float64(inputs), upstream)
    assert_within_reference_error(actual, run(inputs, upstream, "reference"), oracle)
    return actual


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


# NaN on purpose, and padded keys, whose rows are never stored, far from the others
nan_warnings = pytest.mark.filterwarnings(
    "ignore:All-NaN:RuntimeWarning", "ignore:invalid value:RuntimeWarning", "ignore:overflow encountered in exp2:RuntimeWarning"
)


@pytest.fixture(autouse=True)
def _orderless_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter's products not depend on how BLAS orders its sums.

    A GPU adds q @ k.T and k @ q.T in the same order, the BLAS behind numpy does not. Logits in the hundreds turn that last bit
    into errors that the rule would ascribe to the kernel.
    """
    if torch.cuda.is_available():
        return
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        product = a.data.astype("float64") @ b.data.astype("float64")
        return interpreter.TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@every_layout
def test_matches_reference(layout: SegmentLayout, device: str, dtype: torch.dtype) -> None:
    """Outputs, lse and all gradients, lse's included, for every kind of visibility and every edge of a tile."""
    check(make_inputs(layout, dtype, device))


@pytest.mark.parametrize("head_dim", [32, 96, 128])
def test_head_sizes(head_dim: int, device: str, dtype: torch.dtype) -> None:
    """The other head sizes, 96 in tiles of 128 columns included, for several samples and heads."""
    check(make_inputs(LAYOUTS["paper"], dtype, device, batch=2, heads=2, head_dim=head_dim))


@pytest.mark.parametrize("scale", [4.0, 16.0])
def test_input_scale(scale: float, device: str, dtype: torch.dtype) -> None:
    """Large inputs: softmax close to one-hot. A scale folded into half-precision keys would fail here."""
    check(make_inputs(LAYOUTS["above"], dtype, device, scale=scale))


@nan_warnings
@pytest.mark.parametrize("logit", [-120.0, 120.0])
def test_extreme_logits(logit: float, device: str, dtype: torch.dtype) -> None:
    """All scores far from 0, with ragged tiles: a padded score of 0 among scores of -120 would overflow exp."""
    inputs = make_inputs(LAYOUTS["above"], dtype, device, scale=0.1)
    offset = math.sqrt(120.0 / math.sqrt(64))
    with torch.no_grad():
        inputs["q"] += offset
        inputs["k"] += math.copysign(offset, logit)
    actual = check(inputs)
    assert abs(actual["out1"].mean().item() - logit) < 10


@pytest.mark.parametrize("softmax_scale", [0.5, 0.0, -0.25])
def test_softmax_scale(softmax_scale: float, device: str, dtype: torch.dtype) -> None:
    """Any factor: 0 averages the visible values, a negative one prefers the least similar key."""
    check(make_inputs(LAYOUTS["above"], dtype, device) | {"softmax_scale": softmax_scale})


@pytest.mark.parametrize("names", [("text", "target"), ("condition", "text"), ("target",), ()], ids=str)
def test_query_segments(names: tuple[str, ...], device: str, dtype: torch.dtype) -> None:
    """Rows of some segments, in any order, against all keys: the condition cache."""
    layout = LAYOUTS["cached"]
    inputs = make_inputs(layout, dtype, device)
    rows = torch.cat(
        [inputs["q"].detach()[:, :, layout.slice(name)] for name in names] or [inputs["q"].detach()[:, :, :0]], dim=2
    )
    actual = check(inputs | {"q": rows.requires_grad_(), "query_segments": names})
    if names == ("text", "target"):
        full = run(inputs, make_upstream(inputs["q"]))
        assert torch.equal(actual["out0"], full["out0"][:, :, : rows.shape[2]]), (
            "the same rows in a full call have the same bits"
        )


@nan_warnings
@pytest.mark.parametrize("order", ["text target condition", "text condition target", "condition text target"])
@pytest.mark.parametrize("poison", [math.nan, 1e4])
def test_blocked_keys_do_not_leak(poison: float, order: str, device: str, dtype: torch.dtype) -> None:
    """Whatever lies in blocked keys and values, the rows that must not see them keep every bit.

    With the condition right behind the text, its first keys lie in the same tile as the text's last ones.
    """
    layout = of(**dict.fromkeys(order.split(), 0) | {"text": 37, "target": 70, "condition": 45}, blocked=BOTH)
    text, condition = layout.slice("text"), layout.slice("condition")
    inputs = make_inputs(layout, dtype, device)
    upstream = [g.clone() for g in make_upstream(inputs["q"])]
    for grad in upstream:
        keep = grad[:, :, text].clone()
        grad.zero_()
        grad[:, :, text] = keep
    before = run(inputs, upstream)
    with torch.no_grad():
        inputs["k"][:, :, condition] = poison
        inputs["v"][:, :, condition] = poison
    after = run(inputs, upstream)
    for name in ("out0", "out1", "grad_q"):
        assert torch.equal(before[name][:, :, text], after[name][:, :, text]), name
    assert not before["grad_k"][:, :, condition].any()
    assert not before["grad_v"][:, :, condition].any()
    if math.isfinite(poison):
        assert not after["grad_k"][:, :, condition].any()
        assert not after["grad_v"][:, :, condition].any()


@nan_warnings
@pytest.mark.parametrize("order", ["text target condition", "text condition target", "condition text target"])
def test_blocked_queries_do_not_leak(order: str, device: str, dtype: torch.dtype) -> None:
    """NaN in the queries, upstream gradients and rows of one segment stays out of keys that it does not see, and other rows."""
    layout = of(**dict.fromkeys(order.split(), 0) | {"text": 37, "target": 70, "condition": 45}, blocked=BOTH)
    text, condition = layout.slice("text"), layout.slice("condition")
    inputs = make_inputs(layout, dtype, device)
    upstream = make_upstream(inputs["q"])
    before = run(inputs, upstream)
    with torch.no_grad():
        inputs["q"][:, :, condition] = math.nan
    upstream = [g.index_fill(2, torch.arange(layout.seq_len, device=device)[condition], math.nan) for g in upstream]
    after = run(inputs, upstream)
    for name in ("grad_k", "grad_v"):
        assert torch.equal(before[name][:, :, text], after[name][:, :, text]), name
    for name in ("out0", "out1", "grad_q"):
        for segment in ("text", "target"):
            rows = layout.slice(segment)
            assert torch.equal(before[name][:, :, rows], after[name][:, :, rows]), name


@nan_warnings
def test_rows_that_see_nothing(device: str, dtype: torch.dtype) -> None:
    """They give 0, -inf and zero gradients, also where the query is NaN; unseen keys have zero gradients."""
    layout = LAYOUTS["unseen"]
    inputs = make_inputs(layout, dtype, device)
    with torch.no_grad():
        inputs["q"][:, :, layout.slice("a")] = math.nan
        inputs["v"][:, :, layout.slice("c")] = 0.0
    actual = run(inputs, make_upstream(inputs["q"]))
    rows = layout.slice("a")
    assert not actual["out0"][:, :, rows].any()
    assert (actual["out1"][:, :, rows] == -math.inf).all()
    assert not actual["grad_q"][:, :, rows].any()
    for name, value in actual.items():
        assert not value.isnan().any(), name
    assert not actual["grad_k"][:, :, layout.slice("c")].any()


def test_repeats_have_the_same_bits(device: str) -> None:
    """Outputs and gradients, twice from the same inputs."""
    inputs = make_inputs(LAYOUTS["gaps"], torch.float16, device)
    upstream = make_upstream(inputs["q"])
    first = run(inputs, upstream)
    for _ in range(2 if device == "cpu" else 50):
        assert_equal(run(inputs, upstream), first)


def test_batch_mates_do_not_matter(device: str) -> None:
    """A sample and a head have the same bits alone as among others."""
    inputs = make_inputs(LAYOUTS["paper"], torch.float16, device, batch=3, heads=2)
    upstream = make_upstream(inputs["q"])
    together = run(inputs, upstream)
    pick = (slice(1, 2), slice(1, 2))
    alone = {name: x.detach()[pick].requires_grad_() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    assert_equal(run(alone, [g[pick] for g in upstream]), {name: x[pick] for name, x in together.items()})


def _contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def _packed(x: Tensor) -> Tensor:
    """A slice of [B, S, 3, H, D] memory that is NaN elsewhere."""
    packed = torch.full((x.shape[0], x.shape[2], 3, x.shape[1], x.shape[3]), math.nan, dtype=x.dtype, device=x.device)
    packed[:, :, 1] = x.transpose(1, 2)
    return packed[:, :, 1].transpose(1, 2)


def _inside(x: Tensor) -> Tensor:
    """A view whose rows start at an odd element, with NaN before, behind and between them."""
    shape = (x.shape[0], x.shape[1], x.shape[2] + 3, x.shape[3] + 5)
    around = torch.full(shape, math.nan, dtype=x.dtype, device=x.device)
    inner = around[:, :, 1:-2, 3:-2]
    inner.copy_(x)
    return inner


MEMORY: dict[str, Callable[[Tensor], Tensor]] = {"contiguous": _contiguous, "packed": _packed, "inside": _inside}


@pytest.mark.parametrize("memory", MEMORY)
def test_strides(memory: str, device: str) -> None:
    """Any strides with a contiguous last dim: the same bits as [B, S, H, D] memory gives, in q's memory order."""
    inputs = make_inputs(LAYOUTS["paper"], torch.float16, device, batch=2, heads=2)
    upstream = make_upstream(inputs["q"])
    expected = run(inputs, upstream)
    moved = {name: MEMORY[memory](x.detach()).requires_grad_() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    actual = run(moved, [MEMORY[memory](upstream[0].to(torch.float16)), upstream[1]])
    assert_equal(actual, expected)
    tokens_first = memory == "packed"
    for name in ("out0", "grad_q", "grad_k", "grad_v"):
        assert actual[name].transpose(1, 2).is_contiguous() is tokens_first, name


def test_expanded_keys_and_values(device: str, dtype: torch.dtype) -> None:
    """One key head and one sample for all (stride 0): the gradient is summed over what was expanded."""
    layout = LAYOUTS["paper"]
    inputs = make_inputs(layout, dtype, device, batch=2)
    upstream = make_upstream(inputs["q"])
    shared = {name: inputs[name].detach()[:1, :1].clone().requires_grad_() for name in "kv"}

    def fn(q: Tensor, k: Tensor, v: Tensor, impl: str) -> Any:
        return segment_attention(q, k.expand(q.shape), v.expand(q.shape), layout, return_lse=True, impl=impl)

    leaves = {"q": inputs["q"], **shared}
    actual = outputs_and_grads(fn, leaves | {"impl": "triton"}, upstream)
    reference = outputs_and_grads(fn, leaves | {"impl": "reference"}, upstream)
    oracle = outputs_and_grads(fn, to_float64(leaves) | {"impl": "reference"}, upstream)
    assert_within_reference_error(actual, reference, oracle)


@pytest.mark.parametrize("kind", ["sum", "heads", "transposed"])
def test_upstream_strides(kind: str, device: str) -> None:
    """Upstream gradients as autograd makes them: expanded from a scalar or over heads, or in another memory order."""
    inputs = make_inputs(LAYOUTS["paper"], torch.float16, device)
    full = randn(*inputs["q"].shape, dtype=torch.float16, device=device, seed=5)
    grad = {
        "sum": torch.ones((), dtype=torch.float16, device=device).expand(full.shape),
        "heads": full[:, :1].expand(full.shape),
        "transposed": full.transpose(2, 3).contiguous().transpose(2, 3),
    }[kind]
    assert_equal(run(inputs, [grad, None]), run(inputs, [grad.contiguous(), None]))


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "kv"])
def test_gradients_only_where_wanted(wanted: str, device: str) -> None:
    """Frozen inputs (cached keys and values) get no gradient; the others keep their bits."""
    inputs = make_inputs(LAYOUTS["paper"], torch.float32, device)
    upstream = make_upstream(inputs["q"])
    expected = run(inputs, upstream)
    frozen = {n: x.detach().requires_grad_(n in wanted) if isinstance(x, Tensor) else x for n, x in inputs.items()}
    actual = run(frozen, upstream)
    assert {n for n in actual if n.startswith("grad")} == {f"grad_{n}" for n in wanted}
    assert_equal(actual, {name: expected[name] for name in actual})


def test_gradient_of_lse_alone(device: str, dtype: torch.dtype) -> None:
    """A loss on lse only: dv is exactly zero."""
    inputs = make_inputs(LAYOUTS["gaps"], dtype, device)
    actual = check(inputs, [None, make_upstream(inputs["q"])[1]])
    assert not actual["grad_v"].any()


def test_return_lse_is_all_that_changes(device: str) -> None:
    inputs = make_inputs(LAYOUTS["paper"], torch.float32, device)
    o = segment_attention(**inputs, impl="triton")
    assert torch.equal(o, segment_attention(**inputs, impl="triton", return_lse=True)[0])


def test_one_segment_is_plain_attention(device: str) -> None:
    """Splitting a sequence into segments that all see each other changes no bit."""
    inputs = make_inputs(LAYOUTS["plain"], torch.float16, device)
    upstream = make_upstream(inputs["q"])
    assert_equal(run(inputs | {"layout": of(a=40, b=0, c=57)}, upstream), run(inputs, upstream))


def test_reference_is_sdpa_with_a_dense_mask() -> None:
    """The specification itself, in float64, against PyTorch's masked path."""
    layout = LAYOUTS["gaps"]
    q, k, v = (x.detach() for x in list(to_float64(make_inputs(layout, torch.float32)).values())[:3])
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.mask())
    torch.testing.assert_close(segment_attention(q, k, v, layout, impl="reference"), expected, rtol=1e-12, atol=1e-12)


def test_offsets_past_2_to_the_31(device: str) -> None:
    """Token strides so large that the third token's offset does not fit 32 bits. Only the touched pages exist."""
    layout, stride, head_dim = of(a=1, b=2, blocked=[("a", "b")]), 2**30 + 64, 32
    memory = torch.empty(2 * stride + 8 * head_dim, dtype=torch.float16, device=device)
    small = make_inputs(layout, torch.float16, device, head_dim=head_dim)
    upstream = make_upstream(small["q"])
    upstream[0] = upstream[0].to(torch.float16)
    views = []
    for i, x in enumerate([small["q"], small["k"], small["v"], upstream[0]]):
        view = memory.as_strided(x.shape, (0, head_dim, stride, 1), storage_offset=2 * i * head_dim)
        view.copy_(x.detach())
        views.append(view)
    far = {name: view.detach().requires_grad_() for name, view in zip("qkv", views, strict=False)} | {"layout": layout}
    assert_equal(run(far, [views[3], upstream[1]]), run(small, upstream))


UNSUPPORTED = {
    "float64": (torch.float64, 64, r"supports float16, bfloat16 and float32, got torch.float64"),
    "head-size": (torch.float32, 48, r"supports D in \(32, 64, 96, 128\), got 48"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_limits_are_named(case: str, device: str) -> None:
    dtype, head_dim, message = UNSUPPORTED[case]
    with pytest.raises(NotImplementedError, match=message):
        segment_attention(**make_inputs(LAYOUTS["single"], dtype, device, head_dim=head_dim), impl="triton")


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "k-shape": ({"k": torch.zeros(1, 2, 4, 32)}, ValueError, r"k must have shape .* got \[1, 2, 4, 32\]"),
    "v-dtype": ({"v": torch.zeros(1, 2, 3, 64).half()}, ValueError, "v must have dtype torch.float32"),
    "q-rank": ({"q": torch.zeros(2, 3, 64)}, ValueError, "q must have 4 dimensions"),
    "q-stride": ({"q": torch.zeros(1, 2, 64, 3).transpose(2, 3)}, ValueError, "q must have a contiguous last dim"),
    "rows": ({"query_segments": ("text",)}, ValueError, r"q must have shape \[B, H, Sq, D\] = \[1, 2, 1, 64\], got"),
    "twice": ({"query_segments": ("text", "text")}, ValueError, "query_segments must be unique"),
    "a string": ({"query_segments": "text"}, TypeError, "query_segments must be a sequence of names, got the string 'text'"),
    "no layout": ({"layout": None}, TypeError, "layout must be a SegmentLayout, got NoneType"),
    "no scale": ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be finite, got nan"),
    "unknown": ({"query_segments": ("image",)}, ValueError, "segment must be one of"),
    "layout": ({"layout": of(a=2)}, ValueError, "must sum to k's S = 3, got 2"),
    "impl": ({"impl": "cudnn"}, ValueError, r"impl must be one of .*'flash-attn'\), got 'cudnn'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument_and_both_values(case: str) -> None:
    change, error, message = ERRORS[case]
    inputs = {
        n: x.detach() if isinstance(x, Tensor) else x for n, x in make_inputs(LAYOUTS["single"], torch.float32, heads=2).items()
    }
    with pytest.raises(error, match=message):
        segment_attention(**(inputs | {"impl": "triton"} | change))
