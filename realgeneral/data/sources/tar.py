"""Rows from a WebDataset tar file."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

from realgeneral.data.columns import ColumnMap
from realgeneral.data.rows import BaseSource, Picture, Record, make_record
from realgeneral.data.sources.folder import PICTURES
from realgeneral.errors import Failure
from realgeneral.files import file_stamp


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
