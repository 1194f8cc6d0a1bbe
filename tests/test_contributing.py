"""The examples of CONTRIBUTING.md: pasted into a module they run, and pass ruff and mypy."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from realgeneral.data.samples import PairDataset
from realgeneral.tasks import TASKS, get_task

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports the block that defines a name as a module, and gives what it defines."""

    def paste(name: str) -> Any:
        (block,) = (block for block in BLOCKS if f" {name}(" in block)
        (tmp_path / f"pasted_{name}.py").write_text(f"from __future__ import annotations\n\n{block}")
        monkeypatch.syspath_prepend(tmp_path)
        return getattr(importlib.import_module(f"pasted_{name}"), name)

    return paste


def test_a_task(pasted: Callable[[str], Any]) -> None:
    """It is known by its name, with its option."""
    try:
        pasted("Posterized")
        made = get_task("posterized:bits=1").condition(Image.linear_gradient("L").convert("RGB"), 0)
        assert len(set(made.get_flattened_data())) == 2
    finally:
        del TASKS["posterized"]


def test_a_source(pasted: Callable[[str], Any], tmp_path: Path) -> None:
    """Its rows become samples."""
    (tmp_path / "data").mkdir()
    Image.new("RGB", (32, 16), "red").save(tmp_path / "data" / "a_red_pot.png")
    source = pasted("PromptInName")(tmp_path / "data")
    sample = PairDataset(source, ["colouring"], [], (32, 16), 0, strict=True)[0]
    assert sample.prompt == "a red pot"
    assert source.row(0, 0).target.size == (32, 16)
    assert source.stamp()


def test_a_metric(pasted: Callable[[str], Any]) -> None:
    """One value a picture."""
    black, white = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    assert pasted("mean_absolute_error")(black, white).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("tool", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]])
def test_the_examples_pass(tmp_path: Path, tool: list[str]) -> None:
    """As modules of the package would."""
    files = []
    for i, block in enumerate(BLOCKS):
        path = tmp_path / f"example_{i}.py"
        path.write_text(f'"""An example."""\n\nfrom __future__ import annotations\n\n{block}')
        files.append(str(path))
    assert files
    config = (
        ["--config", str(ROOT / "pyproject.toml")] if tool[0] == "ruff" else ["--config-file", str(ROOT / "pyproject.toml")]
    )
    run = subprocess.run([sys.executable, "-m", *tool, *config, *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
