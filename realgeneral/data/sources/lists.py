"""Several sources as one: shards, and the data sets of a .json list with how often and as which task they come."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from realgeneral.data.rows import BaseSource, Block, Record, Source
from realgeneral.errors import Failure, UsageError
from realgeneral.files import decoded
from realgeneral.tasks import TASKS


class Shards(BaseSource):
    """Several sources one after the other."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = list(parts)
        self.notes = [note for part in dict.fromkeys(parts) for note in part.notes]
        self.starts = [0]
        for part in parts:
            self.starts.append(self.starts[-1] + len(part))

    def __len__(self) -> int:
        return self.starts[-1]

    def _find(self, index: int) -> tuple[Source, int]:
        part = bisect_right(self.starts, index) - 1
        return self.parts[part], index - self.starts[part]

    def row_name(self, index: int) -> str:
        """The part's name of the row."""
        part, inside = self._find(index)
        return part.row_name(inside)

    def record(self, index: int, seed: int) -> Record:
        """The part's record."""
        part, inside = self._find(index)
        return part.record(inside, seed)

    @property
    def blocks(self) -> Sequence[Block]:
        """The parts' blocks."""
        return [block for part in self.parts for block in part.blocks]

    def stamp(self) -> str:
        """The parts' stamps."""
        stamps = [part.stamp() for part in self.parts]
        return "\n".join(stamps) if all(stamps) else ""


@dataclass(frozen=True)
class Entry:
    """An entry of the list.

    Attributes:
        data: As `--data`; a relative path is relative to the list's folder.
        repeat: How often its rows come in an epoch, at least 1.
        task: Name of the task of its rows; empty = drawn from the run's, or as the row says.
        columns: As `--columns`; paths are relative like `data`.
    """

    data: str
    repeat: int = 1
    task: str = ""
    columns: Sequence[str] = field(default_factory=list)


class Member(BaseSource):
    """A data set of a list: messages name it before the row, and its rows are of its task."""

    def __init__(self, source: Source, entry: Entry) -> None:
        self.source, self.entry, self.seeded = source, entry, source.seeded
        self.notes = [f"{entry.data}: {note}" for note in source.notes]

    def __len__(self) -> int:
        return len(self.source)

    def row_name(self, index: int) -> str:
        """The source's: random draws belong to it, in a list or alone."""
        return self.source.row_name(index)

    def record(self, index: int, seed: int) -> Record:
        """The source's record; Failure if it is of another task."""
        try:
            record = self.source.record(index, seed)
        except Failure as error:
            raise Failure(f"{self.entry.data}: {error}") from None
        name, task = f"{self.entry.data}: {record.name}", self.entry.task or None
        if task and record.task not in (None, task):
            raise Failure(f"{name}: task must be {task!r}, as the list says, got {record.task!r}")
        return replace(record, name=name, task=task or record.task)

    @property
    def blocks(self) -> Sequence[Block]:
        """The source's blocks."""
        return self.source.blocks

    def stamp(self) -> str:
        """The source's stamp."""
        return self.source.stamp()


class Mixture(Shards):
    """The data sets of a list, one after the other; rows of one with `repeat` n are there n times.

    Args:
        entries: The list.
        sources: Its data sets, opened.
        repeats: False: each data set once, for what needs a row once.
    """

    def __init__(self, entries: Sequence[Entry], sources: Sequence[Source], repeats: bool = True) -> None:
        members: list[Member] = []
        for entry, source in zip(entries, sources, strict=True):
            members += [Member(source, entry)] * (entry.repeat if repeats else 1)
        super().__init__(members)
        self.shares = [[len(source), entry.repeat, entry.task] for entry, source in zip(entries, sources, strict=True)]
        self.seeded = any(member.seeded for member in members)
        self.tasks = frozenset(entry.task for entry in entries if entry.task)


def read_entries(path: Path) -> list[Entry]:
    """Read and check a list; UsageError names the entry that is wrong."""
    try:
        listed = json.loads(decoded(path.read_bytes(), str(path)))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"data must be a JSON list of data sets, got {path}: {error}") from None
    if not isinstance(listed, list) or not listed:
        raise UsageError(f"{path} must hold a list of at least one data set, got {json.dumps(listed)[:60]}")
    return [_entry(f"{path} entry {i}", entry) for i, entry in enumerate(listed, 1)]


def _entry(name: str, entry: Any) -> Entry:
    known = [f.name for f in fields(Entry)]
    if not isinstance(entry, dict) or set(entry) - set(known):
        raise UsageError(f"{name} must be an object with keys of {known}, got {json.dumps(entry)[:80]}")
    data = entry.get("data")
    if not isinstance(data, str) or not data or data.lower().endswith(".json"):
        raise UsageError(f"{name} must have a data set that is not a list itself as data, got {data!r}")
    repeat = entry.get("repeat", 1)
    if type(repeat) is not int or not 1 <= repeat <= 1000:
        raise UsageError(f"{name} must have a whole number of 1 to 1000 as repeat, got {repeat!r}")
    columns = entry.get("columns", [])
    if not isinstance(columns, list) or not all(isinstance(c, str) for c in columns):
        raise UsageError(f"{name} must have a list of strings as columns, got {columns!r}")
    task = entry.get("task", "")
    if not isinstance(task, str) or (task and task not in TASKS):
        raise UsageError(f"{name} must have one of {sorted(TASKS)} as task, got {task!r}")
    return Entry(**entry)
