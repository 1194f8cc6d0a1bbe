"""What a setting is: its help and default, the checks that settings share, and the command line made of them."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from types import UnionType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from realgeneral.errors import UsageError

# NumPy's largest; a seed's products with sample and epoch numbers then fit in PyTorch's 64 bits
MAX_SEED = 2**32 - 1
# no setting that takes memory or processes by its number is larger in earnest; of any other whole number, 32 bits
MOST = {
    **dict.fromkeys(("height", "width"), 2**14),
    **dict.fromkeys(
        ("num_images", "images_per_prompt", "batch_size", "encode_batch", "variants", "rank", "sample_count"), 10_000
    ),
    "shard_megabytes": 2**16,
    "num_workers": 512,
}
TRUNCATE_HELP = "cut prompts that are longer than the base's text window (nano: 16 tokens); otherwise they are refused"

S = TypeVar("S", bound="Settings")


def option(
    help: str, default: Any = None, *, many: tuple[str, ...] | None = None, group: str | None = None, **arguments: Any
) -> Any:
    """A field of a settings class that is also an option of its command.

    Args:
        help: Its meaning, for `--help`.
        default: Its value if it is not given.
        many: Default of an option that takes several values, instead of `default`.
        group: Heading in `--help`, for this option and those after it.
        **arguments: More arguments of `add_argument`.
    """
    metadata = {"help": help, "group": group, "arguments": arguments}
    if many is not None:
        return field(default_factory=lambda: list(many), metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(item: Field[Any]) -> Any:
    """The value of a setting that is not given."""
    return item.default if item.default_factory is MISSING else item.default_factory()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ({self.prog} --help lists the options)")


def command_line(settings: type[S], prog: str) -> argparse.ArgumentParser:
    """The options of a settings class: `--learning-rate 1e-4` for the field `learning_rate`."""
    parser = _Parser(
        prog,
        usage=f"{prog} [options]",
        description=settings.__doc__,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32),
    )
    groups: dict[str, Any] = {}
    group, hints = "options", get_type_hints(settings)
    for item in fields(settings):
        group = item.metadata["group"] or group
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        text, default = item.metadata["help"], default_of(item)
        if default not in (None, "", []) and default is not False:
            text += f" (default: {' '.join(default) if isinstance(default, list) else default})"
        groups[group].add_argument(
            f"--{item.name.replace('_', '-')}",
            dest=item.name,
            default=argparse.SUPPRESS,
            help=text.replace("%", "%%"),
            **{**_values(hints[item.name]), **item.metadata["arguments"]},
        )
    return parser


def _values(hint: Any) -> dict[str, Any]:
    """How many values an option takes, and of which type."""
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is list:
        return {"nargs": "+", **_values(get_args(hint)[0])}
    if get_origin(hint) is UnionType:  # "or None", which is said by leaving the option out
        return _values(get_args(hint)[0])
    if hint is bool:
        return {"nargs": "?", "const": True, "type": _boolean, "metavar": "true|false"}
    return {"type": hint, "metavar": {int: "N", float: "X", str: "TEXT"}[hint]}


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text.lower() == "true"


def parse(settings: type[S], prog: str, arguments: Sequence[str]) -> S:
    """The settings that a command line gives; UsageError in one line that names the option."""
    parser = command_line(settings, prog)
    # --batch_size is taken for --batch-size
    spelled = [name.replace("_", "-") + equals + value for name, equals, value in map(_parted, arguments)]
    names = [name for name, _, _ in map(_parted, spelled)]
    for action in parser._actions:
        times = sum(name in action.option_strings for name in names)
        if action.nargs == "+" and times > 1:
            parser.error(f"{action.option_strings[0]} must be given once, with all its values after it, got {times} times")
    found, unknown = parser.parse_known_args(spelled)
    if unknown:
        near = difflib.get_close_matches(unknown[0], [option for a in parser._actions for option in a.option_strings], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        parser.error(f"options must be known, got {' '.join(unknown)}{hint}")
    return settings(**vars(found))


def _parted(argument: str) -> tuple[str, str, str]:
    """(option, "=", value) of an argument; of a value ("", "", value)."""
    return argument.partition("=") if argument.startswith("--") else ("", "", argument)


def check_at_least_one(config: Any, *names: str) -> None:
    """UsageError that names the first of these settings that is given and below 1."""
    for name in names:
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise UsageError(f"{name} must be at least 1, got {getattr(config, name)}")


def given(config: Any, item: Field[Any]) -> bool:
    """Whether a setting is not its default."""
    return bool(getattr(config, item.name) != default_of(item))


def refuse_unused(config: Any, where: str, *names: str) -> None:
    """UsageError if a setting that does nothing `where` it is given is not its default."""
    for item in fields(config):
        if item.name in names and given(config, item):
            raise UsageError(f"{item.name} has no effect {where}, got {getattr(config, item.name)!r}")


@dataclass(frozen=True)
class Settings:
    """What every command checks of its settings: numbers are finite, seeds in range."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, float) and not math.isfinite(number):
                    raise UsageError(f"{item.name} must be finite, got {number}")
            most = MOST.get(item.name, 2**31 - 1)
            if type(value) is int and "seed" not in item.name and value > most:
                raise UsageError(f"{item.name} must be at most {most}, got {value}")
        for name, least in (("seed", 0), ("condition_seed", -1)):
            seed = getattr(self, name, least)
            if not least <= seed <= MAX_SEED:
                raise UsageError(f"{name} must be between {least} and {MAX_SEED}, got {seed}")
