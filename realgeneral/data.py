"""Training data: rows from a folder, a parquet file, a WebDataset tar or the packaged emoji, and samples made from them.

A row has a `target` picture, a `prompt`, and either `condition` picture(s) or a task that derives one. Sample n of a run is a
pure function of (data, settings, n), whatever the number of workers: that makes a resumed run equal to an uninterrupted one.
"""

from __future__ import annotations

import json
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from realgeneral.embedding import subject_span_mask
from realgeneral.errors import Failure, UsageError
from realgeneral.pictures import fit_picture, load_picture, to_pixels
from realgeneral.tasks import Task, get_task

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Row:
    """One row: the target, its prompt, and what is known of its condition."""

    name: str
    target: Image.Image
    prompt: str
    conditions: tuple[Image.Image, ...] = ()
    task: str | None = None
    subject: str | None = None
    # another picture of the same subject: the condition of a task that cannot derive one from the target
    reference: Image.Image | None = None


class Source(Protocol):
    """Random access to rows; reading a bad one raises Failure."""

    def __len__(self) -> int: ...

    def row(self, index: int, seed: int) -> Row:
        """Row `index`; sources that have several pictures of a thing choose by `seed`."""

    def row_name(self, index: int) -> str:
        """What to call the row in a message."""


def open_source(path: str) -> Source:
    """Open training data by what its path is.

    Raises:
        Failure: No such file, or no rows in it.
        UsageError: Not a kind of data that is known.
    """
    source: Source
    if path == "nano":
        from realgeneral.nano.pairs import NanoSource

        return NanoSource("train")
    if not Path(path).exists():
        raise Failure(f"data must be an existing folder or file, got {path}")
    if Path(path).is_dir():
        source = FolderSource(Path(path))
    elif path.endswith(".parquet"):
        source = ParquetSource(Path(path))
    elif path.endswith(".tar"):
        source = TarSource(Path(path))
    else:
        raise UsageError(f"data must be a folder, a .parquet or a .tar file, got {path}")
    if len(source) == 0:
        raise Failure(f"data must hold at least one row, got none in {path}")
    return source


class FolderSource:
    """A folder with `metadata.jsonl`, or with pictures and a .txt caption of the same name beside each.

    Keys of metadata.jsonl: target, prompt, and optionally condition (one or a list), task, subject; paths relative to it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listing = folder / "metadata.jsonl"
        if listing.is_file():
            lines = _text(listing.read_bytes(), str(listing)).split("\n")
            self.rows = [(f"{listing.name} line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]
        else:
            pictures = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)
            self.rows = [(p.name, "") for p in pictures]

    def __len__(self) -> int:
        return len(self.rows)

    def row_name(self, index: int) -> str:
        """The picture's file name, or the line of metadata.jsonl."""
        return self.rows[index][0]

    def row(self, index: int, seed: int) -> Row:
        """Read a row's pictures."""
        name, line = self.rows[index]
        if not line:
            caption = (self.folder / name).with_suffix(".txt")
            if not caption.is_file():
                raise Failure(f"{name} must have a caption {caption.name} beside it, got none")
            return make_row(name, {"target": name, "prompt": _text(caption.read_bytes(), caption.name).strip()}, self._read)
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise Failure(f"{name} must be JSON, got: {error}") from None
        if not isinstance(record, dict):
            raise Failure(f"{name} must be a JSON object, got {type(record).__name__}")
        return make_row(name, record, self._read)

    def _read(self, value: Any) -> Image.Image:
        return load_picture(self.folder / str(value))


class ParquetSource:
    """A parquet file with columns target, prompt, and optionally condition, task, subject.

    Pictures are encoded bytes, or Hugging Face's {"bytes": ...}; `condition` may be a list of them.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        try:
            self.table = pq.read_table(path, memory_map=True)
        except (pa.ArrowException, OSError) as error:
            raise Failure(f"{path} must be a complete parquet file, got: {error}") from None
        for column in ("target", "prompt"):
            if column not in self.table.column_names:
                raise Failure(f"{path} must have a column {column!r}, got {self.table.column_names}")

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def row_name(self, index: int) -> str:
        """The row's number."""
        return f"{self.path.name} row {index}"

    def row(self, index: int, seed: int) -> Row:
        """Decode a row."""
        record = self.table.slice(index, 1).to_pylist()[0]
        return make_row(self.row_name(index), record, self._read)

    def _read(self, value: Any) -> Image.Image:
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise Failure(f"pictures in {self.path.name} must be bytes, got {type(data).__name__}")
        return load_picture(data)


class TarSource:
    """A WebDataset tar: members KEY.target.png, KEY.condition.png (or condition.0.png, ...), KEY.json or KEY.txt (the prompt).

    KEY.png or KEY.jpg stands for the target. Members are indexed once and read in any order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        members: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(path, "r:") as tar:  # members are read in place, so no compression
                for member in tar:
                    if member.isfile():
                        folder, _, file = member.name.rpartition("/")
                        key, _, extension = file.partition(".")
                        members.setdefault(f"{folder}/{key}" if folder else key, {})[extension.lower()] = (
                            member.offset_data,
                            member.size,
                        )
                # tarfile takes a cut in a header for the end; the real one is a block of zeros
                if self._bytes((tar.offset, tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("unexpected end of data")
        except (tarfile.TarError, OSError) as error:
            raise Failure(f"{path} must be a complete, uncompressed tar file, got: {error}") from None
        self.samples = sorted(members.items())

    def __len__(self) -> int:
        return len(self.samples)

    def row_name(self, index: int) -> str:
        """The sample's key."""
        return f"{self.path.name} {self.samples[index][0]}"

    def row(self, index: int, seed: int) -> Row:
        """Read a sample's members."""
        members = self.samples[index][1]
        record: dict[str, Any] = {}
        try:
            if "json" in members:
                described = json.loads(self._bytes(members["json"]))
                if not isinstance(described, dict):
                    raise ValueError(f"{type(described).__name__} instead of a JSON object")
                # pictures come from members, never by name
                record = {k: described[k] for k in ("prompt", "task", "subject") if k in described}
            if "txt" in members:
                record["prompt"] = self._bytes(members["txt"]).decode().strip()
        except ValueError as error:
            raise Failure(f"{self.row_name(index)} must have a readable json or txt member, got: {error}") from None
        pictures = {k: v for k, v in members.items() if f".{k.rpartition('.')[2]}" in PICTURES}
        targets = [v for k, v in pictures.items() if k.startswith("target.") or "." not in k]
        if targets:
            record["target"] = targets[0]
        conditions = [v for k, v in sorted(pictures.items()) if k.startswith("condition.")]
        if conditions:
            record["condition"] = conditions
        return make_row(self.row_name(index), record, self._read)

    def _bytes(self, place: tuple[int, int]) -> bytes:
        with self.path.open("rb") as file:
            file.seek(place[0])
            return file.read(place[1])

    def _read(self, value: Any) -> Image.Image:
        return load_picture(self._bytes(value))


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Failure(f"{name} must be UTF-8 text, got: {error}") from None


def make_row(name: str, record: dict[str, Any], read: Any) -> Row:
    """Check a record's fields and read its pictures; Failure that names the row."""
    prompt, target = record.get("prompt"), record.get("target")
    if not isinstance(prompt, str):
        raise Failure(f"{name} must have a prompt string, got {prompt!r}")
    if not target:
        raise Failure(f"{name} must have a target picture, got {target!r}")
    for key in ("task", "subject"):
        if not isinstance(record.get(key), str | None):
            raise Failure(f"{name} must have a string as {key}, got {record[key]!r}")
    condition = record.get("condition")
    listed = condition if isinstance(condition, list) else [] if condition is None else [condition]
    try:
        return Row(name, read(target), prompt, tuple(read(c) for c in listed), record.get("task"), record.get("subject"))
    except Failure as error:
        raise Failure(f"{name}: {error}") from None


@dataclass(frozen=True)
class Sample:
    """What the trainer needs of one pair; `skipped` names the bad rows that were passed over to get it.

    `number` is the place in the run, from which its noise is drawn.
    """

    number: int
    name: str
    target: Tensor
    conditions: Tensor
    prompt: str
    task: str
    subject: str | None
    skipped: tuple[str, ...] = ()


class TextCheck:
    """Failure for a row whose prompt is longer than the text window or does not name its subject."""

    def __init__(self, tokenizer: Any, window: int) -> None:
        self.tokenizer, self.window = tokenizer, window

    def __call__(self, row: Row) -> None:
        """Check one row."""
        length = len(self.tokenizer(row.prompt).input_ids)
        if length > self.window:
            raise Failure(f"{row.name} must have a prompt of at most {self.window} tokens, got {length}: {row.prompt[:60]!r}")
        try:
            subject_span_mask(self.tokenizer, [row.prompt], [row.subject], self.window)
        except ValueError as error:
            raise Failure(f"{row.name}: {error}") from None


class PairDataset(Dataset[Sample]):
    """Sample n of an endless run over a source: shuffled each epoch, its task and its condition drawn from (seed, n).

    Args:
        source: Rows.
        tasks: Specs to choose from for rows that do not name one.
        weights: Relative frequency of each task; empty = equal.
        size: (width, height) in pixels.
        seed: Seed of order, tasks and conditions.
        strict: Raise at a bad row instead of taking the next one.
        check: Called with each row; raises Failure for a bad one.
    """

    def __init__(
        self,
        source: Source,
        tasks: Sequence[str],
        weights: Sequence[float],
        size: tuple[int, int],
        seed: int,
        strict: bool,
        check: Callable[[Row], None] | None = None,
    ) -> None:
        self.source, self.size, self.seed, self.strict, self.check = source, size, seed, strict, check
        self.tasks = [get_task(spec) for spec in tasks]
        self.by_name = {task.name: task for task in self.tasks}
        self.weights = list(weights) or [1.0] * len(self.tasks)
        self._order: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, n: int) -> Sample:
        rng = random.Random(f"{self.seed}/{n}")
        skipped: list[str] = []
        for attempt in range(min(len(self.source), 1000)):
            index = self._row_index(n, attempt)
            try:
                return self.sample(index, rng.randrange(2**31), tuple(skipped), n)
            except Failure as error:
                if self.strict:
                    raise
                skipped.append(str(error))
        raise Failure(f"data must hold good rows, got {len(skipped)} bad ones in a row; the first: {skipped[0]}")

    def _row_index(self, n: int, attempt: int) -> int:
        # further attempts stay in the epoch, so that as many as there are rows find a good one
        epoch, position = divmod(n, len(self.source))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(len(self.source), generator=generator).tolist())
        return self._order[1][(position + attempt) % len(self.source)]

    def sample(self, index: int, seed: int, skipped: tuple[str, ...] = (), number: int = 0) -> Sample:
        """Make the sample of one row; Failure if the row is bad."""
        row = self.source.row(index, seed)
        if self.check is not None:
            self.check(row)
        task = self._task(row, seed)
        width, height = self.size
        target = fit_picture(row.target, width, height)
        try:
            conditions, made = row.conditions, target
            if not conditions and row.reference is not None and not task.derives:
                conditions = (row.reference,)
            elif not conditions:
                conditions, made = (task.condition(target, seed),), task.target(target, seed)
        except ValueError as error:
            raise Failure(f"{row.name}: {error}") from None
        pixels = torch.stack([to_pixels(fit_picture(c, width, height)) for c in conditions])
        return Sample(number, row.name, to_pixels(made), pixels, row.prompt, task.name, row.subject, skipped)

    def _task(self, row: Row, seed: int) -> Task:
        if row.task is not None:
            if row.task not in self.by_name:
                raise Failure(f"{row.name}: task must be one of {sorted(self.by_name)}, got {row.task!r}")
            return self.by_name[row.task]
        # a row with a condition and no task is of the first task; otherwise draw one whose condition can be had
        if row.conditions:
            return self.tasks[0]
        weights = [w if task.derives or row.reference else 0.0 for task, w in zip(self.tasks, self.weights, strict=True)]
        if not any(weights):
            raise Failure(f"{row.name} must have a condition, since none of {sorted(self.by_name)} derives one")
        return random.Random(seed).choices(self.tasks, weights)[0]


class RunSampler(Sampler[int]):
    """Sample numbers of one process from a starting step on: step s, micro-step by micro-step, interleaved over the ranks."""

    def __init__(self, start: int, stop: int, rank: int, world: int) -> None:
        self.start, self.stop, self.rank, self.world = start, stop, rank, world

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start + self.rank, self.stop, self.world))

    def __len__(self) -> int:
        return len(range(self.start + self.rank, self.stop, self.world))
