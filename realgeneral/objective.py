"""From samples to the loss: batches, text features, noise, and the prediction of v on the target's tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from realgeneral.data.samples import Batch
from realgeneral.data.store import Store
from realgeneral.diffusion import noised, sample_timesteps, v_loss, v_target
from realgeneral.generation.pipeline import RealGeneralPipeline
from realgeneral.model.vae import encode_images
from realgeneral.prompts import pool_subject, subject_span_mask
from realgeneral.settings.train import TrainConfig


class Texts(Protocol):
    """Text features of prompts, [len(prompts), T, E] on a device."""

    window: int

    def __call__(self, prompts: list[str]) -> Tensor:
        """Features of each prompt, encoded by itself."""


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


class TextCache:
    """Text features of recent prompts; the encoder is frozen, so each prompt is encoded once while it stays here.

    Prompts are encoded one by one: the bits of a batch's rows may depend on the batch, and a resumed run meets other batches.
    """

    def __init__(self, pipe: RealGeneralPipeline, capacity_bytes: int = 2**30) -> None:
        self.pipe, self.capacity_bytes = pipe, capacity_bytes
        self.window = pipe.transformer.config.max_text_seq_length
        self.entries: OrderedDict[str, Tensor] = OrderedDict()

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Tensor:
        """[len(prompts), T, E] on the pipeline's device."""
        device = self.pipe.text_encoder.device
        for prompt in prompts:
            if prompt not in self.entries:
                self.entries[prompt] = self.encoded([prompt])[0]
            self.entries.move_to_end(prompt)
        features = torch.stack([self.entries[p] for p in prompts])
        capacity = max(len(prompts), self.capacity_bytes // max(1, features[0].nbytes))
        while len(self.entries) > capacity:
            self.entries.popitem(last=False)
        return features.to(device)

    @torch.no_grad()
    def encoded(self, prompts: list[str]) -> Tensor:
        """[len(prompts), T, E] on the CPU, encoded together and not kept."""
        device = self.pipe.text_encoder.device
        self.pipe.check_prompts(prompts, self.window)
        with torch.autocast(device.type, enabled=False):  # as precomputed, whatever the trainer runs in
            features: Tensor = self.pipe.encode_prompt(prompts, None, False, max_sequence_length=self.window, device=device)[0]
        return features.cpu()


class StoredTexts:
    """Text features from a precomputed store: the encoder is not needed."""

    def __init__(self, store: Store, device: torch.device) -> None:
        self.store, self.device, self.window = store, device, store.settings.window

    def __call__(self, prompts: list[str]) -> Tensor:
        """[len(prompts), T, E] on the device."""
        return torch.stack([self.store.text(prompt) for prompt in prompts]).to(self.device)


def encode_pictures(vae: Any, pixels: Tensor) -> Tensor:
    """Latents [N, C, h, w] of pixels [N, 3, H, W], one picture at a time.

    The bits of a picture's latents may depend on what it is encoded with, and on autocast: alone and without, they equal the
    precomputed ones. It also bounds the VAE's memory.
    """
    with torch.autocast(pixels.device.type, enabled=False):
        return torch.cat([encode_images(vae, picture[None]) for picture in pixels])


def encode(pipe: RealGeneralPipeline, texts: Texts, batch: Batch) -> tuple[Tensor, Tensor]:
    """What the models see of a batch: latents [B, 1 + K, C, h, w] float32, target first, and text features [B, T, E]."""
    images = torch.cat([batch.target[:, None], batch.conditions], dim=1)
    if not batch.encoded:
        images = encode_pictures(pipe.vae, images.flatten(0, 1)).unflatten(0, images.shape[:2])
    return images.float(), texts(batch.prompts)


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
        noisy, wanted = noised(pipe.scheduler, clean, noise, timesteps), v_target(pipe.scheduler, clean, noise, timesteps)
    dtype = transformer.proj_out.weight.dtype
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
