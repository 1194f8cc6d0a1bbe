"""`pytest benchmarks/`: collect bench_*.py, hand out the device, and keep the rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import default_device, summary, write_rows

ROWS = Path("outputs") / "benchmarks.jsonl"
_SHOWN = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where the rows go, and which shapes run."""
    parser.addoption("--rows", type=Path, default=ROWS, metavar="FILE", help=f"append JSONL rows to FILE (default: {ROWS})")
    parser.addoption("--shape", action="append", default=[], metavar="NAME", help="run this shape of benchmarks/shapes.py")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Collect benchmarks by their own name pattern, unless pytest does already: by its configuration, or named as a file."""
    patterns = parent.config.getini("python_files")
    known = parent.session.isinitpath(file_path) or any(file_path.match(pattern) for pattern in patterns)
    if file_path.match("bench_*.py") and not known:
        module: pytest.Module = pytest.Module.from_parent(parent, path=file_path)
        return module
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One case per shape: those of the command line, else the device's defaults."""
    from benchmarks.shapes import SHAPES, default_names

    if "shape" in metafunc.fixturenames:
        names = metafunc.config.getoption("--shape") or default_names(default_device())
        metafunc.parametrize("shape", [SHAPES[name] for name in names], ids=names)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The current CUDA device, or the CPU."""
    return default_device()


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[list[dict[str, Any]]], None]:
    """Write rows to the file at once, and keep them for the summary at the end."""

    def write(rows: list[dict[str, Any]]) -> None:
        write_rows(rows, request.config.getoption("--rows"))
        request.config.stash.setdefault(_SHOWN, []).extend(rows)

    return write


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Show what was measured, and what could not be."""
    rows = config.stash.get(_SHOWN, [])
    if not rows:
        return
    terminalreporter.section(f"measured on {rows[0]['device']}, torch {rows[0]['torch']}")
    terminalreporter.write_line(summary(rows))
    if default_device().type != "cuda":
        terminalreporter.write_line("no CUDA device: small shapes, and only what runs without one; these are not GPU results")
    terminalreporter.write_line(f"rows appended to {config.getoption('--rows')}")
