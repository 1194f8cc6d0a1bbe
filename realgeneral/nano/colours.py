"""The colours of a drawing in words, for captions: an emoji's name seldom tells them, an edge map or a grey picture never."""

from __future__ import annotations

import numpy as np
from PIL import Image

# Names by hue in degrees, each up to its end; what is dark among the warm ones is brown.
HUES = {"red": 16, "orange": 35, "yellow": 68, "green": 165, "cyan": 195, "blue": 255, "purple": 292, "pink": 345}
COLOURS = (*HUES, "brown", "grey", "black")
SMALLEST_SHARE = 0.1


def colour_words(picture: Image.Image, limit: int = 3) -> tuple[str, ...]:
    """The main colours of a drawing on white, the largest area first: of `COLOURS`, at most `limit`.

    White is the background and has no word; a colour of less than `SMALLEST_SHARE` of the rest is left out.
    """
    rgb = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    hue = np.asarray(picture.convert("HSV"), dtype=np.float32)[..., 0] * (360 / 255)
    value = rgb.max(-1)
    saturation = (value - rgb.min(-1)) / np.maximum(value, 1e-6)
    kinds = np.searchsorted(list(HUES.values()), hue, side="right") % len(HUES)
    red, orange, pink = (COLOURS.index(name) for name in ("red", "orange", "pink"))
    warm = (kinds == red) | (kinds == orange)
    kinds[(kinds == red) & (saturation < 0.5) & (value > 0.8)] = pink
    kinds[warm & (value < 0.68)] = COLOURS.index("brown")
    kinds[saturation < 0.18] = COLOURS.index("grey")
    kinds[value < 0.25] = COLOURS.index("black")
    drawn = kinds[~((saturation < 0.1) & (value > 0.9))]
    shares = np.bincount(drawn, minlength=len(COLOURS)) / max(1, drawn.size)
    order = np.argsort(-shares, kind="stable")[:limit]
    return tuple(COLOURS[i] for i in order if shares[i] >= SMALLEST_SHARE)
