"""The layout of the packages is kept, and the check that keeps it fails on each thing that it forbids."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architecture import MAX_MODULES, MAX_TOP, findings, imports_of_tests

ROOT = Path(__file__).parents[1]
# a small house without a fault: every kind of import that is allowed
GOOD = {
    "realgeneral/__init__.py": (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from realgeneral.model.network import Network\n    from rgkernels import __version__\n"
    ),
    "realgeneral/__main__.py": "from realgeneral.commands.cli import main\n",
    "realgeneral/errors.py": "class Failure(Exception): ...\n",
    "realgeneral/files.py": "from realgeneral.errors import Failure\n",
    "realgeneral/tasks.py": "import torch\ndef estimator():\n    from transformers import pipeline\n",
    "realgeneral/settings/__init__.py": '"""Options."""\n',
    "realgeneral/settings/options.py": "from realgeneral.errors import Failure\n",
    "realgeneral/settings/train.py": 'from realgeneral.settings.options import option\nRUN = "realgeneral.commands.cli"\n',
    "realgeneral/model/__init__.py": '"""The network."""\n',
    "realgeneral/model/network.py": (
        "import diffusers\nimport realgeneral.tasks\nfrom . import adapter\nfrom ..errors import Failure\n"
    ),
    "realgeneral/model/adapter.py": "import peft\n",
    "realgeneral/data/rows.py": "from realgeneral import files\nfrom realgeneral.settings import train\n",
    "realgeneral/generation/pipeline.py": "from realgeneral.model import network\n",
    "realgeneral/training/train.py": "from realgeneral.data.rows import Row\nfrom realgeneral import Network, __version__\n",
    "realgeneral/evaluation/table.py": "from realgeneral.generation.pipeline import Pipeline\n",
    "realgeneral/commands/cli.py": (
        "def train():\n    from realgeneral.training.train import train\n    from realgeneral.evaluation import table\n"
    ),
    "rgkernels/_patch.py": "import diffusers\n",
    "rgkernels/ops.py": "import torch\nfrom rgkernels import _patch\n",
}


def build(root: Path, changes: dict[str, str]) -> Path:
    for name, text in {**GOOD, **changes}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_packages_keep_their_layout() -> None:
    """Imports run one way, in no circle; folders are small, and importing one loads nothing else."""
    assert findings(ROOT) == []


def test_what_is_allowed(tmp_path: Path) -> None:
    """Downward imports in every spelling, doors, libraries where they belong, and modules in strings."""
    assert findings(build(tmp_path, {"realgeneral/py.typed": ""})) == []


UP = "imports run down, and {} is above {}"
APART = "{} and {} do not know each other"


@pytest.mark.parametrize(
    ("file", "text", "module", "rule"),
    [
        ("files", "\nfrom realgeneral.model.network import Network", "model.network", UP.format("model", "files")),
        ("tasks", "import realgeneral.data.rows as r", "data.rows", UP.format("data", "tasks")),
        ("nano/assets", "from realgeneral.generation import pipeline", "generation.pipeline", UP.format("generation", "nano")),
        ("model/vae", "from ..generation.pipeline import P", "generation.pipeline", UP.format("generation", "model")),
        ("data/store", "def f():\n    from realgeneral.training import train", "training.train", UP.format("training", "data")),
        (
            "data/rows",
            "if TYPE_CHECKING:\n    from ..evaluation import table",
            "evaluation.table",
            UP.format("evaluation", "data"),
        ),
        ("model/vae", "from realgeneral.data.rows import Row", "data.rows", APART.format("data", "model")),
        ("data/store", "from realgeneral.model.adapter import save", "model.adapter", APART.format("data", "model")),
        ("data/store", "from realgeneral import Network", "model.network", APART.format("data", "model")),
        ("data/sources/tar", "from ...model import adapter", "model.adapter", APART.format("data", "model")),
        ("data/store", "import realgeneral.generation.pipeline", "generation.pipeline", APART.format("data", "generation")),
        ("generation/bases", "from realgeneral.data import rows", "data.rows", APART.format("data", "generation")),
        ("training/plan", "from ..evaluation import table", "evaluation.table", APART.format("evaluation", "training")),
        ("evaluation/report", "from ..training import train", "training.train", APART.format("evaluation", "training")),
        ("training/plan", "from realgeneral.commands import cli", "commands.cli", "nothing knows a command"),
        ("settings/data", "from realgeneral.files import replacing", "files", "settings import errors alone"),
        ("evaluation/report", "from realgeneral import __main__", "__main__", "the package's doors are for users"),
    ],
)
def test_order(tmp_path: Path, file: str, text: str, module: str, rule: str) -> None:
    """Up, between strangers, of a command or a door; in every spelling, in functions and under conditions."""
    line, importer = text.count("\n") + 1, file.replace("/", ".")
    told = f"realgeneral/{file}.py:{line}: {rule}: realgeneral.{importer} must not import realgeneral.{module}"
    assert findings(build(tmp_path, {f"realgeneral/{file}.py": text})) == [told]


def test_a_room_without_a_level(tmp_path: Path) -> None:
    """A new room must be put in its place."""
    told = "realgeneral/kernels.py:1: a room must have a level in tests/architecture.py, got kernels"
    assert findings(build(tmp_path, {"realgeneral/kernels.py": "import realgeneral.model.network"})) == [told]


@pytest.mark.parametrize(
    ("file", "text", "library", "rule"),
    [
        ("realgeneral/data/rows", "import benchmarks.common", "benchmarks", "what is installed stands alone"),
        ("realgeneral/nano/assets", "from recipes import base", "recipes", "what is installed stands alone"),
        ("realgeneral/files", "from tests.realgeneral import helpers", "tests", "what is installed stands alone"),
        ("rgkernels/ops", "from benchmarks import shapes", "benchmarks", "what is installed stands alone"),
        ("realgeneral/files", "from diffusers.models import ModelMixin", "diffusers", "the ground knows no model"),
        ("realgeneral/files", "def f():\n    import diffusers", "diffusers", "the ground knows no model"),
        ("realgeneral/prompts", "import peft", "peft", "the ground knows no model"),
        ("realgeneral/nano/assets", "import diffusers", "diffusers", "the ground knows no model"),
        ("realgeneral/tasks", "from transformers import pipeline", "transformers", "the ground knows no model"),
        (
            "realgeneral/settings/data",
            "def f():\n    import transformers",
            "transformers",
            "--help must not wait for a library",
        ),
        ("realgeneral/settings/data", "from torch import Tensor", "torch", "--help must not wait for a library"),
        ("realgeneral/errors", "import torch", "torch", "--help must not wait for a library"),
        ("rgkernels/ops", "from realgeneral.errors import Failure", "realgeneral", "the kernels stand alone"),
        ("rgkernels/ops", "import diffusers", "diffusers", "only rgkernels/_patch.py knows diffusers"),
    ],
)
def test_libraries(tmp_path: Path, file: str, text: str, library: str, rule: str) -> None:
    """What is not installed, models on the ground, torch where --help would wait for it, and what rgkernels is kept from."""
    line, importer = text.count("\n") + 1, file.replace("/", ".")
    told = f"{file}.py:{line}: {rule}: {importer} must not import {library}"
    assert findings(build(tmp_path, {f"{file}.py": text})) == [told]


def test_circles(tmp_path: Path) -> None:
    """Two modules, three, and one whose second import waits in a function."""
    changes = {
        "files.py": "from realgeneral.prompts import cut",
        "prompts.py": "from realgeneral.pictures import load",
        "pictures.py": "import realgeneral.files",
        "model/adapter.py": "def f():\n    from realgeneral.model.network import Network",
    }
    assert findings(build(tmp_path, {f"realgeneral/{name}": text for name, text in changes.items()})) == [
        "realgeneral/pictures.py:1: imports run in no circle: "
        "realgeneral.files -> realgeneral.prompts -> realgeneral.pictures -> realgeneral.files",
        "realgeneral/model/adapter.py:2: imports run in no circle: "
        "realgeneral.model.network -> realgeneral.model.adapter -> realgeneral.model.network",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('"""The network."""\nfrom realgeneral.model import adapter\n', 2),
        ("x = 1\n", 1),
        ('"""The network."""\n\n__all__ = []\n', 3),
    ],
)
def test_inits(tmp_path: Path, text: str, line: int) -> None:
    """A docstring alone."""
    told = f"realgeneral/model/__init__.py:{line}: a folder's __init__ must hold a docstring alone"
    assert findings(build(tmp_path, {"realgeneral/model/__init__.py": text})) == [told]


def test_counts(tmp_path: Path) -> None:
    """Entries at the top, modules in a folder; one fewer is allowed."""
    present = {name.split("/")[1] for name in GOOD if name.startswith("realgeneral/")}
    top = {f"realgeneral/asset-{i}.json": "" for i in range(MAX_TOP - len(present))}
    modules = {f"realgeneral/model/part_{i}.py": "" for i in range(MAX_MODULES - 2)}
    assert findings(build(tmp_path, {**top, **modules, "realgeneral/py.typed": "", "realgeneral/__pycache__/x.pyc": ""})) == []
    assert findings(build(tmp_path, {"realgeneral/more.json": "", "realgeneral/model/more.py": ""})) == [
        "realgeneral: the package must have at most 15 entries at its top, got 16",
        "realgeneral/model: a folder must have at most 10 modules, got 11",
    ]


def test_tests_import_no_test(tmp_path: Path) -> None:
    """What tests share is in helpers: one test can be read, moved and run alone."""
    assert imports_of_tests(ROOT) == []
    changes = {
        "tests/test_a.py": "from tests.helpers.pictures import photo\nfrom tests.test_b import bomb\n",
        "tests/data/test_c.py": "from ..conftest import photo\n",
    }
    assert imports_of_tests(build(tmp_path, changes)) == [
        "tests/data/test_c.py:1: what tests share is in helpers: tests.data.test_c must not import tests.conftest.photo",
        "tests/test_a.py:2: what tests share is in helpers: tests.test_a must not import tests.test_b.bomb",
    ]
