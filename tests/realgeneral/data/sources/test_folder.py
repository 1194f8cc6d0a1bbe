"""Folders: pictures with captions, metadata.jsonl, and every line that it should not hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from realgeneral.data.sources.open import open_source
from realgeneral.errors import Failure
from tests.realgeneral.helpers.datasets import dataset, picture, write_folder
from tests.realgeneral.helpers.pictures import encoded, make_photo


def test_folder_with_captions(tmp_path: Path) -> None:
    """Pictures with a .txt of the same name beside them, any letter case of the ending, other files ignored."""
    (tmp_path / "a.PNG").write_bytes(picture(0))
    (tmp_path / "a.txt").write_text(" a red pot \n")
    (tmp_path / "b.jpg").write_bytes(encoded(make_photo(), "JPEG"))
    (tmp_path / "b.txt").write_text("Früchte", encoding="utf-8")
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "sub.png").mkdir()
    source = open_source(str(tmp_path))
    assert [source.row(i, 0).prompt for i in range(2)] == ["a red pot", "Früchte"]


def test_one_condition_as_a_string(tmp_path: Path) -> None:
    """`condition` may be one picture instead of a list."""
    source = open_source(write_folder(tmp_path / "d", [{"target": picture(0), "prompt": "a", "condition": picture(1)}]))
    assert len(source.row(0, 0).conditions) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2 must be JSON"),
        ("5", "line 2 must be a JSON object, got int"),
        ('["a"]', "line 2 must be a JSON object, got list"),
        ('{"target": "nothing.png", "prompt": "a"}', "nothing.png must be a picture file, got no such file"),
        ('{"prompt": "a"}', "must have a target picture, got None"),
        ('{"target": "t.png"}', "must have a prompt string, got None"),
        ('{"target": "t.png", "prompt": 5}', "must have a prompt string, got 5"),
        ('{"target": 7, "prompt": "a"}', "must be a picture file"),
        ('{"target": ["t.png"], "prompt": "a"}', "must be a picture file"),
        ('{"target": ".", "prompt": "a"}', "got a folder"),
        ('{"target": "t.png", "prompt": "a", "task": ["canny"]}', "must have a string as task"),
        ('{"target": "t.png", "prompt": "a", "task": 3}', "must have a string as task, got 3"),
        ('{"target": "t.png", "prompt": "a", "subject": 3}', "must have a string as subject, got 3"),
        ('{"target": "t.png", "prompt": "a", "condition": 3, "task": "canny"}', "must be a picture file"),
        ('{"target": "t.png", "prompt": "a", "condition": {"x": 1}, "task": "canny"}', "must be a picture file"),
        ('{"target": "t\\u0000.png", "prompt": "a"}', "must be a"),
        ("[" * 200_000, "line 2 must be JSON"),
        ('{"n": ' + "1" * 5000 + "}", "line 2 must be JSON"),
        ('{"target": "t.png", "prompt": "fox \\ud83e"}', r"line 2: prompt must be whole characters, got '.ud83e' at 4"),
        ('{"target": "t\\ud83e.png", "prompt": "a"}', r"line 2: path must be whole characters, got '.ud83e' at 1"),
    ],
)
def test_bad_lines_of_metadata(tmp_path: Path, line: str, message: str) -> None:
    """Whatever a line of metadata.jsonl holds, it is a Failure that names the line, or a good row."""
    (tmp_path / "t.png").write_bytes(picture(0))
    good = '{"target": "t.png", "prompt": "a"}'
    (tmp_path / "metadata.jsonl").write_text(f"{good}\n{line}\n\n{good}\n")
    data = dataset(str(tmp_path))
    assert len(data.source) == 3
    skipped = {name for n in range(6) for name in data[n].skipped}
    assert len(skipped) == 1
    strict = dataset(str(tmp_path), strict=True)
    with pytest.raises(Failure, match=message) as caught:
        list(map(strict.__getitem__, range(3)))
    assert "line 2" in str(caught.value)


def test_missing_and_broken_captions(tmp_path: Path) -> None:
    """A picture without caption, or with one that is no UTF-8, is a bad row."""
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(picture(0))
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00bad")
    data = dataset(str(tmp_path))
    skipped = sorted({name for n in range(6) for name in data[n].skipped})
    assert len(skipped) == 2
    assert "b.txt must be UTF-8 text" in skipped[0]
    assert "c.png must have a caption c.txt beside it, got none" in skipped[1]


def test_metadata_that_is_no_text(tmp_path: Path) -> None:
    """A metadata.jsonl in another encoding is one line, not a UnicodeDecodeError."""
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(Failure, match=r"metadata.jsonl must be UTF-8 text"):
        open_source(str(tmp_path))


def test_metadata_with_a_byte_order_mark(tmp_path: Path) -> None:
    """Windows editors put one in front of the first line."""
    (tmp_path / "t.png").write_bytes(picture(0))
    (tmp_path / "metadata.jsonl").write_bytes(b'\xef\xbb\xbf{"target": "t.png", "prompt": "a"}\r\n')
    assert dataset(str(tmp_path), strict=True)[0].prompt == "a"


def test_every_picture_is_a_row_or_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Phones and web pages write .jfif and .avif; what makes no row is said when the data are opened."""
    for name in ("a.png", "b.jfif", "c.tga"):
        (tmp_path / name).write_bytes(encoded(make_photo(), {"b.jfif": "JPEG", "c.tga": "TGA"}.get(name, "PNG")))
        (tmp_path / name).with_suffix(".txt").write_text("a pot")
    (tmp_path / "sub").mkdir()
    (tmp_path / "d.heic").write_bytes(b"x")
    (tmp_path / "._a.png").write_bytes(b"\0\5\x16\7")
    source = open_source(str(tmp_path))
    assert [source.row_name(i) for i in range(len(source))] == ["a.png", "b.jfif", "c.tga"]
    assert [source.row(i, 0).prompt for i in range(3)] == ["a pot"] * 3
    told = capsys.readouterr().err
    assert "1 folders inside it, whose pictures are not read, such as sub" in told
    assert "1 files that are neither pictures" in told
    assert "such as d.heic" in told
    assert "1 files of macOS beside the pictures, such as ._a.png" in told


def test_a_listing_with_the_columns_of_hugging_face(tmp_path: Path) -> None:
    """The message says which column map reads it, and that map does."""
    (tmp_path / "p0.png").write_bytes(picture(0))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "p0.png", "text": "a pot"}\n')
    maps = "--columns target=file_name prompt=text"
    with pytest.raises(Failure, match=f"must have a prompt string, got the keys .*; {maps} maps them"):
        open_source(str(tmp_path)).record(0, 0)
    assert open_source(str(tmp_path), maps.split()[1:]).row(0, 0).prompt == "a pot"


def test_names_do_nothing_to_a_terminal(tmp_path: Path) -> None:
    """Control characters in a name are shown as escapes; the file is read all the same."""
    name = "red\x1b[31m\npot.png"
    (tmp_path / name).write_bytes(picture(0))
    source = open_source(str(tmp_path))
    shown = r"red\x1b[31m\npot"
    assert source.row_name(0) == f"{shown}.png"
    with pytest.raises(Failure) as caught:
        source.record(0, 0)
    assert str(caught.value) == f"{shown}.png must have a caption {shown}.txt beside it, got none"
    (tmp_path / name).with_suffix(".txt").write_text("a pot")
    assert source.row(0, 0).name == f"{shown}.png"


def test_a_caption_of_megabytes_is_none(tmp_path: Path) -> None:
    """A file that is not read whole."""
    (tmp_path / "a.png").write_bytes(picture(0))
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(2**20 + 1)
    with pytest.raises(Failure, match=r"a.png must have a caption of at most 1048576 bytes, got 1048577"):
        open_source(str(tmp_path)).record(0, 0)
