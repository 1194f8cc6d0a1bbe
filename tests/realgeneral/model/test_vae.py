"""Images to latents and back, each by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor

from realgeneral import RealGeneralPipeline
from realgeneral.model.vae import decode_latents, encode_images, fold_single_frame, whole_tiles
from tests.realgeneral.helpers.checkpoints import tiny_vae


@pytest.fixture
def vae() -> AutoencoderKLCogVideoX:
    return tiny_vae().double()


@torch.no_grad()
def test_images_never_mix(vae: AutoencoderKLCogVideoX) -> None:
    """A batch of images is each image encoded alone; a clip of the same images is not."""
    pixels = torch.randn(2, 3, 16, 24, dtype=torch.float64).clamp(-1, 1)
    latents = encode_images(vae, pixels)
    assert latents.shape == (2, 4, 2, 3)
    for i in range(2):
        torch.testing.assert_close(encode_images(vae, pixels[i : i + 1])[0], latents[i])
    clip = vae.encode(pixels.transpose(0, 1)[None]).latent_dist.mode() * vae.config.scaling_factor
    assert clip.shape[2] == 1
    assert not torch.allclose(clip[0, :, 0], latents[0], atol=1e-3)


@torch.no_grad()
def test_folding_changes_nothing_but_rounding() -> None:
    """2D convolutions on the summed taps equal the causal 3D ones on a single frame, there and back; folding twice is once."""
    plain, folded = tiny_vae().double(), fold_single_frame(fold_single_frame(tiny_vae().double()))
    pixels = torch.randn(2, 3, 16, 24, dtype=torch.float64).clamp(-1, 1)
    cases: tuple[tuple[Callable[..., Tensor], Tensor], ...] = (
        (encode_images, pixels),
        (decode_latents, torch.randn(2, 4, 2, 3, dtype=torch.float64)),
    )
    for function, inputs in cases:
        torch.testing.assert_close(function(folded, inputs), function(plain, inputs), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_scaling_factor_goes_in_and_out(vae: AutoencoderKLCogVideoX) -> None:
    """Latents are multiplied by the factor, and divided by it before decoding."""
    pixels = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    mode = vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
    latents = encode_images(vae, pixels)
    torch.testing.assert_close(latents, mode * 0.7)
    torch.testing.assert_close(decode_latents(vae, latents), vae.decode(mode[:, :, None]).sample[:, :, 0])


@torch.no_grad()
def test_sampling_follows_the_generator(vae: AutoencoderKLCogVideoX) -> None:
    """The mode is the default; a sample is repeatable by its generator."""
    pixels = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    one, two = (encode_images(vae, pixels, torch.Generator().manual_seed(1), sample=True) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, encode_images(vae, pixels))


def test_errors(vae: AutoencoderKLCogVideoX, bases: dict[str, Path]) -> None:
    """Shapes and types are named."""
    with pytest.raises(ValueError, match=r"pixels must be \[B, 3, H, W\], got \(3, 16, 16\)"):
        encode_images(vae, torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match=r"height and width must be multiples of 8, got \(12, 16\)"):
        encode_images(vae, torch.zeros(1, 3, 12, 16))
    with pytest.raises(ValueError, match=r"latents must be \[B, 4, h, w\], got \(1, 3, 2, 2\)"):
        decode_latents(vae, torch.zeros(1, 3, 2, 2))
    with pytest.raises(TypeError, match="vae must be an AutoencoderKLCogVideoX, got Linear"):
        fold_single_frame(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="a folded VAE takes one frame at a time, got 5 frames"):
        fold_single_frame(vae).encode(torch.zeros(1, 3, 5, 16, 16, dtype=torch.float64))


@pytest.mark.parametrize("sides", [(64, 64), (96, 160), (480, 720), (40, 72)])
def test_tiling_keeps_sizes(sides: tuple[int, int]) -> None:
    """Whatever the VAE's own size, pictures larger than a tile come back as large as they were; CogVideoX's tiles stay."""
    vae = tiny_vae(sample_height=sides[0], sample_width=sides[1])
    stock = (vae.tile_overlap_factor_height, vae.tile_overlap_factor_width)
    whole_tiles(vae)
    if sides == (480, 720):
        assert (vae.tile_overlap_factor_height, vae.tile_overlap_factor_width) == stock
        vae.enable_tiling(tile_sample_min_height=48, tile_sample_min_width=80)
    else:
        vae.enable_tiling()
    for size in ((64, 96), (96, 64), (104, 112)):
        pixels = torch.zeros(1, 3, *size)
        with torch.no_grad():
            latents = encode_images(vae, pixels)
            assert latents.shape[2:] == (size[0] // 8, size[1] // 8)
            assert decode_latents(vae, latents).shape == pixels.shape


def test_nano_with_tiles() -> None:
    """nano's tiles are of eight latent pixels, of which a sixth is none."""
    pipe = RealGeneralPipeline.from_pretrained("nano")
    pipe.vae.enable_tiling()
    with torch.no_grad():
        assert decode_latents(pipe.vae, torch.zeros(1, 8, 24, 32)).shape == (1, 3, 96, 128)
