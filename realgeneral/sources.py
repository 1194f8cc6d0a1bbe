"""Where training rows come from: a folder, parquet or WebDataset shards, Hugging Face `datasets`, or the packaged emoji.

A row has a `target` picture, a `prompt`, and either `condition` picture(s) or a task that derives one. Sources give records,
whose pictures are not decoded yet: their sizes come from the files' headers, their hashes from the files' bytes.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image

from realgeneral.columns import ColumnMap, Crop, Cropped, crop_box, parse_columns
from realgeneral.errors import Failure, UsageError
from realgeneral.pictures import load_picture, picture_size

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Picture:
    """A picture that is not decoded yet: a file, its bytes, or an image made in memory; and the part of it that counts."""

    source: Path | bytes | Image.Image
    crop: Crop | None = None

    def load(self) -> Image.Image:
        """Decode; Failure if it cannot be."""
        picture = self.source if isinstance(self.source, Image.Image) else load_picture(self.source)
        return picture if self.crop is None else picture.crop(crop_box(self.crop, *picture.size))

    def size(self) -> tuple[int, int]:
        """(width, height), from the header alone; Failure if it has none."""
        size = self.source.size if isinstance(self.source, Image.Image) else picture_size(self.source)
        if self.crop is None:
            return size
        left, top, right, bottom = crop_box(self.crop, *size)
        return right - left, bottom - top

    def digest(self) -> str:
        """Hash of the file's bytes (or the image's pixels) and the crop: what the decoded picture depends on."""
        if isinstance(self.source, Image.Image):
            data = f"{self.source.mode} {self.source.size} ".encode() + self.source.tobytes()
        elif isinstance(self.source, bytes):
            data = self.source
        else:
            try:
                data = self.source.read_bytes()
            except (OSError, ValueError):
                load_picture(self.source)  # says what is wrong, as without a hash
                raise
        digest = hashlib.sha256(data).hexdigest()
        return digest if self.crop is None else f"{digest}/{self.crop}"


@dataclass(frozen=True)
class Record:
    """One row: the target, its prompt, and what is known of its condition."""

    name: str
    target: Picture
    prompt: str
    conditions: tuple[Picture, ...] = ()
    task: str | None = None
    subject: str | None = None
    # another picture of the same subject: the condition of a task that cannot derive one from the target
    reference: Picture | None = None

    def load(self) -> Row:
        """Decode the pictures; Failure that names the row."""
        try:
            conditions = tuple(c.load() for c in self.conditions)
            reference = self.reference.load() if self.reference is not None else None
            return Row(self.name, self.target.load(), self.prompt, conditions, self.task, self.subject, reference)
        except Failure as error:
            raise Failure(f"{self.name}: {error}") from None


@dataclass(frozen=True)
class Row:
    """A record with its pictures decoded."""

    name: str
    target: Image.Image
    prompt: str
    conditions: tuple[Image.Image, ...] = ()
    task: str | None = None
    subject: str | None = None
    reference: Image.Image | None = None


class Block(NamedTuple):
    """Consecutive rows that are read together: how many, and their bytes in memory."""

    rows: int
    bytes: int


class Source(Protocol):
    """Random access to rows; reading a bad one raises Failure."""

    # whether a record depends on the seed it is asked with
    seeded: bool

    def __len__(self) -> int: ...

    def row_name(self, index: int) -> str:
        """What to call the row in a message."""

    def record(self, index: int, seed: int) -> Record:
        """Row `index`; sources that have several pictures of a thing choose by `seed`."""

    def row(self, index: int, seed: int) -> Row:
        """`record`, decoded."""

    @property
    def blocks(self) -> Sequence[Block]:
        """How the rows lie in storage."""

    def stamp(self) -> str:
        """Changes when the files do (names, sizes, times); empty if that is not known."""


class BaseSource:
    """What sources share: rows are records decoded, any row costs the same, nothing is drawn."""

    seeded = False

    def __len__(self) -> int:
        raise NotImplementedError

    def record(self, index: int, seed: int) -> Record:
        """See `Source`."""
        raise NotImplementedError

    def row(self, index: int, seed: int) -> Row:
        """See `Source`."""
        return self.record(index, seed).load()

    @property
    def blocks(self) -> Sequence[Block]:
        """See `Source`."""
        return [Block(len(self), 0)]

    def stamp(self) -> str:
        """See `Source`."""
        return ""


def open_source(path: str, columns: Sequence[str] = ()) -> Source:
    """Open training data by what its path is.

    Args:
        path: "nano"; a folder of pictures, of .parquet or .tar shards, or written by `datasets`' save_to_disk; a .parquet or
            .tar file; a glob of those; "hf:NAME[:CONFIG][@SPLIT]".
        columns: As `parse_columns` takes them.

    Raises:
        Failure: No such file, or no rows in it.
        UsageError: Not a kind of data that is known, or a column map that is wrong.
    """
    source: Source
    if path == "nano":
        from realgeneral.nano.pairs import NanoSource

        if columns:
            raise UsageError(f"columns must not be given for the nano data, got {list(columns)}")
        return NanoSource("train")
    source = _open(path, parse_columns(columns))
    if len(source) == 0:
        raise Failure(f"data must hold at least one row, got none in {path}")
    return source


def _open(path: str, columns: ColumnMap) -> Source:
    from realgeneral.tables import open_huggingface

    place = Path(path)
    if path.startswith("hf:") or (place / "dataset_info.json").is_file() or (place / "dataset_dict.json").is_file():
        return open_huggingface(path, columns)
    if glob.has_magic(path) and not place.exists():
        files = [Path(p) for p in sorted(glob.glob(path, recursive=True))]
        if not files:
            raise Failure(f"data must match at least one file, got none for {path}")
        return _open_shards(files, columns)
    if not place.exists():
        raise Failure(f"data must be an existing folder or file, got {path}")
    if not place.is_dir():
        return _open_shards([place], columns)
    if not (place / "metadata.jsonl").is_file():
        files = sorted(place.iterdir())
        shards = [p for p in files if p.suffix in (".parquet", ".tar") and p.is_file()]
        if shards and any(p.suffix.lower() in PICTURES for p in files):
            raise UsageError(f"data must be a folder of pictures or of shards, got {path} with both, such as {shards[0].name}")
        if shards:
            return _open_shards(shards, columns)
    return FolderSource(place, columns)


def _open_shards(files: Sequence[Path], columns: ColumnMap) -> Source:
    from realgeneral.tables import ParquetSource, RowGroups

    groups = RowGroups()
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
        except json.JSONDecodeError as error:
            raise Failure(f"{name} must be JSON, got: {error}") from None
        if not isinstance(described, dict):
            raise Failure(f"{name} must be a JSON object, got {type(described).__name__}")
        return make_record(name, self.columns(described), self._picture)

    def stamp(self) -> str:
        """Of the listing and of the files of the folder, and of its folders' files if the listing may name them."""
        return file_stamp(p for p in sorted(self.folder.rglob("*")) if p.suffix.lower() in (*PICTURES, ".txt", ".jsonl"))

    def _picture(self, value: Any) -> Picture:
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
        except ValueError as error:
            raise Failure(f"{self.row_name(index)} must have a readable json or txt member, got: {error}") from None
        # pictures come from members, never by name
        described = {k: v for k, v in described.items() if k not in ("target", "condition")}
        pictures = {k: v for k, v in members.items() if f".{k.rpartition('.')[2]}" in PICTURES}
        targets = [v for k, v in pictures.items() if k.startswith("target.") or "." not in k]
        if targets:
            described["target"] = targets[0]
        conditions = [v for k, v in sorted(pictures.items()) if k.startswith("condition.")]
        if conditions:
            described["condition"] = conditions
        return make_record(self.row_name(index), self.columns({**described, **pictures}), self._picture)

    def stamp(self) -> str:
        """Of the file."""
        return file_stamp([self.path])

    def _bytes(self, place: tuple[int, int]) -> bytes:
        with self.path.open("rb") as file:
            file.seek(place[0])
            return file.read(place[1])

    def _picture(self, value: Any) -> Picture:
        if not isinstance(value, tuple):
            raise Failure(f"pictures in {self.path.name} must be members, got {value!r}")
        return Picture(self._bytes(value))


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Failure(f"{name} must be UTF-8 text, got: {error}") from None


def file_stamp(files: Iterable[Path]) -> str:
    """Names, sizes and times of files."""
    lines = []
    for file in files:
        status = os.stat(file)
        lines.append(f"{file.absolute()} {status.st_size} {status.st_mtime_ns}")
    return "\n".join(lines)


def make_record(name: str, described: dict[str, Any], picture: Callable[[Any], Picture]) -> Record:
    """Check a record's fields and find its pictures; Failure that names the row."""
    prompt, target = described.get("prompt"), described.get("target")
    if not isinstance(prompt, str):
        raise Failure(f"{name} must have a prompt string, got {prompt!r}")
    if not target:
        raise Failure(f"{name} must have a target picture, got {target!r}")
    for key in ("task", "subject"):
        if not isinstance(described.get(key), str | None):
            raise Failure(f"{name} must have a string as {key}, got {described[key]!r}")
    condition = described.get("condition")
    listed = condition if isinstance(condition, list) else [] if condition is None else [condition]

    def find(value: Any) -> Picture:
        return Picture(picture(value.value).source, value.crop) if isinstance(value, Cropped) else picture(value)

    try:
        conditions = tuple(find(value) for value in listed)
        return Record(name, find(target), prompt, conditions, described.get("task"), described.get("subject"))
    except Failure as error:
        raise Failure(f"{name}: {error}") from None
