"""Rows from tables: parquet files, read one row group at a time, and Hugging Face `datasets`."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from realgeneral.data.columns import ColumnMap
from realgeneral.data.rows import WINDOW_BYTES, BaseSource, Block, Picture, Record, make_record
from realgeneral.errors import Failure, UsageError
from realgeneral.files import file_stamp


class RowGroups:
    """The row groups read last, shared by the files of a data set: at most twice a shuffle window in each process."""

    def __init__(self, capacity_bytes: int = 2 * WINDOW_BYTES) -> None:
        self.capacity_bytes = capacity_bytes
        self.entries: OrderedDict[tuple[Path, int], pa.Table | str] = OrderedDict()

    def read(self, source: ParquetSource, group: int) -> pa.Table:
        """A row group; Failure if it is damaged."""
        key = (source.path, group)
        if key not in self.entries:
            try:
                # one thread: the pool's threads do not survive the fork of a data-loading process
                self.entries[key] = source.file.read_row_group(group, columns=source.roots, use_threads=False)
            except (pa.ArrowException, OSError) as error:
                # told once per row, but read only once
                self.entries[key] = f"row group {group} of {source.path} must be complete, got: {error}"
            while len(self.entries) > 1 and sum(map(_nbytes, self.entries.values())) > self.capacity_bytes:
                self.entries.popitem(last=False)
        self.entries.move_to_end(key)
        table = self.entries[key]
        if isinstance(table, str):
            raise Failure(table)
        return table


def _nbytes(table: pa.Table | str) -> int:
    return 0 if isinstance(table, str) else int(table.nbytes)


def _to_dict(row: pa.Table, name: str) -> dict[str, Any]:
    """The one row of a table; Failure if a string of it is none."""
    try:
        return row.to_pylist()[0]  # type: ignore[no-any-return]
    except UnicodeDecodeError as error:
        raise Failure(f"{name} must hold UTF-8 strings, got: {error}") from None


class ParquetSource(BaseSource):
    """A parquet file with columns target, prompt, and optionally condition, task, subject, or mapped ones.

    Pictures are encoded bytes, or Hugging Face's {"bytes": ...}; `condition` may be a list of them. Only the columns that are
    needed are read, one row group at a time.
    """

    def __init__(self, path: Path, columns: ColumnMap, groups: RowGroups) -> None:
        self.path, self.columns, self.groups = path, columns, groups
        self._open()
        self.roots = columns.roots(self.file.schema_arrow.names, str(path))
        metadata = self.file.metadata
        sizes = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        self._blocks = [Block(group.num_rows, group.total_byte_size) for group in sizes]
        self.starts = [0, *accumulate(block.rows for block in self._blocks)]

    def _open(self) -> None:
        try:
            self.file = pq.ParquetFile(self.path, memory_map=True)
        except (pa.ArrowException, OSError) as error:
            raise Failure(f"{self.path} must be a complete parquet file, got: {error}") from None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "file": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return self.starts[-1]

    def row_name(self, index: int) -> str:
        """The row's number."""
        return f"{self.path.name} row {index}"

    def record(self, index: int, seed: int) -> Record:
        """Read a row, and with it its row group."""
        group = bisect_right(self.starts, index) - 1
        try:
            table = self.groups.read(self, group)
        except Failure as error:
            raise Failure(f"{self.row_name(index)}: {error}") from None
        described = _to_dict(table.slice(index - self.starts[group], 1), self.row_name(index))
        return make_record(self.row_name(index), self.columns(described), self._picture)

    @property
    def blocks(self) -> Sequence[Block]:
        """The row groups."""
        return self._blocks

    def stamp(self) -> str:
        """Of the file, and of what is read of it."""
        return f"{self.columns} {file_stamp([self.path])}"

    def _picture(self, value: Any) -> Picture:
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise Failure(f"pictures in {self.path.name} must be bytes, got {type(data).__name__}")
        return Picture(data)


class HuggingFaceSource(BaseSource):
    """A `datasets.Dataset`, memory-mapped: rows in any order; pictures are decoded here, not by `datasets`."""

    def __init__(self, dataset: Any, name: str, columns: ColumnMap) -> None:
        self.name, self.columns = name, columns
        roots = columns.roots(dataset.column_names, name)
        # as Arrow, so that pictures stay encoded
        self.dataset = dataset.select_columns(roots).with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def row_name(self, index: int) -> str:
        """The row's number."""
        return f"{self.name} row {index}"

    def stamp(self) -> str:
        """Of the data set's fingerprint; picture files that its rows name by path are taken not to change."""
        return f"{self.columns} {self.dataset._fingerprint}"

    def record(self, index: int, seed: int) -> Record:
        """Read a row."""
        described = _to_dict(self.dataset[index : index + 1], self.row_name(index))
        return make_record(self.row_name(index), self.columns(described), self._picture)

    def _picture(self, value: Any) -> Picture:
        if isinstance(value, dict):
            path = value.get("path")
            value = value["bytes"] if value.get("bytes") is not None else Path(path) if path else None
        if not isinstance(value, bytes | Path):
            raise Failure(f"pictures in {self.name} must be of datasets' Image or bytes, got {type(value).__name__}")
        return Picture(value)


def open_huggingface(path: str, columns: ColumnMap) -> HuggingFaceSource:
    """Open "hf:NAME[:CONFIG][@SPLIT]" (split "train" unless given), or a folder that `save_to_disk` wrote.

    Raises:
        UsageError: The package `datasets` is missing.
        Failure: The data set, its configuration or split is not there.
    """
    try:
        import datasets
    except ImportError:
        raise UsageError(f"data {path} needs the package datasets: pip install 'realgeneral[datasets]'") from None
    name, _, split = path.removeprefix("hf:").partition("@")
    try:
        if path.startswith("hf:"):
            name, _, config = name.partition(":")
            dataset = datasets.load_dataset(name, config or None, split=split or "train")
        else:
            dataset = datasets.load_from_disk(path)
            if isinstance(dataset, datasets.DatasetDict):
                dataset = dataset["train"]
    except (OSError, ValueError, KeyError) as error:  # its own errors derive from these
        raise Failure(f"data {path} must be a data set that can be loaded, got: {' '.join(str(error).split())}") from None
    return HuggingFaceSource(dataset, Path(name).name, columns)
