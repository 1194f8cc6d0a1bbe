"""The nano base: how its parts are built, sampled and saved as a CogVideoX folder."""

from __future__ import annotations

import copy
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor, nn
from transformers import T5EncoderModel, T5Tokenizer

from realgeneral.model.vae import decode_latents
from recipes.build_text import MAX_LENGTH, WIDTH
from recipes.common import image_grid
from recipes.train_vae import LATENT_CHANNELS

LATENT_SIZE = 16
# CogVideoX-5B's noise schedule.
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "snr_shift_scale": 1.0,
    "set_alpha_to_one": True,
    "clip_sample": False,
}


# First dimension and energy of the RoPE pairs that a look-back head uses: time, rows (two frequencies), columns (two).
LOOK_BACK_PAIRS = ((0, 12.0), (16, 20.0), (18, 6.0), (40, 20.0), (42, 6.0))
# Weight of the QK-norms in those dimensions, which training hardly moves. At the start, such a head puts 0.61 of its attention
# on its place with 1.5, and 0.97 with 2.5.
LOOK_BACK_SHARPNESS = 2.5


@torch.no_grad()
def init_look_back(attention: Any, head: int = 0) -> None:
    """Start a head as attention from each token to the same place in the frame before.

    The biases of its queries and keys hold a pattern whose product, once rotated, peaks there; content counts a tenth. The
    norms weigh the pattern's dimensions by `LOOK_BACK_SHARPNESS`; as all heads share them, the other heads' rows of these
    dimensions shrink by as much. Neighbours on an 8 x 8 grid hardly differ in RoPE's angles: without this start the copying
    of details is learned late, and never precisely.
    """
    size = attention.norm_q.weight.shape[0]
    patterns = torch.zeros(2, size)
    for first, energy in LOOK_BACK_PAIRS:
        # One frame back is one radian in the first pair of time.
        for pattern, angle in zip(patterns, (0.0, 1.0 if first == 0 else 0.0), strict=True):
            pattern[first] = math.sqrt(energy) * math.cos(angle - math.pi / 4)
            pattern[first + 1] = math.sqrt(energy) * math.sin(angle - math.pi / 4)
    used = patterns[0] != 0
    for projection, norm, pattern in zip(
        (attention.to_q, attention.to_k), (attention.norm_q, attention.norm_k), patterns, strict=True
    ):
        weight, bias = projection.weight.unflatten(0, (-1, size)), projection.bias.unflatten(0, (-1, size))
        others = torch.arange(len(weight)) != head
        ratio = norm.weight[used] / LOOK_BACK_SHARPNESS
        weight[others.nonzero(), used.nonzero().T] *= ratio[:, None]
        bias[others.nonzero(), used.nonzero().T] *= ratio
        norm.weight[used] = LOOK_BACK_SHARPNESS
        bias[head] = pattern * weight[head].norm(dim=1).mean()
        weight[head] *= 0.1


def make_transformer(layers: int) -> CogVideoXTransformer3DModel:
    """Build the transformer, initialised for training from scratch.

    Every block starts as the identity: gates at one, output projections at zero; one head of each looks back.
    diffusers' own initialisation is made for loading checkpoints, not for training.
    """
    model = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=128,
        text_embed_dim=WIDTH,
        num_layers=layers,
        sample_width=LATENT_SIZE,
        sample_height=LATENT_SIZE,
        sample_frames=2,
        patch_size=2,
        temporal_compression_ratio=1,
        max_text_seq_length=MAX_LENGTH,
        use_rotary_positional_embeddings=True,
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
            nn.init.zeros_(module.bias)
    for block in model.transformer_blocks:
        for norm in (block.norm1, block.norm2):
            nn.init.zeros_(norm.linear.weight)
            # Rows: shift, scale, gate for the video, then the same for the text.
            _, _, gate, _, _, text_gate = norm.linear.bias.data.chunk(6)
            gate.fill_(1.0)
            text_gate.fill_(1.0)
        init_look_back(block.attn1)
        nn.init.zeros_(block.attn1.to_out[0].weight)
        nn.init.zeros_(block.ff.net[2].weight)
    nn.init.zeros_(model.norm_out.linear.weight)
    nn.init.zeros_(model.proj_out.weight)
    return model


def rotary(frames: int, size: int = LATENT_SIZE) -> tuple[Tensor, Tensor]:
    """Return cos, sin [frames * (size / 2)^2, 64], as the stock pipeline computes them."""
    grid = size // 2
    base = LATENT_SIZE // 2
    crops = get_resize_crop_region_for_grid((grid, grid), base, base)
    cos, sin = get_3d_rotary_pos_embed(embed_dim=64, crops_coords=crops, grid_size=(grid, grid), temporal_size=frames)
    return cos, sin


def tokenize(tokenizer: T5Tokenizer, captions: list[str]) -> Tensor:
    """Return token ids [B, MAX_LENGTH], padded as the stock pipeline pads."""
    out = tokenizer(captions, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt")
    ids: Tensor = out.input_ids
    return ids


def make_pipeline(
    vae: AutoencoderKLCogVideoX,
    tokenizer: T5Tokenizer,
    text_encoder: T5EncoderModel,
    transformer: CogVideoXTransformer3DModel,
) -> CogVideoXPipeline:
    """Join the parts, with the DPM scheduler."""
    return CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=CogVideoXDPMScheduler.from_config(CogVideoXDDIMScheduler(**SCHEDULE).config),
    )


def save_pipeline(pipeline: CogVideoXPipeline, folder: Path) -> None:
    """Save an fp16 copy; the folder is replaced in one rename, so that readers see a whole model."""
    tmp, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    shutil.rmtree(tmp, ignore_errors=True)
    parts = dict(pipeline.components)
    # Sampling leaves its padding in the tokenizer.
    pipeline.tokenizer.backend_tokenizer.no_padding()
    pipeline.tokenizer.backend_tokenizer.no_truncation()
    for name in ("vae", "text_encoder", "transformer"):
        parts[name] = copy.deepcopy(parts[name]).half()
    # diffusers and transformers would record the folder a part was loaded from.
    for part in parts.values():
        if hasattr(part, "register_to_config"):
            part.register_to_config(_name_or_path="")
        elif hasattr(part, "name_or_path"):
            part.name_or_path = ""
    CogVideoXPipeline(**parts).save_pretrained(tmp)
    for file in tmp.rglob("*"):
        # safetensors writes private files; a package must be readable by all.
        file.chmod(0o755 if file.is_dir() else 0o644)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(tmp, folder)
    shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def sample_grid(
    pipeline: CogVideoXPipeline,
    folded_vae: AutoencoderKLCogVideoX,
    prompts: list[str],
    steps: int = 25,
    guidance: float = 4.0,
    frames: int = 2,
    seed: int = 0,
    columns: int = 4,
) -> np.ndarray:
    """Sample one clip per prompt with the stock pipeline; frames side by side, `columns` clips a row."""
    pipeline.set_progress_bar_config(disable=True)
    side = 4 * LATENT_SIZE
    latents = pipeline(
        prompts,
        height=side,
        width=side,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=MAX_LENGTH,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).frames
    images = decode_latents(folded_vae, latents.flatten(0, 1)).clamp(-1, 1)
    arrays = ((images + 1) * 127.5).round().permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()
    clips = [np.concatenate(list(c), axis=1) for c in arrays.reshape(len(prompts), frames, *arrays.shape[1:])]
    clips += [np.full_like(clips[0], 255)] * (-len(clips) % columns)
    return image_grid(clips[i : i + columns] for i in range(0, len(clips), columns))
