"""Training rows from the packaged emoji: a picture in one style, and the same concept in another as its reference."""

from __future__ import annotations

import math
import random
from dataclasses import replace

from PIL import Image, ImageOps

from realgeneral.data.rows import BaseSource, Picture, Record
from realgeneral.files import file_stamp
from realgeneral.nano.colours import colour_words
from realgeneral.nano.emoji import PARQUET, Concept, caption, load_emoji
from realgeneral.nano.latents import RECOLOURINGS

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
        return f"{file_stamp([PARQUET])} {len(self)}"

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
