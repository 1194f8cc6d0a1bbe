"""The packaged avatars: seeded characters with six faces each, 64 x 64; customization's "same subject, another state".

Sources and licences: `assets/licenses/README.md`.
"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import pyarrow.parquet as pq
from PIL import Image, ImageOps

from realgeneral.data.rows import BaseSource, Picture, Record
from realgeneral.files import file_stamp
from realgeneral.nano.assets import ASSETS
from realgeneral.nano.emoji import of_split

PARQUET = ASSETS / "avatars.parquet"
SIZE = 64
FACES = 6
EYES = ("round", "happy", "closed", "winking", "sleepy", "angry")
MOUTHS = ("smiling", "grinning", "open", "straight", "frowning", "wavy")
BACKGROUNDS = {
    "white": "#ffffff",
    "red": "#c8323c",
    "orange": "#e8842a",
    "yellow": "#f2c832",
    "green": "#2f9e58",
    "blue": "#2f78c8",
    "purple": "#8246b4",
    "pink": "#f0a0c8",
    "grey": "#8c9096",
    "black": "#202228",
}
# Shares of training rows: target and reference on the same background; of those, the ones whose prompt leaves it out; mirrored.
SAME_BACKGROUND, UNSAID, MIRRORED = 0.25, 0.5, 0.5
# Share of white among the backgrounds.
WHITE = 0.35


@dataclass(frozen=True)
class Avatar:
    """One character.

    Attributes:
        seed: What it was drawn from; identifies it.
        kind: What it is, in words.
        shape: Its parts, in the drawing's own names.
        split: "train" or "held_out"; avatars of one shape, a combination of parts, are in the same split.
        eyes: The eyes of each face, of `EYES`.
        mouths: The mouth of each face, of `MOUTHS`.
    """

    seed: str
    kind: str
    shape: str
    split: str
    eyes: tuple[str, ...]
    mouths: tuple[str, ...]
    encoded: bytes = field(repr=False, compare=False)

    def image(self, face: int, background: str = "white") -> Image.Image:
        """A face on a background: RGB, 64 x 64.

        Raises:
            ValueError: If `face` or `background` is unknown.
        """
        if not 0 <= face < FACES:
            raise ValueError(f"face must be in 0..{FACES - 1}, got {face}")
        if background not in BACKGROUNDS:
            raise ValueError(f"background must be one of {list(BACKGROUNDS)}, got {background!r}")
        strip = Image.open(io.BytesIO(self.encoded)).convert("RGBA")
        picture = Image.new("RGBA", (SIZE, SIZE), BACKGROUNDS[background])
        picture.alpha_composite(strip.crop((0, face * SIZE, SIZE, (face + 1) * SIZE)))
        return picture.convert("RGB")

    def caption(self, face: int, background: str | None) -> str:
        """For example "monster, sleepy eyes, wavy mouth, blue background"; without the last part if `background` is None."""
        parts = [self.kind, f"{self.eyes[face]} eyes", f"{self.mouths[face]} mouth"]
        return ", ".join(parts if background is None else [*parts, f"{background} background"])


def pack_faces(faces: Sequence[Image.Image]) -> bytes:
    """RGBA faces below each other as one lossless WebP, in which all but the first cost little."""
    strip = Image.new("RGBA", (SIZE, SIZE * len(faces)))
    for i, face in enumerate(faces):
        strip.paste(face, (0, i * SIZE))
    buffer = io.BytesIO()
    strip.save(buffer, "WEBP", lossless=True, method=6)
    return buffer.getvalue()


@lru_cache(maxsize=1)
def _load_all() -> tuple[Avatar, ...]:
    return tuple(
        Avatar(r["seed"], r["kind"], r["shape"], r["split"], tuple(r["eyes"]), tuple(r["mouths"]), r["faces"])
        for r in pq.read_table(PARQUET).to_pylist()
    )


def load_avatars(split: str | None = None) -> list[Avatar]:
    """Load the avatars of one split, or of both.

    Args:
        split: "train", "held_out", or None for all.

    Raises:
        ValueError: If `split` is unknown.
    """
    return of_split(_load_all(), split)


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
        return f"{file_stamp([PARQUET])} {len(self)}"


def _background(rng: random.Random) -> str:
    return "white" if rng.random() < WHITE else rng.choice([name for name in BACKGROUNDS if name != "white"])
