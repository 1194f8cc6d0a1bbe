"""The `realgeneral` command: one-line errors, exit status 2 for usage and 1 for failures."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from realgeneral.errors import Failure, UsageError

USAGE = """usage: realgeneral COMMAND [options]

  demo        generate with the small shipped model and train it for a minute, on a CPU
  check-data  report what is in a data set, and its bad rows
  precompute  encode the pictures and prompts of a data set once
  train       train an adapter (LoRA + condition branch) on a frozen CogVideoX
  generate    one image from a prompt and a condition picture
  evaluate    scores of an adapter: nano's held-out table, or the paper's protocols on a folder

realgeneral COMMAND --help lists the options of a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"realgeneral: command must be one of {list(COMMANDS)}, got {command!r}", file=sys.stderr)
        return 2
    try:
        COMMANDS[command](rest)
        return 0
    except KeyboardInterrupt:
        print(f"realgeneral {command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # the last line of defence: every error is one line, the traceback on demand
        if any(argument.partition("=")[0] == "--debug" for argument in rest):
            traceback.print_exc()
        text = " ".join(str(error).split()) or type(error).__name__
        known = isinstance(error, (UsageError, Failure, OSError))
        print(f"realgeneral {command}: {text if known else f'{type(error).__name__}: {text}'}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _parse(command: str, config: Any, arguments: list[str]) -> Any:
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UsageError(f"{message} (realgeneral {command} --help lists the options)")

    parser = Parser(config, prog=f"realgeneral {command}", description=config.__doc__, allow_abbrev=False)
    given = [argument.partition("=")[0] for argument in arguments]
    for action in parser._actions:
        times = sum(name in action.option_strings for name in given)
        if action.nargs == "+" and times > 1:
            parser.error(f"{action.option_strings[0]} must be given once, with all its values after it, got {times} times")
    *parsed, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        parser.error(f"options must be known, got {' '.join(unknown)}")
    return parsed[0]


def _demo(arguments: list[str]) -> None:
    from realgeneral.config import DemoConfig
    from realgeneral.demo import demo

    demo(_parse("demo", DemoConfig, arguments))


def _check_data(arguments: list[str]) -> None:
    from realgeneral.check_data import check_data
    from realgeneral.config import CheckDataConfig

    check_data(_parse("check-data", CheckDataConfig, arguments))


def _precompute(arguments: list[str]) -> None:
    from realgeneral.config import PrecomputeConfig
    from realgeneral.precompute import precompute

    config = _parse("precompute", PrecomputeConfig, arguments)
    result = precompute(config)
    print(
        f"{result['encoded']} entries encoded, {result['kept']} there already, "
        f"{len(result['bad'])} of {result['rows']} rows bad; store in {config.output}"
    )


def _train(arguments: list[str]) -> None:
    from realgeneral.config import TrainConfig
    from realgeneral.train import train

    result = train(_parse("train", TrainConfig, arguments))
    skipped = "1 row" if result["skipped"] == 1 else f"{result['skipped']} rows"
    print(f"loss {result['loss']:.4f} after {result['steps']} steps, {skipped} skipped; adapter in {result['adapter']}")


def _generate(arguments: list[str]) -> None:
    from realgeneral.config import GenerateConfig
    from realgeneral.generate import generate

    for path in generate(_parse("generate", GenerateConfig, arguments)):
        print(path)


def _evaluate(arguments: list[str]) -> None:
    from realgeneral.config import EvaluateConfig
    from realgeneral.evaluate import evaluate

    evaluate(_parse("evaluate", EvaluateConfig, arguments))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": _demo,
    "check-data": _check_data,
    "precompute": _precompute,
    "train": _train,
    "generate": _generate,
    "evaluate": _evaluate,
}

if __name__ == "__main__":
    sys.exit(main())
