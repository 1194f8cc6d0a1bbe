"""Which tile walks which ranges: visibility as data, so that one binary serves every length, segment count and blocked pair.

A schedule tiles one axis of the score matrix (query rows, or keys for dk and dv) and lists, per tile, the ranges of the other
axis. Neighbouring segments that see the same ranges are tiled as one; no tile straddles two that see different ones. Schedules
are small int32 tensors, cached per (problem, axis, tile size, device); `schedule_cache.py` says for how long.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from rgkernels._triton.schedule_cache import ScheduleCache

MAX_CACHED = 1024

Range = tuple[int, int]


class Problem(NamedTuple):
    """A layout as the integers that travel through the dispatcher.

    Args:
        lengths: Tokens of each segment, [G].
        blocked: The blocked (query, key) pairs of segment indices, flattened.
        rows: Indices of the segments whose rows q holds, in q's order.
    """

    lengths: tuple[int, ...]
    blocked: tuple[int, ...]
    rows: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Sq, the number of query rows."""
        return sum(self.lengths[g] for g in self.rows)

    @property
    def num_scores(self) -> int:
        """Visible (query, key) pairs of one head."""
        pairs = set(zip(self.blocked[::2], self.blocked[1::2], strict=True))
        seen = [sum(length for g, length in enumerate(self.lengths) if (row, g) not in pairs) for row in self.rows]
        return sum(self.lengths[row] * length for row, length in zip(self.rows, seen, strict=True))


class Schedule(NamedTuple):
    """Tiles and their ranges on the device.

    Args:
        tiles: [T, 4] int32: first row, end of the rows that belong to it, first range, end of its ranges. Tiles with the most
            work come first, so that the last wave of programs is short.
        ranges: [R, 2] int32: start, stop.
    """

    tiles: Tensor
    ranges: Tensor

    @property
    def num_tiles(self) -> int:
        """Programs per head."""
        return self.tiles.shape[0]


Key = tuple[Problem, bool, int, torch.device]


def schedule(problem: Problem, block: int, device: torch.device, *, by_key: bool = False) -> Schedule:
    """The schedule of query tiles over key ranges, or with `by_key` of key tiles over query ranges, from the cache.

    Raises:
        RuntimeError: It is not in the cache while a CUDA graph is being captured.
    """
    found = _cache.get(
        (problem, by_key, block, device),
        lambda: _build(*tile_table(problem, block, by_key=by_key), device),
        capturing=_is_capturing(device),
    )
    if found is None:
        raise RuntimeError(
            "segment_attention must run once with a layout before a CUDA graph captures it, as every warm-up does; "
            f"got a new layout with lengths {problem.lengths} during capture"
        )
    return found


def _is_capturing(device: torch.device) -> bool:
    """Whether the device's current stream, on which the kernel will run, is being captured."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _wait(keys: list[Key]) -> None:
    """Queued kernels may still read the schedules of these keys."""
    for device in {device for *_, device in keys if device.type == "cuda"}:
        torch.cuda.synchronize(device)


_cache: ScheduleCache[Key, Schedule] = ScheduleCache(MAX_CACHED, _wait)


def tile_table(problem: Problem, block: int, *, by_key: bool) -> tuple[list[tuple[int, int, int, int]], list[Range]]:
    """The rows of `Schedule.tiles` and `Schedule.ranges`, in plain integers."""
    tiles: list[tuple[int, int, int, int]] = []
    ranges: list[Range] = []
    work: dict[int, int] = {}
    for start, stop, seen in _groups(problem, by_key):
        first = len(ranges)
        ranges.extend(seen)
        work[first] = sum(hi - lo for lo, hi in seen)
        tiles.extend((row, stop, first, len(ranges)) for row in range(start, stop, block))
    tiles.sort(key=lambda tile: -work[tile[2]] if tile[2] < tile[3] else 0)
    return tiles, ranges


def _groups(problem: Problem, by_key: bool) -> list[tuple[int, int, list[Range]]]:
    """Runs of rows (start, stop, ranges of the other axis that they see); empty segments vanish on both axes."""
    pairs = set(zip(problem.blocked[::2], problem.blocked[1::2], strict=True))
    queries = _spans(problem.rows, problem.lengths)
    keys = _spans(range(len(problem.lengths)), problem.lengths)
    visible: Callable[[int, int], bool] = lambda query, key: (query, key) not in pairs  # noqa: E731
    tiled, walked = (keys, queries) if by_key else (queries, keys)
    groups: list[tuple[int, int, list[Range]]] = []
    for start, stop, mine in tiled:
        sees = [visible(other, mine) if by_key else visible(mine, other) for _, _, other in walked]
        seen = _merge((lo, hi) for (lo, hi, _), keep in zip(walked, sees, strict=True) if keep)
        if groups and groups[-1][2] == seen:
            groups[-1] = (groups[-1][0], stop, seen)
        else:
            groups.append((start, stop, seen))
    return groups


def _spans(segments: Iterable[int], lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(start, stop, segment) of consecutive segments, empty ones left out."""
    edges = [0]
    segments = list(segments)
    for segment in segments:
        edges.append(edges[-1] + lengths[segment])
    return [(lo, hi, g) for (lo, hi), g in zip(pairwise(edges), segments, strict=True) if lo < hi]


def _merge(ranges: Iterable[Range]) -> list[Range]:
    merged: list[Range] = []
    for lo, hi in ranges:
        if merged and merged[-1][1] == lo:
            merged[-1] = (merged[-1][0], hi)
        else:
            merged.append((lo, hi))
    return merged


def _build(tiles: list[tuple[int, int, int, int]], ranges: list[Range], device: torch.device) -> Schedule:
    numbers = [n for tile in tiles for n in tile] + [n for pair in ranges for n in pair]
    packed = _upload(numbers, device)
    return Schedule(packed[: 4 * len(tiles)].view(-1, 4), packed[4 * len(tiles) :].view(-1, 2))


@functools.cache
def _upload_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream per device carries all uploads, so that their memory is one pool."""
    return torch.cuda.Stream(device)


def _upload(numbers: list[int], device: torch.device) -> Tensor:
    """Copy to the device without waiting for the work that is queued there.

    The copy runs on a stream of its own and is complete on return, so every stream may read it. It runs in a thread of its own
    because the warm-up of torch.compile's CUDA graphs redirects the calling thread's allocations to a pool that must be empty
    again afterwards.
    """
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    def copy() -> Tensor:
        with torch.cuda.stream(_upload_stream(device)):
            return torch.tensor(numbers, dtype=torch.int32, device=device)

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(copy).result()
