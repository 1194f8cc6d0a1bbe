"""Clips for the nano base: entries of one row of a pool, in order, with an honest caption."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from recipes.latents import COLOUR_STYLES, EMOJI, ICONS, MOTIONS, STAGES, Entries, Pool

K = TypeVar("K")
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


# Shares of captions that call the thing "emoji" or "icon", and of those of a coloured drawing that tell its colours.
UNNAMED, COLOURED = 0.3, 0.5


@dataclass(frozen=True)
class Clip:
    """Entries of a row; first style, derived version or "motion"; what the clip and its last frame show; the latter's style."""

    entries: list[int]
    kind: str
    description: str
    last: str
    style: str


def change(first: tuple[int, str], last: tuple[int, str], frames: int, kind: str, style: str) -> Clip:
    """Half of the frames of each; the ends are (entry, words), `style` is the last one's, "" if it is none."""
    half = frames // 2
    return Clip([first[0]] * half + [last[0]] * (frames - half), kind, f"from {first[1]} to {last[1]}", last[1], style)


def derived_clip(entries: Entries, style: str, words: Mapping[str, str], frames: int, rng: np.random.Generator) -> Clip:
    """A picture restored from its derived version, or in one of four clips the other way round."""
    kind = _pick(KIND_SHARES, rng)
    ends = (entries.derived(style, kind), KIND_WORDS[kind]), (entries.still(style), words[style])
    if rng.random() < 0.75:
        return change(*ends, frames, kind, style)
    return change(*ends[::-1], frames, kind, "")


def motion_clip(
    entries: Entries, style: str, words: Mapping[str, str], motions: np.ndarray, frames: int, rng: np.random.Generator
) -> Clip:
    """A picture that moves, or stands still in two of five clips; `motions` [styles, slots] are the row's."""
    still = entries.still(style)
    if rng.random() < 0.4:
        return Clip([still] * frames, "motion", words[style], words[style], style)
    slot = int(rng.integers(entries.motions))
    stages = [still, *(entries.motion(style, slot, k) for k in range(len(STAGES)))]
    if frames == 2:
        stages = [still, stages[int(rng.integers(2, 4))]]
    described = f"{words[style]}, {MOTIONS[motions[entries.styles.index(style), slot]]}"
    return Clip(stages, "motion", described, described, style)


class ClipSource:
    """Draws clips from copies of the emoji's pool and, if given, of the icons'.

    Args:
        emoji: Copies by name.
        icons: Copies by name; icons of emoji also change into the drawings of their concept.
        device: Latents are kept here if it is not the CPU; there they stay in their files.
    """

    def __init__(
        self, emoji: dict[str, Pool], icons: dict[str, Pool] | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.emoji, self.icons = emoji, icons or {}
        self.pools = [*self.emoji.values(), *self.icons.values()]
        rows = {codepoint: row for row, codepoint in enumerate(emoji["plain"].concepts)}
        self.links = [(i, rows[c]) for i, c in enumerate(self.icons["plain"].concepts) if c] if icons else []
        sizes = [pool.latents.shape[0] * pool.latents.shape[1] for pool in self.pools]
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.start_of = {id(pool): start for pool, start in zip(self.pools, self.starts, strict=True)}
        self.resident: Tensor | None = None
        if torch.device(device).type != "cpu":
            flat = [torch.from_numpy(np.array(pool.latents)).flatten(0, 1).to(device) for pool in self.pools]
            self.resident = torch.cat(flat)

    def draw(self, size: int, frames: int, rng: np.random.Generator) -> tuple[Tensor, list[str]]:
        """Draw clips: places of their frames for `latents`, int64 [B, frames], and captions."""
        drawn = [self._draw(frames, rng) for _ in range(size)]
        return torch.tensor([places for places, _ in drawn]), [caption for _, caption in drawn]

    def latents(self, places: Tensor) -> Tensor:
        """Float32 [B, frames, C, h, w] of what `draw` gave."""
        if self.resident is not None:
            return self.resident[places.to(self.resident.device)].float()
        found = []
        for place in places.flatten().tolist():
            i = bisect.bisect_right(self.starts, place) - 1
            pool = self.pools[i]
            row, entry = divmod(place - self.starts[i], pool.latents.shape[1])
            found.append(pool.latents[row, entry])
        return torch.from_numpy(np.stack(found)).float().unflatten(0, tuple(places.shape))

    def _draw(self, frames: int, rng: np.random.Generator) -> tuple[list[int], str]:
        if not self.icons or rng.random() >= ICON_SHARE:
            return self._emoji(frames, rng)
        return self._redrawn(frames, rng) if rng.random() < 0.3 else self._icon(frames, rng)

    def _place(self, pool: Pool, row: int, entry: int) -> int:
        return self.start_of[id(pool)] + row * pool.latents.shape[1] + entry

    def _emoji(self, frames: int, rng: np.random.Generator) -> tuple[list[int], str]:
        copy, pool = _copy(self.emoji, rng)
        row = int(rng.integers(len(pool.names)))
        words = pool.words[row]
        kind = _pick(SHARES, rng)
        if kind == "style":
            first, last = _pick(STYLE_PAIRS, rng)
            clip = change((EMOJI.still(first), words[first]), (EMOJI.still(last), words[last]), frames, first, last)
        elif kind == "derived":
            clip = derived_clip(EMOJI, COLOUR_STYLES[rng.integers(len(COLOUR_STYLES))], words, frames, rng)
        else:
            style = EMOJI.styles[rng.integers(len(EMOJI.styles))]
            clip = motion_clip(EMOJI, style, words, pool.motions[row], frames, rng)
        if copy == "recoloured" and clip.kind in COLOURLESS:
            pool = self.emoji["mirrored"]
        return [self._place(pool, row, e) for e in clip.entries], _caption(
            pool.names[row], pool.colours[row], clip, "emoji", rng
        )

    def _icon(self, frames: int, rng: np.random.Generator) -> tuple[list[int], str]:
        copy, pool = _copy(self.icons, rng)
        row = int(rng.integers(len(pool.names)))
        if rng.random() < 0.75:
            clip = derived_clip(ICONS, "icon", pool.words[row], frames, rng)
        else:
            clip = motion_clip(ICONS, "icon", pool.words[row], pool.motions[row], frames, rng)
        if copy == "recoloured" and clip.kind in COLOURLESS:
            pool = self.icons["plain"]
        return [self._place(pool, row, e) for e in clip.entries], _caption(
            pool.names[row], pool.colours[row], clip, "icon", rng
        )

    def _redrawn(self, frames: int, rng: np.random.Generator) -> tuple[list[int], str]:
        """An icon of a concept becomes one of the concept's drawings, or the other way round; both in the same copy."""
        icon, row = self.links[rng.integers(len(self.links))]
        icons, emoji = self.icons["plain"], self.emoji["plain"]
        style = COLOUR_STYLES[rng.integers(len(COLOUR_STYLES))]
        ends = [
            (self._place(icons, icon, ICONS.still("icon")), icons.words[icon]["icon"], icons.colours[icon], "icon"),
            (self._place(emoji, row, EMOJI.still(style)), emoji.words[row][style], emoji.colours[row], style),
        ]
        if rng.random() < 0.25:
            ends = ends[::-1]
        (first, first_words, *_), (last, last_words, colours, last_style) = ends
        clip = change((first, first_words), (last, last_words), frames, "icon", last_style)
        return clip.entries, _caption(emoji.names[row], colours, clip, "emoji", rng)


def _pick(shares: Mapping[K, float], rng: np.random.Generator) -> K:
    """A key by its share; several times faster than numpy's choice."""
    return list(shares)[bisect.bisect_right(list(itertools.accumulate(shares.values())), rng.random() * sum(shares.values()))]


def _caption(name: str, colours: Mapping[str, str], clip: Clip, unnamed: str, rng: np.random.Generator) -> str:
    """What the last frame shows, perhaps with its style's colours, or what the clip shows; perhaps without the name."""
    name = unnamed if rng.random() < UNNAMED else name
    if rng.random() >= LAST_FRAME_CAPTIONS:
        return f"{name}, {clip.description}"
    told = colours.get(clip.style, "") if rng.random() < COLOURED else ""
    return ", ".join(filter(None, (name, told, clip.last)))


def _copy(pools: dict[str, Pool], rng: np.random.Generator) -> tuple[str, Pool]:
    copy = _pick({copy: COPY_SHARES[copy] for copy in pools}, rng)
    return copy, pools[copy]
