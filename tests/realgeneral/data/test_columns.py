"""Column maps: every spelling, the ready ones on records of those data sets' shape, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from realgeneral.data.columns import Cropped, crop_box, parse_columns
from realgeneral.errors import Failure, UsageError


def test_without_a_map_fields_have_their_own_names() -> None:
    """The record comes through as it is, other columns dropped."""
    record = {"target": 1, "prompt": "a", "condition": [2, 3], "other": 4}
    assert parse_columns([])(record) == {"target": 1, "prompt": "a", "condition": [2, 3], "task": None, "subject": None}


def test_columns_by_name() -> None:
    """Renamed, nested, several for condition, and a field that is turned off."""
    columns = parse_columns(["target=image", "prompt=text.en", "condition=a", "condition=b", "subject="])
    made = columns({"image": 1, "text": {"en": "x", "de": "y"}, "a": [2, 3], "b": 4, "subject": "pot"})
    assert (made["target"], made["prompt"], made["condition"]) == (1, "x", [2, 3, 4])
    assert "subject" not in made


def test_names_with_dots_are_columns_first() -> None:
    """Members of a tar such as "depth.png" are not nested."""
    assert parse_columns(["condition=depth.png"])({"depth.png": 5, "depth": {"png": 6}})["condition"] == 5


@pytest.mark.parametrize("name", ["map.json", "map.yaml"])
def test_maps_in_files(tmp_path: Path, name: str) -> None:
    """A file of either kind, overridden by what follows it."""
    described = {"target": "image", "prompt": "text", "condition": ["a", "b:left"]}
    text = json.dumps(described) if name == "map.json" else "target: image\nprompt: text\ncondition:\n- a\n- b:left\n"
    (tmp_path / name).write_text(text)
    made = parse_columns([str(tmp_path / name), "prompt=caption"])({"image": 1, "caption": "x", "a": 2, "b": 3})
    assert (made["target"], made["prompt"]) == (1, "x")
    assert made["condition"] == [2, Cropped(3, (0, 0, 0.5, 1))]


def test_ready_maps() -> None:
    """Subjects200K: crops of one picture and the second description. MultiGen: picture, text and its control."""
    record = {"image": b"pair", "description": {"item": "pot", "description_0": "left", "description_1": "right"}}
    made = parse_columns(["subjects200k"])(record)
    assert made["prompt"] == "right"
    assert crop_box(made["condition"].crop, 1056, 528) == (8, 8, 520, 520)
    assert crop_box(made["target"].crop, 1056, 528) == (528, 8, 1040, 520)
    made = parse_columns(["multigen-depth"])({"image": 1, "text": "a", "control_depth": 2})
    assert (made["target"], made["prompt"], made["condition"]) == (1, "a", 2)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["image"], "columns must be FIELD=COLUMN, a .json or .yaml file or one of"),
        (["picture=image"], "field of --columns must be one of"),
        (["target=image:middle"], "crop must be one of .* got 'middle'"),
        (["target=image:0.5,0,0.2,1"], "crop must have fractions"),
        (["target=a", "target=b"], r"target must have one column, got \['a', 'b'\]"),
        (["target="], "target must have a column, got none"),
        (["prompt=text:left"], "only pictures can have a crop, got one for prompt"),
        (["target=:left"], "columns must name a column, got ':left'"),
    ],
)
def test_wrong_maps(items: list[str], message: str) -> None:
    """One line that names what is wrong."""
    with pytest.raises(UsageError, match=message):
        parse_columns(items)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("map.json", "{broken", "must be a readable column map"),
        ("map.yaml", "a: [b", "must be a readable column map"),
        ("map.json", "[1]", "must map fields to columns, got list"),
        ("map.json", None, "must be a readable column map"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    """A file that is missing or no map is a failure that names it."""
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(Failure, match=message):
        parse_columns([str(tmp_path / name)])


def test_missing_columns_are_named() -> None:
    """A mapped column that is not there is not taken for an empty one."""
    with pytest.raises(Failure, match=r"x must have a column 'depth', got \['target', 'prompt'\]"):
        parse_columns(["condition=depth"]).roots(["target", "prompt"], "x")


def test_crops_keep_a_pixel() -> None:
    """However small the picture."""
    assert crop_box((0, 0, 0.5, 1), 1, 1) == (0, 0, 1, 1)
    assert crop_box((0.5, 0, 1, 1), 1, 3) == (0, 0, 1, 3)


def test_a_map_with_a_byte_order_mark_and_one_too_deep(tmp_path: Path) -> None:
    """Windows programs write the former; the latter ends in the message of its file."""
    path = tmp_path / "map.json"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "text"}')
    assert parse_columns([str(path)])({"text": "a"})["prompt"] == "a"
    for name, text in (("map.json", "[" * 100_000), ("map.yaml", "[" * 3000)):
        (tmp_path / name).write_text(text)
        with pytest.raises(Failure, match=f"{name} must be a readable column map, got"):
            parse_columns([str(tmp_path / name)])
