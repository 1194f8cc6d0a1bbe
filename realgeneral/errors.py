"""The two kinds of errors that a command reports in one line."""

from __future__ import annotations


class UsageError(ValueError):
    """An argument is wrong: exit status 2."""


class Failure(RuntimeError):
    """The arguments are right but the work failed (a file, the data, the numbers): exit status 1."""
