"""Clips for the nano base: entries of one row of a pool, in order, with an honest caption."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from realgeneral.nano.latents import COLOUR_STYLES, EMOJI, ICONS, MOTIONS, STAGES, Entries, Pool

KIND_WORDS = {
    "canny": "edge drawing",
    "edges": "line sketch",
    "grey": "grey picture",
    "blur": "blurred picture",
    "mask": "masked picture",
}
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
# Shares of the copies. Without them the base learns a concept's colours by its name and trusts the given frame less than its
# memory.
COPY_SHARES = {"plain": 0.4, "mirrored": 0.3, "recoloured": 0.3}
# Kinds of clips with a colourless end: these are not recoloured.
COLOURLESS = ("canny", "edges", "grey", "high_contrast")
# Share of clips of icons, where there are any.
ICON_SHARE = 0.5


@dataclass(frozen=True)
class Clip:
    """Entries of a row; first style, derived version or "motion"; what the clip shows; what its last frame shows."""

    entries: list[int]
    kind: str
    description: str
    last: str


def change(first: tuple[int, str], last: tuple[int, str], frames: int, kind: str) -> Clip:
    """Half of the frames of each; the ends are (entry, words)."""
    half = frames // 2
    return Clip([first[0]] * half + [last[0]] * (frames - half), kind, f"from {first[1]} to {last[1]}", last[1])


def derived_clip(entries: Entries, style: str, words: Mapping[str, str], frames: int, rng: np.random.Generator) -> Clip:
    """A picture restored from its derived version, or in one of four clips the other way round."""
    kind = str(rng.choice(list(KIND_SHARES), p=list(KIND_SHARES.values())))
    ends = (entries.derived(style, kind), KIND_WORDS[kind]), (entries.still(style), words[style])
    return change(*(ends if rng.random() < 0.75 else ends[::-1]), frames, kind)


def motion_clip(
    entries: Entries, style: str, words: Mapping[str, str], motions: np.ndarray, frames: int, rng: np.random.Generator
) -> Clip:
    """A picture that moves, or stands still in two of five clips; `motions` [styles, slots] are the row's."""
    still = entries.still(style)
    if rng.random() < 0.4:
        return Clip([still] * frames, "motion", words[style], words[style])
    slot = int(rng.integers(entries.motions))
    stages = [still, *(entries.motion(style, slot, k) for k in range(len(STAGES)))]
    if frames == 2:
        stages = [still, stages[int(rng.integers(2, 4))]]
    described = f"{words[style]}, {MOTIONS[motions[entries.styles.index(style), slot]]}"
    return Clip(stages, "motion", described, described)


class ClipSource:
    """Draws clips from copies of the emoji's pool and, if given, of the icons'.

    Args:
        emoji: Copies by name.
        icons: Copies by name; icons of emoji also change into the drawings of their concept.
    """

    def __init__(self, emoji: dict[str, Pool], icons: dict[str, Pool] | None = None) -> None:
        self.emoji, self.icons = emoji, icons or {}
        rows = {codepoint: row for row, codepoint in enumerate(emoji["plain"].concepts)}
        self.links = [(i, rows[c]) for i, c in enumerate(self.icons["plain"].concepts) if c] if icons else []

    def batch(self, size: int, frames: int, rng: np.random.Generator) -> tuple[Tensor, list[str]]:
        """Draw clips: latents float32 [B, frames, C, h, w] and captions."""
        drawn = [self._draw(frames, rng) for _ in range(size)]
        captions = []
        for _, name, clip in drawn:
            captions.append(f"{name}, {clip.last if rng.random() < LAST_FRAME_CAPTIONS else clip.description}")
        return torch.from_numpy(np.stack([latents for latents, _, _ in drawn])).float(), captions

    def _draw(self, frames: int, rng: np.random.Generator) -> tuple[np.ndarray, str, Clip]:
        if not self.icons or rng.random() >= ICON_SHARE:
            return self._emoji(frames, rng)
        return self._redrawn(frames, rng) if rng.random() < 0.3 else self._icon(frames, rng)

    def _emoji(self, frames: int, rng: np.random.Generator) -> tuple[np.ndarray, str, Clip]:
        copy, pool = _copy(self.emoji, rng)
        row = int(rng.integers(len(pool.names)))
        words = pool.words[row]
        kind = rng.choice(list(SHARES), p=list(SHARES.values()))
        if kind == "style":
            first, last = list(STYLE_PAIRS)[rng.choice(len(STYLE_PAIRS), p=list(STYLE_PAIRS.values()))]
            clip = change((EMOJI.still(first), words[first]), (EMOJI.still(last), words[last]), frames, first)
        elif kind == "derived":
            clip = derived_clip(EMOJI, str(rng.choice(COLOUR_STYLES)), words, frames, rng)
        else:
            style = EMOJI.styles[rng.integers(len(EMOJI.styles))]
            clip = motion_clip(EMOJI, style, words, pool.motions[row], frames, rng)
        if copy == "recoloured" and clip.kind in COLOURLESS:
            pool = self.emoji["mirrored"]
        return pool.latents[row][clip.entries], pool.names[row], clip

    def _icon(self, frames: int, rng: np.random.Generator) -> tuple[np.ndarray, str, Clip]:
        copy, pool = _copy(self.icons, rng)
        row = int(rng.integers(len(pool.names)))
        if rng.random() < 0.75:
            clip = derived_clip(ICONS, "icon", pool.words[row], frames, rng)
        else:
            clip = motion_clip(ICONS, "icon", pool.words[row], pool.motions[row], frames, rng)
        if copy == "recoloured" and clip.kind in COLOURLESS:
            pool = self.icons["plain"]
        return pool.latents[row][clip.entries], pool.names[row], clip

    def _redrawn(self, frames: int, rng: np.random.Generator) -> tuple[np.ndarray, str, Clip]:
        """An icon of a concept becomes one of the concept's drawings, or the other way round."""
        icon, row = self.links[rng.integers(len(self.links))]
        icons, emoji = self.icons["plain"], self.emoji["plain"]
        style = str(rng.choice(COLOUR_STYLES))
        pictures = [icons.latents[icon][ICONS.still("icon")], emoji.latents[row][EMOJI.still(style)]]
        words = [icons.words[icon]["icon"], emoji.words[row][style]]
        if rng.random() < 0.25:
            pictures, words = pictures[::-1], words[::-1]
        clip = change((0, words[0]), (1, words[1]), frames, "icon")
        return np.stack(pictures)[clip.entries], emoji.names[row], clip


def _copy(pools: dict[str, Pool], rng: np.random.Generator) -> tuple[str, Pool]:
    shares = np.array([COPY_SHARES[copy] for copy in pools])
    copy = str(rng.choice(list(pools), p=shares / shares.sum()))
    return copy, pools[copy]
