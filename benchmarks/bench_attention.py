"""Segment attention against split SDPA on each backend, a dense mask, compiled FlexAttention, peers, and unmasked kernels.

    pytest benchmarks/bench_attention.py --shape 5b-480x720-b1 --rows outputs/benchmarks.jsonl

FLOPs are those of the scores that the provider has to compute: the visible ones, and all of them for "-unmasked" providers,
which are upper lines, not competitors. Forward 4 D per score, backward 2.5 times that. Each row carries the provider's relative
error against float32 reference values, because a backend can be fast by ignoring the mask.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness.attention import block_mask_of, compiled_flex, masked_sdpa
from benchmarks.harness.shapes import ATTENTION, Shape
from benchmarks.harness.timing import OURS, Case, Run, gradient_run, measure
from benchmarks.harness.timing import usable as usable_runs
from rgkernels import SegmentLayout, segment_attention

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FACTOR = {"forward": 1.0, "backward": 2.5}
Op = Callable[[Tensor, Tensor, Tensor, SegmentLayout], Tensor]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k, v as [B, H, S, D] views of [B, S, H, D] memory, as the model makes them."""
    size = (3, shape.batch, shape.seq_len, shape.heads, shape.head_dim)
    return [x.transpose(1, 2).requires_grad_() for x in torch.randn(size, device=device).to(dtype).unbind(0)]


def flops(shape: Shape, mode: str, masked: bool = True) -> int:
    """Floating-point operations of the two matrix products over the scores, times 2.5 for the backward."""
    scores = shape.seq_len**2 * (shape.layout.visible_fraction if masked else 1.0)
    return round(4 * shape.head_dim * shape.batch * shape.heads * scores * FACTOR[mode])


def own(q: Tensor, k: Tensor, v: Tensor, layout: SegmentLayout, *, impl: str) -> Tensor:
    """One of our implementations."""
    o = segment_attention(q, k, v, layout, impl=impl)
    assert isinstance(o, Tensor)
    return o


def own_unmasked(q: Tensor, k: Tensor, v: Tensor, layout: SegmentLayout) -> Tensor:
    """Our kernel on one segment: what the mask must not cost."""
    return own(q, k, v, SegmentLayout.of(all=layout.seq_len), impl="triton")


def split_sdpa(q: Tensor, k: Tensor, v: Tensor, layout: SegmentLayout, *, backend: SDPBackend) -> Tensor:
    """One unmasked call per query segment, on one backend."""
    with sdpa_kernel(backend):
        return own(q, k, v, layout, impl="reference")


def unmasked_sdpa(q: Tensor, k: Tensor, v: Tensor, layout: SegmentLayout, *, backend: SDPBackend) -> Tensor:
    """One call that ignores the layout."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


@functools.lru_cache(maxsize=1)
def block_mask(layout: SegmentLayout, device: torch.device) -> Any:
    """FlexAttention's plan, built outside the timed region."""
    return block_mask_of(layout, layout.names, device)


def flex(q: Tensor, k: Tensor, v: Tensor, layout: SegmentLayout) -> Tensor:
    """Compiled FlexAttention with a block mask."""
    o: Tensor = compiled_flex()(q, k, v, block_mask=block_mask(layout, q.device))
    return o


def xformers(q: Tensor, k: Tensor, v: Tensor, layout: SegmentLayout) -> Tensor:
    """One unmasked call per query segment into xformers, which takes [B, S, H, D]."""
    from xformers.ops import memory_efficient_attention

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    outputs = []
    for name, rows in zip(layout.names, q.split(layout.lengths, dim=1), strict=True):
        keys, values = (torch.cat([x[:, a:b] for a, b in layout.key_ranges(name)], dim=1) for x in (k, v))
        outputs.append(memory_efficient_attention(rows, keys, values))
    return torch.cat(outputs, dim=1).transpose(1, 2)


def candidates(device: torch.device) -> dict[str, Op]:
    """Every provider that this kind of machine might run."""
    found: dict[str, Op] = {"sdpa-mask": masked_sdpa}
    if device.type != "cuda":
        return {"sdpa-split": functools.partial(own, impl="reference")} | found
    found["triton"] = functools.partial(own, impl="triton")
    found["flex"] = flex
    found["flash-attn"] = functools.partial(own, impl="flash-attn")
    found["xformers"] = xformers
    for name, backend in BACKENDS.items():
        found[f"sdpa-split-{name}"] = functools.partial(split_sdpa, backend=backend)
    found["triton-unmasked"] = own_unmasked
    found["sdpa-cudnn-unmasked"] = functools.partial(unmasked_sdpa, backend=BACKENDS["cudnn"])
    return found


def usable(ops: dict[str, Op], qkv: list[Tensor], layout: SegmentLayout) -> tuple[dict[str, Op], dict[str, float]]:
    """The providers that run these inputs, and their relative L2 error; those that do not are named with the reason."""
    expected = own(*(x.detach().float() for x in qkv), layout, impl="reference")
    kept, errors = {}, {}
    for name, op in ops.items():
        try:
            with torch.no_grad():
                o = op(*qkv, layout).float()
        except (RuntimeError, ImportError, NotImplementedError) as error:
            if name.startswith(OURS):
                raise
            print(f"{name} left out: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        kept[name] = op
        if not name.endswith("-unmasked"):
            errors[name] = ((o - expected).norm() / expected.norm()).item()
    return kept, errors


def runs(ops: dict[str, Op], qkv: list[Tensor], layout: SegmentLayout, mode: str) -> dict[str, Run]:
    """One run per provider; for backward the graphs exist already."""
    if mode == "forward":
        return {name: torch.no_grad()(lambda op=op: op(*qkv, layout)) for name, op in ops.items()}
    upstream = [torch.randn_like(qkv[0])]
    return {name: gradient_run([op(*qkv, layout)], qkv, upstream) for name, op in ops.items()}


@pytest.mark.shapes(ATTENTION)
@pytest.mark.parametrize("mode", FACTOR)
def test_segment_attention(
    shape: Shape, mode: str, device: torch.device, report: Callable[[list[dict[str, Any]]], None]
) -> None:
    """Time segment attention; on a machine without CUDA only what runs there."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    qkv = inputs(shape, dtype, device)
    ops, errors = usable(candidates(device), qkv, shape.layout)
    case = Case("segment_attention", mode, shape.name, dtype, flops=flops(shape, mode))
    rows = measure(case, usable_runs(runs(ops, qkv, shape.layout, mode)), device)
    more_work = flops(shape, mode, masked=False) / flops(shape, mode)
    for row in rows:
        row |= {"seq_len": shape.seq_len, "relative_error": errors.get(row["provider"])}
        if row["provider"].endswith("-unmasked"):
            row["tflop_per_s"] *= more_work
            row["share_of_ceiling"] *= more_work
    report(rows)
    assert all(row["ms_p50"] > 0 for row in rows)
