"""The recipe of nano's VAE: noise on latents, and a decoder trained alone."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLCogVideoX

from realgeneral.model.vae import fold_single_frame
from realgeneral.nano.assets import ASSETS
from realgeneral.nano.emoji import load_emoji
from realgeneral.pictures import to_pixels
from recipes.train_vae import decoder_terms, latent_noise


def test_decoder_recipe_leaves_the_encoder() -> None:
    """Noise of the size that was asked for, and no gradient but the decoder's."""
    latent = torch.zeros(200, 8, 1, 16, 16)
    noise = latent_noise(latent, 0.3)
    sizes = noise.std(dim=(1, 2, 3, 4))
    assert sizes.max() < 0.36
    assert 0.12 < sizes.mean() < 0.18
    vae = fold_single_frame(AutoencoderKLCogVideoX.from_pretrained(ASSETS / "base" / "vae", torch_dtype=torch.float32))
    pixels = torch.stack([to_pixels(load_emoji("train")[0].image("3d"))])
    terms = decoder_terms(vae, pixels, torch.float32)
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is None for p in vae.encoder.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in vae.decoder.parameters())
