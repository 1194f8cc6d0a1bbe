"""Pools of latents that the nano base is trained on.

Every row is a concept or an icon, and has the same entries: per style a still picture and some motions in three stages, per
colour style its derived versions. There are copies of a pool: as drawn, mirrored, and recoloured, where only the first frame
can tell the colours.
"""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKLCogVideoX
from PIL import Image
from torch.nn import functional as F

from realgeneral.data.sources.packaged import RECOLOURINGS
from realgeneral.model.vae import encode_images
from realgeneral.nano.colours import colour_words
from realgeneral.nano.emoji import STYLE_WORDS, STYLES, load_emoji
from recipes.common import log
from recipes.derived import KINDS, derive

MOTIONS = (
    "zooming in",
    "zooming out",
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "turning left",
    "turning right",
    "flipping",
)


COLOUR_STYLES = ("flat", "3d", "noto")
STAGES = (1 / 3, 2 / 3, 1.0)
COPIES = ("plain", "mirrored", "recoloured")
PICTURES_AT_ONCE = 512  # encoded together


@dataclass(frozen=True)
class Entries:
    """Where the versions of a row are: its styles, those of them with colours, motions per style."""

    styles: tuple[str, ...]
    coloured: tuple[str, ...]
    motions: int

    @property
    def count(self) -> int:
        """Entries of a row."""
        return len(self.styles) * self._per_style + len(self.coloured) * len(KINDS)

    @property
    def _per_style(self) -> int:
        return 1 + self.motions * len(STAGES)

    def still(self, style: str) -> int:
        """Index of a still picture."""
        return self.styles.index(style) * self._per_style

    def motion(self, style: str, slot: int, stage: int) -> int:
        """Index of a stage of one of the motions of a style."""
        return self.still(style) + 1 + slot * len(STAGES) + stage

    def derived(self, style: str, kind: str) -> int:
        """Index of the derived version of a colour style."""
        return len(self.styles) * self._per_style + self.coloured.index(style) * len(KINDS) + KINDS.index(kind)


EMOJI = Entries(STYLES, COLOUR_STYLES, motions=2)
ICONS = Entries(("icon",), ("icon",), motions=1)


@dataclass(frozen=True)
class Thing:
    """A row before it is rendered: `words` describes each style, `concept` is the code point of the emoji that it shows."""

    name: str
    words: dict[str, str]
    concept: str
    encoded: dict[str, bytes]

    def pictures(self) -> dict[str, np.ndarray]:
        """Uint8 [64, 64, 3] by style."""
        return {style: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for style, data in self.encoded.items()}


def load_things(split: str, icons: Path | None) -> list[Thing]:
    """The concepts of a split, or the icons of a file that `recipes.icons` wrote."""
    if icons is None:
        return [Thing(c.name, STYLE_WORDS, c.codepoint, c.encoded) for c in load_emoji(split)]
    rows = pq.read_table(icons).to_pylist()
    return [Thing(row["name"], {"icon": row["word"]}, row["concept"], {"icon": row["picture"]}) for row in rows]


def motion_matrix(motion: str, strength: float, stage: float) -> np.ndarray:
    """Return the sampling matrix [2, 3] of a motion; `strength` in [0, 1] scales it, `stage` is its progress."""
    theta = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    shift = (0.3 + 0.3 * strength) * stage
    if motion.startswith("zooming"):
        zoom = 1.3 + 0.5 * strength if motion.endswith("in") else 0.72 - 0.22 * strength
        theta[:, :2] /= 1 + (zoom - 1) * stage
    elif motion.startswith("moving"):
        # The sampling point moves against the picture.
        axis, sign = {"left": (0, 1), "right": (0, -1), "up": (1, 1), "down": (1, -1)}[motion.split()[1]]
        theta[axis, 2] = sign * shift
    elif motion.startswith("turning"):
        angle = (0.4 + 1.0 * strength) * stage * (1 if motion.endswith("right") else -1)
        theta[:, :2] = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    else:
        # Turning over like a card: thirds are never edge-on.
        theta[0, 0] = 1 / np.cos(np.pi * stage)
    return theta


def alter(stills: dict[str, np.ndarray], copy: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The pictures of a row as a copy has them, all styles alike; white, grey and black keep their colour."""
    if copy == "mirrored" or (copy == "recoloured" and rng.random() < 0.5):
        stills = {style: picture[:, ::-1] for style, picture in stills.items()}
    if copy == "recoloured":
        channels = RECOLOURINGS[rng.integers(len(RECOLOURINGS))]
        stills = {style: picture[..., channels] for style, picture in stills.items()}
    return {style: np.ascontiguousarray(picture) for style, picture in stills.items()}


def render_entries(stills: dict[str, np.ndarray], entries: Entries, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the entries of a row, uint8 [entries, 64, 64, 3], and its motions [styles, slots]."""
    out = np.empty((entries.count, *stills[entries.styles[0]].shape), np.uint8)
    motions = np.stack([rng.permutation(len(MOTIONS))[: entries.motions] for _ in entries.styles])
    thetas, sources, targets = [], [], []
    for s, style in enumerate(entries.styles):
        out[entries.still(style)] = stills[style]
        for slot in range(entries.motions):
            strength = rng.random()
            for stage, progress in enumerate(STAGES):
                thetas.append(motion_matrix(MOTIONS[motions[s, slot]], strength, progress))
                sources.append(stills[style])
                targets.append(entries.motion(style, slot, stage))
    pictures = torch.from_numpy(np.stack(sources)).permute(0, 3, 1, 2).float() / 255
    grid = F.affine_grid(torch.tensor(np.stack(thetas)).float(), list(pictures.shape), align_corners=False)
    moved = 1 - F.grid_sample(1 - pictures, grid, align_corners=False)
    out[targets] = (moved.clamp(0, 1) * 255).round().permute(0, 2, 3, 1).to(torch.uint8).numpy()
    for style in entries.coloured:
        for kind in KINDS:
            out[entries.derived(style, kind)] = derive(stills[style], kind, rng)
    return out, motions


@dataclass(frozen=True)
class Row:
    """A rendered row: pictures uint8 [entries, 64, 64, 3], motions [styles, slots], and by style the colours in words."""

    pictures: np.ndarray
    motions: list[list[int]]
    colours: dict[str, str]


def render_row(numbered: tuple[int, Thing], entries: Entries, copy: str, seed: int) -> Row:
    """Render row number i of a copy; what is random follows from seed, copy and i alone."""
    i, thing = numbered
    rng = np.random.default_rng([seed, COPIES.index(copy), i])
    stills = alter(thing.pictures(), copy, rng)
    pictures, motions = render_entries(stills, entries, rng)
    colours = {style: " ".join(colour_words(Image.fromarray(stills[style]))) for style in entries.coloured}
    return Row(pictures, motions.tolist(), colours)


def renderers(workers: int) -> ProcessPoolExecutor:
    """Processes for `build_pool`; not forked, since this one has threads and perhaps a GPU."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,))


def render_rows(
    things: Sequence[Thing], entries: Entries, copy: str, seed: int, processes: ProcessPoolExecutor | None = None
) -> Iterator[Row]:
    """All rows in order, rendered by processes if there are some."""
    render = partial(render_row, entries=entries, copy=copy, seed=seed)
    if processes is None:
        return map(render, enumerate(things))
    return processes.map(render, enumerate(things), chunksize=8)


@torch.no_grad()
def build_pool(
    vae: AutoencoderKLCogVideoX,
    path: Path,
    things: Sequence[Thing],
    entries: Entries,
    copy: str,
    seed: int,
    processes: ProcessPoolExecutor | None = None,
) -> None:
    """Encode a copy with the folded VAE: `path`, fp16 [N, entries, C, 16, 16], and beside it a .json of what the rows are."""
    tmp = path.with_suffix(".tmp.npy")
    pool: np.memmap | None = None
    rows = render_rows(things, entries, copy, seed, processes)
    at_once = max(1, PICTURES_AT_ONCE // entries.count)
    meta: dict[str, list[Any]] = {
        "names": [thing.name for thing in things],
        "words": [thing.words for thing in things],
        "concepts": [thing.concept for thing in things],
        "motions": [],
        "colours": [],
    }
    for start in range(0, len(things), at_once):
        some = list(itertools.islice(rows, at_once))
        latents = _encode(vae, np.concatenate([row.pictures for row in some])).reshape(len(some), entries.count, -1, 16, 16)
        if pool is None:
            pool = np.lib.format.open_memmap(tmp, "w+", np.float16, (len(things), *latents.shape[1:]))
        pool[start : start + len(some)] = latents
        meta["motions"] += [row.motions for row in some]
        meta["colours"] += [row.colours for row in some]
    assert pool is not None
    pool.flush()
    tmp.rename(path)
    path.with_suffix(".json").write_text(json.dumps(meta), encoding="utf-8")
    log(f"pool {path.stem}: {len(things)} rows of {entries.count} pictures")


def _encode(vae: AutoencoderKLCogVideoX, pictures: np.ndarray) -> np.ndarray:
    """Latents of uint8 [N, 64, 64, 3]."""
    pixels = torch.from_numpy(pictures).to(vae.device).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.autocast(vae.device.type, torch.bfloat16):
        latents: np.ndarray = encode_images(vae, pixels).float().cpu().numpy()
    return latents


@dataclass
class Pool:
    """A copy of a pool, mapped: latents [N, entries, C, 16, 16] and what the rows are."""

    latents: np.ndarray
    motions: np.ndarray
    names: list[str]
    words: list[dict[str, str]]
    concepts: list[str]
    colours: list[dict[str, str]]

    @classmethod
    def open(cls, path: Path) -> Pool:
        """Map what `build_pool` wrote."""
        meta = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        motions = np.asarray(meta["motions"])
        latents = np.load(path, mmap_mode="r")
        return cls(latents, motions, meta["names"], meta["words"], meta["concepts"], meta["colours"])
