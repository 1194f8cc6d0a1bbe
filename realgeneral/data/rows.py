"""Rows before anything is decoded: pictures as files or bytes, their sizes from headers, their hashes from contents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image

from realgeneral.data.columns import Crop, Cropped, crop_box
from realgeneral.errors import Failure
from realgeneral.files import file_digest
from realgeneral.pictures import load_picture, picture_size


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
            picture_size(self.source)  # nothing but a picture is read to its end
            try:
                return self._cropped(file_digest(self.source))
            except OSError as error:
                raise Failure(f"{self.source} must be a picture file that can be read, got: {error.strerror}") from None
        return self._cropped(hashlib.sha256(data).hexdigest())

    def _cropped(self, digest: str) -> str:
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
    # tasks that some of its rows are known to be of before they are read
    tasks: frozenset[str]
    # of a list of data sets: (rows, repeat, task) of each, on which a run's order and draws depend
    shares: Sequence[Sequence[Any]]
    # what is in the data and makes no row, in words
    notes: Sequence[str]

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
        """Changes when the files (names, sizes, times) or the column map do; empty if that is not known."""


class BaseSource:
    """What sources share: rows are records decoded, any row costs the same, nothing is drawn."""

    seeded = False
    tasks: frozenset[str] = frozenset()
    shares: Sequence[Sequence[Any]] = ()
    notes: Sequence[str] = ()

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


def check_text(name: str, text: str) -> None:
    """Failure for half of a character of two, as a cut between them leaves: neither tokenizers nor file systems take it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Failure(f"{name} must be whole characters, got {text[error.start]!a} at {error.start}") from None


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
    for key in ("prompt", "task", "subject"):
        check_text(f"{name}: {key}", described.get(key) or "")
    condition = described.get("condition")
    listed = condition if isinstance(condition, list) else [] if condition is None else [condition]

    def find(value: Any) -> Picture:
        return Picture(picture(value.value).source, value.crop) if isinstance(value, Cropped) else picture(value)

    try:
        conditions = tuple(find(value) for value in listed)
        return Record(name, find(target), prompt, conditions, described.get("task"), described.get("subject"))
    except Failure as error:
        raise Failure(f"{name}: {error}") from None


# rows are shuffled within windows of row groups of at most so many bytes, so that one read of a group serves all of its rows
WINDOW_BYTES = 2**29
