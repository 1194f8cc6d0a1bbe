"""Small random CogVideoX checkpoints in the on-disk format of diffusers, one for each geometry."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

GEOMETRIES = ("2b", "5b", "1.5")
TEXT_WINDOW = 12
WORDS = "a red pot plant on the table in jungle fox cat dog blue flat 3d render icon ,".split()


def tiny_transformer(geometry: str, seed: int = 0, **changes: object) -> CogVideoXTransformer3DModel:
    """A two-layer stock transformer with non-trivial norms, in 2B (sin-cos), 5B (RoPE) or 1.5 (patch_size_t) geometry."""
    config: dict[str, object] = {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 16,
        "text_embed_dim": 24,
        "num_layers": 2,
        "sample_width": 12 if geometry != "1.5" else 40,
        "sample_height": 8 if geometry != "1.5" else 40,
        "sample_frames": 5,
        "patch_size": 2,
        "patch_size_t": 2 if geometry == "1.5" else None,
        "max_text_seq_length": TEXT_WINDOW,
        "use_rotary_positional_embeddings": geometry != "2b",
        **changes,
    }
    torch.manual_seed(seed)
    model = CogVideoXTransformer3DModel(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def tiny_vae(seed: int = 0, **changes: int) -> AutoencoderKLCogVideoX:
    """A VAE with 8x spatial and 4x temporal compression, as the real ones."""
    torch.manual_seed(seed)
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        scaling_factor=0.7,
        **changes,
    ).eval()


def tiny_tokenizer() -> T5TokenizerFast:
    """A tokenizer of T5's class: whole words, and single letters for the rest."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("\u2581" + word, -1.0) for word in WORDS]
    pieces += [(letter, -9.0) for letter in "\u2581abcdefghijklmnopqrstuvwxyz,."]
    return T5TokenizerFast(vocab=pieces, extra_ids=0)


def tiny_text_encoder(seed: int = 0) -> T5EncoderModel:
    """A one-layer T5 encoder."""
    torch.manual_seed(seed)
    config = T5Config(vocab_size=len(tiny_tokenizer()), d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def save_checkpoint(folder: Path, geometry: str) -> Path:
    """Write a whole checkpoint folder with `save_pretrained`."""
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        snr_shift_scale=3.0 if geometry == "2b" else 1.0,
    )
    pipe = CogVideoXPipeline(tiny_tokenizer(), tiny_text_encoder(), tiny_vae(), tiny_transformer(geometry), scheduler)
    pipe.save_pretrained(folder)
    return folder
