"""What may import what: reads the imports of the packages and of their tests and names each that must go.

An import inside a function or under TYPE_CHECKING is an import like others; a module named in a string is none.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

# a room imports rooms of its own level and of those before it
LEVELS = (
    ("errors", "files", "nano", "pictures", "prompts", "settings", "tasks"),
    ("model",),
    ("data", "generation"),
    ("evaluation", "training"),
    ("commands",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
STRANGERS = ({"data", "model"}, {"data", "generation"}, {"evaluation", "training"})
# the package's two doors hand on what is further in
DOORS = ("__init__", "__main__")
NOT_PACKAGED = {"benchmarks", "recipes", "tests"}
MODEL_LIBRARIES = {"diffusers", "peft", "transformers"}
MAX_TOP, MAX_MODULES = 15, 10


@dataclass(frozen=True)
class Import:
    """One name that one line imports: `target` is a.b.c for both `import a.b.c` and `from a.b import c`."""

    file: str
    line: int
    module: str
    target: str
    in_function: bool

    @property
    def library(self) -> str:
        return self.target.partition(".")[0]


class Package:
    """The modules of a package and their imports, read from its folder."""

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.name, self.folder = root, name, root / name
        self.files = {self._module(file): file for file in sorted(self.folder.rglob("*.py"))}

    def _module(self, file: Path) -> str:
        return ".".join(file.relative_to(self.root).with_suffix("").parts).removesuffix(".__init__")

    def place(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    @cached_property
    def trees(self) -> dict[str, ast.Module]:
        return {module: ast.parse(file.read_text(encoding="utf-8")) for module, file in self.files.items()}

    @cached_property
    def imports(self) -> list[Import]:
        return [found for module in self.files for found in self._imports_of(module)]

    @cached_property
    def handed_on(self) -> dict[str, str]:
        """Where the names come from that the package itself gives: `from realgeneral import X` is an import of X's module."""
        return {
            f"{self.name}.{found.target.rpartition('.')[2]}": found.target
            for found in self._imports_of(self.name)
            if found.target not in self.files
        }

    def owner(self, target: str) -> str | None:
        """The module of this package that an import of `target` reaches."""
        target = target if target in self.files else self.handed_on.get(target, target)
        while target and target not in self.files:
            target = target.rpartition(".")[0]
        return target or None

    def _imports_of(self, module: str) -> Iterator[Import]:
        if module not in self.files:
            return
        file, tree = self.files[module], self.trees[module]
        functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        inside = {node for function in functions for node in ast.walk(function)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = self._base(file, node)
                targets = [f"{base}.{alias.name}" for alias in node.names]
            else:
                continue
            for target in targets:
                yield Import(self.place(file), node.lineno, module, target, node in inside)

    def _base(self, file: Path, node: ast.ImportFrom) -> str:
        """What stands between from and import, with leading dots resolved."""
        if not node.level:
            return node.module or ""
        here = file.relative_to(self.root).parts[: -node.level]
        return ".".join([*here, *filter(None, [node.module])])


def room(module: str) -> str:
    """The wing or the ground file of a module of realgeneral; the package itself is the door __init__."""
    return module.split(".")[1] if "." in module else "__init__"


def findings(root: Path) -> list[str]:
    """All that is wrong, a line each: file, line and rule."""
    house, kernels = Package(root, "realgeneral"), Package(root, "rgkernels")
    return [*order(house), *libraries(house, kernels), *circles(house), *inits(house), *counts(house)]


def order(house: Package) -> Iterator[str]:
    """Imports of one room by another: up, between strangers, of a command."""
    for module, file in house.files.items():
        if room(module) not in (*LEVEL, *DOORS):
            yield f"{house.place(file)}:1: a room must have a level in tests/architecture.py, got {room(module)}"
    for found in house.imports:
        owner = house.owner(found.target)
        here, there = room(found.module), room(owner or house.name)
        if owner is None or here == there or here not in LEVEL:
            continue
        if there in DOORS:
            rule = "the package's doors are for users"
        elif there == "commands":
            rule = "nothing knows a command"
        elif {here, there} in STRANGERS:
            rule = f"{' and '.join(sorted({here, there}))} do not know each other"
        elif LEVEL.get(there, 0) > LEVEL[here]:
            rule = f"imports run down, and {there} is above {here}"
        elif here == "settings" and there != "errors":
            rule = "settings import errors alone"
        else:
            continue
        yield f"{found.file}:{found.line}: {rule}: {found.module} must not import {owner}"


def libraries(house: Package, kernels: Package) -> Iterator[str]:
    """Imports of what is outside of the package."""
    for found in (*house.imports, *kernels.imports):
        library, here, ground = found.library, room(found.module), LEVEL.get(room(found.module)) == 0
        if library in NOT_PACKAGED:
            rule = "what is installed stands alone"
        elif found.module.startswith(kernels.name):
            if library == house.name:
                rule = "the kernels stand alone"
            elif library == "diffusers" and here != "_patch":
                rule = "only rgkernels/_patch.py knows diffusers"
            else:
                continue
        elif here in ("errors", "settings") and library in MODEL_LIBRARIES | {"torch"}:
            rule = "--help must not wait for a library"
        # in a function: a depth task opens its estimator when it first needs one
        elif ground and library in MODEL_LIBRARIES and not (library == "transformers" and found.in_function):
            rule = "the ground knows no model"
        else:
            continue
        yield f"{found.file}:{found.line}: {rule}: {found.module} must not import {library}"


def circles(house: Package) -> Iterator[str]:
    """Modules that import each other, over any number of others; one finding for each import that closes a circle."""
    edges: dict[str, dict[str, Import]] = {module: {} for module in house.files}
    for found in house.imports:
        owner = house.owner(found.target)
        if owner not in (None, house.name, found.module) and room(found.module) not in DOORS:
            edges[found.module].setdefault(str(owner), found)
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> Iterator[str]:
        path = [*path, module]
        for other, found in edges[module].items():
            if other in path:
                circle = " -> ".join([*path[path.index(other) :], other])
                yield f"{found.file}:{found.line}: imports run in no circle: {circle}"
            elif other not in done:
                yield from visit(other, path)
        done.add(module)

    for module in edges:
        if module not in done:
            yield from visit(module, [])


def inits(house: Package) -> Iterator[str]:
    """Importing a folder must load nothing else."""
    for module, file in house.files.items():
        if file.name != "__init__.py" or module == house.name:
            continue
        for number, statement in enumerate(house.trees[module].body):
            text = statement.value if isinstance(statement, ast.Expr) else None
            if number or not (isinstance(text, ast.Constant) and isinstance(text.value, str)):
                yield f"{house.place(file)}:{statement.lineno}: a folder's __init__ must hold a docstring alone"
                break


def counts(house: Package) -> Iterator[str]:
    """A newcomer reads a folder at a glance."""
    entries = [path.name for path in house.folder.iterdir() if path.name not in ("__pycache__", "py.typed")]
    if len(entries) > MAX_TOP:
        yield f"{house.name}: the package must have at most {MAX_TOP} entries at its top, got {len(entries)}"
    for folder in sorted({file.parent for file in house.files.values()} - {house.folder}):
        modules = [file for file in folder.glob("*.py") if file.name != "__init__.py"]
        if len(modules) > MAX_MODULES:
            yield f"{house.place(folder)}: a folder must have at most {MAX_MODULES} modules, got {len(modules)}"


def imports_of_tests(root: Path) -> list[str]:
    """Imports of a test or a conftest by another test."""
    return [
        f"{found.file}:{found.line}: what tests share is in helpers: {found.module} must not import {found.target}"
        for found in Package(root, "tests").imports
        if any(part == "conftest" or part.startswith("test_") for part in found.target.split("."))
    ]
