"""What a path is: data of every kind, shards, globs, column maps, and sizes and hashes without decoding."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from realgeneral.data.rows import Picture
from realgeneral.data.sources.open import open_source
from realgeneral.errors import Failure, UsageError
from tests.realgeneral.helpers.datasets import WRITERS, Rows, Writer, good_rows, picture, write_folder, write_parquet, write_tar
from tests.realgeneral.helpers.pictures import encoded, make_photo


@pytest.mark.parametrize("writer", [write_parquet, write_tar])
def test_shards(writer: Writer, tmp_path: Path) -> None:
    """A folder of shards and a glob of them are one data set, in the order of their names; rows keep their file's name."""
    (tmp_path / "all").mkdir()
    for i in range(3):
        path = Path(writer(tmp_path / str(i), good_rows(i + 1)))
        shutil.copy(path, tmp_path / "all" / f"part-{i}{path.suffix}")
    for place in (tmp_path / "all", tmp_path / "all" / "part-*"):
        source = open_source(str(place))
        assert len(source) == 6
        assert [source.row(i, 0).prompt[-1] for i in range(6)] == ["0", "0", "1", "0", "1", "2"]
        assert source.row_name(5).startswith("part-2")
        assert sum(block.rows for block in source.blocks) == 6
    with pytest.raises(Failure, match="data must match at least one file, got none"):
        open_source(str(tmp_path / "all" / "*.nothing"))
    (tmp_path / "all" / "a.png").write_bytes(picture(0))
    with pytest.raises(UsageError, match=r"of pictures or of shards, got .* with both, such as part-0"):
        open_source(str(tmp_path / "all"))


def test_one_broken_shard_is_named(tmp_path: Path) -> None:
    """A truncated shard among good ones is a failure with its name, at once."""
    for i in range(2):
        shutil.copy(write_parquet(tmp_path / str(i), good_rows(2)), tmp_path / f"part-{i}.parquet")
    broken = tmp_path / "part-1.parquet"
    broken.write_bytes(broken.read_bytes()[:-20])
    with pytest.raises(Failure, match=r"part-1.parquet must be a complete parquet file"):
        open_source(str(tmp_path / "part-*.parquet"))


@pytest.mark.parametrize("writer", [write_folder, write_parquet])
def test_column_maps(writer: Writer, tmp_path: Path) -> None:
    """Names, nested captions and halves of one picture, in metadata.jsonl and in parquet."""
    pair = Image.new("RGB", (80, 24))
    pair.paste(make_photo(40, 24, 1), (0, 0))
    pair.paste(make_photo(40, 24, 2), (40, 0))
    rows: Rows = [{"image": encoded(pair), "text": {"en": "a red pot"}, "other": "x"}]
    path = writer(tmp_path / "d", rows)
    columns = ["target=image:right", "condition=image:left", "prompt=text.en"]
    row = open_source(path, columns).row(0, 0)
    assert row.prompt == "a red pot"
    assert row.target.tobytes() == make_photo(40, 24, 2).tobytes()
    assert row.conditions[0].tobytes() == make_photo(40, 24, 1).tobytes()
    record = open_source(path, columns).record(0, 0)
    assert record.target.size() == (40, 24)
    assert record.target.digest() != record.conditions[0].digest()


def test_column_map_of_a_tar(tmp_path: Path) -> None:
    """Members by their endings, and keys of the json."""
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        for name, data in (
            ("0.jpg", encoded(make_photo(), "JPEG")),
            ("0.depth.png", picture(3)),
            ("0.json", b'{"caption": "x"}'),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    source = open_source(str(tmp_path / "d.tar"), ["target=jpg", "condition=depth.png", "prompt=caption"])
    row = source.row(0, 0)
    assert (row.prompt, row.target.size) == ("x", (96, 64))
    assert row.conditions[0].tobytes() == make_photo(40, 24, 3).tobytes()
    with pytest.raises(Failure, match=r"pictures in d.tar must be members, got 'x'"):
        open_source(str(tmp_path / "d.tar"), ["target=caption", "prompt=caption"]).row(0, 0)


def test_columns_of_nano() -> None:
    """The packaged data has none."""
    with pytest.raises(UsageError, match="columns must not be given for nano"):
        open_source("nano", ["target=image"])


def test_sizes_without_decoding(tmp_path: Path) -> None:
    """The header is enough, also of a truncated file; EXIF turns the sides as it turns the picture."""
    data = encoded(make_photo(40, 24), "JPEG")
    assert Picture(data[: len(data) - 200]).size() == (40, 24)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        file = io.BytesIO()
        make_photo(40, 24).save(file, kind, exif=exif)
        turned = Picture(file.getvalue())
        assert turned.size() == turned.load().size == (24, 40), kind
    with pytest.raises(Failure, match="not an image"):
        Picture(b"hello").size()


def test_digests_follow_the_content(tmp_path: Path) -> None:
    """A file and its bytes are the same picture; a changed byte or another crop is another one."""
    (tmp_path / "a.png").write_bytes(picture(0))
    same = {Picture(tmp_path / "a.png").digest(), Picture(picture(0)).digest()}
    assert len(same) == 1
    others = {Picture(picture(1)).digest(), Picture(picture(0), (0, 0, 0.5, 1)).digest(), Picture(make_photo()).digest()}
    assert len(same | others) == 4
    with pytest.raises(Failure, match=r"nothing.png must be a picture file, got no such file"):
        Picture(tmp_path / "nothing.png").digest()


def test_stamps_follow_the_files(tmp_path: Path) -> None:
    """Writing a picture anew changes the stamp of its data set."""
    path = Path(write_folder(tmp_path / "d", good_rows(2)))
    before = open_source(str(path)).stamp()
    assert before == open_source(str(path)).stamp()
    (path / "target-0-0.png").write_bytes(picture(9) + b" ")
    assert open_source(str(path)).stamp() != before


def test_rows_of_every_kind_of_source(write: Writer, tmp_path: Path) -> None:
    """Folder, parquet and tar give the same rows: target, prompt, several conditions, task and subject."""
    rows: Rows = [
        {"target": picture(0), "prompt": "a red pot", "condition": [picture(5), picture(6)], "task": "canny", "subject": "pot"},
        {"target": picture(1), "prompt": "blue cat", "condition": [picture(7), picture(8)], "task": None, "subject": None},
    ]
    source = open_source(write(tmp_path / "d", rows))
    assert len(source) == 2
    row = source.row(0, 0)
    assert (row.prompt, row.task, row.subject, len(row.conditions)) == ("a red pot", "canny", "pot", 2)
    assert row.target.tobytes() == make_photo(40, 24, 0).tobytes()
    assert [c.tobytes() for c in row.conditions] == [make_photo(40, 24, i).tobytes() for i in (5, 6)]
    assert source.row(1, 0).task is None


def test_missing_and_unknown_data(tmp_path: Path) -> None:
    """A missing path is a failure, an unknown kind of file a usage error."""
    with pytest.raises(Failure, match="data must be an existing folder or file, got /nowhere"):
        open_source("/nowhere")
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(UsageError, match=r"data must be a folder, a .parquet or a .tar file, got .*rows.csv"):
        open_source(str(tmp_path / "rows.csv"))


def test_empty_data(tmp_path: Path) -> None:
    """Nothing to train on is said at once, for every kind."""
    (tmp_path / "empty").mkdir()
    blank = tmp_path / "blank"
    blank.mkdir()
    (blank / "metadata.jsonl").write_text("\n\n")
    with tarfile.open(tmp_path / "d.tar", "w"):
        pass
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"target": pa.array([], pa.binary()), "prompt": pa.array([], pa.string())}), tmp_path / "d.parquet")
    for path in ("empty", "blank", "d.tar", "d.parquet"):
        with pytest.raises(Failure, match="data must hold at least one row, got none in"):
            open_source(str(tmp_path / path))


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize("defect", ["header", "data", "text", "empty"])
def test_broken_containers(tmp_path: Path, kind: str, defect: str) -> None:
    """A truncated or fake parquet or tar is one line that names it."""
    path = Path(WRITERS[kind](tmp_path / "d", good_rows(3)))
    data = path.read_bytes()
    header, member = (5220, 4700) if kind == "tar" else (-6, len(data) // 2)
    path.write_bytes({"header": data[:header], "data": data[:member], "text": b"hello\n" * 300, "empty": b""}[defect])
    with pytest.raises(Failure, match=rf"must be a complete.* {kind} file, got"):
        open_source(str(path))
