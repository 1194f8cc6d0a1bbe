"""Images to latents and back: each image is one frame of CogVideoX's causal 3D VAE, encoded by itself."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d, CogVideoXSpatialNorm3D
from torch import Tensor, nn
from torch.nn import functional as F


class SingleFrameConv(nn.Module):
    """A causal 3D convolution restricted to one frame: the 2D convolution with the temporal taps summed."""

    def __init__(self, conv: CogVideoXCausalConv3d) -> None:
        super().__init__()
        weight = conv.conv.weight.detach().sum(dim=2)
        bias = conv.conv.bias
        self.weight = nn.Parameter(weight.contiguous())
        self.bias = nn.Parameter(bias.detach().clone()) if bias is not None else None
        self.padding = (int(conv.height_pad), int(conv.width_pad))
        self.stride = tuple(conv.conv.stride[1:])

    def forward(self, inputs: Tensor, conv_cache: Tensor | None = None) -> tuple[Tensor, None]:
        """Convolve [B, C, 1, H, W]; the cache of earlier frames is always empty."""
        if inputs.shape[2] != 1 or conv_cache is not None:
            raise ValueError(f"a folded VAE takes one frame at a time, got {inputs.shape[2]} frames")
        frame = F.conv2d(inputs.squeeze(2), self.weight, self.bias, self.stride, self.padding)
        return frame.unsqueeze(2), None


class SingleFrameSpatialNorm(nn.Module):
    """`CogVideoXSpatialNorm3D` on one frame.

    The 1 x 1 convolutions of the latent run before the nearest-neighbour resize instead of after it: the two
    commute, and the latent is the smaller image.
    """

    def __init__(self, norm: CogVideoXSpatialNorm3D) -> None:
        super().__init__()
        self.norm_layer = norm.norm_layer
        self.conv_y = SingleFrameConv(norm.conv_y)
        self.conv_b = SingleFrameConv(norm.conv_b)

    def forward(self, f: Tensor, zq: Tensor, conv_cache: Any = None) -> tuple[Tensor, dict[str, None]]:
        """Normalise `f` [B, C, 1, H, W], modulated by the latent `zq` [B, Cz, 1, h, w]."""
        size = f.shape[-2:]
        scale = F.interpolate(self.conv_y(zq)[0].squeeze(2), size=size).unsqueeze(2)
        shift = F.interpolate(self.conv_b(zq)[0].squeeze(2), size=size).unsqueeze(2)
        return self.norm_layer(f) * scale + shift, {"conv_y": None, "conv_b": None}


def fold_single_frame(vae: AutoencoderKLCogVideoX) -> AutoencoderKLCogVideoX:
    """Replace, in place, every causal 3D convolution by the 2D convolution that equals it on a single frame.

    A single image sees itself as all earlier frames, so with weight `w` [O, I, T, kh, kw] the 3D convolution is
    `conv2d(x, w.sum(dim=2))`: T times less work, equal up to the rounding of the sum.

    Args:
        vae: Any CogVideoX VAE, for example `CogVideoXPipeline.vae`. Changed in place; its state dict changes
            too, so reload the VAE to save it or to handle clips.

    Returns:
        `vae`.

    Raises:
        TypeError: If `vae` is not an `AutoencoderKLCogVideoX`.

    Note:
        The sums are taken in the weight's dtype. Folding twice changes nothing. A folded VAE raises ValueError
        on clips of more than one frame.
    """
    if not isinstance(vae, AutoencoderKLCogVideoX):
        raise TypeError(f"vae must be an AutoencoderKLCogVideoX, got {type(vae).__name__}")
    for parent in list(vae.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, CogVideoXSpatialNorm3D):
                setattr(parent, name, SingleFrameSpatialNorm(child))
            elif isinstance(child, CogVideoXCausalConv3d) and child.pad_mode != "replicate":
                setattr(parent, name, SingleFrameConv(child))
    return vae


def whole_tiles(vae: AutoencoderKLCogVideoX) -> None:
    """Make tiles of whole latent pixels that overlap by whole ones, in place: otherwise pictures change size with diffusers.

    CogVideoX's own tiles (30 x 45 latent pixels, which overlap by 1/6 and 1/5) stay as they are.
    """
    ratio = 2 ** (len(vae.config["block_out_channels"]) - 1)
    for side in ("height", "width"):
        latents = max(2, getattr(vae, f"tile_latent_min_{side}"))
        pixels = latents * ratio
        setattr(vae, f"tile_latent_min_{side}", latents)
        setattr(vae, f"tile_sample_min_{side}", pixels)
        share = getattr(vae, f"tile_overlap_factor_{side}")
        for overlap in (share, *(n / latents for n in range(max(1, round(latents * share)), latents))):
            # as diffusers rounds them: the step between tiles, and what is kept of each
            steps = int(latents * (1 - overlap)) * ratio, int(pixels * (1 - overlap))
            kept = pixels - int(pixels * overlap), (latents - int(latents * overlap)) * ratio
            if steps == kept:
                setattr(vae, f"tile_overlap_factor_{side}", overlap)
                break


def encode_images(
    vae: AutoencoderKLCogVideoX,
    pixels: Tensor,
    generator: torch.Generator | None = None,
    sample: bool = False,
) -> Tensor:
    """Encode each image by itself as one frame: `scaling_factor * mode(q(z | x))`.

    Images on the batch axis never mix, whereas images joined as a clip would share latent frames.

    Args:
        vae: The VAE, folded or not.
        pixels: [B, 3, H, W] in [-1, 1]; H and W multiples of the VAE's spatial factor.
        generator: Random state of the sample.
        sample: Draw from the posterior instead of taking its mode.

    Returns:
        Latents [B, C, h, w] in the VAE's dtype, multiplied by `scaling_factor`.

    Raises:
        ValueError: If `pixels` is not [B, 3, H, W] or its size does not divide.
    """
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    if pixels.ndim != 4 or pixels.shape[1] != vae.config["in_channels"]:
        raise ValueError(f"pixels must be [B, {vae.config['in_channels']}, H, W], got {tuple(pixels.shape)}")
    if pixels.shape[2] % factor or pixels.shape[3] % factor:
        raise ValueError(f"height and width must be multiples of {factor}, got {tuple(pixels.shape[2:])}")
    posterior = vae.encode(pixels.to(vae.dtype).unsqueeze(2)).latent_dist
    latents: Tensor = posterior.sample(generator) if sample else posterior.mode()
    return latents.squeeze(2) * vae.config["scaling_factor"]


def decode_latents(vae: AutoencoderKLCogVideoX, latents: Tensor) -> Tensor:
    """Decode each latent by itself as one frame: the inverse of `encode_images`.

    Args:
        vae: The VAE, folded or not.
        latents: [B, C, h, w], scaled by `scaling_factor`.

    Returns:
        Images [B, 3, H, W] in the VAE's dtype, about [-1, 1], not clamped.

    Raises:
        ValueError: If `latents` is not [B, C, h, w].
    """
    channels = vae.config["latent_channels"]
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise ValueError(f"latents must be [B, {channels}, h, w], got {tuple(latents.shape)}")
    scaled = latents.to(vae.dtype) / vae.config["scaling_factor"]
    images: Tensor = vae.decode(scaled.unsqueeze(2)).sample
    return images.squeeze(2)
