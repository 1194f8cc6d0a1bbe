"""A whole LoRA training step: noising, forward, loss, backward, gradient clipping, AdamW.

The trainer's own pieces with a random base and encoded inputs; text encoder and VAE are the same for all and left out. The
learning rate is 0: the same work, and the weights stay what they are for the next provider. FLOPs are model FLOPs, without LoRA
and recomputation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import CogVideoXDDIMScheduler

from benchmarks.harness.models import Inputs, Provider, build_model, model_flops, model_inputs, providers
from benchmarks.harness.shapes import MODELS, Shape
from benchmarks.harness.timing import Case, Run, measure, usable
from realgeneral.model.lora import add_lora
from realgeneral.model.presets import get_preset, joint_layout
from realgeneral.settings.train import LORA_TARGETS
from realgeneral.training.objective import v_loss

RANK = 64  # the trainer's default
PRESET = "cached"


def flops(shape: Shape, layers: int) -> int:
    """Forward, and a backward of 1x its linear products (the base is frozen) and 2.5x its attention."""
    joint = joint_layout(get_preset(PRESET), shape.text, shape.image, shape.conditions)
    forward = model_flops(shape.channels, layers, joint, joint.names)
    linear = 2 * shape.channels**2 * ((layers - 1) * 12 * joint.seq_len + 3 * joint.seq_len + 9 * shape.image)
    return shape.batch * (2 * linear + round(3.5 * (forward - linear)))


def training_run(provider: Provider, model: Any, inputs: Inputs) -> Run:
    """One optimizer step; all providers share the model and its optimizer."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.0)
    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    clean, noise = inputs.target.float(), torch.randn_like(inputs.target.float())
    device, dtype = model.device, inputs.target.dtype
    half = dtype != torch.float32

    def run() -> None:
        with provider.applied(model):
            noisy = model.objective.noised(scheduler, clean, noise, inputs.timestep)
            with torch.autocast(device.type, dtype) if half else contextlib.nullcontext():
                prediction = model(
                    noisy.to(dtype), inputs.text, inputs.timestep,
                    condition_latents=inputs.conditions, task_ids=inputs.task_ids, return_dict=False,
                )[0]  # fmt: skip
            loss = v_loss(prediction, model.objective.target(scheduler, clean, noise, inputs.timestep)).mean()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


@pytest.mark.shapes(MODELS)
def test_training_step(
    shape: Shape,
    device: torch.device,
    report: Callable[[list[dict[str, Any]]], None],
    pytestconfig: pytest.Config,
) -> None:
    """Time a step; on CUDA with gradient checkpointing, as the real model is trained."""
    if shape.grid is None:
        pytest.skip(f"a model's shape must be one of images, {shape.name} is not")
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    model = build_model(shape, device, dtype, pytestconfig.getoption("--layers"), PRESET)
    add_lora(model, RANK, None, LORA_TARGETS)
    model.train()
    if cuda:
        model.enable_gradient_checkpointing()
    inputs = model_inputs(shape, model)
    found = providers(shape, device, pytestconfig.getoption("--provider"))
    runs = usable({p.name: training_run(p, model, inputs) for p in found})
    layers = model.config.num_layers
    case = Case("training_step", "step", shape.name, dtype, flops=flops(shape, layers))
    rows = measure(case, runs, device, against=dict.fromkeys(list(runs)[1:], next(iter(runs))), graphs=False)
    report([row | {"layers": layers, "rank": RANK, "preset": PRESET, "gradient_checkpointing": cuda} for row in rows])
