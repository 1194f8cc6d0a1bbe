"""Aspect-ratio buckets: batches of one size and one number of conditions from mixed pictures.

Micro-batch b of a run is a function of (data, settings, b): an epoch's rows, in their shuffled order, fill one list per bucket,
and each full list is a batch; a list that is left over is filled up with rows of its bucket from the start of the epoch.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from tqdm.auto import tqdm

from realgeneral.errors import Failure, UsageError
from realgeneral.files import replacing
from realgeneral.model.geometry import NEWER_SIDES
from realgeneral.records import Block, Source
from realgeneral.tables import WINDOW_BYTES

Size = tuple[int, int]  # width, height

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


def bucket_sizes(specs: Sequence[str], size: Size, multiple: int, limit: int | None) -> tuple[Size, ...]:
    """Read `--buckets`: "standard" and HEIGHTxWIDTH.

    Args:
        specs: What was given.
        size: (width, height) of the run, the base's own unless set: the area of the standard list.
        multiple: Sides must be multiples of it.
        limit: Greatest side, of CogVideoX 1.5 only; at its standard area the standard list keeps to the trained sides.

    Raises:
        UsageError: Not a size, or one that the base cannot have.
    """
    sizes: dict[Size, None] = {}
    for spec in specs:
        if spec == "standard":
            trained = limit and size[0] * size[1] == NEWER_SIDES[0] * NEWER_SIDES[1]
            sides = NEWER_SIDES if trained else (0, limit or 2**31)
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
    path = _cache_folder() / "shapes" / f"{hashlib.sha256(stamp.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.npy"
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


def epoch_order(blocks: Sequence[Block], seed: int, epoch: int) -> list[int]:
    """All rows in the order of an epoch: shuffled, within windows of at most WINDOW_BYTES of shuffled blocks.

    Data that fits into one window is shuffled as a whole. Rows of blocks without bytes, which cost the same in any order, are
    spread over all windows.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    total = sum(block.rows for block in blocks)
    if sum(block.bytes for block in blocks) <= WINDOW_BYTES:
        return torch.randperm(total, generator=generator).tolist()
    starts = np.cumsum([0, *(block.rows for block in blocks)])
    windows: list[list[int]] = []
    room = 0
    shuffled = torch.randperm(len(blocks), generator=generator).tolist()
    for i in (i for i in shuffled if blocks[i].bytes):
        if not windows or blocks[i].bytes > room:
            windows.append([])
            room = WINDOW_BYTES
        room -= blocks[i].bytes
        windows[-1].append(i)
    anywhere = [torch.arange(starts[i], starts[i + 1]) for i, block in enumerate(blocks) if not block.bytes]
    spread = torch.cat([torch.arange(0), *anywhere])
    spread = spread[torch.randperm(len(spread), generator=generator)]
    # as many of them after each window as its share of the other rows
    done = np.cumsum([0, *(sum(blocks[i].rows for i in window) for window in windows)])
    cuts = done * len(spread) // max(1, done[-1])
    order: list[int] = []
    for k, window in enumerate(windows):
        rows = torch.cat([*(torch.arange(starts[i], starts[i + 1]) for i in window), spread[cuts[k] : cuts[k + 1]]])
        order += rows[torch.randperm(len(rows), generator=generator)].tolist()
    return order


class Order(Protocol):
    """Which row, at which size, each sample number of a run stands for."""

    # so many consecutive samples belong to one process, as one batch
    run: int
    # sizes and numbers of conditions that its batches have; empty if only the rows know
    shapes: Sequence[Shape]

    def choices(self, n: int) -> int:
        """How many rows can stand in for sample n."""

    def place(self, n: int, attempt: int) -> tuple[int, Size]:
        """Row and size of sample n; `attempt` passes over that many bad rows."""

    def size(self, index: int) -> Size:
        """The size of a row."""


class OneSize:
    """Every row at one size: sample n is row n of the shuffled epochs."""

    run = 1
    shapes: Sequence[Shape] = ()

    def __init__(self, blocks: Sequence[Block], seed: int, size: Size) -> None:
        self.blocks, self.seed, self._size = blocks, seed, size
        self.total = sum(block.rows for block in blocks)
        self._epoch: tuple[int, list[int]] = (-1, [])

    def choices(self, n: int) -> int:
        """All rows."""
        return self.total

    def place(self, n: int, attempt: int) -> tuple[int, Size]:
        """Further attempts stay in the epoch, so that as many as there are rows find a good one."""
        epoch, position = divmod(n, self.total)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, epoch_order(self.blocks, self.seed, epoch))
        return self._epoch[1][(position + attempt) % self.total], self._size

    def size(self, index: int) -> Size:
        """The one size."""
        return self._size


class Bucketed:
    """Batches of equal size and number of conditions: samples b B .. b B + B - 1 are micro-batch b.

    Args:
        shapes: Of the source's rows. Those without one go to the fullest bucket, where they are met and named as bad rows.
        sizes: The buckets.
        blocks: Of the source.
        batch_size: B.
        seed: Seed of the order.
    """

    def __init__(
        self, shapes: Sequence[Shape | None], sizes: Sequence[Size], blocks: Sequence[Block], batch_size: int, seed: int
    ) -> None:
        self.blocks, self.seed, self.run = blocks, seed, batch_size
        found = [(nearest(shape[:2], sizes), shape.conditions) if shape else None for shape in shapes]
        counts = Counter(bucket for bucket in found if bucket is not None)
        fullest = max(counts, key=lambda b: (counts[b], b)) if counts else (sizes[0], 1)
        self.buckets = [bucket or fullest for bucket in found]
        self.counts = Counter(self.buckets)
        self.shapes: Sequence[Shape] = [Shape(*size, conditions) for size, conditions in self.counts]
        self.batches_per_epoch = sum(-(-count // batch_size) for count in self.counts.values())
        # reshuffling the batches would scatter the reads of a windowed source
        self.windowed = sum(block.bytes for block in blocks) > WINDOW_BYTES
        self._epoch = -1
        self._rows: dict[tuple[Size, int], list[int]] = {}
        self._batches: list[tuple[tuple[Size, int], int]] = []

    def choices(self, n: int) -> int:
        """The rows of the sample's bucket."""
        return self.counts[self._batch(n)[0]]

    def place(self, n: int, attempt: int) -> tuple[int, Size]:
        """Rows stand in for others of their bucket only."""
        bucket, start = self._batch(n)
        rows = self._rows[bucket]
        return rows[(start + n % self.run + attempt) % len(rows)], bucket[0]

    def size(self, index: int) -> Size:
        """The bucket's size."""
        return self.buckets[index][0]

    def _batch(self, n: int) -> tuple[tuple[Size, int], int]:
        epoch, position = divmod(n // self.run, self.batches_per_epoch)
        if epoch != self._epoch:
            self._fill(epoch)
        return self._batches[position]

    def _fill(self, epoch: int) -> None:
        rows: dict[tuple[Size, int], list[int]] = {}
        batches = []
        for index in epoch_order(self.blocks, self.seed, epoch):
            bucket = self.buckets[index]
            members = rows.setdefault(bucket, [])
            members.append(index)
            if len(members) % self.run == 0:
                batches.append((bucket, len(members) - self.run))
        batches += [(b, len(m) - len(m) % self.run) for b, m in sorted(rows.items()) if len(m) % self.run]
        if not self.windowed:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        self._epoch, self._rows, self._batches = epoch, rows, batches
