"""One transformer block: RealGeneral's, and stock CogVideoX's before and after `rgkernels.patch`.

Weights are frozen, as in LoRA training: a backward pass makes the gradients of tokens and modulation. FLOPs are those of the
matrix products that the mask leaves; a backward has 1x the forward's linear ones (inputs only) and 2.5x its attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from diffusers import CogVideoXTransformer3DModel
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

import rgkernels
from benchmarks.harness.models import Provider, block_flops, build_model, config_of, providers
from benchmarks.harness.shapes import MODELS, STOCK, Shape
from benchmarks.harness.timing import Case, Run, measure, usable
from rgkernels.cogvideox import Modulation, Rotary

MODES = ("forward", "forward+backward")
Report = Callable[[list[dict[str, Any]]], None]


def flops(shape: Shape, mode: str) -> int:
    """Of one block over the whole joint sequence."""
    total = block_flops(shape.channels, shape.layout, shape.layout.names)
    linear = 24 * shape.channels**2 * shape.seq_len
    return shape.batch * (total if mode == "forward" else 2 * linear + round(3.5 * (total - linear)))


def block_inputs(shape: Shape, block: Any, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Any], list[Tensor]]:
    """Arguments of `block_forward` for a block in the middle of a model, and the tensors that want a gradient."""

    def leaf(*size: int) -> Tensor:
        return torch.randn(*size, device=device).to(dtype).requires_grad_()

    def modulation() -> Modulation:
        return Modulation(*(leaf(shape.batch, shape.layout.num_segments, shape.channels) for _ in range(3)))

    residual, branch = (leaf(shape.batch, shape.seq_len, shape.channels) for _ in range(2))
    norm1, norm2, before = modulation(), modulation(), modulation()
    angle = torch.rand(shape.seq_len - shape.text, shape.head_dim // 2, device=device).repeat_interleave(2, dim=1)
    values = {
        "block": block, "residual": residual, "branch": branch, "gate": before.gate, "norm1": norm1, "norm2": norm2,
        "rows": shape.layout, "joint": shape.layout, "rotary": Rotary(angle.cos(), angle.sin(), shape.text),
    }  # fmt: skip
    return values, [residual, branch, before.gate, *norm1, norm2.shift, norm2.scale]


def joined(streams: Tensor | tuple[Tensor, ...]) -> Tensor:
    """One tensor, whatever a block returns."""
    return torch.cat(streams, dim=1) if isinstance(streams, tuple) else streams


def outputs(provider: Provider, values: dict[str, Any]) -> list[Tensor]:
    """Residual and branch after the block; a tensor per segment where the provider keeps them apart."""
    with provider.applied() as block:
        residual, branch, _ = block(*values.values(), impl=provider.impl)
    return [x for part in (residual, branch) for x in (part if isinstance(part, tuple) else (part,))]


def block_run(provider: Provider, values: dict[str, Any], leaves: list[Tensor], upstream: Tensor, mode: str) -> Run:
    """One run of a provider; the upstream gradients are views of one tensor."""

    def run() -> Any:
        if mode == "forward":
            with torch.no_grad():
                return outputs(provider, values)
        made = outputs(provider, values)
        parts = [upstream] if len(made) == 2 else list(upstream.split([x.shape[1] for x in made[: len(made) // 2]], dim=1))
        return torch.autograd.grad(made, leaves, parts * 2)

    return run


@pytest.mark.shapes(MODELS)
@pytest.mark.parametrize("mode", MODES)
def test_realgeneral_block(shape: Shape, mode: str, device: torch.device, report: Report, pytestconfig: pytest.Config) -> None:
    """Time a block in the middle of a model, on the shape's own layout (preset "paper")."""
    if shape.grid is None:
        pytest.skip(f"a model's shape must be one of images, {shape.name} is not")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    block = build_model(shape, device, dtype, layers=1).transformer_blocks[0]
    values, leaves = block_inputs(shape, block, dtype, device)
    upstream = torch.randn_like(values["residual"])
    found = providers(shape, device, pytestconfig.getoption("--provider"), shape.layout)
    runs = usable({p.name: block_run(p, values, leaves, upstream, mode) for p in found})
    case = Case("realgeneral_block", mode, shape.name, dtype, flops=flops(shape, mode))
    report(measure(case, runs, device, against=dict.fromkeys(list(runs)[1:], next(iter(runs))), graphs=False))


def stock_runs(shape: Shape, device: torch.device, dtype: torch.dtype, mode: str) -> dict[str, Run]:
    """A one-block stock model's block: diffusers' forward, the same compiled, and patched onto the ops; shared weights."""
    config = config_of(shape) | {"num_layers": 1}
    with torch.device(device):
        model = CogVideoXTransformer3DModel(**config).to(dtype).eval().requires_grad_(False)
    torch.manual_seed(0)
    tokens = torch.randn(shape.batch, shape.image, shape.channels, device=device).to(dtype).requires_grad_()
    text = torch.randn(shape.batch, shape.text, shape.channels, device=device).to(dtype).requires_grad_()
    temb = torch.randn(shape.batch, model.config.time_embed_dim, device=device).to(dtype)
    angle = torch.rand(shape.image, shape.head_dim // 2, device=device).repeat_interleave(2, dim=1)
    arguments = (tokens, text, temb, (angle.cos(), angle.sin()))

    def patched(impl: str) -> Any:
        with torch.device("meta"):
            twin = CogVideoXTransformer3DModel(**config)
        twin.load_state_dict(model.state_dict(), assign=True)
        return rgkernels.patch(twin.eval().requires_grad_(False), impl=impl).transformer_blocks[0]

    blocks = {"stock": model.transformer_blocks[0], "reference": patched("reference")}
    if device.type == "cuda":
        compiled = torch.compile(CogVideoXBlock.forward, dynamic=False, fullgraph=True)
        blocks["compile"] = lambda *args: compiled(model.transformer_blocks[0], *args)
        blocks["triton"] = patched("triton")
    upstream = [torch.randn_like(tokens), torch.randn_like(text)]

    def run(block: Any) -> Any:
        if mode == "forward":
            with torch.no_grad():
                return block(*arguments)
        return torch.autograd.grad(block(*arguments), [tokens, text], upstream)

    return {name: lambda block=block: run(block) for name, block in blocks.items()}


@pytest.mark.shapes(STOCK)
@pytest.mark.parametrize("mode", MODES)
def test_stock_block(shape: Shape, mode: str, device: torch.device, report: Report) -> None:
    """Time stock CogVideoX's block and the patched one."""
    if shape.conditions or shape.blocked:
        pytest.skip(f"a stock block has no conditions, {shape.name} has {shape.conditions}")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    runs = usable(stock_runs(shape, device, dtype, mode))
    case = Case("stock_block", mode, shape.name, dtype, flops=flops(shape, mode))
    report(measure(case, runs, device, against=dict.fromkeys(list(runs)[1:], "stock"), graphs=False))
