"""Latents and text features of a batch: encoded as they are needed, or from a store."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Protocol

import torch
from torch import Tensor

from realgeneral.data.samples import Batch, PairDataset
from realgeneral.data.store import Store
from realgeneral.generation.pipeline import RealGeneralPipeline
from realgeneral.model.transformer import Images


class Texts(Protocol):
    """Text features of prompts, [len(prompts), T, E] on a device."""

    window: int

    def __call__(self, prompts: list[str]) -> Tensor:
        """Features of each prompt, encoded by itself."""


class TextCache:
    """Text features of recent prompts; the encoder is frozen, so each prompt is encoded once while it stays here.

    Prompts are encoded one by one: the bits of a batch's rows may depend on the batch, and a resumed run meets other batches.
    """

    def __init__(self, pipe: RealGeneralPipeline, capacity_bytes: int = 2**30) -> None:
        self.pipe, self.capacity_bytes = pipe, capacity_bytes
        self.window = pipe.transformer.geometry.text_window
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


def encode_pictures(images: Images, vae: Any, pixels: Tensor) -> Tensor:
    """Latents [N, C, h, w] of pixels [N, 3, H, W], one picture at a time.

    The bits of a picture's latents may depend on what it is encoded with, and on autocast: alone and without, they equal the
    precomputed ones. It also bounds the VAE's memory.
    """
    with torch.autocast(pixels.device.type, enabled=False):
        return torch.cat([images.encode(vae, picture[None]) for picture in pixels])


def encode(pipe: RealGeneralPipeline, texts: Texts, batch: Batch) -> tuple[Tensor, Tensor]:
    """What the models see of a batch: latents [B, 1 + K, C, h, w] float32, target first, and text features [B, T, E]."""
    images = torch.cat([batch.target[:, None], batch.conditions], dim=1)
    if not batch.encoded:
        images = encode_pictures(pipe.transformer.images, pipe.vae, images.flatten(0, 1)).unflatten(0, images.shape[:2])
    return images.float(), texts(batch.prompts)


def training_texts(pipe: RealGeneralPipeline, dataset: PairDataset, device: torch.device) -> Texts:
    """Text features of a run: from its store, or encoded as they are needed."""
    return TextCache(pipe) if dataset.store is None else StoredTexts(dataset.store, device)
