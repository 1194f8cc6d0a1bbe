"""Training rows from the packaged emoji: a picture in one style, and the same concept in another as its reference."""

from __future__ import annotations

import random

from PIL import Image, ImageOps

from realgeneral.nano.emoji import PARQUET, Concept, caption, load_emoji
from realgeneral.records import BaseSource, Picture, Record, file_stamp

# the black-icon style is left to the base: as a target it is nearly its own edge map
TARGET_STYLES = ("flat", "3d", "noto")
NANO_TASKS = ("customization", "canny", "inpainting", "colouring", "deblurring:radius=16.0", "image-to-sketch")


class NanoSource(BaseSource):
    """One row per concept and target style of a split.

    Args:
        split: "train" or "held_out".
        augment: Mirror, shift and scale pictures at random; the reference gets the same transform.
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
        target, reference = concept.image(style), concept.image(other)
        if self.augment:
            state = rng.getstate()
            target = _transformed(target, rng)
            rng.setstate(state)
            reference = _transformed(reference, rng)
        text = caption(concept, style)
        return Record(text, Picture(target), text, subject=concept.name, reference=Picture(reference))

    def stamp(self) -> str:
        """Of the packaged file, and the split."""
        return f"{file_stamp([PARQUET])} {len(self)}"

    def _find(self, index: int) -> tuple[Concept, str]:
        concept, style = divmod(index, len(TARGET_STYLES))
        return self.concepts[concept], TARGET_STYLES[style]


def _transformed(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Mirror with probability 1/2; shift and scale with probability 1/2, on white."""
    mirrored, moved = rng.random() < 0.5, rng.random() < 0.5
    scale, dx, dy = rng.uniform(0.75, 1.05), rng.uniform(-5, 5), rng.uniform(-5, 5)
    if mirrored:
        picture = ImageOps.mirror(picture)
    if not moved:
        return picture
    centre = picture.width / 2
    matrix = (1 / scale, 0, centre - (centre + dx) / scale, 0, 1 / scale, centre - (centre + dy) / scale)
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor="white")
