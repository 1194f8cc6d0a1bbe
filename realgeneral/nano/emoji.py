"""The packaged emoji set: concepts drawn in four aligned styles, 64 x 64 on white.

Sources and licences: `assets/licenses/README.md`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol, TypeVar

import pyarrow.parquet as pq
from PIL import Image

from realgeneral.nano.assets import ASSETS

EMOJI_PARQUET = ASSETS / "emoji.parquet"
STYLE_WORDS = {
    "flat": "flat icon",
    "high_contrast": "black line icon",
    "3d": "3d render",
    "noto": "cartoon",
}
STYLES = tuple(STYLE_WORDS)
SPLITS = ("train", "held_out")


class Split(Protocol):
    """What belongs to a split."""

    @property
    def split(self) -> str:
        """Its name, of `SPLITS`."""


T = TypeVar("T", bound=Split)


@dataclass(frozen=True)
class Concept:
    """One thing, drawn in every style of `STYLES`.

    Attributes:
        codepoint: Unicode code points in hex, joined by dashes; identifies the concept.
        name: Lower-case English name, for example "red fox".
        keywords: More words for it.
        group: Unicode group, for example "Animals & Nature".
        split: "train" or "held_out"; near-duplicates are always in the same split.
    """

    codepoint: str
    name: str
    keywords: tuple[str, ...]
    group: str
    split: str
    encoded: dict[str, bytes] = field(repr=False, compare=False)

    def image(self, style: str) -> Image.Image:
        """Decode the drawing in `style`: RGB, 64 x 64.

        Raises:
            ValueError: If `style` is unknown.
        """
        if style not in self.encoded:
            raise ValueError(f"style must be one of {list(STYLES)}, got {style!r}")
        return Image.open(io.BytesIO(self.encoded[style])).convert("RGB")


@lru_cache(maxsize=1)
def _load_all() -> tuple[Concept, ...]:
    rows = pq.read_table(EMOJI_PARQUET).to_pylist()
    return tuple(
        Concept(
            codepoint=row["codepoint"],
            name=row["name"],
            keywords=tuple(row["keywords"]),
            group=row["group"],
            split=row["split"],
            encoded={style: row[style] for style in STYLES},
        )
        for row in rows
    )


def load_emoji(split: str | None = None) -> list[Concept]:
    """Load the concepts of one split, or of both, in code point order.

    Args:
        split: "train", "held_out", or None for all.

    Raises:
        ValueError: If `split` is unknown.
    """
    return of_split(_load_all(), split)


def of_split(things: Sequence[T], split: str | None) -> list[T]:
    """Those of one split, or all if it is None; ValueError if it is unknown."""
    if split is not None and split not in SPLITS:
        raise ValueError(f"split must be one of {list(SPLITS)} or None, got {split!r}")
    return [thing for thing in things if split is None or thing.split == split]


def caption(concept: Concept, style: str, colours: Sequence[str] = ()) -> str:
    """Return the caption of a concept in a style, for example "fox, 3d render", or "fox, orange black, 3d render" with colours.

    Raises:
        ValueError: If `style` is unknown.
    """
    if style not in STYLE_WORDS:
        raise ValueError(f"style must be one of {list(STYLES)}, got {style!r}")
    return ", ".join(filter(None, (concept.name, " ".join(colours), STYLE_WORDS[style])))
