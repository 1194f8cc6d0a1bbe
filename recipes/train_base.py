"""Recipe: train the nano base, a small CogVideoX text-to-video model, on clips of emoji.

    python -m recipes.train_base --icons FILE --out DIR --minutes 8 --batch 384 --workers 12      on a GPU
    python -m recipes.train_base --icons FILE --out DIR --minutes 300 --compile                   on two cores

Encodes pools of latents once (about 1.4 GB in `--out`), then trains transformer and text encoder from it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import T5EncoderModel, T5Tokenizer

from realgeneral.model.vae import fold_single_frame
from realgeneral.nano.assets import BASE
from recipes.base import LATENT_SIZE, SCHEDULE, make_pipeline, make_transformer, rotary, sample_grid, save_pipeline, tokenize
from recipes.clips import ClipSource
from recipes.common import Ema, append_csv, command_line, log, log_settings, save_atomic, seed_everything, warmup_cosine
from recipes.latents import COPIES, EMOJI, ICONS, Pool, build_pool, load_things, renderers

# The second half names concepts that training never saw.
PROMPTS = [
    "red heart, 3d render",
    "fox, from flat icon to 3d render",
    "pizza, from edge drawing to cartoon",
    "red apple, 3d render, zooming out",
    "automobile, from flat icon to cartoon",
    "cat face, from black line icon to 3d render",
    "guitar, 3d render",
    "birthday cake, from blurred picture to flat icon",
    "rocket, from flat icon to 3d render",
    "carrot, 3d render",
    "tiger face, from black line icon to flat icon",
    "crab, from edge drawing to 3d render",
    "snowman, cartoon",
    "key, flat icon, turning left",
    "mushroom, from grey picture to 3d render",
    "backpack, from masked picture to flat icon",
]


FRAME_CHOICES = ((2, 0.85), (4, 0.15))
# Share of clips whose first frame is given, clean: next-frame prediction, as image-to-video training does it.
NEXT_FRAME = 0.85
# Share of these in which text and first frame do not see each other, as the method's mask will have it: an adapter need not
# begin by getting used to that.
BLIND = 0.5
LOG_EVERY = 25  # steps; the only ones that wait for a GPU


class Model(nn.Module):
    """Transformer and text encoder, trained together."""

    def __init__(self, transformer: CogVideoXTransformer3DModel, text_encoder: T5EncoderModel, device: torch.device) -> None:
        super().__init__()
        self.transformer = transformer.to(device)
        self.text_encoder = text_encoder.to(device)
        self.rotary = {frames: tuple(table.to(device) for table in rotary(frames)) for frames, _ in FRAME_CHOICES}

    def forward(self, latents: Tensor, token_ids: Tensor, timestep: Tensor, blind: Tensor) -> Tensor:
        """Predict v [B, F, C, h, w] for noisy latents [B, F, C, h, w] and token ids [B, T]; `blind` [B] as in `Batch`."""
        text = self.text_encoder(token_ids)[0]
        frames = latents.shape[1]
        out: Tensor = self.transformer(
            latents, text, timestep, image_rotary_emb=self.rotary[frames], return_dict=False,
            attention_kwargs={"attention_mask": attention_mask(blind, token_ids.shape[1], frames)},
        )[0]  # fmt: skip
        return out


def attention_mask(blind: Tensor, text: int, frames: int) -> Tensor:
    """Who sees whom, [B, S, S] bool: all tokens see all, but text and first frame of a blind clip do not see each other."""
    frame = (LATENT_SIZE // 2) ** 2
    kind = torch.full((text + frames * frame,), 2, device=blind.device)
    kind[:text], kind[text : text + frame] = 0, 1
    apart = kind[:, None] + kind[None] == 1
    return ~(apart & blind[:, None, None])


@dataclass
class Diffusion:
    """v-prediction on CogVideoX's schedule: x_t = a x + s e, v = a e - s x, with a^2 = abar_t, s^2 = 1 - abar_t."""

    alphas_cumprod: Tensor = field(default_factory=lambda: CogVideoXDDIMScheduler(**SCHEDULE).alphas_cumprod.float())

    def noised(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Return x_t and the target v."""
        abar = self.alphas_cumprod.to(timestep.device)[timestep].view(-1, 1, 1, 1, 1)
        a, s = abar.sqrt(), (1 - abar).sqrt()
        return a * latents + s * noise, a * noise - s * latents


def make_optimizers(model: Model, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for everything else; the token table learns slowly.

    Muon reaches the same loss in fewer steps, and on a CPU steps are what is scarce.
    """
    table = model.text_encoder.shared.weight
    hidden: list[nn.Parameter] = []
    other: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p is table:
            continue
        is_hidden = p.ndim == 2 and any(k in name for k in (".attn1.", ".ff.", ".layer."))
        is_hidden &= "relative_attention_bias" not in name
        (hidden if is_hidden and args.optimizer == "muon" else other).append(p)
    groups = [{"params": other, "lr": args.lr}, {"params": [table], "lr": 0.05 * args.lr}]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)]
    if hidden:
        optimizers.append(torch.optim.Muon(hidden, lr=args.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


@dataclass
class Batch:
    """Clips: places of their frames [B, F] (see `ClipSource`), time steps [B], token ids [B, T].

    `given` [B]: the first frame is clean. `blind` [B]: it is, and text and first frame do not see each other.
    """

    places: Tensor
    timestep: Tensor
    token_ids: Tensor
    given: Tensor
    blind: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; DataLoader asks for it."""
        return Batch(*(getattr(self, f.name).pin_memory() for f in fields(self)))


def draw_batch(
    source: ClipSource, tokenizer: T5Tokenizer, size: int, frames: int, next_frame: float, rng: np.random.Generator
) -> Batch:
    """Draw a batch, `next_frame` of it with the first frame given; one caption in ten is empty."""
    places, captions = source.draw(size, frames, rng)
    captions = ["" if rng.random() < 0.1 else c for c in captions]
    # Stratified, still uniform: each batch covers the whole schedule.
    strata = (np.arange(size) + rng.random(size)) / size
    timestep = torch.from_numpy(rng.permutation(strata) * 1000).long().clamp_(0, 999)
    given = torch.from_numpy(rng.random(size) < next_frame)
    blind = given & torch.from_numpy(rng.random(size) < BLIND)
    return Batch(places, timestep, tokenize(tokenizer, captions), given, blind)


class TrainingBatches(IterableDataset[Batch]):
    """Endless batches; those of a worker follow from seed, first step and worker alone."""

    def __init__(self, source: ClipSource, tokenizer: T5Tokenizer, size: int, seed: int, first_step: int) -> None:
        self.source, self.tokenizer, self.size, self.seed, self.first_step = source, tokenizer, size, seed, first_step

    def __iter__(self) -> Iterator[Batch]:
        info = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([self.seed, self.first_step, info.id if info else 0])
        while True:
            frames = int(rng.choice([f for f, _ in FRAME_CHOICES], p=[p for _, p in FRAME_CHOICES]))
            # Fewer long clips, so that a step costs about the same.
            yield draw_batch(self.source, self.tokenizer, self.size * 2 // frames, frames, NEXT_FRAME, rng)


def clip_loss(model: Model, diffusion: Diffusion, source: ClipSource, batch: Batch, generator: torch.Generator) -> Tensor:
    """Mean squared error on v over the frames that are not given; the generator's device is the one to compute on."""
    device = generator.device
    batch = batch.to(device)
    latents = source.latents(batch.places).to(device)
    noise = torch.randn(latents.shape, generator=generator, device=device)
    noisy, target = diffusion.noised(latents, noise, batch.timestep)
    is_given = torch.zeros(noisy.shape[:2], dtype=torch.bool, device=device)
    is_given[:, 0] = batch.given
    noisy = torch.where(is_given[..., None, None, None], latents, noisy)
    with torch.autocast(device.type, torch.bfloat16):
        predicted = model(noisy, batch.token_ids, batch.timestep, batch.blind)
    errors = (predicted.float() - target).square().mean((2, 3, 4)) * ~is_given
    return errors.sum() / (~is_given).sum()


@torch.no_grad()
def validation_loss(
    model: Model, diffusion: Diffusion, source: ClipSource, tokenizer: T5Tokenizer, next_frame: float, device: torch.device
) -> float:
    """Loss on fixed clips, noise and time steps; `next_frame` is 0 (none) or 1 (every first frame is given)."""
    rng, generator = np.random.default_rng(123), torch.Generator(device).manual_seed(123)
    batches = [draw_batch(source, tokenizer, 64, 2, next_frame, rng) for _ in range(3)]
    losses = [clip_loss(model, diffusion, source, batch, generator) for batch in batches]
    return float(torch.stack(losses).mean())


class Run:
    """One training run: state, checkpoints, previews."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        self.state_path = args.out / "base_state.pt"
        self.vae = AutoencoderKLCogVideoX.from_pretrained(args.vae, torch_dtype=torch.float32).eval()
        self.folded = fold_single_frame(AutoencoderKLCogVideoX.from_pretrained(args.vae, torch_dtype=torch.float32))
        self.folded.eval().to(self.device)
        with renderers(args.workers) if args.workers else contextlib.nullcontext() as processes:
            train, held_out = self._pools("train", COPIES, processes), self._pools("held_out", ("plain",), processes)
            icons = self._pools("icons", ("plain", "recoloured"), processes) if args.icons else None
        self.source = ClipSource(train, icons, self.device)
        self.validation = {"train": ClipSource({"plain": train["plain"]}), "held_out": ClipSource(held_out)}
        self.tokenizer = T5Tokenizer.from_pretrained(args.text / "tokenizer")
        self.model, self.average = self._make_model(), self._make_model().eval()
        if args.compile:
            # block by block: they are alike, so that one is compiled
            for block in [*self.model.transformer.transformer_blocks, *self.model.text_encoder.encoder.block]:
                block.compile(dynamic=False)
        self.ema = Ema(self.model, args.ema)
        self.optimizers = make_optimizers(self.model, args)
        self.diffusion = Diffusion()
        self.step, self.spent = 0, 0.0
        if args.resume and self.state_path.exists():
            self._load()

    def _pools(self, name: str, copies: Sequence[str], processes: ProcessPoolExecutor | None) -> dict[str, Pool]:
        """Copies of a pool, encoded if they are not there yet."""
        icons, entries = (self.args.icons, ICONS) if name == "icons" else (None, EMOJI)
        paths = {copy: self.args.out / (f"{name}.npy" if copy == "plain" else f"{name}_{copy}.npy") for copy in copies}
        for copy, path in paths.items():
            if not path.with_suffix(".json").exists():
                build_pool(self.folded, path, load_things(name, icons), entries, copy, self.args.seed, processes)
        return {copy: Pool.open(path) for copy, path in paths.items()}

    def _make_model(self) -> Model:
        text_encoder = T5EncoderModel.from_pretrained(self.args.text / "text_encoder", dtype=torch.float32)
        start = self.args.transformer
        transformer = (
            CogVideoXTransformer3DModel.from_pretrained(start, torch_dtype=torch.float32)
            if start
            else make_transformer(self.args.layers)
        )
        return Model(transformer, text_encoder, self.device)

    def _load(self) -> None:
        state = torch.load(self.state_path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.spent = state["step"], state["spent"]
        log(f"resumed at step {self.step}, {self.spent / 60:.1f} minutes")

    def checkpoint(self) -> None:
        """Save all that `--resume` needs."""
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "spent": self.spent,
        }
        save_atomic(state, self.state_path)

    def log_losses(self, recent: Sequence[Tensor]) -> None:
        """Write the mean of the latest losses; RuntimeError if one is not finite."""
        mean = torch.stack(list(recent)).mean().item()
        if not math.isfinite(mean):
            raise RuntimeError(f"the loss must be finite, got {mean} in the {len(recent)} steps up to step {self.step}")
        row = {"step": self.step, "minutes": round(self.spent / 60, 2), "loss": round(mean, 5)}
        append_csv(self.args.out / "base_loss.csv", row)

    def report(self, preview: bool) -> None:
        """Log validation losses of the average; export it and sample pictures if `preview`."""
        self.ema.copy_to(self.average)
        row: dict[str, Any] = {"step": self.step, "minutes": round(self.spent / 60, 2)}
        for name, source in self.validation.items():
            for mode, next_frame in (("clip", 0.0), ("next_frame", 1.0)):
                value = validation_loss(self.average, self.diffusion, source, self.tokenizer, next_frame, self.device)
                row[f"{name}_{mode}"] = round(value, 5)
        log(f"losses of the average: {row}")
        append_csv(self.args.out / "base_eval.csv", row)
        if preview:
            self.export(self.args.out / "base_preview")

    def export(self, folder: Path) -> None:
        """Save the averaged model as a CogVideoX folder, and a picture of samples beside it."""
        self.ema.copy_to(self.average)
        transformer, text_encoder = self.average.transformer, self.average.text_encoder
        save_pipeline(make_pipeline(self.vae, self.tokenizer, text_encoder, transformer), folder)
        pipeline = make_pipeline(self.folded, self.tokenizer, text_encoder, transformer)
        picture = sample_grid(pipeline, self.folded, PROMPTS)
        Image.fromarray(picture).save(self.args.out / f"samples_{self.step:06d}.png")
        log(f"exported {folder.name}")


def train(run: Run) -> None:
    """Train for `--minutes` in all, then export to `--out`/base."""
    args, start = run.args, time.monotonic() - run.spent
    total = args.minutes * 60
    dataset = TrainingBatches(run.source, run.tokenizer, args.batch, args.seed, run.step)
    batches = iter(DataLoader(dataset, None, num_workers=args.workers, pin_memory=run.device.type == "cuda"))
    generator = torch.Generator(run.device).manual_seed(args.seed + run.step)
    next_report, next_preview = run.spent + 60 * args.report_minutes, run.spent + 300.0
    recent: list[Tensor] = []
    while run.spent < total and run.step < args.steps:
        scale = warmup_cosine(run.spent / total, 0.02)
        for group in itertools.chain.from_iterable(o.param_groups for o in run.optimizers):
            group["lr"] = group["peak"] * scale
        recent.append(training_step(run, next(batches), generator))
        run.step += 1
        run.spent = time.monotonic() - start
        if run.step % LOG_EVERY == 0:
            run.log_losses(recent)
            recent.clear()
        if run.spent > next_report:
            next_report = run.spent + 60 * args.report_minutes
            preview = run.spent > next_preview
            if preview:
                next_preview = run.spent + 60 * args.preview_minutes
            run.report(preview)
            run.checkpoint()
    run.checkpoint()
    run.report(preview=False)
    run.export(args.out / "base")


def training_step(run: Run, batch: Batch, generator: torch.Generator) -> Tensor:
    """One update; returns the loss, which nothing has waited for."""
    loss = clip_loss(run.model, run.diffusion, run.source, batch, generator)
    for optimizer in run.optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optimizer in run.optimizers:
        optimizer.step()
    run.ema.update(run.model)
    return loss.detach()


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--vae", type=Path, default=BASE / "vae")
    parser.add_argument("--text", type=Path, default=BASE, help="holds text_encoder/ and tokenizer/")
    parser.add_argument("--transformer", type=Path, help="go on with this one instead of a fresh one")
    parser.add_argument("--icons", type=Path, help="icons.parquet of recipes.icons: half of the clips are of these")
    parser.add_argument("--out", type=Path, required=True, help="receives the pools, checkpoints and base/")
    parser.add_argument("--minutes", type=float, default=55.0, help="training time in all, resumed runs included")
    parser.add_argument("--steps", type=int, default=10**9, help="stop earlier, after this many steps")
    parser.add_argument("--report-minutes", type=float, default=2.5)
    parser.add_argument("--preview-minutes", type=float, default=10.0)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32, help="two-frame clips per step")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--lr", type=float, default=1e-3, help="AdamW's peak")
    parser.add_argument("--muon-lr", type=float, default=3e-3, help="Muon's peak, scaled to AdamW's update size")
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that render pools and draw clips (0: this one)")
    parser.add_argument("--compile", action="store_true", help="torch.compile, where it is faster")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--export-only", action="store_true", help="with --resume: export the last checkpoint")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    seed_everything(args.seed)
    log_settings(vars(args) | {"command": command_line()})
    run = Run(args)
    if args.export_only:
        run.export(args.out / "base")
    else:
        train(run)


if __name__ == "__main__":
    main()
