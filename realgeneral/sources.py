"""Where training rows come from: a folder, parquet or WebDataset shards, Hugging Face `datasets`, packaged data, lists.

A row has a `target` picture, a `prompt`, and either `condition` picture(s) or a task that derives one.
"""

from __future__ import annotations

import glob
import json
import tarfile
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from realgeneral.data.columns import ColumnMap, parse_columns
from realgeneral.data.rows import BaseSource, Block, Picture, Record, Source, check_text, make_record
from realgeneral.errors import Failure, UsageError
from realgeneral.files import file_stamp
from realgeneral.tables import ParquetSource, RowGroups, open_huggingface

BUILT_IN = ("nano", "avatars")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def open_source(path: str, columns: Sequence[str] = (), *, repeats: bool = True, groups: RowGroups | None = None) -> Source:
    """Open training data by what its path is.

    Args:
        path: "nano" (emoji) or "avatars"; a folder of pictures, of .parquet or .tar shards, or written by `datasets`'
            save_to_disk; a .parquet or .tar file; a glob of those; "hf:NAME[:CONFIG][@SPLIT]"; a .json list of several of these
            (`realgeneral.mixture`).
        columns: As `parse_columns` takes them.
        repeats: Whether a list's rows are there as often as it says, or once.
        groups: Where parquet files keep what they read last; default: their own.

    Raises:
        Failure: No such file, or no rows in it.
        UsageError: Not a kind of data that is known, or a column map that is wrong.
    """
    a_list = path.lower().endswith(".json") and not Path(path).is_dir()
    if columns and (path in BUILT_IN or a_list):
        raise UsageError(f"columns must not be given for {path}, got {list(columns)}")
    if path in BUILT_IN:
        return built_in(path, "train")
    if a_list and Path(path).is_file():
        from realgeneral.mixture import Mixture

        return Mixture(Path(path), repeats)
    source = _open(path, parse_columns(columns), RowGroups() if groups is None else groups)
    if len(source) == 0:
        raise Failure(f"data must hold at least one row, got none in {path}")
    return source


def built_in(name: str, split: str) -> Source:
    """A split of the packaged data `name` of `BUILT_IN`; the held-out one is not augmented."""
    from realgeneral.nano.avatars import AvatarSource
    from realgeneral.nano.pairs import NanoSource

    augment = split == "train"
    return NanoSource(split, augment) if name == "nano" else AvatarSource(split, augment)


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
        shards = [p for p in files if p.suffix in (".parquet", ".tar") and p.is_file()]
        if shards and any(p.suffix.lower() in PICTURES for p in files):
            raise UsageError(f"data must be a folder of pictures or of shards, got {path} with both, such as {shards[0].name}")
        if shards:
            return _open_shards(shards, columns, groups)
    return FolderSource(place, columns)


def _open_shards(files: Sequence[Path], columns: ColumnMap, groups: RowGroups) -> Source:
    parts: list[Source] = []
    for file in files:
        if file.suffix == ".parquet":
            parts.append(ParquetSource(file, columns, groups))
        elif file.suffix == ".tar":
            parts.append(TarSource(file, columns))
        else:
            raise UsageError(f"data must be a folder, a .parquet or a .tar file, got {file}")
    return parts[0] if len(parts) == 1 else Shards(parts)


class Shards(BaseSource):
    """Several sources one after the other."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = list(parts)
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


class FolderSource(BaseSource):
    """A folder with `metadata.jsonl`, or with pictures and a .txt caption of the same name beside each.

    Keys of metadata.jsonl: target, prompt, and optionally condition (one or a list), task, subject; paths relative to it.
    """

    def __init__(self, folder: Path, columns: ColumnMap) -> None:
        self.folder, self.columns = folder, columns
        listing = folder / "metadata.jsonl"
        if listing.is_file():
            lines = _text(listing.read_bytes(), str(listing)).split("\n")
            self.rows = [(f"{listing.name} line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]
        else:
            if columns.fields:
                raise UsageError(f"columns must not be given for a folder of pictures with captions, got {folder}")
            pictures = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)
            self.rows = [(p.name, "") for p in pictures]

    def __len__(self) -> int:
        return len(self.rows)

    def row_name(self, index: int) -> str:
        """The picture's file name, or the line of metadata.jsonl."""
        return self.rows[index][0]

    def record(self, index: int, seed: int) -> Record:
        """A row; its pictures stay on disk."""
        name, line = self.rows[index]
        if not line:
            caption = (self.folder / name).with_suffix(".txt")
            if not caption.is_file():
                raise Failure(f"{name} must have a caption {caption.name} beside it, got none")
            return make_record(
                name, {"target": name, "prompt": _text(caption.read_bytes(), caption.name).strip()}, self._picture
            )
        try:
            described = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Failure(f"{name} must be JSON, got: {error}") from None
        if not isinstance(described, dict):
            raise Failure(f"{name} must be a JSON object, got {type(described).__name__}")
        return make_record(name, self.columns(described), self._picture)

    def stamp(self) -> str:
        """Of the listing and of the files of the folder and its folders; none if the listing names files elsewhere."""
        if any("../" in line or '"/' in line for _, line in self.rows):
            return ""
        files = (p for p in sorted(self.folder.rglob("*")) if p.suffix.lower() in (*PICTURES, ".txt", ".jsonl"))
        return f"{self.columns} {file_stamp(files)}"

    def _picture(self, value: Any) -> Picture:
        check_text("path", str(value))
        return Picture(self.folder / str(value))


class TarSource(BaseSource):
    """A WebDataset tar: members KEY.target.png, KEY.condition.png (or condition.0.png, ...), KEY.json or KEY.txt (the prompt).

    KEY.png or KEY.jpg stands for the target. Members are indexed once and read in any order. A column map may name members
    without their key ("jpg", "depth.png") and keys of the json.
    """

    def __init__(self, path: Path, columns: ColumnMap) -> None:
        self.path, self.columns = path, columns
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

    def record(self, index: int, seed: int) -> Record:
        """Read a sample's members."""
        members = self.samples[index][1]
        described: dict[str, Any] = {}
        try:
            if "json" in members:
                described = json.loads(self._bytes(members["json"]))
                if not isinstance(described, dict):
                    raise ValueError(f"{type(described).__name__} instead of a JSON object")
            if "txt" in members:
                described["prompt"] = described["txt"] = self._bytes(members["txt"]).decode().strip()
        except (ValueError, RecursionError) as error:
            raise Failure(f"{self.row_name(index)} must have a readable json or txt member, got: {error}") from None
        # pictures come from members, never by name
        described = {k: v for k, v in described.items() if k not in ("target", "condition")}
        pictures = {k: v for k, v in members.items() if f".{k.rpartition('.')[2]}" in PICTURES}
        targets = [v for k, v in pictures.items() if k.startswith("target.") or "." not in k]
        if targets:
            described["target"] = targets[0]
        conditions = [pictures[k] for k in sorted(pictures, key=_numbered) if k.startswith("condition.")]
        if conditions:
            described["condition"] = conditions
        return make_record(self.row_name(index), self.columns({**described, **pictures}), self._picture)

    def stamp(self) -> str:
        """Of the file, and of what is read of it."""
        return f"{self.columns} {file_stamp([self.path])}"

    def _bytes(self, place: tuple[int, int]) -> bytes:
        with self.path.open("rb") as file:
            file.seek(place[0])
            return file.read(place[1])

    def _picture(self, value: Any) -> Picture:
        if not isinstance(value, tuple):
            raise Failure(f"pictures in {self.path.name} must be members, got {value!r}")
        return Picture(self._bytes(value))


def _numbered(member: str) -> list[tuple[int, str]]:
    """A sort key by which condition.10.png comes after condition.9.png."""
    return [(int(part), "") if part.isdecimal() and len(part) < 10 else (-1, part) for part in member.split(".")]


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Failure(f"{name} must be UTF-8 text, got: {error}") from None
