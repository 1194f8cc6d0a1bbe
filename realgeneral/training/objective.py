"""From samples to the loss: batches, text features, noise, and the prediction of v on the target's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from realgeneral.data.samples import Batch
from realgeneral.generation.pipeline import RealGeneralPipeline
from realgeneral.prompts import pool_subject, subject_span_mask
from realgeneral.settings.train import TrainConfig
from realgeneral.training.features import Texts, encode


def sample_timesteps(batch: int, num_train_timesteps: int, generator: torch.Generator) -> Tensor:
    """t uniform in 0..num_train_timesteps - 1, [batch] int64, drawn on the CPU."""
    return torch.randint(0, num_train_timesteps, (batch,), generator=generator)


def v_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Per-sample mean squared error on v in float32, [B].

    CogVideoX's own trainers write the loss on x0 divided by (1 - abar_t); the two are identical, and this one has no division
    that blows up near t = 0.
    """
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


@dataclass(frozen=True)
class Draws:
    """What is random in a batch: each sample's part is a function of (seed, sample number) alone.

    Batch size, accumulation, number of processes and resumption therefore change nothing of it.

    Args:
        text_dropped: Samples that are trained without their prompt, [B] bool.
        condition_dropped: Samples that are trained without their condition, [B] bool.
        timesteps: [B] int64.
        noise_seeds: Seed of each sample's noise.
    """

    text_dropped: Tensor
    condition_dropped: Tensor
    timesteps: Tensor
    noise_seeds: tuple[int, ...]

    @classmethod
    def of(cls, config: TrainConfig, numbers: Sequence[int], num_train_timesteps: int) -> Draws:
        """Draw for the samples of these numbers, on the CPU."""
        seeds = [2 * (config.seed * 1_000_003 + number) for number in numbers]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        uniform = torch.stack([torch.rand(2, generator=generator) for generator in generators])
        timesteps = torch.cat([sample_timesteps(1, num_train_timesteps, generator) for generator in generators])
        return cls(
            uniform[:, 0] < config.text_dropout,
            uniform[:, 1] < config.condition_dropout,
            timesteps,
            tuple(seed + 1 for seed in seeds),
        )

    def noise(self, shape: Sequence[int]) -> Tensor:
        """Standard normal noise, [B, *shape] float32."""
        return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in self.noise_seeds])


def training_loss(pipe: RealGeneralPipeline, model: nn.Module, texts: Texts, batch: Batch, draws: Draws) -> Tensor:
    """Per-sample loss, [B]: encode, noise, drop prompts and conditions, predict v on the target tokens."""
    transformer, device = pipe.transformer, batch.target.device
    with torch.no_grad():
        latents, text = encode(pipe, texts, batch)
        frames = transformer.geometry.frames_per_image
        clean, conditions = latents[:, :1].repeat(1, frames, 1, 1, 1), latents[:, 1:]
        subjects = subject_span_mask(pipe.tokenizer, batch.prompts, batch.subjects, texts.window).to(device)
        subject_embeds = pool_subject(text, subjects)
        text = torch.where(draws.text_dropped.to(device)[:, None, None], texts([""]), text)
        kept = ~draws.condition_dropped.to(device)
        conditions = conditions * kept[:, None, None, None, None]
        timesteps, noise = draws.timesteps.to(device), draws.noise(clean.shape[1:]).to(device)
        noisy = transformer.objective.noised(pipe.scheduler, clean, noise, timesteps)
        wanted = transformer.objective.target(pipe.scheduler, clean, noise, timesteps)
    dtype = transformer.base_dtype
    prediction = model(
        noisy.to(dtype),
        text.to(dtype),
        timesteps,
        condition_latents=conditions.to(dtype),
        task_ids=transformer.task_ids(batch.tasks),
        subject_embeds=subject_embeds,
        return_dict=False,
    )[0]
    return v_loss(prediction, wanted)
