"""Rows from a folder: metadata.jsonl, or pictures with a caption beside each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from realgeneral.data.columns import ColumnMap
from realgeneral.data.rows import BaseSource, Picture, Record, check_text, make_record
from realgeneral.errors import Failure, UsageError, escaped
from realgeneral.files import decoded, file_stamp

# what Pillow decodes by itself: no documents and videos, and nothing that it hands to another program
PICTURES = tuple(
    ".png .apng .jpg .jpeg .jpe .jfif .webp .bmp .dib .gif .tif .tiff .avif .jp2 .j2k .jpf .jpx "
    ".tga .ppm .pgm .pbm .pnm .qoi .ico".split()
)
MAX_CAPTION_BYTES = 2**20
# what people call the two columns that a row needs
_USUAL = {"target": ("file_name", "image", "image_path", "path", "file"), "prompt": ("text", "caption", "description")}


class FolderSource(BaseSource):
    """A folder with `metadata.jsonl`, or with pictures and a .txt caption of the same name beside each.

    Keys of metadata.jsonl: target, prompt, and optionally condition (one or a list), task, subject; paths relative to it.
    """

    def __init__(self, folder: Path, columns: ColumnMap) -> None:
        self.folder, self.columns = folder, columns
        listing = folder / "metadata.jsonl"
        if listing.is_file():
            lines = decoded(listing.read_bytes(), str(listing)).split("\n")
            self.rows = [(f"{listing.name} line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]
        else:
            if columns.fields:
                raise UsageError(f"columns must not be given for a folder of pictures with captions, got {folder}")
            files = sorted(folder.iterdir())
            pictures = [p for p in files if p.suffix.lower() in PICTURES and not p.name.startswith("._")]
            self.rows = [(p.name, "") for p in pictures]
            self.notes = _left_out(sorted({*files} - {*pictures}), {p.stem for p in pictures})

    def __len__(self) -> int:
        return len(self.rows)

    def row_name(self, index: int) -> str:
        """The picture's file name, or the line of metadata.jsonl."""
        return escaped(self.rows[index][0])

    def record(self, index: int, seed: int) -> Record:
        """A row; its pictures stay on disk."""
        file, line = self.rows[index]
        name = escaped(file)
        if not line:
            return make_record(name, {"target": file, "prompt": self._caption(file, name)}, self._picture)
        try:
            described = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Failure(f"{name} must be JSON, got: {error}") from None
        if not isinstance(described, dict):
            raise Failure(f"{name} must be a JSON object, got {type(described).__name__}")
        row = self.columns(described)
        missing = [key for key in _USUAL if row.get(key) is None and key not in self.columns.fields]
        guessed = {key: next((column for column in _USUAL[key] if column in described), "") for key in missing}
        if missing and all(guessed.values()):
            maps = " ".join(f"{key}={column}" for key, column in guessed.items())
            must = "a prompt string" if "prompt" in missing else "a target picture"
            raise Failure(f"{name} must have {must}, got the keys {sorted(described)}; --columns {maps} maps them")
        return make_record(name, row, self._picture)

    def stamp(self) -> str:
        """Of the listing, of each caption, and of the pictures that rows name, wherever they are and whatever their suffix."""
        files = [self.folder / "metadata.jsonl"]
        for i, (file, line) in enumerate(self.rows):
            if not line:
                files += [self.folder / file, (self.folder / file).with_suffix(".txt")]
                continue
            try:
                record = self.record(i, 0)
            except Failure:
                continue  # of the listing alone
            files += [p.source for p in (record.target, *record.conditions) if isinstance(p.source, Path)]
        return f"{self.columns} {file_stamp(files)}"

    def _caption(self, file: str, name: str) -> str:
        caption = (self.folder / file).with_suffix(".txt")
        if not caption.is_file():
            raise Failure(f"{name} must have a caption {escaped(caption.name)} beside it, got none")
        if (size := caption.stat().st_size) > MAX_CAPTION_BYTES:
            raise Failure(f"{name} must have a caption of at most {MAX_CAPTION_BYTES} bytes, got {size}")
        return decoded(caption.read_bytes(), escaped(caption.name)).strip()

    def _picture(self, value: Any) -> Picture:
        check_text("path", str(value))
        return Picture(self.folder / str(value))


def _left_out(files: Sequence[Path], stems: set[str]) -> tuple[str, ...]:
    """What a person would miss: sub-folders, files that no row stands for, and other programs' hidden ones."""
    others = [p for p in files if not (p.name.startswith(".") or (p.suffix == ".txt" and p.stem in stems))]
    kinds = {
        "folders inside it, whose pictures are not read": [p for p in others if p.is_dir()],
        f"files that are neither pictures ({', '.join(PICTURES[:6])}, ...) nor their captions": [
            p for p in others if not p.is_dir()
        ],
        "files of macOS beside the pictures": [p for p in files if p.name.startswith("._")],
    }
    return tuple(f"{len(found)} {kind}, such as {escaped(found[0].name)}" for kind, found in kinds.items() if found)
