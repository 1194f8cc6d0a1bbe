"""`pytest benchmarks/`: collect bench_*.py, hand out the device, and keep the rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness.shapes import OPS, SHAPES, Shape
from benchmarks.harness.timing import default_device, leave_default_stream, summary, write_rows

ROWS = Path("outputs") / "benchmarks.jsonl"
_SHOWN = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where the rows go, and what runs."""
    parser.addoption("--rows", type=Path, default=ROWS, metavar="FILE", help=f"append JSONL rows to FILE (default: {ROWS})")
    parser.addoption("--shape", action="append", default=[], metavar="NAME", help="run this shape of harness/shapes.py")
    parser.addoption("--provider", action="append", default=[], metavar="NAME", help="models: run this provider only")
    parser.addoption("--layers", type=int, metavar="N", help="models: transformer blocks (default: all of the geometry)")
    parser.addoption("--steps", type=int, metavar="N", help="generation: denoising steps (default: 50, shape mid 10)")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Collect benchmarks by their own name pattern, unless pytest does already: by its configuration, or named as a file."""
    patterns = parent.config.getini("python_files")
    known = parent.session.isinitpath(file_path) or any(file_path.match(pattern) for pattern in patterns)
    if file_path.match("bench_*.py") and not known:
        module: pytest.Module = pytest.Module.from_parent(parent, path=file_path)
        return module
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One case per shape: those of the command line, else the benchmark's defaults for the device."""
    if "shape" not in metafunc.fixturenames:
        return
    mark = metafunc.definition.get_closest_marker("shapes")
    names = metafunc.config.getoption("--shape") or (mark.args[0] if mark else OPS)[default_device().type]
    if unknown := [name for name in names if name not in SHAPES]:
        raise pytest.UsageError(f"--shape must be one of {list(SHAPES)}, got {unknown[0]}")
    metafunc.parametrize("shape", [SHAPES[name] for name in names], ids=names)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All benchmarks at their first shape, then all at their second: a run that is cut off leaves what matters most."""
    ranks: dict[str, dict[str, int]] = {}

    def rank(item: pytest.Item) -> int:
        shape = item.callspec.params.get("shape") if hasattr(item, "callspec") else None
        own = ranks.setdefault(item.nodeid.partition("[")[0], {})
        return own.setdefault(shape.name, len(own)) if isinstance(shape, Shape) else 0

    items.sort(key=rank)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The current CUDA device, or the CPU."""
    device = default_device()
    leave_default_stream(device)
    return device


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    # each shape compiles anew; what is left of others only adds up to the recompile limit and to the memory
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


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
