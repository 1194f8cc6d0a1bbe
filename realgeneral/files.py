"""Files: written whole or not at all, told apart by their contents, and outputs that can be written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from realgeneral.errors import Failure


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, shared: bool = False) -> Iterator[Path]:
    """A name beside `path` to write a file or folder to, which takes the place of `path` when the block ends.

    A reader never sees half of it. After an error what was there before stays, and nothing else is left.

    Args:
        path: File or folder; the folder above it is made.
        shared: Several processes may write it at once: each under a name of its own.
    """
    path = Path(path)
    # not by process id: containers on several machines that share the folder may have the same
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial" if shared else f"{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)  # a killed process left it
    try:
        yield partial
        if partial.is_dir():
            _remove(path)
        os.replace(partial, path)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def file_stamp(files: Iterable[Path]) -> str:
    """Names, sizes and times of files."""
    lines = []
    for file in files:
        try:
            status = os.stat(file)
            lines.append(f"{file.absolute()} {status.st_size} {status.st_mtime_ns}")
        except OSError as error:  # a link to nothing: its row is told when it is read
            lines.append(f"{file.absolute()} {error.errno}")
    return "\n".join(lines)


def check_output(path: str, file: bool = False) -> None:
    """Failure unless `path` is a folder that can be written or made, or a file in one; makes nothing."""
    place = Path(path).absolute()
    above = next(p for p in (place, *place.parents)[file:] if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        must = "be in a folder" if file else "be a folder"
        found = "is read-only" if above.is_dir() else "is a file"
        raise Failure(f"output must {must} that can be written, got {path} where {above} {found}")


def folder_fingerprint(folder: Path) -> str:
    """Hash of the names and contents of a folder's files."""
    digest = hashlib.sha256()
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    if not files:
        raise Failure(f"{folder} must hold the files of a model, found none")
    for path in files:
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while chunk := file.read(2**24):
                digest.update(chunk)
    return digest.hexdigest()


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Write a file whole or not at all; `shared` as in `replacing`."""
    with replacing(path, shared=shared) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record whole or not at all; numbers that JSON does not have (the interval of one value) are null."""
    write_text(path, json.dumps(_finite(record), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
