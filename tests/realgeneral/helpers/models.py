"""RealGeneral models and inputs for the property tests, in float64 so that equality means equality."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import Tensor

from realgeneral import RealGeneralPipeline, RealGeneralTransformer3DModel
from realgeneral.model.lora import add_lora
from realgeneral.settings.train import LORA_TARGETS

TASKS = ("canny", "colouring")
# sizes in latent pixels: the base's own, square, one token per side, larger than the base's
SIZES = ((8, 12), (6, 6), (2, 2), (10, 16))
# rounding of some thousand float64 operations
ROUNDING = 2e4 * torch.finfo(torch.float64).eps


@dataclass
class Inputs:
    """Latents of K clean conditions and a noisy target, text and time."""

    conditions: Tensor
    target: Tensor
    text: Tensor
    timestep: Tensor
    task_ids: Tensor
    subject: Tensor

    @property
    def clip(self) -> Tensor:
        """The stock model's clip: [c, ..., y], for 1.5 [c, c, ..., y, y']."""
        return torch.cat([self.conditions.repeat_interleave(self.target.shape[1], dim=1), self.target], dim=1)


def make_inputs(
    model: CogVideoXTransformer3DModel, size: tuple[int, int], conditions: int = 1, batch: int = 2, seed: int = 1
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    frames, channels = model.config.patch_size_t or 1, model.config.in_channels

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Inputs(
        normal(batch, conditions, channels, *size),
        normal(batch, frames, channels, *size),
        normal(batch, model.config.max_text_seq_length, model.config.text_embed_dim),
        torch.tensor([749.0, 320.0, 5.0])[:batch],
        torch.arange(batch) % len(TASKS),
        normal(batch, model.config.text_embed_dim),
    )


def stock_model(folder: Path) -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel.from_pretrained(folder, subfolder="transformer").double()


def fresh_model(folder: Path, preset: str, lora: bool = True) -> RealGeneralTransformer3DModel:
    """Through the pipeline's loading code; condition branch at its start, LoRA with B = 0."""
    model = RealGeneralPipeline.from_pretrained(folder).transformer
    model.configure_condition(TASKS, preset)
    if lora:
        add_lora(model, 3, 6, LORA_TARGETS)
    return model.double()


def trained_model(folder: Path, preset: str, seed: int = 3) -> RealGeneralTransformer3DModel:
    """As if trained: nothing that was added is zero or a copy any more."""
    torch.manual_seed(seed)  # PEFT draws A from the global generator
    model = fresh_model(folder, preset)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or name.startswith("condition_"):
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    return model


def stock_rotary(folder: Path, clip: Tensor) -> tuple[Tensor, Tensor] | None:
    """What CogVideoXPipeline hands its transformer for this clip."""
    pipe = CogVideoXPipeline.from_pretrained(folder)
    if not pipe.transformer.config.use_rotary_positional_embeddings:
        return None
    factor = pipe.vae_scale_factor_spatial
    height, width = clip.shape[-2] * factor, clip.shape[-1] * factor
    return pipe._prepare_rotary_positional_embeddings(height, width, clip.shape[1], torch.device("cpu"))


def run_stock(model: CogVideoXTransformer3DModel, folder: Path, x: Inputs) -> Tensor:
    """The stock model's prediction for the last image of the clip."""
    rotary = stock_rotary(folder, x.clip)
    output = model(x.clip, x.text, x.timestep, image_rotary_emb=rotary, return_dict=False)[0]
    return output[:, -x.target.shape[1] :]


def run(model: RealGeneralTransformer3DModel, x: Inputs, **changes: Tensor | None) -> Tensor:
    inputs: dict[str, Tensor | None] = {
        "hidden_states": x.target,
        "encoder_hidden_states": x.text,
        "timestep": x.timestep,
        "condition_latents": x.conditions,
        "task_ids": x.task_ids,
        "subject_embeds": x.subject,
        **changes,
    }
    return model(**inputs, return_dict=False)[0]  # type: ignore[arg-type]
