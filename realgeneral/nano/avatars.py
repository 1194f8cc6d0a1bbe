"""The packaged avatars: seeded characters with six faces each, 64 x 64; customization's "same subject, another state".

Sources and licences: `assets/licenses/README.md`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import pyarrow.parquet as pq
from PIL import Image

from realgeneral.nano.assets import ASSETS
from realgeneral.nano.emoji import of_split

AVATARS_PARQUET = ASSETS / "avatars.parquet"


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
        for r in pq.read_table(AVATARS_PARQUET).to_pylist()
    )


def load_avatars(split: str | None = None) -> list[Avatar]:
    """Load the avatars of one split, or of both.

    Args:
        split: "train", "held_out", or None for all.

    Raises:
        ValueError: If `split` is unknown.
    """
    return of_split(_load_all(), split)
