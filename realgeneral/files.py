"""Files: written whole or not at all, by one process at a time, and told apart by their contents."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import socket
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


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str], name: str = "") -> Iterator[None]:
    """Hold a folder, or the part `name` of it, for this process alone; it is made if it is missing.

    The lock is the operating system's on a file `.lock` (`.NAME.lock`), so that of a process that was killed is free at once.

    Raises:
        Failure: Another process holds it; the message says which.
    """
    path = Path(folder) / (f".{name}.lock" if name else ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _open_locked(path)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)


def _open_locked(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the process that held it may have taken the file away in between: then another one is locked by its successor
            if path.exists() and os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        except BlockingIOError:
            holder = os.read(handle, 200).decode(errors="replace") or "another process"
            os.close(handle)
            raise Failure(f"{path.parent} must be written by one process at a time, but {holder} holds {path.name}") from None
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(handle)
            raise Failure(f"{path} must be on a file system with locks, got: {error.strerror}") from None
        os.close(handle)


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
            # the times of contents and of the entry: a copy may bring the former along
            lines.append(f"{file.absolute()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}")
        except (OSError, ValueError) as error:  # a link to nothing, a name that is none: its row is told when it is read
            lines.append(f"{file.absolute()} {getattr(error, 'errno', None)}")
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
        _update(digest, path)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's contents."""
    digest = hashlib.sha256()
    _update(digest, path)
    return digest.hexdigest()


def _update(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        while chunk := file.read(2**24):
            digest.update(chunk)


def decoded(data: bytes, name: str) -> str:
    """UTF-8 text with or without a byte-order mark; Failure for anything else."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Failure(f"{name} must be UTF-8 text, got: {error}") from None


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
