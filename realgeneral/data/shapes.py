"""Sizes of pictures: the buckets of a run, and the sizes of a source's rows, read once and kept."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm

from realgeneral.data.rows import Source
from realgeneral.errors import Failure, UsageError
from realgeneral.files import replacing

Size = tuple[int, int]  # width, height
# raised when a size is read in another way, so that what was kept before is not found any more
FORMAT = 2
# width / height of a standard list
RATIOS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 16 / 9, 2.0)


def standard_sizes(width: int, height: int, multiple: int, sides: tuple[int, int] = (0, 2**31)) -> tuple[Size, ...]:
    """Sizes of about the area width x height, one for each of RATIOS whose sides are within `sides`; the given size is one.

    Args:
        width: Pixels of the base's own size.
        height: As width.
        multiple: Sides are multiples of it.
        sides: Least and greatest side.
    """
    area, found = width * height, {(width, height): None}
    for ratio in RATIOS:
        w, h = (round(math.sqrt(area * r) / multiple) * multiple for r in (ratio, 1 / ratio))
        # rounding to a coarse multiple can miss the area, which is what a step costs
        if sides[0] <= min(w, h) and max(w, h) <= sides[1] and min(w, h) > 0 and 0.8 < w * h / area < 1.25:
            found[w, h] = None
    return tuple(sorted(found))


def bucket_sizes(
    specs: Sequence[str], size: Size, multiple: int, limit: int | None, trained_sides: tuple[int, int] | None = None
) -> tuple[Size, ...]:
    """Read `--buckets`: "standard" and HEIGHTxWIDTH.

    Args:
        specs: What was given.
        size: (width, height) of the run, the base's own unless set: the area of the standard list.
        multiple: Sides must be multiples of it.
        limit: Greatest side that the base can have, None = any.
        trained_sides: Least and greatest side that the base was trained on; the standard list of their area keeps to them.

    Raises:
        UsageError: Not a size, or one that the base cannot have.
    """
    sizes: dict[Size, None] = {}
    for spec in specs:
        if spec == "standard":
            sides = (0, limit or 2**31)
            if trained_sides and size[0] * size[1] == trained_sides[0] * trained_sides[1]:
                sides = trained_sides
            sizes.update(dict.fromkeys(standard_sizes(*size, multiple, sides)))
            continue
        parts = spec.lower().split("x")
        if len(parts) != 2 or not all(part.isdecimal() for part in parts):
            raise UsageError(f"buckets must be standard or HEIGHTxWIDTH such as 480x720, got {spec!r}")
        height, width = map(int, parts)
        for side in (height, width):
            if side < multiple or side % multiple or side > (limit or side):
                most = f" of at most {limit}" if limit else ""
                raise UsageError(f"sides of buckets must be positive multiples of {multiple}{most}, got {spec}")
        sizes[width, height] = None
    return tuple(sorted(sizes))


def nearest(size: Size, sizes: Sequence[Size]) -> Size:
    """The size whose aspect ratio is nearest on a log scale; of equals the largest."""
    ratio = math.log(size[0] / size[1])
    return min(sizes, key=lambda s: (round(abs(math.log(s[0] / s[1]) - ratio), 9), -s[0] * s[1], s))


class Shape(NamedTuple):
    """What a bucket asks of a row: the target's size in pixels and the number of condition pictures (at least 1)."""

    width: int
    height: int
    conditions: int


def read_shapes(source: Source) -> list[Shape | None]:
    """Shapes of all rows from the pictures' headers; None for a row that has none to read.

    They are kept under the user's cache folder until the files change.
    """
    stamp = source.stamp()
    digest = hashlib.sha256(f"{FORMAT} {stamp}".encode("utf-8", "surrogateescape")).hexdigest()
    path = _cache_folder() / "shapes" / f"{digest[:32]}.npy"
    if stamp and path.is_file():
        table = _load(path)
        if table is not None and table.shape == (len(source), 3):
            return [Shape(*row) if row[2] else None for row in table.tolist()]
    shapes = [_shape(source, i) for i in tqdm(range(len(source)), desc="picture sizes", delay=2)]
    if stamp:
        _save(path, np.array([shape or (0, 0, 0) for shape in shapes], dtype=np.int32))
    return shapes


def _shape(source: Source, index: int) -> Shape | None:
    try:
        record = source.record(index, 0)
        return Shape(*record.target.size(), max(1, len(record.conditions)))
    except Failure:
        return None


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "realgeneral"


def _load(path: Path) -> np.ndarray | None:
    try:
        table: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None  # half a file of a full disk: read the headers again
    return table


def _save(path: Path, table: np.ndarray) -> None:
    try:
        with replacing(path, shared=True) as partial, partial.open("wb") as file:
            np.save(file, table)
    except OSError as error:
        print(f"picture sizes are not kept, next time they are read again: {error}")
