"""The packaged data as sources: emoji in another style, and avatars with another face, each with a reference."""

from __future__ import annotations

import math
import random
from dataclasses import replace

from PIL import Image, ImageOps

from realgeneral.data.rows import BaseSource, Picture, Record, Source
from realgeneral.files import file_stamp
from realgeneral.nano.avatars import AVATARS_PARQUET, BACKGROUNDS, FACES, Avatar, load_avatars
from realgeneral.nano.colours import colour_words
from realgeneral.nano.emoji import EMOJI_PARQUET, Concept, caption, load_emoji

BUILT_IN = ("nano", "avatars")


RECOLOURINGS = ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
# the black-icon style is left to the base: as a target it is nearly its own edge map
TARGET_STYLES = ("flat", "3d", "noto")


# Shares: rows that are named "emoji" alone, and of those the ones in other colours. What has a name is drawn from memory, and a
# thing that was never seen then comes out as another thing.
UNNAMED, RECOLOURED = 0.5, 0.5


# Share of rows whose prompt tells the colours.
COLOURED = 0.75
NANO_TASKS = ("customization", "canny", "inpainting", "colouring", "deblurring:radius=16.0", "image-to-sketch")


class NanoSource(BaseSource):
    """One row per concept and target style of a split.

    Args:
        split: "train" or "held_out".
        augment: Mirror, rotate, shift, scale and recolour pictures at random, the reference alike; leave names and colours out.
    """

    seeded = True  # the reference's style, and the transform

    def __init__(self, split: str, augment: bool = True) -> None:
        self.concepts = load_emoji(split)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.concepts) * len(TARGET_STYLES)

    def row_name(self, index: int) -> str:
        """Concept and style."""
        concept, style = self._find(index)
        return caption(concept, style)

    def record(self, index: int, seed: int) -> Record:
        """The picture, its caption, and a reference in another style."""
        concept, style = self._find(index)
        rng = random.Random(seed)
        other = rng.choice([s for s in TARGET_STYLES if s != style])
        pictures, shown = [concept.image(style), concept.image(other)], concept
        if self.augment:
            pictures = _moved(pictures, rng)
            if rng.random() < UNNAMED:
                shown = replace(concept, name="emoji")
                pictures = _recoloured(pictures, rng) if rng.random() < RECOLOURED else pictures
        colours = () if self.augment and rng.random() >= COLOURED else colour_words(pictures[0])
        target, reference = map(Picture, pictures)
        return Record(caption(concept, style), target, caption(shown, style, colours), subject=shown.name, reference=reference)

    def stamp(self) -> str:
        """Of the packaged file, and the split."""
        return f"{file_stamp([EMOJI_PARQUET])} {len(self)}"

    def _find(self, index: int) -> tuple[Concept, str]:
        concept, style = divmod(index, len(TARGET_STYLES))
        return self.concepts[concept], TARGET_STYLES[style]


def _moved(pictures: list[Image.Image], rng: random.Random) -> list[Image.Image]:
    """Mirror with probability 1/2; rotate, shift and scale with probability 1/2, on white; all pictures alike."""
    mirrored, moved = rng.random() < 0.5, rng.random() < 0.5
    scale, dx, dy = rng.uniform(0.65, 1.05), rng.uniform(-5, 5), rng.uniform(-5, 5)
    angle = math.radians(rng.uniform(-20, 20))
    if mirrored:
        pictures = [ImageOps.mirror(picture) for picture in pictures]
    if not moved:
        return pictures
    centre = pictures[0].width / 2
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    x, y = centre + dx, centre + dy  # where the centre goes
    matrix = (cos, sin, centre - cos * x - sin * y, -sin, cos, centre + sin * x - cos * y)
    return [p.transform(p.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor="white") for p in pictures]


def _recoloured(pictures: list[Image.Image], rng: random.Random) -> list[Image.Image]:
    channels = rng.choice(RECOLOURINGS)
    return [Image.merge("RGB", [picture.getchannel(c) for c in channels]) for picture in pictures]


# Shares of training rows: target and reference on the same background; of those, the ones whose prompt leaves it out; mirrored.
SAME_BACKGROUND, UNSAID, MIRRORED = 0.25, 0.5, 0.5


# Share of white among the backgrounds.
WHITE = 0.35


class AvatarSource(BaseSource):
    """One row per avatar and face of a split; the reference is the same avatar with another face.

    Args:
        split: "train" or "held_out".
        augment: Mirror at random; sometimes keep the reference's face or its background, and then perhaps say nothing of it.
            Without it, face and background both change and the prompt tells all.
        same_background: Without `augment`: the background stays, and the prompt tells it.
    """

    seeded = True  # the reference's face, and the backgrounds

    def __init__(self, split: str, augment: bool = True, same_background: bool = False) -> None:
        self.avatars = load_avatars(split)
        self.augment, self.same_background = augment, same_background

    def __len__(self) -> int:
        return len(self.avatars) * FACES

    def row_name(self, index: int) -> str:
        """Seed and face."""
        avatar, face = self._find(index)
        return f"{avatar.seed} {avatar.caption(face, None)}"

    def record(self, index: int, seed: int) -> Record:
        """The avatar with a face, on a background, and a reference of the same avatar."""
        avatar, face = self._find(index)
        rng = random.Random(seed)
        other, background, before = self._draw(face, rng)
        said = None if self.augment and before == background and rng.random() < UNSAID else background
        pictures = [avatar.image(face, background), avatar.image(other, before)]
        if self.augment and rng.random() < MIRRORED:
            pictures = [ImageOps.mirror(picture) for picture in pictures]
        target, reference = map(Picture, pictures)
        return Record(self.row_name(index), target, avatar.caption(face, said), subject=avatar.kind, reference=reference)

    def states(self, index: int, seed: int) -> list[Image.Image]:
        """The avatar of `record` with each of its faces, on the target's background."""
        avatar, face = self._find(index)
        _, background, _ = self._draw(face, random.Random(seed))
        return [avatar.image(f, background) for f in range(FACES)]

    def _draw(self, face: int, rng: random.Random) -> tuple[int, str, str]:
        """The reference's face; the backgrounds of target and reference."""
        other = rng.choice([f for f in range(FACES) if self.augment or f != face])
        background, before = _background(rng), _background(rng)
        if self.same_background or (self.augment and rng.random() < SAME_BACKGROUND):
            return other, background, background
        while not self.augment and before == background:
            before = _background(rng)
        return other, background, before

    def _find(self, index: int) -> tuple[Avatar, int]:
        avatar, face = divmod(index, FACES)
        return self.avatars[avatar], face

    def stamp(self) -> str:
        """Of the packaged file, and the split."""
        return f"{file_stamp([AVATARS_PARQUET])} {len(self)}"


def _background(rng: random.Random) -> str:
    return "white" if rng.random() < WHITE else rng.choice([name for name in BACKGROUNDS if name != "white"])


def built_in(name: str, split: str) -> Source:
    """A split of the packaged data `name` of `BUILT_IN`; the held-out one is not augmented."""
    augment = split == "train"
    return NanoSource(split, augment) if name == "nano" else AvatarSource(split, augment)
