"""The segments of a joint token sequence, and which of them see each other.

A joint sequence is a run of segments, `[text | target | condition ...]`. `SegmentLayout` is the one value that describes
it: immutable and hashable, so it can key caches and schedules. Which pairs are blocked is data here, never code in a kernel.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SegmentLayout:
    """Names and lengths of consecutive segments, and the (query, key) pairs that attention must not compute.

    Build it with `SegmentLayout.of`; the constructor takes the same facts as plain tuples.

    Args:
        names: Segment names in sequence order, unique.
        lengths: Number of tokens of each segment, zero allowed.
        blocked: (query name, key name) pairs: queries of the first do not attend to keys of the second.

    Raises:
        ValueError: Names are not unique, a length is negative, or a blocked pair names an unknown segment.
        TypeError: A name is not a string or a length is not an integer.
    """

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    blocked: frozenset[tuple[str, str]] = frozenset()

    def __post_init__(self) -> None:
        names, lengths = tuple(self.names), tuple(_as_length(length) for length in self.lengths)
        if not names:
            raise ValueError("names must hold at least one segment, got none")
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"names must be strings, got {name!r}")
        if len(set(names)) != len(names):
            raise ValueError(f"names must be unique, got {names}")
        if len(lengths) != len(names):
            raise ValueError(f"lengths must have one entry per name, {len(names)}, got {len(lengths)}")
        for name, length in zip(names, lengths, strict=True):
            if length < 0:
                raise ValueError(f"length of segment {name!r} must be >= 0, got {length}")
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "blocked", frozenset(_as_pair(pair, names) for pair in self.blocked))

    @classmethod
    def of(cls, *, blocked: Iterable[Sequence[str]] = (), **lengths: int) -> SegmentLayout:
        """Build a layout from keywords, in sequence order.

        Example:
            `SegmentLayout.of(text=226, target=1350, condition=1350, blocked=[("text", "condition")])`
        """
        return cls(tuple(lengths), tuple(lengths.values()), blocked)  # type: ignore[arg-type]

    @property
    def num_segments(self) -> int:
        """Number of segments, empty ones included (G in shapes)."""
        return len(self.names)

    @property
    def seq_len(self) -> int:
        """Total number of tokens (S in shapes)."""
        return sum(self.lengths)

    def index(self, name: str) -> int:
        """Position of a segment in the layout; ValueError if there is none of that name."""
        if name not in self.names:
            raise ValueError(f"segment must be one of {self.names}, got {name!r}")
        return self.names.index(name)

    def length(self, name: str) -> int:
        """Number of tokens of a segment."""
        return self.lengths[self.index(name)]

    def offset(self, name: str) -> int:
        """Index of a segment's first token in the joint sequence."""
        return sum(self.lengths[: self.index(name)])

    def slice(self, name: str) -> slice:
        """The segment's tokens as a slice of the joint sequence."""
        start = self.offset(name)
        return slice(start, start + self.length(name))

    def visible(self, query: str, key: str) -> bool:
        """Whether queries of one segment attend to keys of another."""
        self.index(query), self.index(key)
        return (query, key) not in self.blocked

    def key_ranges(self, query: str) -> list[tuple[int, int]]:
        """Merged, contiguous `[(start, stop), ...]` of the keys that a segment's queries see; empty ranges are left out."""
        return self._merge([self.visible(query, key) for key in self.names])

    def query_ranges(self, key: str) -> list[tuple[int, int]]:
        """Merged, contiguous `[(start, stop), ...]` of the queries that see a segment's keys (the transpose)."""
        return self._merge([self.visible(query, key) for query in self.names])

    def mask(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Dense bool mask `[S, S]` (query, key), True = may attend. For tests and small references only."""
        mask = torch.ones(self.seq_len, self.seq_len, dtype=torch.bool, device=device)
        for query, key in self.blocked:
            mask[self.slice(query), self.slice(key)] = False
        return mask

    @property
    def visible_fraction(self) -> float:
        """Share of the S x S score matrix that is computed (1.0 for an empty sequence)."""
        if self.seq_len == 0:
            return 1.0
        hidden = sum(self.length(query) * self.length(key) for query, key in self.blocked)
        return 1.0 - hidden / self.seq_len**2

    def _merge(self, keep: list[bool]) -> list[tuple[int, int]]:
        ranges: list[tuple[int, int]] = []
        start = 0
        for length, kept in zip(self.lengths, keep, strict=True):
            stop = start + length
            if kept and length:
                if ranges and ranges[-1][1] == start:
                    ranges[-1] = (ranges[-1][0], stop)
                else:
                    ranges.append((start, stop))
            start = stop
        return ranges


def _as_length(value: object) -> int:
    if isinstance(value, bool):
        raise TypeError(f"lengths must be integers, got {value!r}")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"lengths must be integers, got {value!r}") from None


def _as_pair(pair: Sequence[str], names: tuple[str, ...]) -> tuple[str, str]:
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
        raise ValueError(f"blocked must hold (query, key) pairs, got {pair!r}")
    for name in pair:
        if name not in names:
            raise ValueError(f"blocked must name segments of {names}, got {name!r}")
    return (pair[0], pair[1])
