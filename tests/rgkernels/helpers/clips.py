"""Inputs of small CogVideoX models."""

from __future__ import annotations

import torch
from diffusers import CogVideoXTransformer3DModel

from tests.realgeneral.helpers.checkpoints import TEXT_WINDOW

FRAMES, HEIGHT, WIDTH = 4, 8, 12


def clip_inputs(model: CogVideoXTransformer3DModel, seed: int = 0) -> dict[str, object]:
    """Random inputs of a four-frame clip, with rotary tables where the geometry has them."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    frames = FRAMES // (config.patch_size_t or 1)
    tokens = frames * (HEIGHT // 2) * (WIDTH // 2)
    angles = torch.rand(tokens, config.attention_head_dim // 2, generator=generator).repeat_interleave(2, 1) * 6
    rotary = (angles.cos(), angles.sin()) if config.use_rotary_positional_embeddings else None
    return {
        "hidden_states": torch.randn(2, FRAMES, config.in_channels, HEIGHT, WIDTH, generator=generator),
        "encoder_hidden_states": torch.randn(2, TEXT_WINDOW, config.text_embed_dim, generator=generator),
        "timestep": torch.tensor([3, 900]),
        "image_rotary_emb": rotary,
        "return_dict": False,
    }
