"""Where training rows come from: a folder, parquet or WebDataset shards, Hugging Face `datasets`, packaged data, lists.

A row has a `target` picture, a `prompt`, and either `condition` picture(s) or a task that derives one.
"""

from __future__ import annotations

import glob
import sys
from collections.abc import Sequence
from pathlib import Path

from realgeneral.data.columns import ColumnMap, parse_columns
from realgeneral.data.rows import Source
from realgeneral.data.sources.folder import PICTURES, FolderSource
from realgeneral.data.sources.lists import Mixture, Shards, read_entries
from realgeneral.data.sources.packaged import BUILT_IN, built_in
from realgeneral.data.sources.tables import ParquetSource, RowGroups, open_huggingface
from realgeneral.data.sources.tar import TarSource
from realgeneral.errors import Failure, UsageError, escaped


def open_source(path: str, columns: Sequence[str] = (), *, repeats: bool = True, groups: RowGroups | None = None) -> Source:
    """Open training data by what its path is.

    Args:
        path: "nano" (emoji) or "avatars"; a folder of pictures, of .parquet or .tar shards, or written by `datasets`'
            save_to_disk; a .parquet or .tar file; a glob of those; "hf:NAME[:CONFIG][@SPLIT]"; a .json list of several of these
            (`realgeneral.data.sources.lists`).
        columns: As `parse_columns` takes them.
        repeats: Whether a list's rows are there as often as it says, or once.
        groups: Where parquet files keep what they read last; default: their own.

    Raises:
        Failure: No such file, or no rows in it.
        UsageError: Not a kind of data that is known, or a column map that is wrong.
    """
    source = _open_any(path, columns, repeats, RowGroups() if groups is None else groups)
    for note in source.notes:
        print(f"{escaped(path)}: {note}", file=sys.stderr, flush=True)
    return source


def _open_any(path: str, columns: Sequence[str], repeats: bool, groups: RowGroups) -> Source:
    a_list = path.lower().endswith(".json") and not Path(path).is_dir()
    if columns and (path in BUILT_IN or a_list):
        raise UsageError(f"columns must not be given for {path}, got {list(columns)}")
    if path in BUILT_IN:
        return built_in(path, "train")
    if a_list and Path(path).is_file():
        return _open_list(Path(path), repeats)
    source = _open(path, parse_columns(columns), groups)
    if len(source) == 0:
        raise Failure("; ".join([f"data must hold at least one row, got none in {path}", *source.notes]))
    return source


def _open(path: str, columns: ColumnMap, groups: RowGroups) -> Source:
    place = Path(path)
    if path.startswith("hf:") or (place / "dataset_info.json").is_file() or (place / "dataset_dict.json").is_file():
        return open_huggingface(path, columns)
    if glob.has_magic(path) and not place.exists():
        files = [Path(p) for p in sorted(glob.glob(path, recursive=True))]
        if not files:
            raise Failure(f"data must match at least one file, got none for {path}")
        return _open_shards(files, columns, groups)
    if not place.exists():
        raise Failure(f"data must be an existing folder or file, got {path}")
    if not place.is_dir():
        return _open_shards([place], columns, groups)
    if not (place / "metadata.jsonl").is_file():
        files = sorted(place.iterdir())
        shards = [p for p in files if p.suffix in (".parquet", ".tar") and p.is_file() and not p.name.startswith("._")]
        if shards and any(p.suffix.lower() in PICTURES for p in files):
            raise UsageError(f"data must be a folder of pictures or of shards, got {path} with both, such as {shards[0].name}")
        if shards:
            return _open_shards(shards, columns, groups)
    return FolderSource(place, columns)


def _open_list(path: Path, repeats: bool) -> Source:
    entries, groups, sources = read_entries(path), RowGroups(), []
    for i, entry in enumerate(entries, 1):
        columns = [str(path.parent / c) if c.endswith((".json", ".yaml", ".yml")) else c for c in entry.columns]
        try:
            sources.append(_open_any(_beside(path, entry.data), columns, True, groups))
        except (UsageError, Failure) as error:
            raise type(error)(f"{path} entry {i}: {error}") from None
    return Mixture(entries, sources, repeats)


def _beside(path: Path, data: str) -> str:
    """`data` with a relative path made relative to the list's folder."""
    if data in BUILT_IN or data.startswith("hf:"):
        return data
    folder = str(path.parent)
    return str(Path(glob.escape(folder) if glob.has_magic(data) else folder) / data)


def _open_shards(files: Sequence[Path], columns: ColumnMap, groups: RowGroups) -> Source:
    parts: list[Source] = []
    for file in files:
        if not file.is_file():
            raise Failure(f"data must be a folder, a .parquet or a .tar file, got {file}, which is no regular file")
        if file.suffix == ".parquet":
            parts.append(ParquetSource(file, columns, groups))
        elif file.suffix == ".tar":
            parts.append(TarSource(file, columns))
        else:
            raise UsageError(f"data must be a folder, a .parquet or a .tar file, got {file}")
    return parts[0] if len(parts) == 1 else Shards(parts)
