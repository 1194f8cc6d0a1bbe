"""Sample grids during training: fixed rows, through the same pipeline as inference."""

from __future__ import annotations

import torch
from PIL import Image

from realgeneral.data.rows import Source
from realgeneral.data.sources.packaged import BUILT_IN, built_in
from realgeneral.generation.bases import lent
from realgeneral.generation.pipeline import RealGeneralPipeline
from realgeneral.pictures import picture_grid, to_picture
from realgeneral.settings.train import TrainConfig
from realgeneral.training.features import Texts
from realgeneral.training.plan import Plan


def sample_grid(
    pipe: RealGeneralPipeline, config: TrainConfig, plan: Plan, source: Source, texts: Texts, variants: int = 0
) -> Image.Image:
    """A grid (condition | result | target) of the first `sample_count` rows of a fixed order; of packaged data held-out rows.

    With precomputed inputs the rows are those of training, in one of the `variants` draws, whose text features are stored, and
    the VAE is lent to the device.

    A result equals what `realgeneral generate` makes of the same prompt, condition, seed, steps and guidance, bit for bit in
    float32.
    """
    if config.data in BUILT_IN and not config.precomputed:
        source = built_in(config.data, "held_out")
    with lent(pipe.vae, pipe.transformer.device):
        return _grid(pipe, config, plan, source, texts, variants if config.precomputed else 0)


def _grid(
    pipe: RealGeneralPipeline, config: TrainConfig, plan: Plan, source: Source, texts: Texts, variants: int
) -> Image.Image:
    dataset = plan.dataset(
        source, weights=config.task_weights, seed=config.seed, strict=False, one_size=True, variants=variants
    )
    width, height = plan.size
    rows, labels = [], []
    device = pipe.transformer.device
    for n in range(config.sample_count):
        sample = dataset[n]
        conditions = [to_picture(c) for c in sample.conditions]
        with torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            result = pipe(
                sample.prompt,
                conditions,
                task=sample.task,
                subject=sample.subject,
                prompt_embeds=texts([sample.prompt]),
                negative_prompt_embeds=texts([""]),
                height=height,
                width=width,
                num_inference_steps=config.sample_steps,
                guidance_scale=config.guidance_scale,
                generator=torch.Generator().manual_seed(config.seed),
            ).images[0]
        rows.append([conditions[0], result, to_picture(sample.target)])
        labels.append(f"{sample.task}\n{sample.prompt}")
    return picture_grid(rows, ("condition", "result", "target"), labels, max(1, 128 // width))
