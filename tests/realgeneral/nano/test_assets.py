"""The packaged nano model: its files, its captions, its VAE, and a base that plain diffusers loads."""

from __future__ import annotations

import torch
from diffusers import CogVideoXPipeline
from PIL import Image

from realgeneral import RealGeneralPipeline
from realgeneral.data.sources.packaged import TARGET_STYLES
from realgeneral.evaluation.metrics import psnr
from realgeneral.model.vae import decode_latents, encode_images
from realgeneral.nano.assets import ASSETS
from realgeneral.nano.colours import colour_words
from realgeneral.nano.emoji import EMOJI_PARQUET, STYLES, caption, load_emoji
from realgeneral.pictures import to_pixels
from realgeneral.tasks import get_task


def test_assets_are_small_and_licensed() -> None:
    """Pictures, weights and licences ship within their budgets: 6.5 MB of pictures, 35 MB of weights."""
    weights = list(ASSETS.rglob("*.safetensors"))
    assert {p.parent.name for p in weights} == {"vae", "transformer", "text_encoder", "adapter"}
    assert sum(p.stat().st_size for p in weights) < 35e6
    assert EMOJI_PARQUET.stat().st_size < 6.5e6
    assert {p.name for p in (ASSETS / "licenses").iterdir()} >= {"README.md", "APACHE-2.0.txt", "MIT-fluent-emoji.txt"}


def test_captions_fit_nanos_window(nano: RealGeneralPipeline) -> None:
    """Every caption with its colours has at most 16 tokens."""
    captions = [caption(c, style, colour_words(c.image(style))) for c in load_emoji("held_out") for style in TARGET_STYLES]
    assert max(map(len, nano.tokenizer(captions).input_ids)) <= nano.transformer.config.max_text_seq_length


def test_base_is_a_stock_checkpoint() -> None:
    """The base folder loads in plain diffusers and makes a clip of two frames from text alone."""
    stock = CogVideoXPipeline.from_pretrained(ASSETS / "base", dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    frames = stock(
        "red heart, 3d render", num_frames=2, num_inference_steps=4, guidance_scale=3, max_sequence_length=16,
        output_type="pt", generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip
    assert frames.shape == (1, 2, 3, 64, 64)
    assert torch.isfinite(frames).all()


def test_vae_reconstructs_held_out_pictures(nano: RealGeneralPipeline) -> None:
    """At least 29 dB on held-out pictures in every style, and on edge maps of them at least 25 dB."""
    concepts = load_emoji("held_out")[::20]
    for style in STYLES:
        pictures = [c.image(style) for c in concepts]
        assert _reconstruction_psnr(nano, pictures) > 29
    edges = [get_task("canny").condition(c.image("3d"), 0) for c in concepts]
    assert _reconstruction_psnr(nano, edges) > 25


def _reconstruction_psnr(nano: RealGeneralPipeline, pictures: list[Image.Image]) -> float:
    pixels = torch.stack([to_pixels(p) for p in pictures])
    with torch.no_grad():
        decoded = decode_latents(nano.vae, encode_images(nano.vae, pixels))
    return psnr((decoded.clamp(-1, 1) + 1) / 2, (pixels + 1) / 2).mean().item()
