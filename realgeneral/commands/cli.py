"""The `realgeneral` command: one-line errors, exit status 2 for usage and 1 for failures."""

from __future__ import annotations

import importlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from realgeneral.errors import Failure, UsageError, escaped
from realgeneral.settings.options import parse


class Command(NamedTuple):
    """A command: what it does in a line, where its settings are, and what runs it."""

    summary: str
    settings: str
    run: Callable[[Any], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):  # a name that a terminal's encoding lacks is no reason to end
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    command, *rest = arguments
    if command == "--version":
        from realgeneral import __version__

        print(f"realgeneral {__version__}")
        return 0
    if command not in COMMANDS:
        print(f"realgeneral: command must be one of {list(COMMANDS)}, got {command!r}", file=sys.stderr)
        return 2
    config: Any = None
    try:
        _, settings, run = COMMANDS[command]
        module, _, name = settings.partition(":")
        # options first: the models' libraries take seconds to import
        config = parse(getattr(importlib.import_module(module), name), f"realgeneral {command}", rest)
        run(config)
        return 0
    except KeyboardInterrupt:
        print(f"realgeneral {command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # the last line of defence: every error is one line, the traceback on demand
        if getattr(config, "debug", False):
            traceback.print_exc()
        text = " ".join(_words(error).split()) or type(error).__name__
        known = isinstance(error, (UsageError, Failure, OSError))
        print(f"realgeneral {command}: {text if known else f'{type(error).__name__}: {text}'}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _words(error: Exception) -> str:
    """An error's message; of a file, what the system says of it and its name."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return escaped(f"{os.fsdecode(error.filename)}: {error.strerror[0].lower()}{error.strerror[1:]}")
    return str(error)


def usage() -> str:
    """What `realgeneral --help` prints."""
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {name:<{width}}{command.summary}" for name, command in COMMANDS.items())
    return f"""usage: realgeneral COMMAND [options]

{commands}

realgeneral COMMAND --help lists the options of a command; realgeneral --version prints the version."""


def _demo(config: Any) -> None:
    from realgeneral.commands.demo import demo

    demo(config)


def _check_data(config: Any) -> None:
    from realgeneral.commands.check_data import check_data

    check_data(config)


def _precompute(config: Any) -> None:
    from realgeneral.commands.precompute import precompute

    result = precompute(config)
    print(
        f"{result['encoded']} entries encoded, {result['kept']} there already, "
        f"{len(result['bad'])} of {result['rows']} rows bad; store in {config.output}"
    )


def _train(config: Any) -> None:
    from realgeneral.training.train import train

    result = train(config)
    skipped = "1 row" if result["skipped"] == 1 else f"{result['skipped']} rows"
    print(f"loss {result['loss']:.4f} after {result['steps']} steps, {skipped} skipped; adapter in {result['adapter']}")


def _generate(config: Any) -> None:
    from realgeneral.commands.generate import generate

    for path in generate(config):
        print(path)


def _evaluate(config: Any) -> None:
    from realgeneral.evaluation.evaluate import evaluate

    evaluate(config)


SETTINGS = "realgeneral.settings"
COMMANDS: dict[str, Command] = {
    "demo": Command(
        "generate with the small shipped model and train it for a minute, on a CPU", f"{SETTINGS}.sampling:DemoConfig", _demo
    ),
    "check-data": Command("report what is in a data set, and its bad rows", f"{SETTINGS}.data:CheckDataConfig", _check_data),
    "precompute": Command(
        "encode the pictures and prompts of a data set once", f"{SETTINGS}.data:PrecomputeConfig", _precompute
    ),
    "train": Command(
        "train an adapter (LoRA + condition branch) on a frozen CogVideoX", f"{SETTINGS}.train:TrainConfig", _train
    ),
    "generate": Command("one image from a prompt and a condition picture", f"{SETTINGS}.sampling:GenerateConfig", _generate),
    "evaluate": Command(
        "scores of an adapter: nano's held-out table, or the paper's protocols on a folder",
        f"{SETTINGS}.evaluate:EvaluateConfig",
        _evaluate,
    ),
}
