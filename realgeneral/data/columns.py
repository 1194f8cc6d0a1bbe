"""Which column of a data set is which field of a row: `--columns target=image prompt=text condition=control_depth`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from realgeneral.errors import Failure, UsageError
from realgeneral.files import decoded

FIELDS = ("target", "prompt", "condition", "task", "subject")
PICTURE_FIELDS = ("target", "condition")
# left, top, right, bottom as fractions of the picture
Crop = tuple[float, float, float, float]
CROPS: Mapping[str, Crop] = {
    "left": (0, 0, 0.5, 1),
    "right": (0.5, 0, 1, 1),
    "top": (0, 0, 1, 0.5),
    "bottom": (0, 0.5, 1, 1),
}


@dataclass(frozen=True)
class Column:
    """A column, or a member of a nested one ("description.item"), and the part of its picture that counts."""

    path: str
    crop: Crop | None = None

    @classmethod
    def parse(cls, text: str) -> Column:
        """Read "COLUMN" or "COLUMN:CROP"; a crop is left, right, top, bottom or four fractions "0,0,0.5,1"."""
        path, _, crop = text.partition(":")
        if not path:
            raise UsageError(f"columns must name a column, got {text!r}")
        if not crop:
            return cls(path)
        if crop in CROPS:
            return cls(path, CROPS[crop])
        try:
            left, top, right, bottom = map(float, crop.split(","))
        except ValueError:
            raise UsageError(f"crop must be one of {list(CROPS)} or four fractions such as 0,0,0.5,1, got {crop!r}") from None
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise UsageError(f"crop must have fractions with 0 <= left < right <= 1, 0 <= top < bottom <= 1, got {crop!r}")
        return cls(path, (left, top, right, bottom))

    @property
    def root(self) -> str:
        """The top-level column of a nested path."""
        return self.path.partition(".")[0]

    def __call__(self, record: Mapping[str, Any]) -> Any:
        """The value in a record, or None."""
        if self.path in record:  # members of a tar have dots in their names
            return record[self.path]
        value: Any = record
        for key in self.path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value


@dataclass(frozen=True)
class Cropped:
    """A picture's value in a record, and the part of it that counts."""

    value: Any
    crop: Crop


@dataclass(frozen=True)
class ColumnMap:
    """Fields of a row by the columns they come from; a field that is not mapped has the column of its own name."""

    fields: Mapping[str, tuple[Column, ...]] = field(default_factory=dict)

    def columns(self, name: str) -> tuple[Column, ...]:
        """The columns of a field; several only for `condition`, none for a field that was mapped to nothing."""
        return self.fields.get(name, (Column(name),))

    def roots(self, available: Iterable[str], where: str) -> list[str]:
        """The top-level columns to read; Failure if a mapped one or one of a required field is not there."""
        have, roots = list(available), []
        for name in FIELDS:
            for column in self.columns(name):
                root = column.path if column.path in have else column.root
                if root in have:
                    roots.append(root)
                elif name in self.fields or name in ("target", "prompt"):
                    raise Failure(f"{where} must have a column {root!r}, got {have} (--columns maps other names)")
        return list(dict.fromkeys(roots))

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """A record under our field names."""
        out: dict[str, Any] = {}
        for name in FIELDS:
            values = [_cropped(column(record), column.crop) for column in self.columns(name)]
            if name == "condition" and len(values) > 1:
                out[name] = [v for value in values for v in (value if isinstance(value, list) else [value])]
            elif values:
                out[name] = values[0]
        return out


def _cropped(value: Any, crop: Crop | None) -> Any:
    if crop is None or value is None:
        return value
    return [Cropped(v, crop) for v in value] if isinstance(value, list) else Cropped(value, crop)


# a pair of 512 px pictures with borders of 8 and 16 px in one of 1056 x 528 (the crops of its authors' trainer)
_PAIR = {"left": (8 / 1056, 8 / 528, 520 / 1056, 520 / 528), "right": (528 / 1056, 8 / 528, 1040 / 1056, 520 / 528)}
READY: Mapping[str, Mapping[str, tuple[Column, ...]]] = {
    # Yuanshi/Subjects200K: the subject on the left, in another scene on the right
    "subjects200k": {
        "condition": (Column("image", _PAIR["left"]),),
        "target": (Column("image", _PAIR["right"]),),
        "prompt": (Column("description.description_1"),),
    },
    # limingcv/MultiGen-20M_depth
    "multigen-depth": {
        "target": (Column("image"),),
        "prompt": (Column("text"),),
        "condition": (Column("control_depth"),),
    },
    # the columns of diffusers' ControlNet example
    "controlnet": {
        "target": (Column("image"),),
        "prompt": (Column("text"),),
        "condition": (Column("conditioning_image"),),
    },
}


def parse_columns(items: Sequence[str]) -> ColumnMap:
    """Read `--columns`: names of ready maps, .json or .yaml files, and FIELD=COLUMN[:CROP]; later ones win.

    `condition=a condition=b` gives a row two condition pictures; `subject=` turns a field off.

    Raises:
        UsageError: An unknown field, map or crop.
        Failure: A file that cannot be read.
    """
    fields: dict[str, tuple[Column, ...]] = {}
    given: dict[str, list[str]] = {}
    for item in items:
        name, equals, column = item.partition("=")
        if equals:
            given.setdefault(name, []).extend([column] if column else [])
        elif item in READY:
            fields.update(READY[item])
        elif Path(item).suffix in (".json", ".yaml", ".yml"):
            fields.update(_read_map(Path(item)))
        else:
            raise UsageError(f"columns must be FIELD=COLUMN, a .json or .yaml file or one of {sorted(READY)}, got {item!r}")
    fields.update(_checked(given))
    return ColumnMap(fields)


def _read_map(path: Path) -> dict[str, tuple[Column, ...]]:
    try:
        text = decoded(path.read_bytes(), str(path))
        described = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise Failure(f"{path} must be a readable column map, got: {error}") from None
    if not isinstance(described, dict):
        raise Failure(f"{path} must map fields to columns, got {type(described).__name__}")
    given = {name: value if isinstance(value, list) else [] if value is None else [value] for name, value in described.items()}
    return _checked(given)


def _checked(given: Mapping[str, Sequence[Any]]) -> dict[str, tuple[Column, ...]]:
    for name, columns in given.items():
        if name not in FIELDS:
            raise UsageError(f"field of --columns must be one of {list(FIELDS)}, got {name!r}")
        if not all(isinstance(column, str) for column in columns):
            raise UsageError(f"columns of {name} must be strings, got {list(columns)}")
        if len(columns) > 1 and name != "condition":
            raise UsageError(f"{name} must have one column, got {list(columns)}")
        if not columns and name in ("target", "prompt"):
            raise UsageError(f"{name} must have a column, got none")
    made = {name: tuple(map(Column.parse, columns)) for name, columns in given.items()}
    for name, columns in made.items():
        if name not in PICTURE_FIELDS and any(column.crop for column in columns):
            raise UsageError(f"only pictures can have a crop, got one for {name}")
    return made


def crop_box(crop: Crop, width: int, height: int) -> tuple[int, int, int, int]:
    """Pixels of a crop: left, top, right, bottom; at least one pixel each way."""
    left, top = (min(round(part * side), side - 1) for part, side in zip(crop[:2], (width, height), strict=True))
    right, bottom = (round(part * side) for part, side in zip(crop[2:], (width, height), strict=True))
    return left, top, max(right, left + 1), max(bottom, top + 1)
