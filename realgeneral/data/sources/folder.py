"""Rows from a folder: metadata.jsonl, or pictures with a caption beside each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from realgeneral.data.columns import ColumnMap
from realgeneral.data.rows import BaseSource, Picture, Record, check_text, make_record
from realgeneral.errors import Failure, UsageError
from realgeneral.files import file_stamp

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


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


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Failure(f"{name} must be UTF-8 text, got: {error}") from None
