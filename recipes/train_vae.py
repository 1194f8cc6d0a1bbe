"""Recipe: train the nano VAE, a small AutoencoderKLCogVideoX, on the packaged emoji and avatars.

    python -m recipes.train_vae --out DIR --minutes 26
    python -m recipes.train_vae --out DIR2 --minutes 50 --lr 1e-3 --decoder-of DIR/vae

The second command leaves the encoder, and so the latents, as they are and goes on with the decoder on *noisy* latents: what a
diffusion model makes is off by a tenth or two of a standard deviation, which a decoder that only saw clean latents turns into
mottled surfaces.

Trained on single frames with folded (2D) convolutions, saved as a stock 3D VAE: the 2D weights sit in the last
temporal tap, the others are zero, so on one frame both are the same function.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor
from torch.nn import functional as F

from realgeneral.model.vae import SingleFrameConv, decode_latents, encode_images, fold_single_frame
from realgeneral.nano.assets import BASE
from realgeneral.nano.avatars import BACKGROUNDS, FACES, load_avatars
from realgeneral.nano.emoji import STYLES, load_emoji
from recipes.common import (
    Ema,
    append_csv,
    command_line,
    log,
    log_settings,
    rounded,
    save_atomic,
    seed_everything,
    warmup_cosine,
)
from recipes.derived import KINDS, derive

CHANNELS = (32, 64, 64)
LATENT_CHANNELS = 8
# Means over elements. The KL weight keeps latents smooth for the diffusion model at a cost of ~0.3 dB.
LOSS_WEIGHTS = {"l1": 1.0, "mse": 1.0, "gradient": 0.5, "kl": 3e-4}
# Of `--decoder-of`: the largest standard deviation of the noise, in those of the latents.
LATENT_NOISE = 0.3


def make_vae(scaling_factor: float = 1.0) -> AutoencoderKLCogVideoX:
    """Build the stock 3D VAE: 4x spatial compression, one latent frame per frame."""
    levels = len(CHANNELS)
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * levels,
        up_block_types=("CogVideoXUpBlock3D",) * levels,
        block_out_channels=CHANNELS,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        temporal_compression_ratio=1,
        sample_height=64,
        sample_width=64,
        scaling_factor=scaling_factor,
    )


def unfold(folded: AutoencoderKLCogVideoX, scaling_factor: float) -> AutoencoderKLCogVideoX:
    """Return a stock VAE that equals `folded` on single frames."""
    stock = make_vae(scaling_factor)
    state = stock.state_dict()
    source = dict(folded.state_dict())
    for name, module in folded.named_modules():
        if isinstance(module, SingleFrameConv):
            weight = torch.zeros_like(state[f"{name}.conv.weight"])
            weight[:, :, -1] = source.pop(f"{name}.weight")
            source[f"{name}.conv.weight"] = weight
            source[f"{name}.conv.bias"] = source.pop(f"{name}.bias")
    stock.load_state_dict(source)
    return stock.eval()


def load_pictures(split: str) -> np.ndarray:
    """Decode the emoji of a split: uint8 [N, styles, 64, 64, 3]."""
    return np.stack([[np.asarray(c.image(style)) for style in STYLES] for c in load_emoji(split)])


def avatar_pictures(split: str) -> np.ndarray:
    """Faces of the avatars of a split, as many as an emoji has styles, on random backgrounds: uint8 [N, styles, 64, 64, 3]."""
    rng = np.random.default_rng(0)
    pictures = []
    for avatar in load_avatars(split):
        faces, backgrounds = rng.permutation(FACES)[: len(STYLES)], rng.choice(list(BACKGROUNDS), len(STYLES))
        pictures.append([np.asarray(avatar.image(int(f), str(b))) for f, b in zip(faces, backgrounds, strict=True)])
    return np.array(pictures)


def random_affine(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Shift, zoom, rotate and flip [B, 3, H, W] in [0, 1] on white."""
    batch = len(pictures)
    angle = rng.normal(0, 0.25, batch) * (rng.random(batch) < 0.5)
    zoom = np.exp(rng.normal(0.05, 0.25, batch))
    flip = np.where(rng.random(batch) < 0.5, -1.0, 1.0)
    shift = rng.uniform(-0.25, 0.25, (batch, 2))
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    theta = np.stack([cos * flip, -sin, shift[:, 0], sin * flip, cos, shift[:, 1]], 1).reshape(batch, 2, 3)
    grid = F.affine_grid(torch.tensor(theta, dtype=torch.float32), list(pictures.shape), align_corners=False)
    # Sampling (1 - x) pads with white.
    return 1 - F.grid_sample(1 - pictures, grid, align_corners=False)


def random_background(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Tint some pictures: multiplying by a colour (or a ramp of two) turns the white background into it."""
    batch, _, height, _ = pictures.shape
    first, second = (torch.tensor(rng.random((batch, 3, 1, 1)), dtype=torch.float32) for _ in range(2))
    ramp = torch.linspace(0, 1, height).view(1, 1, height, 1)
    second = torch.where(torch.tensor(rng.random((batch, 1, 1, 1)) < 0.5), first, second)
    tint = first + (second - first) * ramp
    chosen = torch.tensor(rng.random((batch, 1, 1, 1)) < 0.2)
    return torch.where(chosen, pictures * tint, pictures)


def training_batch(pictures: np.ndarray, batch: int, rng: np.random.Generator) -> Tensor:
    """Draw [B, 3, 64, 64] in [-1, 1] of uint8 [N, styles, 64, 64, 3]: half plain, half derived, most of them transformed."""
    index = rng.integers(0, len(pictures), batch)
    style = rng.integers(0, len(STYLES), batch)
    raw = torch.from_numpy(pictures[index, style]).permute(0, 3, 1, 2).float() / 255
    moved = torch.tensor(rng.random((batch, 1, 1, 1)) < 0.7)
    raw = random_background(torch.where(moved, random_affine(raw, rng), raw), rng)
    arrays = (raw.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    out = np.empty_like(arrays)
    for i, picture in enumerate(arrays):
        kind = KINDS[int(rng.integers(0, len(KINDS)))] if rng.random() < 0.45 else None
        out[i] = picture if kind is None else derive(np.ascontiguousarray(picture), kind, rng)
    return to_pixels(out)


def to_pixels(arrays: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] -> float [N, 3, H, W] in [-1, 1], channels last in memory."""
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


def loss_terms(vae: AutoencoderKLCogVideoX, pixels: Tensor) -> dict[str, Tensor]:
    """Reconstruct through a posterior sample; return the terms of `LOSS_WEIGHTS`."""
    with torch.autocast("cpu", torch.bfloat16):
        mean, logvar = vae.encoder(pixels.unsqueeze(2))[0].float().chunk(2, dim=1)
        logvar = logvar.clamp(-20.0, 10.0)
        latent = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
        image = vae.decoder(latent)[0].squeeze(2).float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return {**image_terms(image, pixels), "kl": kl}


def decoder_terms(vae: AutoencoderKLCogVideoX, pixels: Tensor, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Reconstruct from latents with noise on them; return the terms of `LOSS_WEIGHTS` that the decoder has."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        with torch.no_grad():
            latent = vae.encoder(pixels.unsqueeze(2))[0].float().chunk(2, dim=1)[0]
        image = vae.decoder(latent + latent_noise(latent, LATENT_NOISE / vae.config["scaling_factor"]))[0].squeeze(2).float()
    return image_terms(image, pixels)


def latent_noise(latent: Tensor, largest: float) -> Tensor:
    """Noise for [B, C, 1, h, w] like a diffusion model's error: per picture of another size, fine and coarse in another mix."""
    batch, channels, _, height, width = latent.shape
    fine = torch.randn_like(latent)
    coarse = torch.randn(batch, channels, height // 2, width // 2)
    coarse = F.interpolate(coarse, scale_factor=2.0, mode="bilinear").unsqueeze(2)
    coarse = coarse / coarse.std()
    share, size = torch.rand(2, batch, 1, 1, 1, 1)
    return largest * size * (share.sqrt() * fine + (1 - share).sqrt() * coarse)


def image_terms(image: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    """The terms of `LOSS_WEIGHTS` that compare pictures."""
    error = image - pixels
    return {
        "l1": error.abs().mean(),
        "mse": error.square().mean(),
        "gradient": error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean(),
    }


@torch.no_grad()
def psnr_by_kind(
    vae: AutoencoderKLCogVideoX, pictures: np.ndarray, avatars: np.ndarray, limit: int = 64, noise: float = 0.0
) -> dict[str, float]:
    """Mean PSNR in dB over held-out pictures: per style, per derived kind (of all styles), of avatars.

    Args:
        vae: The folded VAE.
        pictures: uint8 [N, styles, H, W, 3].
        avatars: As `pictures`; one of each is taken.
        limit: Of so many concepts, and so many avatars.
        noise: Standard deviation of white noise on the latents, in that of the latents.
    """
    rng = np.random.default_rng(0)
    sets = {style: pictures[:limit, s] for s, style in enumerate(STYLES)}
    mixed = pictures[np.arange(limit) % len(pictures), np.arange(limit) % len(STYLES)]
    sets |= {kind: np.stack([derive(p, kind, rng) for p in mixed]) for kind in KINDS}
    sets["avatar"] = avatars[np.arange(limit) * len(avatars) // limit, 0]
    out = {}
    for name, arrays in sets.items():
        pixels = to_pixels(arrays)
        latents = torch.cat([encode_images(vae, p) for p in pixels.split(16)])
        latents = latents + noise * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        decoded = torch.cat([decode_latents(vae, x) for x in latents.split(16)])
        mse = (decoded.clamp(-1, 1) - pixels).div(2).square().mean(dim=(1, 2, 3))
        out[name] = float((-10 * torch.log10(mse.clamp_min(1e-8))).mean())
    return out


@torch.no_grad()
def measure_scaling_factor(vae: AutoencoderKLCogVideoX, pictures: np.ndarray) -> float:
    """Return 1 / std of the latents of plain and derived training pictures."""
    rng = np.random.default_rng(0)
    latents = [encode_images(vae, training_batch(pictures, 32, rng)) for _ in range(16)]
    return 1.0 / float(torch.cat(latents).std())


def export(folded: AutoencoderKLCogVideoX, scaling_factor: float, folder: Path) -> AutoencoderKLCogVideoX:
    """Save the stock VAE in fp16."""
    stock = unfold(folded, scaling_factor)
    stock.half().save_pretrained(folder)
    log(f"saved {folder.name}, scaling factor {stock.config['scaling_factor']:.4f}")
    return stock.float()


class Run:
    """One training run: state, checkpoints, reports."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.state_path = args.out / "vae_state.pt"
        self.pictures = np.concatenate([load_pictures("train"), avatar_pictures("train")])
        self.held_out, self.avatars = load_pictures("held_out"), avatar_pictures("held_out")
        self.vae, self.average = (fold_single_frame(self._start()) for _ in range(2))
        self.vae.encoder.requires_grad_(not args.decoder_of)
        self.terms = decoder_terms if args.decoder_of else loss_terms
        for p in self.vae.parameters():
            if p.ndim == 4:
                p.data = p.data.contiguous(memory_format=torch.channels_last)
        self.ema = Ema(self.vae, args.ema)
        trained = [p for p in self.vae.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-3)
        self.step, self.spent = 0, 0.0
        if args.resume and self.state_path.exists():
            self._load()
        size = sum(p.numel() for p in self.vae.parameters())
        log(f"{size / 1e6:.2f} M folded parameters, {len(self.pictures)} concepts and avatars")

    def _start(self) -> AutoencoderKLCogVideoX:
        folder = self.args.decoder_of
        return AutoencoderKLCogVideoX.from_pretrained(folder, torch_dtype=torch.float32) if folder else make_vae()

    def _load(self) -> None:
        state = torch.load(self.state_path, weights_only=True)
        self.vae.load_state_dict(state["vae"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.spent = state["step"], state["spent"]

    def checkpoint(self) -> None:
        """Save all that `--resume` needs."""
        state = {
            "vae": self.vae.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "spent": self.spent,
        }
        save_atomic(state, self.state_path)

    def report(self, vae: AutoencoderKLCogVideoX, limit: int) -> None:
        """Log the PSNR of `vae` on up to `limit` held-out concepts."""
        for noise in (0.0, 0.1, 0.2) if self.args.decoder_of else (0.0,):
            psnr = rounded(psnr_by_kind(vae, self.held_out, self.avatars, limit, noise), 2)
            log(f"step {self.step} noise {noise} psnr {psnr}")
            append_csv(self.args.out / "vae_psnr.csv", {"step": self.step, "noise": noise, **psnr})


def train(run: Run) -> None:
    """Train for `--minutes` in all, then export the averaged weights to `--out`/vae."""
    args, start = run.args, time.monotonic() - run.spent
    total = args.minutes * 60
    rng = np.random.default_rng([args.seed, run.step])
    next_check = run.spent + args.check_minutes * 60
    running: dict[str, float] = {}
    while run.spent < total:
        for group in run.optimizer.param_groups:
            group["lr"] = args.lr * warmup_cosine(run.spent / total, 0.02, 0.005)
        terms = run.terms(run.vae, training_batch(run.pictures, args.batch, rng))
        loss = sum((LOSS_WEIGHTS[k] * v for k, v in terms.items()), torch.zeros(()))
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.vae.parameters(), 1.0)
        run.optimizer.step()
        run.ema.update(run.vae)
        run.step += 1
        run.spent = time.monotonic() - start
        running = {k: running.get(k, v.item()) * 0.98 + 0.02 * v.item() for k, v in terms.items()}
        if run.step % 50 == 0:
            row = {"step": run.step, "minutes": round(run.spent / 60, 2), **rounded(running, 5)}
            append_csv(args.out / "vae_loss.csv", row)
            if not math.isfinite(loss.item()):
                raise RuntimeError(f"the loss must be finite, got {loss.item()} at step {run.step}")
        if run.spent > next_check:
            next_check = run.spent + args.check_minutes * 60
            run.checkpoint()
            run.ema.copy_to(run.average)
            run.report(run.average, limit=64)
    run.ema.copy_to(run.average)
    # the latents' scale belongs to the encoder, and the base was trained with it
    scale = run.vae.config["scaling_factor"] if args.decoder_of else measure_scaling_factor(run.average, run.pictures)
    export(run.average, scale, args.out / "vae")
    run.report(run.average, limit=len(run.held_out))


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=BASE, help="receives vae/ and the training state")
    parser.add_argument("--decoder-of", type=Path, help="train only the decoder of this VAE, on noisy latents")
    parser.add_argument("--minutes", type=float, default=26.0)
    parser.add_argument("--check-minutes", type=float, default=4.0, help="between checkpoints")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args(argv)
    # PyTorch 2.13's CPU build corrupts memory in the backward pass of these bfloat16 convolutions where it may use AMX
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    seed_everything(args.seed)
    log_settings({"command": command_line(), "weights": LOSS_WEIGHTS, "channels": CHANNELS})
    train(Run(args))


if __name__ == "__main__":
    main()
