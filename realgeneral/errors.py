"""The two kinds of errors that a command reports in one line."""

from __future__ import annotations

import re

# control characters and halves of characters: in a terminal a name must not do anything, and must be printable at all
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def escaped(text: str) -> str:
    """A name as it can be shown in one line: control characters, line breaks too, as escapes such as backslash x1b."""
    return _shown(text).replace("\t", "\\t").replace("\n", "\\n")


def _shown(text: str) -> str:
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class UsageError(ValueError):
    """An argument is wrong: exit status 2."""

    def __init__(self, message: str) -> None:
        super().__init__(_shown(message))


class Failure(RuntimeError):
    """The arguments are right but the work failed (a file, the data, the numbers): exit status 1."""

    def __init__(self, message: str) -> None:
        super().__init__(_shown(message))
