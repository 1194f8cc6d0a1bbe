"""The two kinds of errors that a command reports in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(ValueError):
    """An argument is wrong: exit status 2."""


class Failure(RuntimeError):
    """The arguments are right but the work failed (a file, the data, the numbers): exit status 1."""


@contextmanager
def from_workers() -> Iterator[None]:
    """Around a data loader: its processes put their traceback before the message of an error, which is taken off."""
    try:
        yield
    except (UsageError, Failure) as error:
        kind = type(error)
        raise kind(str(error).rpartition(f"{kind.__name__}: ")[2].strip()) from None
