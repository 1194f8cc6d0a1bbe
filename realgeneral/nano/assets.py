"""Files of the small model that ships with the package, and the word "nano" where a checkpoint or adapter is asked for."""

from __future__ import annotations

import os
from pathlib import Path

NANO = Path(__file__).resolve().parent
ASSETS = NANO / "assets"
BASE = ASSETS / "base"


def resolve_base(base: str | os.PathLike[str]) -> str:
    """A checkpoint folder or hub id; "nano" is the small model that ships with the package."""
    return str(ASSETS / "base") if str(base) == "nano" else str(base)


def resolve_adapter(adapter: str | os.PathLike[str]) -> str:
    """An adapter folder; "nano" is the adapter that ships with the package."""
    return str(ASSETS / "adapter") if str(adapter) == "nano" else str(adapter)
