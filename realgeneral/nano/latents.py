"""A pool of latents, and the clips drawn from it, that the nano base is trained on.

Every concept has the same entries: per style a still picture and two motions in three stages, per colour style its
derived versions. A clip is a list of entries of one concept plus an honest caption. For training there are three copies of the
pool: as drawn, mirrored, and recoloured, where only the first frame can tell the colours.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor
from torch.nn import functional as F

from realgeneral.nano.common import log
from realgeneral.nano.derived import KINDS, derive
from realgeneral.nano.emoji import STYLE_WORDS, STYLES, Concept, load_emoji
from realgeneral.vae import encode_images

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
KIND_WORDS = {
    "canny": "edge drawing",
    "edges": "line sketch",
    "grey": "grey picture",
    "blur": "blurred picture",
    "mask": "masked picture",
}
COLOUR_STYLES = ("flat", "3d", "noto")
RECOLOURINGS = ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
STAGES = (1 / 3, 2 / 3, 1.0)
MOTIONS_PER_STYLE = 2
PER_STYLE = 1 + MOTIONS_PER_STYLE * len(STAGES)
ENTRIES = len(STYLES) * PER_STYLE + len(COLOUR_STYLES) * len(KINDS)
# Directions of style change and their shares; same-vendor pairs are pixel-aligned.
STYLE_PAIRS = {
    ("flat", "3d"): 0.22,
    ("3d", "flat"): 0.18,
    ("flat", "noto"): 0.12,
    ("high_contrast", "3d"): 0.14,
    ("high_contrast", "flat"): 0.08,
    ("3d", "noto"): 0.08,
    ("noto", "3d"): 0.06,
    ("high_contrast", "noto"): 0.06,
    ("flat", "high_contrast"): 0.06,
}
SHARES = {"style": 0.40, "derived": 0.45, "motion": 0.15}
# Of the derived pictures: edges give the least, and need the most practice.
KIND_SHARES = {"canny": 0.32, "edges": 0.17, "grey": 0.17, "blur": 0.17, "mask": 0.17}
# Share of captions that describe the last frame alone, as a prompt of the conditional tasks does.
LAST_FRAME_CAPTIONS = 0.6
# Copies of the pool and their shares. Without them the base learns a concept's colours by its name and trusts the given frame
# less than its memory.
COPIES = {"plain": 0.4, "mirrored": 0.3, "recoloured": 0.3}
# First frames without colours: what follows them is not recoloured.
COLOURLESS = ("canny", "edges", "grey", "high_contrast")


def still_entry(style: str) -> int:
    """Index of a still picture."""
    return STYLES.index(style) * PER_STYLE


def motion_entry(style: str, slot: int, stage: int) -> int:
    """Index of a stage of one of the motions of a style."""
    return still_entry(style) + 1 + slot * len(STAGES) + stage


def derived_entry(style: str, kind: str) -> int:
    """Index of the derived version of a colour style."""
    return len(STYLES) * PER_STYLE + COLOUR_STYLES.index(style) * len(KINDS) + KINDS.index(kind)


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


def render_entries(concept: Concept, rng: np.random.Generator, copy: str = "plain") -> tuple[np.ndarray, np.ndarray]:
    """Return the entries of a concept, uint8 [ENTRIES, 64, 64, 3], and its motions [styles, slots]."""
    stills = {style: np.asarray(concept.image(style)) for style in STYLES}
    if copy == "mirrored" or (copy == "recoloured" and rng.random() < 0.5):
        stills = {style: picture[:, ::-1] for style, picture in stills.items()}
    if copy == "recoloured":
        # another order of red, green and blue, the same in all styles: white, grey and black stay
        channels = RECOLOURINGS[rng.integers(len(RECOLOURINGS))]
        stills = {style: picture[..., channels] for style, picture in stills.items()}
    stills = {style: np.ascontiguousarray(picture) for style, picture in stills.items()}
    out = np.empty((ENTRIES, *stills["flat"].shape), np.uint8)
    motions = np.stack([rng.permutation(len(MOTIONS))[:MOTIONS_PER_STYLE] for _ in STYLES])
    thetas, sources, targets = [], [], []
    for s, style in enumerate(STYLES):
        out[still_entry(style)] = stills[style]
        for slot in range(MOTIONS_PER_STYLE):
            strength = rng.random()
            for stage, progress in enumerate(STAGES):
                thetas.append(motion_matrix(MOTIONS[motions[s, slot]], strength, progress))
                sources.append(stills[style])
                targets.append(motion_entry(style, slot, stage))
    pictures = torch.from_numpy(np.stack(sources)).permute(0, 3, 1, 2).float() / 255
    grid = F.affine_grid(torch.tensor(np.stack(thetas)).float(), list(pictures.shape), align_corners=False)
    moved = 1 - F.grid_sample(1 - pictures, grid, align_corners=False)
    out[targets] = (moved.clamp(0, 1) * 255).round().permute(0, 2, 3, 1).to(torch.uint8).numpy()
    for style in COLOUR_STYLES:
        for kind in KINDS:
            out[derived_entry(style, kind)] = derive(stills[style], kind, rng)
    return out, motions


def pool_path(folder: Path, split: str, copy: str) -> Path:
    """Latents of a copy of a split; names and motions are beside it, as .json."""
    return folder / (f"{split}.npy" if copy == "plain" else f"{split}_{copy}.npy")


@torch.no_grad()
def build_pool(vae: AutoencoderKLCogVideoX, path: Path, split: str, copy: str, seed: int) -> None:
    """Encode a copy of a split with the folded VAE: fp16 [N, ENTRIES, C, 16, 16]."""
    concepts = load_emoji(split)
    rng = np.random.default_rng(seed + list(COPIES).index(copy))
    tmp = path.with_suffix(".tmp.npy")
    pool: np.memmap | None = None
    motions = []
    for i, concept in enumerate(concepts):
        pictures, concept_motions = render_entries(concept, rng, copy)
        motions.append(concept_motions.tolist())
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            latents = encode_images(vae, pixels).float().numpy()
        if pool is None:
            shape = (len(concepts), *latents.shape)
            pool = np.lib.format.open_memmap(tmp, "w+", np.float16, shape)
        pool[i] = latents
        if i % 200 == 199:
            log(f"pool {path.stem}: {i + 1}/{len(concepts)}")
    assert pool is not None
    pool.flush()
    tmp.rename(path)
    names = [c.name for c in concepts]
    path.with_suffix(".json").write_text(json.dumps({"names": names, "motions": motions}), encoding="utf-8")


@dataclass
class Pool:
    """A copy of the pool: latents, and the motions of every concept, [N, styles, slots]."""

    latents: np.ndarray
    motions: np.ndarray


@dataclass
class ClipSource:
    """Draws clips from copies of a pool."""

    pools: dict[str, Pool]
    names: list[str]

    @classmethod
    def open(cls, folder: Path, split: str, copies: Sequence[str] = ("plain",)) -> ClipSource:
        """Map the files that `build_pool` wrote."""
        pools, names = {}, []
        for copy in copies:
            path = pool_path(folder, split, copy)
            meta = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            pools[copy], names = Pool(np.load(path, mmap_mode="r"), np.asarray(meta["motions"])), meta["names"]
        return cls(pools, names)

    def batch(self, size: int, frames: int, rng: np.random.Generator) -> tuple[Tensor, list[str]]:
        """Draw clips: latents float32 [B, frames, C, h, w] and captions."""
        shares = np.array([COPIES[copy] for copy in self.pools])
        latents, captions = [], []
        for concept in rng.integers(0, len(self.names), size):
            copy = str(rng.choice(list(self.pools), p=shares / shares.sum()))
            first, entries, description, last = self._clip(int(concept), copy, frames, rng)
            if copy == "recoloured" and first in COLOURLESS:
                copy = "mirrored"
            description = last if rng.random() < LAST_FRAME_CAPTIONS else description
            latents.append(self.pools[copy].latents[concept][entries])
            captions.append(f"{self.names[concept]}, {description}")
        return torch.from_numpy(np.stack(latents)).float(), captions

    def _clip(self, concept: int, copy: str, frames: int, rng: np.random.Generator) -> tuple[str, list[int], str, str]:
        """What the clip starts with, entries of the frames, what the clip shows, what its last frame shows."""
        kind = rng.choice(list(SHARES), p=list(SHARES.values()))
        if kind == "style":
            index = rng.choice(len(STYLE_PAIRS), p=list(STYLE_PAIRS.values()))
            first, last = list(STYLE_PAIRS)[index]
            ends = (still_entry(first), STYLE_WORDS[first]), (still_entry(last), STYLE_WORDS[last])
            return first, *_change(*ends, frames)
        if kind == "derived":
            style = str(rng.choice(COLOUR_STYLES))
            version = str(rng.choice(list(KIND_SHARES), p=list(KIND_SHARES.values())))
            ends = (derived_entry(style, version), KIND_WORDS[version]), (still_entry(style), STYLE_WORDS[style])
            # Most clips restore the picture: that is the direction of the conditional tasks.
            return version, *(_change(*ends, frames) if rng.random() < 0.75 else _change(ends[1], ends[0], frames))
        style = STYLES[rng.integers(len(STYLES))]
        if rng.random() < 0.4:
            return "motion", [still_entry(style)] * frames, STYLE_WORDS[style], STYLE_WORDS[style]
        slot = int(rng.integers(MOTIONS_PER_STYLE))
        stages = [still_entry(style), *(motion_entry(style, slot, k) for k in range(len(STAGES)))]
        if frames == 2:
            stages = [stages[0], stages[int(rng.integers(2, 4))]]
        motion = MOTIONS[self.pools[copy].motions[concept, STYLES.index(style), slot]]
        described = f"{STYLE_WORDS[style]}, {motion}"
        return "motion", stages, described, described


def _change(first: tuple[int, str], last: tuple[int, str], frames: int) -> tuple[list[int], str, str]:
    half = frames // 2
    return [first[0]] * half + [last[0]] * (frames - half), f"from {first[1]} to {last[1]}", last[1]
