"""Generation: all denoising steps of one image with guidance, with the condition cached and computed anew in each step.

The pipeline's own loop from noise to latents; a cached run includes making its cache. Text encoder and VAE are the same for all
and left out. A cached run is paired with the same provider's uncached one in each round; on a quiet CPU the median of these
ratios must reach 1.5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import CogVideoXDDIMScheduler

from benchmarks.harness.models import Inputs, Provider, block_flops, build_model, model_flops, model_inputs, providers
from benchmarks.harness.shapes import MODELS, Shape
from benchmarks.harness.timing import Case, Run, measure, usable
from realgeneral.generation.denoising import Conditioning, denoise
from realgeneral.generation.guidance import Guidance
from realgeneral.generation.pipeline import RealGeneralPipeline
from realgeneral.model.presets import get_preset, joint_layout, sublayout

PRESET = "cached"
GUIDANCE = 6.0
STEPS = {"mid": 10}  # others 50, the default of `realgeneral generate`
LEAST_RATIO = 1.5
QUIET = 0.8  # cores


def flops(shape: Shape, layers: int, steps: int, cached: bool) -> int:
    """Two prompts per step; the cache is made once, up to the last block's keys and values."""
    joint = joint_layout(get_preset(PRESET), shape.text, shape.image, shape.conditions)
    if not cached:
        return shape.batch * steps * 2 * model_flops(shape.channels, layers, joint, joint.names)
    conditions = joint.names[2:]
    alone = block_flops(shape.channels, sublayout(joint, conditions), conditions)
    once = (layers - 1) * alone + 6 * shape.channels**2 * shape.conditions * shape.image
    return shape.batch * (once + steps * 2 * model_flops(shape.channels, layers, joint, ("text", "target")))


def sampler(model: Any) -> RealGeneralPipeline:
    """A pipeline around a model alone."""
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )
    pipe = RealGeneralPipeline(None, None, None, model, scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe._guidance_scale, pipe._interrupt, pipe._attention_kwargs = GUIDANCE, False, None
    return pipe


def generation_run(provider: Provider, pipe: RealGeneralPipeline, inputs: Inputs, cached: bool, steps: int) -> Run:
    """Latents from noise; returns them."""
    model, conditions = pipe.transformer, {"condition_latents": inputs.conditions, "task_ids": inputs.task_ids}

    def run() -> Tensor:
        with provider.applied(model), torch.no_grad():
            cache = model.encode_condition(**conditions) if cached else None
            guidance = Guidance(GUIDANCE)
            texts = inputs.text.chunk(len(guidance.passes))
            return denoise(pipe, inputs.target, texts, Conditioning({} if cached else conditions, cache), guidance, steps=steps)

    return run


def runs(found: list[Provider], pipe: RealGeneralPipeline, inputs: Inputs, steps: int) -> dict[str, Run]:
    """Uncached and, where the provider can, cached."""
    return {
        f"{provider.name} {mode}": generation_run(provider, pipe, inputs, mode == "cached", steps)
        for provider in found
        for mode in (("uncached", "cached") if provider.caches else ("uncached",))
    }


@pytest.mark.shapes(MODELS)
def test_generation(
    shape: Shape,
    device: torch.device,
    report: Callable[[list[dict[str, Any]]], None],
    pytestconfig: pytest.Config,
) -> None:
    """Time one image; on a CPU hold caching to its ratio."""
    if shape.grid is None:
        pytest.skip(f"a model's shape must be one of images, {shape.name} is not")
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    steps = pytestconfig.getoption("--steps") or STEPS.get(shape.name, 50)
    model = build_model(shape, device, dtype, pytestconfig.getoption("--layers"), PRESET)
    pipe, inputs = sampler(model), model_inputs(shape, model, text_batch=2 * shape.batch)
    # on a CPU the question is caching alone; stock blocks, which cannot, take as long again
    asked = pytestconfig.getoption("--provider") or ([] if cuda else ["split-sdpa"])
    found = providers(shape, device, asked)
    # two steps compile and allocate what fifty do
    short = usable(runs(found, pipe, inputs, min(2, steps)))
    whole = {name: run for name, run in runs(found, pipe, inputs, steps).items() if name in short}
    against = {name: f"{name.split()[0]} uncached" for name in whole if name.endswith(" cached")}

    layers = model.config.num_layers
    # one FLOP here: modes that take turns differ in FLOPs, so each row is multiplied by its own below
    case = Case("generation", "", shape.name, dtype, flops=1)
    rows = measure(case, whole, device, against=against, warm_ups=short, graphs=False, least=1 if cuda else 5)
    for row in rows:
        row["provider"], row["mode"] = row["provider"].split()
        row |= {"layers": layers, "steps": steps, "preset": PRESET, "guidance": GUIDANCE}
        for key in ("tflop_per_s", "share_of_ceiling"):
            row[key] *= flops(shape, layers, steps, row["mode"] == "cached")
    report(rows)
    if not cuda and not pytestconfig.getoption("--steps"):
        check_ratios(rows)


def check_ratios(rows: list[dict[str, Any]]) -> None:
    """Hold caching to its ratio, on a machine quiet enough for a ratio of times to mean something."""
    if (cores := min(row["cores_used"] for row in rows)) < QUIET:
        pytest.skip(f"cached over uncached is not held to {LEAST_RATIO}: this process got {cores:.2f} of a core")
    ratios = {row["provider"]: row["ratio"] for row in rows if "ratio" in row}
    assert all(ratio >= LEAST_RATIO for ratio in ratios.values()), f"cached over uncached: {ratios}"
