"""Several data sets as one: a .json list of what to train on, how often, and as which task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from realgeneral.errors import Failure, UsageError
from realgeneral.records import BaseSource, Block, Record, Source, file_stamp
from realgeneral.sources import BUILT_IN, Shards, open_source
from realgeneral.tasks import TASKS


@dataclass(frozen=True)
class Part:
    """An entry of the list.

    Attributes:
        data: As `--data`; a relative path is relative to the list's folder.
        repeat: How often its rows come in an epoch, at least 1.
        task: Name of the task of its rows; empty = drawn from the run's, or as the row says.
        columns: As `--columns`.
    """

    data: str
    repeat: int = 1
    task: str = ""
    columns: Sequence[str] = field(default_factory=list)


class Member(BaseSource):
    """A data set of a list: its rows are named after it, and are of its task."""

    def __init__(self, source: Source, part: Part) -> None:
        self.source, self.part, self.seeded = source, part, source.seeded

    def __len__(self) -> int:
        return len(self.source)

    def row_name(self, index: int) -> str:
        """The source's name of the row, with the data set's before it unless it is a built-in one."""
        name = self.source.row_name(index)
        return name if self.part.data in BUILT_IN else f"{self.part.data}: {name}"

    def record(self, index: int, seed: int) -> Record:
        """The source's record; Failure if it is of another task."""
        record, name, task = self.source.record(index, seed), self.row_name(index), self.part.task or None
        if task and record.task not in (None, task):
            raise Failure(f"{name}: task must be {task!r}, as the list says, got {record.task!r}")
        return replace(record, name=name, task=task or record.task)

    @property
    def blocks(self) -> Sequence[Block]:
        """The source's blocks."""
        return self.source.blocks

    def stamp(self) -> str:
        """The source's stamp, and the task."""
        stamp = self.source.stamp()
        return f"{stamp} {self.part.task}" if stamp else ""


class Mixture(Shards):
    """The data sets of a list, one after the other; rows of one with `repeat` n are there n times.

    Args:
        path: The .json file: a list of objects with the fields of `Part`.

    Raises:
        UsageError: It says something else.
        Failure: There is no such file, or a data set of it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        sources: list[Source] = []
        parts = read_parts(path)
        self.tasks = frozenset(part.task for part in parts if part.task)
        for part in parts:
            inside = part.data in BUILT_IN or part.data.startswith("hf:")
            source = open_source(part.data if inside else str(path.parent / part.data), part.columns)
            sources += [Member(source, part)] * part.repeat
        super().__init__(sources)
        self.seeded = any(source.seeded for source in sources)

    def stamp(self) -> str:
        """The list's and the parts' stamps."""
        stamp = super().stamp()
        return f"{file_stamp([self.path])}\n{stamp}" if stamp else ""


def read_parts(path: Path) -> list[Part]:
    """Read and check a list; UsageError names the entry that is wrong."""
    if not path.is_file():
        raise Failure(f"data must be an existing folder or file, got {path}")
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"data must be a JSON list of data sets, got {path}: {error}") from None
    if not isinstance(listed, list) or not listed:
        raise UsageError(f"{path} must hold a list of at least one data set, got {json.dumps(listed)[:60]}")
    return [_part(f"{path} entry {i}", entry) for i, entry in enumerate(listed, 1)]


def _part(name: str, entry: Any) -> Part:
    known = [f.name for f in fields(Part)]
    if not isinstance(entry, dict) or set(entry) - set(known):
        raise UsageError(f"{name} must be an object with keys of {known}, got {json.dumps(entry)[:80]}")
    data = entry.get("data")
    if not isinstance(data, str) or not data or data.endswith(".json"):
        raise UsageError(f"{name} must have a data set that is not a list itself as data, got {data!r}")
    repeat = entry.get("repeat", 1)
    if type(repeat) is not int or repeat < 1:
        raise UsageError(f"{name} must have a whole number of at least 1 as repeat, got {repeat!r}")
    columns = entry.get("columns", [])
    if not isinstance(columns, list) or not all(isinstance(c, str) for c in columns):
        raise UsageError(f"{name} must have a list of strings as columns, got {columns!r}")
    task = entry.get("task", "")
    if not isinstance(task, str) or (task and task not in TASKS):
        raise UsageError(f"{name} must have one of {sorted(TASKS)} as task, got {task!r}")
    return Part(**entry)
