"""Their tests run only where a checkout of theirs is given; a refusal that is listed must happen, and nothing else may fail."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

import pytest

from tests.peers import theirs
from tests.peers.refusals import REFUSALS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--diffusers", type=Path, help="a checkout of diffusers whose tests run on our classes")


def pytest_configure(config: pytest.Config) -> None:
    if (checkout := config.getoption("--diffusers", None)) is None:
        return
    folder = checkout.resolve() / "tests"
    if not (folder / "testing_utils.py").is_file():
        raise pytest.UsageError(f"--diffusers must be a checkout of diffusers with its tests, got {checkout}")
    theirs.add(folder)
    for mark in sorted(set(re.findall(r"pytest\.mark\.(\w+)", (folder / "testing_utils.py").read_text()))):
        config.addinivalue_line("markers", f"{mark}: theirs")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    here = collection_path.parent == Path(__file__).parent and collection_path.name.startswith("test_")
    return True if here and config.getoption("--diffusers", None) is None else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unused = set(REFUSALS)
    ours = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in ours:
        item.add_marker(pytest.mark.filterwarnings("default"))
        for pattern in (p for p in REFUSALS if fnmatch.fnmatchcase(name(item), p)):
            unused.discard(pattern)
            refused = (NotImplementedError, TypeError, ValueError)
            item.add_marker(pytest.mark.xfail(reason=REFUSALS[pattern], raises=refused, strict=True))
    whole = {item.path.name for item in ours} == {path.name for path in Path(__file__).parent.glob("test_*.py")}
    if unused and whole:
        raise pytest.UsageError(f"each refusal must name a test that there is, got {sorted(unused)}")


def name(item: pytest.Item) -> str:
    """Class and function of a test, with its parameters."""
    return item.nodeid.partition("::")[2]
