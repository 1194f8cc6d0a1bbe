"""Aspect-ratio buckets: batches of one size and one number of conditions from mixed pictures.

Micro-batch b of a run is a function of (data, settings, b): an epoch's rows, in their shuffled order, fill one list per bucket,
and each full list is a batch; a list that is left over is filled up with rows of its bucket from the start of the epoch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Sampler

from realgeneral.data.rows import WINDOW_BYTES, Block
from realgeneral.data.shapes import Shape, Size, nearest


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


class RunSampler(Sampler[int]):
    """Sample numbers of one process from a starting step on.

    `run` consecutive samples go to one process, the next ones to the next: 1 interleaves the samples, a batch size the batches.
    `start` and `stop` are multiples of run x world.
    """

    def __init__(self, start: int, stop: int, rank: int, world: int, run: int = 1) -> None:
        self.start, self.stop, self.rank, self.world, self.run = start, stop, rank, world, run

    def __iter__(self) -> Iterator[int]:
        for first in range(self.start + self.rank * self.run, self.stop, self.world * self.run):
            yield from range(first, min(first + self.run, self.stop))

    def __len__(self) -> int:
        firsts = range(self.start + self.rank * self.run, self.stop, self.world * self.run)
        return len(firsts) * self.run - max(0, firsts[-1] + self.run - self.stop) if firsts else 0
