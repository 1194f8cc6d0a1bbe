"""Buckets of a run, and the sizes of a source's pictures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from realgeneral.data import shapes as shapes_module
from realgeneral.data.samples import PairDataset
from realgeneral.data.shapes import Shape, bucket_sizes, nearest, read_shapes, standard_sizes
from realgeneral.data.sources.open import open_source
from realgeneral.errors import UsageError
from tests.realgeneral.helpers.datasets import good_rows, write_folder
from tests.realgeneral.helpers.pictures import encoded, make_photo

SIZES = ((32, 16), (16, 32), (32, 32))
pytestmark = pytest.mark.usefixtures("cache")


def test_standard_lists() -> None:
    """480x720 of CogVideoX 1.0 and 768x1360 of 1.5: multiples of 16, about equal areas, sides within the trained range."""
    older, newer = standard_sizes(720, 480, 16), standard_sizes(1360, 768, 16, (768, 1360))
    assert {(720, 480), (480, 720), (592, 592)} <= set(older)
    assert {(1360, 768), (768, 1360), (1024, 1024)} <= set(newer)
    for sizes, area in ((older, 480 * 720), (newer, 768 * 1360)):
        assert all(w % 16 == h % 16 == 0 and abs(w * h / area - 1) < 0.06 for w, h in sizes)
        assert {(h, w) for w, h in sizes} == set(sizes)
    assert all(768 <= side <= 1360 for size in newer for side in size)
    assert len(older) == 9
    assert len(newer) == 7
    assert (64, 64) in standard_sizes(64, 64, 8)


def test_given_lists() -> None:
    """HEIGHTxWIDTH, mixed with the standard list."""
    assert bucket_sizes(["480x720"], (64, 64), 16, None) == ((720, 480),)
    assert set(bucket_sizes(["standard", "256x256"], (720, 480), 16, None)) == {*standard_sizes(720, 480, 16), (256, 256)}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wide", "buckets must be standard or HEIGHTxWIDTH such as 480x720, got 'wide'"),
        ("480x", "buckets must be standard or"),
        ("480x721", "sides of buckets must be positive multiples of 16 of at most 1360, got 480x721"),
        ("0x480", "positive multiples of 16"),
        ("480x1376", "of at most 1360, got 480x1376"),
    ],
)
def test_wrong_lists(spec: str, message: str) -> None:
    """Each is one line that names it."""
    with pytest.raises(UsageError, match=message):
        bucket_sizes([spec], (720, 480), 16, 1360)


def test_nearest_ratio() -> None:
    """Twice as wide is as far from square as twice as high; ties go to the larger size."""
    assert nearest((1000, 500), SIZES) == (32, 16)
    assert nearest((10, 30), SIZES) == (16, 32)
    assert nearest((110, 100), SIZES) == (32, 32)
    assert nearest((5, 5), ((16, 16), (64, 64), (32, 32))) == (64, 64)


def test_shapes_are_kept_until_files_change(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second reading opens no picture; a changed file or a damaged cache is read anew."""
    path = write_folder(tmp_path / "d", good_rows(3))
    first = read_shapes(open_source(path))
    assert first == [Shape(40, 24, 1)] * 3
    (kept,) = (cache / "realgeneral" / "shapes").iterdir()
    original, calls = shapes_module._shape, [0]

    def counting(*args: Any) -> Any:
        calls[0] += 1
        return original(*args)

    monkeypatch.setattr(shapes_module, "_shape", counting)
    assert read_shapes(open_source(path)) == first
    assert calls == [0]
    kept.write_bytes(kept.read_bytes()[:90])
    assert read_shapes(open_source(path)) == first
    assert calls == [3]
    (Path(path) / "target-0-0.png").write_bytes(encoded(make_photo(20, 60)))
    assert read_shapes(open_source(path))[0] == Shape(20, 60, 1)


def test_shapes_of_files_elsewhere_are_not_kept(tmp_path: Path, cache: Path) -> None:
    """Only files of the folder are watched: sizes of others are read each time."""
    (tmp_path / "d").mkdir()
    for size in ((40, 24), (24, 40)):
        make_photo(*size).save(tmp_path / "outside.png")
        for name in ("../outside.png", str(tmp_path / "outside.png")):
            (tmp_path / "d" / "metadata.jsonl").write_text(json.dumps({"target": name, "prompt": "a"}))
            assert read_shapes(open_source(str(tmp_path / "d"))) == [Shape(*size, 1)]


@pytest.mark.parametrize("name", ["link.png", os.fsdecode(b"caf\xe9.png")])
def test_odd_names_are_one_bad_row(tmp_path: Path, cache: Path, name: str) -> None:
    """A link to nothing, and a name that is no UTF-8: skipped by name with buckets and variants too."""
    folder = tmp_path / "d"
    folder.mkdir()
    for i in range(3):
        make_photo(40, 24, i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a pot")
    if name == "link.png":
        (folder / name).symlink_to("/nowhere.png")
    else:
        make_photo(40, 24).save(folder / name, format="PNG")
    (folder / name).with_suffix(".txt").write_text("a pot")
    source = open_source(str(folder))
    shapes = read_shapes(source)
    assert [shape is None for shape in shapes].count(True) == 1
    rows = PairDataset(source, ["canny"], [], (32, 16), 0, strict=False, variants=2)
    assert len({reason for n in range(12) for reason in rows[n].skipped}) == 1


def test_a_cache_that_cannot_be_written(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes are read all the same, and it is said."""
    cache.write_text("a file where the folder should be")
    assert len(read_shapes(open_source(write_folder(tmp_path / "d", good_rows(2))))) == 2
    assert "picture sizes are not kept" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a.heic", "picture", "../outside.png", "sub/b.png"])
def test_a_replaced_picture_of_any_name_has_its_new_size(tmp_path: Path, name: str) -> None:
    """Also with the same number of bytes and the old time, as `cp -p` leaves it."""
    folder = tmp_path / "d"
    (folder / "sub").mkdir(parents=True)
    path = folder / name
    wide, high = (encoded(make_photo(*size)) for size in ((40, 24), (24, 40)))
    length = max(len(wide), len(high))
    path.write_bytes(wide.ljust(length, b"\0"))
    (folder / "metadata.jsonl").write_text(json.dumps({"target": name, "prompt": "a"}) + "\n")
    source = open_source(str(folder))
    assert source.stamp()
    assert read_shapes(source) == [Shape(40, 24, 1)]
    status = path.stat()
    path.write_bytes(high.ljust(length, b"\0"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert read_shapes(open_source(str(folder))) == [Shape(24, 40, 1)]
