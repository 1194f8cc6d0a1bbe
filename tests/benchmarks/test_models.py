"""Model-level benchmarks: every provider computes the same thing, and FLOPs are counted right."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("diffusers")

from benchmarks import bench_block, bench_generation, bench_training_step
from benchmarks.harness.models import CONFIGS, Provider, block_flops, build_model, config_of, model_inputs, providers
from benchmarks.harness.shapes import MODELS, SHAPES, Shape
from realgeneral.model.lora import add_lora
from realgeneral.settings.train import LORA_TARGETS
from rgkernels.testing import assert_within_reference_error

CPU = torch.device("cpu")
NANO = SHAPES["nano"]
# a ragged one: no length is a multiple of another, two conditions, two samples
ODD = Shape("nano-odd", heads=2, head_dim=32, text=7, image=15, conditions=2, batch=2, grid=(3, 5))
EAGER = ["stock", "split-sdpa", "triton"]
COMPILED = ["compile", "flex"]


def model_of(shape: Shape, dtype: torch.dtype = torch.float32) -> Any:
    """Two layers in which nothing that a provider could drop is zero or one."""
    model = build_model(shape, CPU, dtype, layers=2)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return model


def outputs_of(provider: Provider, shape: Shape, dtype: torch.dtype, gradients: bool) -> dict[str, Tensor]:
    """Residual and branch after a block, and the gradients of all that wants one."""
    block = model_of(shape).to(dtype).transformer_blocks[0]
    torch.manual_seed(0)
    values, leaves = bench_block.block_inputs(shape, block, torch.float32, CPU)
    upstream = torch.randn_like(values["residual"]).to(dtype)
    wide = {id(x): x.detach().to(dtype).requires_grad_() for x in leaves}

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            return wide.get(id(value), value.to(dtype))
        return type(value)(*(cast(x) for x in value)) if isinstance(value, tuple) and hasattr(value, "_fields") else value

    values = {name: value if name == "rotary" else cast(value) for name, value in values.items()}
    made = bench_block.outputs(provider, values)
    half = len(made) // 2
    results = {"residual": torch.cat(made[:half], 1), "branch": torch.cat(made[half:], 1)}
    if gradients:
        run = bench_block.block_run(provider, values, list(wide.values()), upstream, "forward+backward")
        results |= {f"grad{i}": grad for i, grad in enumerate(run())}
    return {name: x.detach() for name, x in results.items()}


@pytest.mark.parametrize("shape", [NANO, ODD], ids=lambda shape: shape.name)
@pytest.mark.parametrize("name", EAGER)
def test_blocks_agree(name: str, shape: Shape) -> None:
    provider = providers(shape, CPU, [name], shape.layout)[0]
    reference = Provider("split-sdpa")
    gradients = name != "triton"  # those of the kernels have tests of their own, and take the interpreter minutes
    truth = outputs_of(reference, shape, torch.float64, gradients)
    plain = outputs_of(reference, shape, torch.float32, gradients)
    assert_within_reference_error(outputs_of(provider, shape, torch.float32, gradients), plain, truth)


def denoised(provider: Provider, model: Any, shape: Shape, cached: bool, steps: int = 2) -> Tensor:
    torch.manual_seed(0)
    pipe, inputs = bench_generation.sampler(model), model_inputs(shape, model, text_batch=2 * shape.batch)
    return bench_generation.generation_run(provider, pipe, inputs, cached, steps)()


@pytest.mark.parametrize("shape", [NANO, ODD], ids=lambda shape: shape.name)
def test_generation_agrees(shape: Shape) -> None:
    """Latents of the eager providers, cached and not, against the reference in float64."""
    model = model_of(shape)
    plain = {"latents": denoised(Provider("split-sdpa"), model, shape, cached=False)}
    truth = {"latents": denoised(Provider("split-sdpa"), model_of(shape).double(), shape, cached=False)}
    found = providers(shape, CPU, ["stock", "split-sdpa"])
    for name, run in bench_generation.runs(found, bench_generation.sampler(model), inputs_for(model, shape), 2).items():
        torch.manual_seed(0)
        assert_within_reference_error({"latents": run()}, plain, truth), name


def inputs_for(model: Any, shape: Shape) -> Any:
    torch.manual_seed(0)
    return model_inputs(shape, model, text_batch=2 * shape.batch)


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Tracing and guards alone, or with the C++ compiler as well."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=request.param))
    return str(request.param)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_generation_agrees(name: str) -> None:
    """Compiled blocks, cached and not, with and without FlexAttention: one process, so swapping must compile anew."""
    model = model_of(NANO)
    truth = denoised(Provider("split-sdpa"), model, NANO, cached=False)
    provider = providers(NANO, CPU, [name])[0]
    for cached in (False, True):
        torch.testing.assert_close(denoised(provider, model, NANO, cached), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("backend")
def test_swapping_the_attention_of_a_compiled_block_is_seen() -> None:
    model = model_of(NANO)
    provider = providers(NANO, CPU, ["compile"])[0]
    before = denoised(provider, model, NANO, cached=False)
    blind = dataclasses.replace(provider, attention=lambda q, k, v, layout, **_: torch.zeros_like(q))
    assert not torch.allclose(denoised(blind, model, NANO, cached=False), before)
    assert torch.equal(denoised(provider, model, NANO, cached=False), before)


def test_training_steps_agree() -> None:
    """The gradients that reach the optimizer, stock blocks against split SDPA, with and without checkpointing."""
    seen = {}
    for name in ("split-sdpa", "stock"):
        for checkpointing in (False, True):
            model = model_of(NANO)
            add_lora(model, 4, None, LORA_TARGETS)
            model.train()
            if checkpointing:
                model.enable_gradient_checkpointing()
            torch.manual_seed(0)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = torch.randn_like(parameter) * 0.05
            run = bench_training_step.training_run(Provider(name, block=provider_block(name)), model, model_inputs(NANO, model))
            seen[name, checkpointing] = gradients_of(run, model)
    first = seen["split-sdpa", False]
    assert sum(grad.abs().sum() > 0 for grad in first) > 20
    for grads in seen.values():
        torch.testing.assert_close(grads, first, rtol=1e-3, atol=1e-5)


def provider_block(name: str) -> Any:
    return providers(NANO, CPU, [name])[0].block


def gradients_of(run: Any, model: Any) -> list[Tensor]:
    """What the parameters hold when the optimizer steps."""
    kept: list[Tensor] = []
    handle = register_optimizer_step_pre_hook(
        lambda *_: kept.extend(p.grad.clone() for p in model.parameters() if p.grad is not None)
    )
    before = [p.clone() for p in model.parameters()]
    run()
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "a step must leave the weights"
    assert all(p.grad is None for p in model.parameters())
    return kept


def counted(run: Any) -> int:
    # the counter does not know the CPU's flash attention; the plain one's backward has 2x its forward's products, not 2.5x
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["nano", "mid"])
def test_generation_flops(name: str) -> None:
    """The formula against PyTorch's counter; what it leaves out (embeddings, modulation, head) is small beside the blocks."""
    shape = SHAPES[name]
    model = build_model(shape, CPU, torch.float32)
    runs = bench_generation.runs([Provider("split-sdpa")], bench_generation.sampler(model), inputs_for(model, shape), 2)
    total = {cached: counted(runs[f"split-sdpa {'cached' if cached else 'uncached'}"]) for cached in (False, True)}
    for cached, count in total.items():
        assert 0.93 < bench_generation.flops(shape, model.config.num_layers, 2, cached) / count <= 1.0
    # over the 50 steps of a picture the cache saves what the benchmark asks for in time
    layers = model.config.num_layers
    saved = bench_generation.flops(shape, layers, 50, False) / bench_generation.flops(shape, layers, 50, True)
    assert saved >= bench_generation.LEAST_RATIO


def test_training_flops() -> None:
    model = build_model(NANO, CPU, torch.float32)
    add_lora(model, 1, None, LORA_TARGETS)
    run = bench_training_step.training_run(Provider("split-sdpa"), model.train(), model_inputs(NANO, model))
    assert 0.9 < bench_training_step.flops(NANO, model.config.num_layers) / counted(run) <= 1.05


def test_block_flops() -> None:
    block = build_model(NANO, CPU, torch.float32, layers=1).transformer_blocks[0]
    values, leaves = bench_block.block_inputs(NANO, block, torch.float32, CPU)
    for mode in bench_block.MODES:
        run = bench_block.block_run(Provider("split-sdpa"), values, leaves, torch.randn_like(values["residual"]), mode)
        forward = block_flops(NANO.channels, NANO.layout, NANO.layout.names)
        attention = forward - 24 * NANO.channels**2 * NANO.seq_len
        more = 0.5 * attention if mode == "forward+backward" else 0
        assert bench_block.flops(NANO, mode) == counted(run) + more


def test_stock_runs_agree() -> None:
    for mode in bench_block.MODES:
        runs = bench_block.stock_runs(SHAPES["nano-video"], CPU, torch.float32, mode)
        assert list(runs) == ["stock", "reference"]
        stock, patched = (run() for run in runs.values())
        torch.testing.assert_close(patched, stock, rtol=1e-3, atol=1e-3)


def test_large_configs_are_the_published_ones() -> None:
    """Parameters of the stock part, in billions, without allocating them; shapes that the benchmarks run have a grid."""
    for name, billions in {"2b": 1.69, "5b": 5.57, "1.5-5b": 5.57}.items():
        shape = SHAPES[f"{name}-480x720-b1"]
        model = build_model(shape, torch.device("meta"), torch.bfloat16)
        own = {id(p) for p in model.condition_parameters().values()}
        stock = sum(p.numel() for p in model.parameters() if id(p) not in own)
        assert stock / 1e9 == pytest.approx(billions, rel=0.01), name
        assert config_of(shape)["num_layers"] == CONFIGS[name]["num_layers"]
    assert all(SHAPES[name].grid is not None for names in MODELS.values() for name in names)


def test_unknown_provider() -> None:
    with pytest.raises(ValueError, match=r"--provider must be one of \['stock', .*got nothing"):
        providers(NANO, CPU, ["nothing"])


def test_a_busy_machine_is_not_held_to_the_ratio() -> None:
    rows = [{"provider": "split-sdpa", "cores_used": 1.0, "ratio": 1.4}]
    with pytest.raises(AssertionError, match="cached over uncached"):
        bench_generation.check_ratios(rows)
    with pytest.raises(pytest.skip.Exception, match=r"got 0\.30 of a core"):
        bench_generation.check_ratios([rows[0] | {"cores_used": 0.3}])
    bench_generation.check_ratios([rows[0] | {"ratio": 1.5}])
