"""Rows from a WebDataset tar file."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

from realgeneral.data.columns import ColumnMap
from realgeneral.data.rows import BaseSource, Picture, Record, make_record
from realgeneral.data.sources.folder import PICTURES
from realgeneral.errors import Failure, escaped
from realgeneral.files import decoded, file_stamp
from realgeneral.pictures import MAX_BYTES


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
                places: dict[str, tuple[int, int]] = {}
                for member in tar:
                    folder, _, file = member.name.rpartition("/")
                    if member.isfile():
                        places[member.name] = (member.offset_data, member.size)
                    elif member.islnk() and member.linkname in places:  # a second name of a file before it
                        places[member.name] = places[member.linkname]
                    if member.name in places and not file.startswith("._"):  # those are macOS's notes on other files
                        key, _, extension = file.partition(".")
                        members.setdefault(f"{folder}/{key}" if folder else key, {})[extension.lower()] = places[member.name]
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
        return escaped(f"{self.path.name} {self.samples[index][0]}")

    def record(self, index: int, seed: int) -> Record:
        """Read a sample's members."""
        members = self.samples[index][1]
        described: dict[str, Any] = {}
        try:
            if "json" in members:
                described = json.loads(decoded(self._bytes(members["json"]), "the json member"))
                if not isinstance(described, dict):
                    raise ValueError(f"{type(described).__name__} instead of a JSON object")
            if "txt" in members:
                described["prompt"] = described["txt"] = decoded(self._bytes(members["txt"]), "the txt member").strip()
        except (Failure, ValueError, RecursionError) as error:
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
        row = self.columns({**described, **pictures})
        if len(pictures) > 1 and not row.get("target"):
            raise Failure(
                f"{self.row_name(index)} must have a target picture KEY.SUFFIX, got members {sorted(pictures)} of that key, "
                "which ends at the first dot of a name"
            )
        return make_record(self.row_name(index), row, self._picture)

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
        if value[1] > MAX_BYTES:
            raise Failure(f"pictures in {self.path.name} must have at most {MAX_BYTES} bytes, got {value[1]}")
        return Picture(self._bytes(value))


def _numbered(member: str) -> list[tuple[int, str]]:
    """A sort key by which condition.10.png comes after condition.9.png."""
    return [(int(part), "") if part.isdecimal() and len(part) < 10 else (-1, part) for part in member.split(".")]
