"""A process dies before its k-th file operation: old things are intact or new ones whole, and the same command succeeds."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from realgeneral.commands.cli import COMMANDS
from realgeneral.settings.data import CheckDataConfig, PrecomputeConfig
from realgeneral.settings.evaluate import EvaluateConfig
from realgeneral.settings.sampling import DemoConfig, GenerateConfig
from realgeneral.settings.train import TrainConfig
from realgeneral.training.checkpoint import DIGESTS_FILE
from tests.realgeneral.helpers.datasets import good_rows, write_folder
from tests.realgeneral.helpers.nano_like import save_nano_like, shorten_captions
from tests.realgeneral.helpers.pictures import make_photo
from tests.realgeneral.helpers.processes import start

# of six commands, twice: 100 in all, since two commands have no more than five operations
KILLS_EACH = 10
pytestmark = pytest.mark.slow
# audit events of Python's own calls; each comes before the operation
OPERATIONS = {
    "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod",
    "shutil.rmtree",
}  # fmt: skip


def run(command: str, config: Any, assets: Path, root: Path, kill_at: int) -> int:
    """Run a command on the stand-in for nano, in a process that dies before its k-th operation below `root`.

    Returns:
        The number of operations.
    """
    from realgeneral.nano import assets as nano_assets

    done, below = 0, str(root)

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        if event in OPERATIONS and any(isinstance(a, str | os.PathLike) and str(a).startswith(below) for a in arguments[:2]):
            if done == kill_at:
                os.kill(os.getpid(), 9)
            done += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nano_assets, "ASSETS", assets)
        shorten_captions(patch)
        sys.addaudithook(count)
        COMMANDS[command].run(config)
    return done


def finished(command: str, config: Any, assets: Path, root: Path, kill_at: int = -1) -> Any:
    """The outcome of `run` in a process of its own, or None if it was killed."""
    process, receiver = start(run, command, config, assets, root, kill_at)
    try:
        outcome = receiver.recv() if receiver.poll(120) else None
    except EOFError:
        outcome = None
    process.kill()
    process.join()
    receiver.close()
    return outcome


def files(root: Path) -> dict[str, bytes]:
    """What a reader finds: not half-written files, which have names of their own, and not locks."""
    found = (path for path in root.rglob("*") if path.is_file())
    names = {str(path.relative_to(root)): path for path in found}
    return {name: canonical(path) for name, path in names.items() if ".partial" not in name and ".lock" not in name}


def canonical(path: Path) -> bytes:
    """What a file says, where its bytes depend on the process that wrote it."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":  # the order of the metadata
        end = 8 + int.from_bytes(data[:8], "little")
        return json.dumps(json.loads(data[8:end]), sort_keys=True).encode() + data[end:]
    if path.suffix == ".pt":  # which of equal strings are one
        return repr(plain(torch.load(path, weights_only=True))).encode()
    if path.name == DIGESTS_FILE:  # of the bytes of those; a resumed run compares them
        return repr(sorted(json.loads(data))).encode()
    return data


def plain(value: Any) -> Any:
    """Nested values with bytes for tensors."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def check_readable(name: str, data: bytes) -> None:
    """A file whose bytes differ from run to run (it holds times) is whole."""
    if name.endswith(".json") and not name.endswith(DIGESTS_FILE):
        json.loads(data)
    elif name.endswith(".png"):
        Image.open(io.BytesIO(data)).load()
    elif name.endswith(".jsonl"):
        for line in data.decode().splitlines()[:-1]:
            json.loads(line)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Callable[[Path], tuple[str, list[Any]]]]]:
    """Assets, inputs, and for each command what it is run with, given its output folder: what came before, and what dies."""
    root = tmp_path_factory.mktemp("inputs")
    assets = save_nano_like(root / "assets")
    base = str(assets / "base")
    rows = good_rows(3)
    for row in rows:
        row["prompt"] = "a red pot"
    data = write_folder(root / "data", rows)
    make_photo(64, 64).save(root / "photo.png")
    shared: dict[str, Any] = {"base": base, "data": data, "tasks": ["canny"], "height": 16, "width": 16}
    picture: dict[str, Any] = {
        "prompt": "a red pot", "task": "canny", "picture": str(root / "photo.png"), "base": base,
        "adapter": str(assets / "adapter"), "height": 16, "width": 16, "steps": 1,
    }  # fmt: skip

    def training(out: Path) -> tuple[str, list[Any]]:
        config = TrainConfig(
            **shared, output=str(out / "run"), rank=2, alpha=4.0, steps=4, batch_size=1, warmup_steps=1, save_every=2,
            keep_checkpoints=9, sample_count=1, sample_steps=1, resume=True,
        )  # fmt: skip
        return "train", [replace(config, steps=2, lr_schedule="constant"), replace(config, lr_schedule="constant")]

    def precomputing(out: Path) -> tuple[str, list[Any]]:
        config = PrecomputeConfig(**shared, output=str(out / "store"), variants=1)
        return "precompute", [config, replace(config, tasks=["canny", "colouring"])]

    def generating(out: Path) -> tuple[str, list[Any]]:
        config = GenerateConfig(**picture, output=str(out / "picture.png"))
        return "generate", [config, replace(config, seed=1)]

    def checking(out: Path) -> tuple[str, list[Any]]:
        config = CheckDataConfig(**shared, report=str(out / "report.json"))
        return "check-data", [config, replace(config, tasks=["colouring"])]

    def evaluating(out: Path) -> tuple[str, list[Any]]:
        # of several tasks the table is written after each
        config = EvaluateConfig(adapter="nano", base="nano", tasks=["canny"], output=str(out / "scores"), concepts=1, steps=1)
        return "evaluate", [config, replace(config, seed=1)]

    def demonstrating(out: Path) -> tuple[str, list[Any]]:
        config = DemoConfig(output=str(out / "demo"), concepts=1, steps=1, train_steps=2)
        return "demo", [config, replace(config, seed=1)]

    made = (training, precomputing, generating, checking, evaluating, demonstrating)
    return assets, root, {case.__name__: case for case in made}


@pytest.mark.parametrize("case", ["training", "precomputing", "generating", "checking", "evaluating", "demonstrating"])
@pytest.mark.parametrize("over", [False, True], ids=["new", "over"])
def test_killed_before_an_operation(cases: Any, tmp_path: Path, case: str, over: bool) -> None:
    """Kills at random operations of every command, in a new place and over what an earlier one left."""
    assets, _, made = cases
    # paths are in some files, so every run is at the same place
    place, before, kept = tmp_path / "out", tmp_path / "before", tmp_path / "whole"
    command, (first, second) = made[case](place)
    place.mkdir()
    if over:
        assert (outcome := finished(command, first, assets, place)) is not None and not outcome.kind, outcome
    shutil.copytree(place, before)
    old = files(place)
    outcome = finished(command, second, assets, place)
    assert outcome is not None and not outcome.kind, outcome
    operations, new = outcome.value, files(place)
    shutil.copytree(place, kept)
    shutil.rmtree(place)
    shutil.copytree(before, place)
    again = finished(command, second, assets, place)
    exact = {name for name, data in files(place).items() if new.get(name) == data}
    assert again is not None and again.value == operations

    rng = random.Random(f"{case} {over}")
    for kill_at in sorted(rng.sample(range(operations), min(operations, KILLS_EACH))):
        shutil.rmtree(place)
        shutil.copytree(before, place)
        where = f"killed before operation {kill_at} of {operations}"
        assert finished(command, second, assets, place, kill_at) is None, where
        left = files(place)
        for name, data in left.items():
            assert data in (old.get(name), new.get(name)) or name not in exact, f"{where}: {name} is neither old nor new"
            check_readable(name, data)
        lost = {name for name in old if name in new} - left.keys()
        assert not lost, f"{where}: {lost} are gone"
        outcome = finished(command, second, assets, place)
        assert outcome is not None and not outcome.kind, f"{where}, then: {outcome}"
        result = files(place)
        assert result.keys() == new.keys(), f"{where}, then: {result.keys() ^ new.keys()}"
        other = {name for name in exact if result[name] != new[name]}
        assert not other, f"{where}, then: {other} are not those of an undisturbed run"
        rest = [str(path) for path in place.rglob("*") if ".partial" in path.name or ".lock" in path.name]
        # several processes may write it at once, under names that no one else knows
        rest = [path for path in rest if "precompute.json" not in path]
        assert not rest, f"{where}, then: {rest} left"
    print(f"{command} ({'over' if over else 'new'}): {operations} operations")
