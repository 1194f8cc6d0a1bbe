"""impl="flash-attn": the split calls, with SDPA standing in for the package."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rgkernels import SegmentLayout, segment_attention
from rgkernels.testing import outputs_and_grads, randn

LAYOUTS = {
    "paper": SegmentLayout.of(text=5, target=9, condition=7, blocked=[("text", "condition"), ("condition", "text")]),
    "gap": SegmentLayout.of(a=5, b=3, c=4, blocked=[("a", "b")]),
    "empty": SegmentLayout.of(a=0, b=6),
    "unseen": SegmentLayout.of(a=4, b=6, blocked=[("a", "a"), ("a", "b")]),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Stand in for flash_attn: [B, S, H, D] in and out, SDPA inside. Returns the (queries, keys) of each call."""
    made: list[tuple[int, int]] = []

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, deterministic: bool, return_attn_probs: bool):
        assert deterministic and return_attn_probs
        made.append((q.shape[1], k.shape[1]))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        lse = (q.float() @ k.float().transpose(-1, -2) * softmax_scale).logsumexp(-1)
        return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale).transpose(1, 2), lse, None

    module = types.ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return made


def make_inputs(layout: SegmentLayout, dtype: torch.dtype = torch.float16) -> dict[str, Any]:
    shape = (2, layout.seq_len, 3, 8)
    qkv = {name: randn(*shape, dtype=dtype, seed=seed).transpose(1, 2).requires_grad_() for seed, name in enumerate("qkv")}
    return qkv | {"layout": layout}


@pytest.mark.parametrize("name", LAYOUTS)
def test_matches_reference(name: str, calls: list[tuple[int, int]]) -> None:
    """The same calls in the same order as the reference give the same bits, gradients and memory order included."""
    layout = LAYOUTS[name]
    inputs = make_inputs(layout)
    upstream = [randn(*inputs["q"].shape, dtype=torch.float16, seed=9)]
    expected = outputs_and_grads(lambda **kw: segment_attention(**kw, impl="reference"), inputs, upstream)
    actual = outputs_and_grads(lambda **kw: segment_attention(**kw, impl="flash-attn"), inputs, upstream)
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key
        assert actual[key].stride() == value.stride(), key
    seen = [(layout.length(n), sum(b - a for a, b in layout.key_ranges(n))) for n in layout.names]
    assert calls == [(rows, keys) for rows, keys in seen if rows and keys]


def test_lse_and_query_segments(calls: list[tuple[int, int]]) -> None:
    """Rows of some segments in any order against all keys, with the reference's lse."""
    layout = LAYOUTS["paper"]
    inputs = make_inputs(layout)
    options = {"query_segments": ("condition", "text"), "return_lse": True, "softmax_scale": 0.3}
    q = inputs["q"].detach()[:, :, :12]
    rows = (q, inputs["k"].detach(), inputs["v"].detach(), layout)
    o, lse = segment_attention(*rows, **options, impl="flash-attn")
    expected_o, expected_lse = segment_attention(*rows, **options, impl="reference")
    assert torch.equal(o, expected_o)
    torch.testing.assert_close(lse, expected_lse)
    assert lse.dtype == torch.float32
    assert calls == [(7, 16), (5, 14)]
    o, lse = segment_attention(q[:, :, :0], *rows[1:], query_segments=(), return_lse=True, impl="flash-attn")
    assert o.shape == (2, 3, 0, 8)
    assert lse.shape == (2, 3, 0)


def test_rows_that_see_nothing(calls: list[tuple[int, int]]) -> None:
    """They give 0 and -inf, never NaN, even for NaN queries."""
    inputs = {name: x.detach().clone() if isinstance(x, Tensor) else x for name, x in make_inputs(LAYOUTS["unseen"]).items()}
    inputs["q"][:, :, :4] = math.nan
    o, lse = segment_attention(**inputs, return_lse=True, impl="flash-attn")
    assert (o[:, :, :4] == 0).all()
    assert (lse[:, :, :4] == -math.inf).all()
    assert o.isfinite().all()


def test_lse_gradient_is_refused(calls: list[tuple[int, int]]) -> None:
    """The package would drop it silently."""
    o, lse = segment_attention(**make_inputs(LAYOUTS["paper"]), return_lse=True, impl="flash-attn")
    with pytest.raises(NotImplementedError, match="no gradient for lse"):
        (o.sum() + lse.sum()).backward()


def test_float32_is_refused(calls: list[tuple[int, int]]) -> None:
    with pytest.raises(NotImplementedError, match=r"supports float16 and bfloat16, got torch.float32"):
        segment_attention(**make_inputs(LAYOUTS["paper"], torch.float32), impl="flash-attn")


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(RuntimeError, match="pip install flash-attn"):
        segment_attention(**make_inputs(LAYOUTS["paper"]), impl="flash-attn")
