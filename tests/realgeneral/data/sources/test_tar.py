"""WebDataset: how members make a row, and members that make none."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from realgeneral.data.sources.open import open_source
from realgeneral.errors import Failure
from tests.realgeneral.helpers.datasets import dataset, good_rows, picture, write_tar
from tests.realgeneral.helpers.pictures import encoded, make_photo


def test_webdataset_names(tmp_path: Path) -> None:
    """KEY.png with KEY.txt in folders, and names with dots only after the key, as webdataset groups them."""
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        for name, data in (
            ("x/1.jpg", encoded(make_photo(), "JPEG")),
            ("x/1.txt", b"a pot"),
            ("y/1.png", picture(0)),
            ("y/1.txt", b"b"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    source = open_source(str(tmp_path / "d.tar"))
    assert [source.row(i, 0).prompt for i in range(2)] == ["a pot", "b"]
    assert source.row_name(0) == "d.tar x/1"


def test_webdataset_conditions_are_numbered(tmp_path: Path) -> None:
    """KEY.condition.0.png, ... are in the order of their numbers, not of their names: the place is the frame position."""
    numbers = [3, 11, 0, 7, 2, 10, 1, 9, 5, 4, 8, 6]
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        members = [("0.target.png", picture(0)), ("0.txt", b"a pot")]
        for name, data in members + [(f"0.condition.{i}.png", encoded(Image.new("RGB", (32, 16), (i, 0, 0)))) for i in numbers]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (conditions,) = [open_source(str(tmp_path / "d.tar")).row(0, 0).conditions]
    assert [image.getpixel((0, 0))[0] for image in conditions] == sorted(numbers)


@pytest.mark.parametrize(
    ("member", "data"),
    [
        ("00001.json", b"{broken"),
        ("00001.json", b"5"),
        ("00001.json", b'["a", "b"]'),
        ("00001.json", b"\xff\xfe"),
        ("00001.txt", b"\xff\xfe"),
    ],
)
def test_bad_members_of_a_tar(tmp_path: Path, member: str, data: bytes) -> None:
    """A broken json or txt member makes its sample a bad row and no crash."""
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        for name, content in (("00000.png", picture(0)), ("00000.txt", b"a"), ("00001.png", picture(1)), (member, data)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    rows = dataset(str(tmp_path / "d.tar"))
    assert {name.split(" must")[0] for n in range(4) for name in rows[n].skipped} == {"d.tar 00001"}


def test_a_tar_whose_json_names_files(tmp_path: Path) -> None:
    """File names in a json member are not pictures: only members are."""
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        described = json.dumps({"prompt": "a", "target": "x.png", "condition": "y.png"}).encode()
        for name, content in (("0.target.png", picture(0)), ("0.json", described)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert dataset(str(tmp_path / "d.tar"), strict=True)[0].prompt == "a"


def test_compressed_tar_is_refused(tmp_path: Path) -> None:
    """A gzip-compressed file named .tar cannot be read in place: it is named, not read as garbage rows."""
    import gzip

    path = Path(write_tar(tmp_path / "d", good_rows(2)))
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(Failure, match="uncompressed tar"):
        open_source(str(path))


def write_members(path: Path, members: list[tuple[str, bytes | str]]) -> str:
    """Text is the name of the member that a hard link is to."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, str):
                info.type, info.linkname = tarfile.LNKTYPE, data
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    """Windows programs put one before a caption and before JSON."""
    mark = b"\xef\xbb\xbf"
    members = [
        ("a.png", picture(0)),
        ("a.txt", mark + b"red\r\n"),
        ("b.png", picture(1)),
        ("b.json", mark + b'{"prompt": "x"}'),
    ]
    source = open_source(write_members(tmp_path / "d.tar", members))
    assert [source.record(i, 0).prompt for i in range(2)] == ["red", "x"]


def test_hard_links_and_notes_of_macos(tmp_path: Path) -> None:
    """`tar` stores a file's second name as a link; `._` members are no rows."""
    members = [("._a.png", b"x"), ("a.png", picture(0)), ("a.txt", b"red"), ("b.png", "a.png"), ("b.txt", "a.txt")]
    source = open_source(write_members(tmp_path / "d.tar", members))
    assert [source.row_name(i) for i in range(len(source))] == ["d.tar a", "d.tar b"]
    assert source.row(1, 0).target.tobytes() == source.row(0, 0).target.tobytes()
    assert source.row(1, 0).prompt == "red"


def test_dots_in_the_names_of_pictures(tmp_path: Path) -> None:
    """Two pictures of one key are told as such, not as a row without a target."""
    source = open_source(
        write_members(tmp_path / "d.tar", [("22.05.png", picture(0)), ("22.06.png", picture(1)), ("22.txt", b"a")])
    )
    with pytest.raises(
        Failure, match=r"d.tar 22 must have a target picture KEY.SUFFIX, got members \['05.png', '06.png'\] of that"
    ):
        source.record(0, 0)
