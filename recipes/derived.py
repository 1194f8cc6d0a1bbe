"""Images derived from a picture: the conditions of RealGeneral's tasks, as training material for the nano base."""

from __future__ import annotations

import cv2
import numpy as np

KINDS = ("canny", "edges", "grey", "blur", "mask")


def derive(image: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Return the derived version of a uint8 [H, W, 3] RGB image.

    `canny`: white edges on black. `edges`: black edges on white. `grey`: luminance. `blur`: Gaussian.
    `mask`: one or two black rectangles.

    Raises:
        ValueError: If `kind` is unknown.
    """
    if kind in ("canny", "edges"):
        low = float(rng.uniform(40, 110))
        lines = cv2.Canny(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), low, 2 * low)
        lines = lines if kind == "canny" else 255 - lines
        return np.repeat(lines[..., None], 3, axis=2)
    if kind == "grey":
        return np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    if kind == "blur":
        return np.asarray(cv2.GaussianBlur(image, (0, 0), float(rng.uniform(1.0, 4.0))))
    if kind == "mask":
        return _black_rectangles(image, rng)
    raise ValueError(f"kind must be one of {list(KINDS)}, got {kind!r}")


def _black_rectangles(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    out = image.copy()
    size = image.shape[0]
    for _ in range(int(rng.integers(1, 3))):
        h, w = rng.integers(size // 5, size * 3 // 5, 2)
        top, left = rng.integers(0, size - h), rng.integers(0, size - w)
        out[top : top + h, left : left + w] = 0
    return out
