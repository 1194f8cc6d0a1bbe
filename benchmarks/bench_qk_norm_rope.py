"""Query-key LayerNorm and rotary embedding, against diffusers' code, plain PyTorch, torch.compile and peers.

q and k are views of a packed projection. Bytes are the op's floor for all providers.
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

# passes over [B, S, C]: forward reads q, k and writes both; backward reads q, k and two upstream gradients and writes both
VECTORS = {"forward": 4, "backward": 6}
PARAMETERS = ("q_weight", "q_bias", "k_weight", "k_bias")
Op = Callable[..., Any]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Views of one projection, frozen norm parameters as in LoRA training, tables for the tokens after the text."""
    packed = torch.randn((shape.batch, shape.seq_len, 3, shape.heads, shape.head_dim), device=device).to(dtype)
    q, k, _ = (x.transpose(1, 2).requires_grad_() for x in packed.unbind(2))
    norms = {name: torch.randn(shape.head_dim, device=device).to(dtype) for name in PARAMETERS}
    angle = torch.randn((shape.seq_len - shape.text, shape.head_dim // 2), device=device).repeat_interleave(2, dim=-1)
    return {"q": q, "k": k, **norms, "cos": angle.cos(), "sin": angle.sin(), "rope_start": shape.text}


def bytes_moved(values: dict[str, Any], mode: str) -> int:
    """Vectors of q's size, and the tables once."""
    q: Tensor = values["q"]
    tables = sum(values[name].numel() * values[name].element_size() for name in ("cos", "sin"))
    return VECTORS[mode] * q.numel() * q.element_size() + tables


def with_layer_norm(layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> Op:
    """What diffusers' attention processor and apply_rotary_emb do, around some LayerNorm; nothing in place."""

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack((-imaginary, real), dim=-1).flatten(3)
        return (x.float() * cos + rotated.float() * sin).to(x.dtype)

    def op(q, k, *, q_weight, q_bias, k_weight, k_bias, cos, sin, rope_start):
        outputs = []
        for x, weight, bias in ((q, q_weight, q_bias), (k, k_weight, k_bias)):
            normed = layer_norm(x, weight, bias, 1e-6)
            outputs.append(torch.cat((normed[:, :, :rope_start], rotate(normed[:, :, rope_start:], cos, sin)), dim=2))
        return tuple(outputs)

    return op


def reference(*args: Any, **kwargs: Any) -> Any:
    """The specification."""
    return rgkernels.qk_norm_rope(*args, impl="reference", **kwargs)


def triton(*args: Any, **kwargs: Any) -> Any:
    """Our kernels."""
    return rgkernels.qk_norm_rope(*args, impl="triton", **kwargs)


def liger() -> Op:
    """Liger's LayerNorm kernel; rotation in PyTorch."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return with_layer_norm(LigerLayerNormFunction.apply)


def flash_attn() -> Op:
    """The LayerNorm kernel of flash-attn; rotation in PyTorch."""
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    return with_layer_norm(lambda x, weight, bias, eps: layer_norm_fn(x.contiguous(), weight, bias, eps=eps))


def quack() -> Op:
    """The LayerNorm kernel of quack: forward only, float32 parameters, rows of a matrix; rotation in PyTorch."""
    from quack.rmsnorm import layernorm_fwd

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y: Tensor = layernorm_fwd(x.reshape(-1, x.shape[-1]), weight.float(), bias.float(), eps)
        return y.view(x.shape)

    return with_layer_norm(layer_norm)


def providers(device: torch.device, mode: str) -> dict[str, Op]:
    """What can run here; optional peers are left out where they do not import."""
    eager = with_layer_norm(lambda x, weight, bias, eps: F.layer_norm(x, x.shape[-1:], weight, bias, eps))
    found: dict[str, Op] = {"eager": eager, "reference": reference}
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


def runs(ops: dict[str, Op], values: dict[str, Any], mode: str) -> dict[str, Run]:
    """One run per provider; for backward the graphs exist already."""
    if mode == "forward":
        return {name: torch.no_grad()(lambda op=op: op(**values)) for name, op in ops.items()}
    leaves = [values["q"], values["k"]]
    upstream = [torch.randn_like(x) for x in leaves]
    return {name: gradient_run(op(**values), leaves, upstream) for name, op in ops.items()}


@pytest.mark.parametrize("mode", VECTORS)
def test_qk_norm_rope(shape: Shape, mode: str, device: torch.device, report: Callable[[list[dict[str, Any]]], None]) -> None:
    """Time query-key norm and rotation; on a machine without CUDA only what runs there."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    values = inputs(shape, dtype, device)
    case = Case("qk_norm_rope", mode, shape.name, dtype, bytes=bytes_moved(values, mode))
    rows = measure(case, usable(runs(providers(device, mode), values, mode)), device)
    report(rows)
    assert all(row["ms_p50"] > 0 for row in rows)
