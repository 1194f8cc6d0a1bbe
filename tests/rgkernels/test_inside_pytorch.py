"""The ops among PyTorch's own tools: autocast, `torch.func`, and the FLOP counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import rgkernels
from rgkernels import SegmentLayout, segment_attention
from rgkernels.testing import randn

LAYOUT = SegmentLayout.of(text=3, target=5, condition=4, blocked=[("text", "condition"), ("condition", "text")])
FULL = SegmentLayout.of(text=3, target=9)


def make_qkv(device: str, **dtypes: torch.dtype) -> list[Tensor]:
    return [
        randn(2, 2, 12, 32, dtype=dtypes.get(name, torch.float32), device=device, seed=i)
        for i, name in enumerate(("q", "k", "v"))
    ]


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtypes", [{}, {"k": torch.float16}, {"q": torch.bfloat16, "v": torch.float16}], ids=str)
def test_autocast_casts_as_it_does_for_sdpa(impl: str, dtypes: dict[str, torch.dtype], device: str) -> None:
    """q, k and v of any floating dtypes become the autocast dtype, as scaled_dot_product_attention's do; lse stays float32."""
    # the interpreter's bfloat16 products are wrong
    half = torch.float16
    q, k, v = make_qkv(device, **dtypes)
    q.requires_grad_()
    with torch.autocast(device, half):
        stock = F.scaled_dot_product_attention(q, k, v)
        o, lse = segment_attention(q, k, v, FULL, return_lse=True, impl=impl)
    expected, expected_lse = segment_attention(q.to(half), k.to(half), v.to(half), FULL, return_lse=True, impl=impl)
    assert o.dtype == stock.dtype == half
    assert lse.dtype == torch.float32
    assert torch.equal(o, expected)
    assert torch.equal(lse, expected_lse)
    (grad,) = torch.autograd.grad(o.float().square().sum(), q)
    assert grad.dtype == q.dtype
    assert grad.abs().sum() > 0


def test_autocast_leaves_float64_alone() -> None:
    """As PyTorch does: the oracle stays an oracle."""
    q, k, v = (x.double() for x in make_qkv("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        assert segment_attention(q, k, v, FULL, impl="reference").dtype == torch.float64


# PyTorch's own compiler instantiates autograd functions while tracing them, which PyTorch deprecates
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_autocast_in_one_graph(impl: str, device: str) -> None:
    """The casts are traced."""
    torch._dynamo.reset()
    q, k, v = make_qkv(device)
    compiled = torch.compile(lambda *qkv: segment_attention(*qkv, LAYOUT, impl=impl), fullgraph=True, backend="aot_eager")
    with torch.autocast(device, torch.float16):
        assert torch.equal(compiled(q, k, v), segment_attention(q, k, v, LAYOUT, impl=impl))


def op_calls(device: str) -> dict[str, tuple[Callable[[Tensor], Any], Tensor]]:
    """Each op as a function of one tensor."""
    x, modulation = randn(1, 12, 32, dtype=torch.float32, device=device), torch.ones(1, 3, 32, device=device)
    q = x[None]
    return {
        "adaln": (lambda x: rgkernels.segment_adaln(x, modulation, modulation, LAYOUT, impl="triton"), x),
        "gate": (lambda x: rgkernels.segment_gate_residual(x, x, modulation, LAYOUT, impl="triton"), x),
        "site": (
            lambda x: rgkernels.segment_gate_residual_adaln(x, x, modulation, modulation, modulation, LAYOUT, impl="triton")[1],
            x,
        ),
        "qk": (lambda q: rgkernels.qk_norm_rope(q, q, impl="triton")[0], q),
        "attention": (lambda q: segment_attention(q, q, q, LAYOUT, impl="triton"), q),
    }


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Any], Tensor], Any]] = {
    "grad": lambda fn, x: torch.func.grad(lambda x: fn(x).sum())(x),
    "vmap": lambda fn, x: torch.func.vmap(fn)(x[None]),
    "jvp": lambda fn, x: torch.func.jvp(fn, (x,), (x,)),
    "jacrev": lambda fn, x: torch.func.jacrev(fn)(x),
    "hessian": lambda fn, x: torch.func.hessian(lambda x: fn(x).sum())(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", op_calls("cpu"))
def test_transforms_are_refused_in_a_sentence(op: str, transform: str, device: str) -> None:
    """PyTorch's own error asks for an edit of our class; ours says what to do instead."""
    fn, x = op_calls(device)[op]
    with pytest.raises(NotImplementedError, match=r"must not run inside torch\.func transforms .*, got one: use"):
        TRANSFORMS[transform](fn, x)


@pytest.mark.parametrize("wanted", ["qkv", "q", "kv"])
def test_flops_are_those_of_the_visible_scores(wanted: str, device: str) -> None:
    """2 products forward, 5 backward, less where a gradient is not wanted: over what the layout leaves visible."""
    tensors = dict(zip("qkv", make_qkv(device), strict=True))
    for name in wanted:
        tensors[name].requires_grad_()
    with FlopCounterMode(display=False) as forward:
        o = segment_attention(*tensors.values(), LAYOUT, impl="triton")
    with FlopCounterMode(display=False) as backward:
        o.sum().backward()
    product = 2 * 32 * 2 * 2 * int(LAYOUT.mask().sum())
    assert forward.get_total_flops() == 2 * product
    assert backward.get_total_flops() == {"qkv": 5, "q": 3, "kv": 4}[wanted] * product


def test_flops_agree_with_pytorch_where_nothing_is_blocked(device: str) -> None:
    """The count of a dense layout is the count of PyTorch's own attention, which has no formula for its CPU kernel."""
    from torch.utils.flop_counter import sdpa_backward_flop, sdpa_flop

    q, k, v = (x.requires_grad_() for x in make_qkv(device))
    with FlopCounterMode(display=False) as counter:
        segment_attention(q, k, v, FULL, impl="triton").sum().backward()
    shape = tuple(q.shape)
    assert counter.get_total_flops() == sdpa_flop(shape, shape, shape) + sdpa_backward_flop(shape, shape, shape, shape)
