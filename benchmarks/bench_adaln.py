"""Norm sites: gate + residual + LayerNorm + modulation, against plain PyTorch, torch.compile and peers.

Peers have no kernel for the whole site: theirs is LayerNorm, the rest stays eager PyTorch. Each provider computes the same
results; bytes are the op's floor for all of them, so that a share of the ceiling says how near the best possible a provider is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rgkernels
from benchmarks.harness.shapes import Shape
from benchmarks.harness.timing import Case, Run, compiled, gradient_run, measure, usable
from rgkernels.reference import per_token

# passes over [B, S, C]: forward reads residual, branch and writes res, normed; backward reads dres, dnormed, res, branch and
# writes dresidual, dbranch
VECTORS = {"forward": 4, "backward": 6}
NAMES = ("residual", "branch", "gate", "shift", "scale", "weight", "bias")
Site = Callable[..., Any]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Tokens, chunks of one projection, a frozen affine as in LoRA training."""
    rows = (shape.batch, shape.seq_len, shape.channels)
    residual, branch = (torch.randn(rows, device=device).to(dtype).requires_grad_() for _ in range(2))
    projection = torch.randn((shape.batch, shape.layout.num_segments, 3 * shape.channels), device=device).to(dtype)
    gate, shift, scale = (chunk.requires_grad_() for chunk in projection.chunk(3, dim=-1))
    weight, bias = (torch.randn(shape.channels, device=device).to(dtype) for _ in range(2))
    values = dict(zip(NAMES, (residual, branch, gate, shift, scale, weight, bias), strict=True))
    return values | {"layout": shape.layout}


def with_layer_norm(layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> Site:
    """The site in the tokens' dtype, as diffusers writes it, around some LayerNorm."""

    def site(residual, branch, gate, shift, scale, layout, *, weight, bias):
        res = residual + per_token(gate, layout) * branch
        normed = layer_norm(res, weight, bias, 1e-5)
        return res, normed * (1 + per_token(scale, layout)) + per_token(shift, layout)

    return site


def reference(*args: Any, **kwargs: Any) -> Any:
    """The specification."""
    return rgkernels.segment_gate_residual_adaln(*args, impl="reference", **kwargs)


def triton(*args: Any, **kwargs: Any) -> Any:
    """Our kernels."""
    return rgkernels.segment_gate_residual_adaln(*args, impl="triton", **kwargs)


def liger() -> Site:
    """Liger's LayerNorm kernel."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return with_layer_norm(LigerLayerNormFunction.apply)


def flash_attn() -> Site:
    """The LayerNorm kernel of flash-attn."""
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    return with_layer_norm(lambda x, weight, bias, eps: layer_norm_fn(x, weight, bias, eps=eps))


def quack() -> Site:
    """The LayerNorm kernel of quack: forward only, float32 parameters, rows of a matrix."""
    from quack.rmsnorm import layernorm_fwd

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y: Tensor = layernorm_fwd(x.reshape(-1, x.shape[-1]), weight.float(), bias.float(), eps)
        return y.view(x.shape)

    return with_layer_norm(layer_norm)


def providers(device: torch.device, mode: str) -> dict[str, Site]:
    """What can run here; optional peers are left out where they do not import."""
    eager = with_layer_norm(lambda x, weight, bias, eps: F.layer_norm(x, x.shape[-1:], weight, bias, eps))
    found: dict[str, Site] = {"eager": eager, "reference": reference}
    if device.type != "cuda":
        return found
    found |= {"compile": compiled(reference), "triton": triton}
    peers = {"liger": liger, "flash-attn": flash_attn} | ({"quack": quack} if mode == "forward" else {})
    for name, peer in peers.items():
        try:
            found[name] = peer()
        except ImportError:
            continue
    return found


def runs(sites: dict[str, Site], values: dict[str, Any], mode: str) -> dict[str, Run]:
    """One run per provider; for backward the graphs exist already."""
    arguments = [values[name] for name in NAMES[:5]]
    affine = {name: values[name] for name in NAMES[5:]}

    def forward(site: Site) -> Any:
        return site(*arguments, values["layout"], **affine)

    if mode == "forward":
        return {name: torch.no_grad()(lambda site=site: forward(site)) for name, site in sites.items()}
    upstream = [torch.randn_like(values["residual"]) for _ in range(2)]
    return {name: gradient_run(forward(site), arguments, upstream) for name, site in sites.items()}


@pytest.mark.parametrize("mode", VECTORS)
def test_gate_residual_adaln(
    shape: Shape, mode: str, device: torch.device, report: Callable[[list[dict[str, Any]]], None]
) -> None:
    """Time the fused site; on a machine without CUDA only what runs there."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    values = inputs(shape, dtype, device)
    moved = VECTORS[mode] * values["residual"].numel() * values["residual"].element_size()
    case = Case("segment_gate_residual_adaln", mode, shape.name, dtype, bytes=moved)
    rows = measure(case, usable(runs(providers(device, mode), values, mode)), device)
    report(rows)
    assert all(row["ms_p50"] > 0 for row in rows)
