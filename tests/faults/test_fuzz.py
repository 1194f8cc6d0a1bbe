"""Command lines and calls that no one would type: each ends soon, well or with one named error."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import random
import re
import resource
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from PIL import Image

from realgeneral import RealGeneralPipeline
from realgeneral.commands.cli import COMMANDS, main
from realgeneral.errors import Failure, UsageError
from tests.realgeneral.helpers.datasets import good_rows, write_folder
from tests.realgeneral.helpers.nano_like import save_nano_like, shorten_captions
from tests.realgeneral.helpers.pictures import bomb, make_photo
from tests.realgeneral.helpers.processes import start

COMMAND_LINES, CALLS, BATCH = 1000, 300, 50
SECONDS, BYTES = 30, 4 * 2**30
pytestmark = pytest.mark.slow

NUMBERS = ["-1", "0", "1", "2", "3.5", "x", "", "1e3", "nan", "inf", "-inf", "9" * 20, "-0", "0x10", "1_0", "٣"]
# a long run that was asked for is no fault, nor are many processes
LONG = {
    "steps", "train_steps", "sample_steps", "concepts", "variants", "images_per_prompt", "num_workers", "sample_count",
    "gradient_accumulation_steps", "seed",
}  # fmt: skip
# asks for a traceback, and takes a minute where nothing is compiled yet
OTHER = {"debug", "compile"}
HUGE = [str(2**31), str(2**63), "100000", "1e300"]
WORDS = [
    "", " ", "x", "a" * 5000, "no/such", "../..", "/dev/null", "-", "--", "~", "*", "%s", "{}", "=", ",", "\u202e\u0301", "\n",
    "canny:", "canny:low", "canny:low=x", "canny:low=1e999", "inpainting", "1/0", "0/1", "3/2", "nan", "[]", "null",
]  # fmt: skip


class Hangs(BaseException):
    """More than the time that a command has."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """The memory of this process ends `BYTES` above what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, resource.RLIM_INFINITY))

    def ring(number: int, frame: Any) -> None:
        raise Hangs

    signal.signal(signal.SIGALRM, ring)
    yield


def command_lines(root: Path, count: int) -> list[list[str]]:
    """Small valid commands, each with one to four options changed, added or taken away."""
    rng, made = random.Random("commands"), []
    good = {
        "generate": ["--prompt", "a red pot", "--task", "canny", "--picture", "photo.png", "--steps", "1"],
        "train": ["--data", "data", "--tasks", "canny", "--steps", "1", "--sample-count", "0", "--rank", "2"],
        "precompute": ["--data", "data", "--tasks", "canny", "--variants", "1"],
        "check-data": ["--data", "data"],
        "evaluate": ["--concepts", "1", "--steps", "1"],
        "demo": ["--concepts", "1", "--steps", "1", "--train-steps", "1"],
    }
    places = [
        "data",
        "photo.png",
        "cut.png",
        "bomb.png",
        "text.png",
        "empty",
        "data/metadata.jsonl",
        "made",
        "assets/base",
        "assets/adapter",
    ]
    while len(made) < count:
        command = rng.choices(list(good), [6, 6, 4, 4, 2, 1])[0]
        module, _, name = COMMANDS[command].settings.partition(":")
        settings = getattr(importlib.import_module(module), name)
        names = {item.name for item in fields(settings)}
        options = dict(zip(good[command][::2], good[command][1::2], strict=True))
        options |= {f"--{n}": v for n, v in (("height", "16"), ("width", "16"), ("adapter", "nano")) if n in names}
        output = {"generate": "made/a.png", "check-data": ""}.get(command, f"made/{len(made)}")
        options |= {"--output": output} if output else {}
        for item in rng.sample([item for item in fields(settings) if item.name not in OTHER], rng.randint(1, 4)):
            option, hint = "--" + item.name.replace("_", "-"), get_type_hints(settings)[item.name]
            if rng.random() < 0.1:
                options.pop(option, None)
            else:
                options[option] = value(rng, item.name, hint, places)
        line = [command] + [word for pair in options.items() for word in pair if word is not None]
        if rng.random() < 0.1:
            line.insert(rng.randint(0, len(line)), rng.choice(WORDS))
        made.append(line)
    return made


def value(rng: random.Random, name: str, hint: Any, places: list[str]) -> Any:
    if get_origin(hint) is UnionType or get_origin(hint) is list:
        hint = get_args(hint)[0]
    if get_origin(hint) is Literal:
        return rng.choice([*map(str, get_args(hint)), "x"])
    if hint is bool:
        return rng.choice(["true", "false", "maybe", None])
    if hint in (int, float):
        return rng.choice(NUMBERS if name in LONG else NUMBERS + HUGE)
    return rng.choice(WORDS + places + ["nano"])


def run_lines(root: Path, lines: list[list[str]]) -> list[tuple[list[str], str, str]]:
    """(command line, exit status or what was raised, standard error) of each."""
    from realgeneral.nano import assets as nano_assets

    os.chdir(root)
    warnings.simplefilter("ignore")  # a user sees them, and they end nothing
    ends = []
    with pytest.MonkeyPatch.context() as patch, limited():
        patch.setattr(nano_assets, "ASSETS", root / "assets")
        shorten_captions(patch)
        for line in lines:
            errors = io.StringIO()
            signal.alarm(SECONDS)
            try:
                with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                    status = str(main(line))
            except BaseException as error:
                status = type(error).__name__
            finally:
                signal.alarm(0)
            ends.append((line, status, errors.getvalue()))
    return ends


UNNAMED = re.compile(r"^realgeneral [\w-]+: [A-Z]\w*(Error|Exception|Interrupt|Iteration|Exit|Warning): ", re.MULTILINE)


def fault(status: str, errors: str) -> str | None:
    """What is wrong with how a command ended."""
    if status not in ("0", "1", "2", "SystemExit"):
        return status
    if "Traceback" in errors:
        return "traceback"
    if status in "12" and not re.search(r"^realgeneral( [\w-]+)?: .", errors, re.MULTILINE):
        return "no message"
    return "unnamed" if UNNAMED.search(errors) else None


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    save_nano_like(root / "assets")
    rows = good_rows(2)
    for row in rows:
        row["prompt"] = "a red pot"
    write_folder(root / "data", rows)
    make_photo(64, 64).save(root / "photo.png")
    (root / "cut.png").write_bytes((root / "photo.png").read_bytes()[:200])
    (root / "bomb.png").write_bytes(bomb(30_000, 30_000))
    (root / "text.png").write_text("hello")
    (root / "empty").mkdir()
    return root


def in_processes(function: Callable[..., Any], root: Path, items: list[Any]) -> list[Any]:
    """Run the items in processes of `BATCH` each; one that dies is a fault of all of its items."""
    ends: list[Any] = []
    for first in range(0, len(items), BATCH):
        process, receiver = start(function, root, items[first : first + BATCH])
        assert receiver.poll(BATCH * SECONDS), "hangs"
        outcome = receiver.recv()
        process.join()
        assert not outcome.kind, outcome
        ends += outcome.value
    return ends


def check(ends: list[tuple[Any, str, str]]) -> None:
    found = [(what, line, text.strip().splitlines()[-1:]) for line, status, text in ends if (what := fault(status, text))]
    print(Counter(status for _, status, _ in ends), "faults:", Counter(what for what, _, _ in found))
    assert not found, "\n".join(map(str, found))


def test_commands(root: Path) -> None:
    """1,000 command lines: no traceback, no error without a name, none that takes longer than 30 s."""
    check(in_processes(run_lines, root, command_lines(root, COMMAND_LINES)))


ODD: list[Any] = [
    None,
    "",
    "x",
    0,
    -1,
    1.5,
    2**31,
    float("nan"),
    float("inf"),
    1e38,
    True,
    [],
    [None],
    {},
    (1, 2),
    b"x",
    object,
]


def run_calls(root: Path, seeds: list[int]) -> list[tuple[Any, str, str]]:
    """What calls with one to three odd arguments end in."""
    pipe = RealGeneralPipeline.from_pretrained(root / "assets" / "base", adapter=root / "assets" / "adapter")
    pipe.set_progress_bar_config(disable=True)
    parameters = [
        *"prompt condition task subject negative_prompt prompt_embeds negative_prompt_embeds height width".split(),
        *"num_inference_steps guidance_scale image_guidance_scale num_images_per_prompt generator latents".split(),
        *"condition_cache output_type attention_kwargs callback_on_step_end max_sequence_length".split(),
        "callback_on_step_end_tensor_inputs",
    ]
    odd = [
        *ODD,
        torch.zeros(1),
        torch.full((1, 12, 24), float("nan")),
        Image.new("L", (1, 1)),
        torch.Generator(),
        ["a red pot"] * 2,
    ]
    ends = []
    with limited():
        for seed in seeds:
            rng = random.Random(seed)
            given = {"prompt": "a red pot", "condition": make_photo(16, 16), "task": "canny", "height": 16, "width": 16}
            given |= {"num_inference_steps": 1, "output_type": "pt"}
            changed = {name: rng.choice(odd) for name in rng.sample(parameters, rng.randint(1, 3))}
            signal.alarm(SECONDS)
            try:
                pipe(**{**given, **changed})
                status, text = "0", ""
            except (UsageError, Failure) as error:
                status, text = "2", f"realgeneral call: {error}"
            except BaseException as error:
                status, text = "1", f"realgeneral call: {type(error).__name__}Error: {error}"
            finally:
                signal.alarm(0)
            ends.append(({k: repr(v)[:60] for k, v in changed.items()}, status, text))
    return ends


def test_calls(root: Path) -> None:
    """300 calls of the pipeline, likewise."""
    check(in_processes(run_calls, root, list(range(CALLS))))
