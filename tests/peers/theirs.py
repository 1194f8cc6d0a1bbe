"""The tests of diffusers as a package, from a checkout."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

# both repositories call their tests "tests"
PACKAGE = "diffusers_tests"


def add(folder: Path) -> None:
    """Make the package of a checkout's folder `tests`."""
    spec = importlib.util.spec_from_file_location(PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec is not None and spec.loader is not None
    sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)


def theirs(name: str) -> Any:
    """A module of the package; it runs against the diffusers that is installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"{PACKAGE}.{name}")
