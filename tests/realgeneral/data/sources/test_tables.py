"""Parquet by row group, and Hugging Face `datasets`."""

from __future__ import annotations

import pickle
import sys
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from realgeneral.data import order as buckets
from realgeneral.data.columns import parse_columns
from realgeneral.data.sources import tables
from realgeneral.data.sources.open import open_source
from realgeneral.data.sources.tables import ParquetSource, RowGroups
from realgeneral.errors import Failure, UsageError
from tests.realgeneral.helpers.datasets import dataset, good_rows, picture, write_parquet
from tests.realgeneral.helpers.pictures import make_photo


def write_groups(path: Path, rows: int, group: int, start: int = 0) -> Path:
    table = pa.table({
        "target": [picture(start + i) for i in range(rows)],
        "prompt": [f"a red pot {start + i}" for i in range(rows)],
        "unused": [bytes(10_000)] * rows,
    })  # fmt: skip
    pq.write_table(table, path, row_group_size=group)
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every row group that is read from disk."""
    seen: list[tuple[str, int]] = []
    original = RowGroups.read

    def spy(self: RowGroups, source: ParquetSource, group: int) -> pa.Table:
        if (source.path, group) not in self.entries:
            seen.append((source.path.name, group))
        return original(self, source, group)

    monkeypatch.setattr(RowGroups, "read", spy)
    return seen


def test_rows_of_all_groups(tmp_path: Path) -> None:
    """Row numbers run on over ragged groups; only the needed columns are in memory."""
    source = open_source(str(write_groups(tmp_path / "d.parquet", 7, 3)))
    assert [block.rows for block in source.blocks] == [3, 3, 1]
    assert [source.row(i, 0).prompt for i in (6, 0, 3)] == ["a red pot 6", "a red pot 0", "a red pot 3"]
    assert source.row(5, 0).target.tobytes() == make_photo(40, 24, 5).tobytes()
    assert isinstance(source, ParquetSource)
    assert all(table.column_names == ["target", "prompt"] for table in source.groups.entries.values())


def test_shuffled_epochs_read_each_group_once(
    tmp_path: Path, reads: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With windows of about two groups and a cache of as much, an epoch visits every row once and reads every group once."""
    for i in range(2):
        write_groups(tmp_path / f"part-{i}.parquet", 9, 3, 100 * i)
    group_bytes = open_source(str(tmp_path)).blocks[0].bytes
    monkeypatch.setattr(buckets, "WINDOW_BYTES", int(2.5 * group_bytes))
    monkeypatch.setattr(RowGroups.__init__, "__defaults__", (int(2.5 * group_bytes),))
    data = dataset(str(tmp_path))
    first, second = ([data[n].name for n in range(e * 18, e * 18 + 18)] for e in range(2))
    assert len(set(first)) == len(set(second)) == 18
    assert first != second
    # neighbours come from different groups: rows are shuffled within the window
    assert any(a.split()[0] != b.split()[0] for a, b in pairwise(first))
    assert len(set(reads)) == 6
    assert len(reads) <= 12
    again = dataset(str(tmp_path))
    assert [again[n].name for n in (20, 3, 35, 0)] == [(first + second)[n] for n in (20, 3, 35, 0)]


def test_memory_is_bounded(tmp_path: Path) -> None:
    """The cache holds no more bytes than it may, but always the newest group."""
    groups = RowGroups(capacity_bytes=1)
    source = ParquetSource(write_groups(tmp_path / "d.parquet", 6, 2), parse_columns([]), groups)
    for i in range(6):
        source.record(i, 0)
        assert len(groups.entries) == 1


def test_a_damaged_group_is_named_and_read_once(tmp_path: Path, reads: list[tuple[str, int]]) -> None:
    """Bytes overwritten in the middle: its rows are bad rows with one reason, the other groups are good."""
    path = write_groups(tmp_path / "d.parquet", 6, 2)
    metadata = pq.ParquetFile(path).metadata
    column = metadata.row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    rows = dataset(str(path))
    skipped = {name for n in range(12) for name in rows[n].skipped}
    assert {name.split(":")[0] for name in skipped} == {"d.parquet row 2", "d.parquet row 3"}
    assert all("row group 1 of" in name and "must be complete" in name for name in skipped)
    assert len(reads) == 3


def test_pickled_sources_read_on(tmp_path: Path) -> None:
    """Spawned data-loading processes get the source by pickle."""
    source = pickle.loads(pickle.dumps(open_source(str(write_groups(tmp_path / "d.parquet", 4, 2)))))
    assert source.row(3, 0).prompt == "a red pot 3"


# --- datasets ------------------------------------------------------------------------------------------------------------


def test_saved_datasets(tmp_path: Path) -> None:
    """A save_to_disk folder, alone and as a dict with a train split; lists of pictures; rows equal those of parquet."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "extra": datasets.Sequence(datasets.Image())}
    )
    rows = {
        "image": [{"bytes": picture(i), "path": None} for i in range(3)],
        "text": [f"a red pot {i}" for i in range(3)],
        "extra": [[{"bytes": picture(7), "path": None}, {"bytes": picture(8), "path": None}]] * 3,
    }
    made = datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "dict")
    for name in ("one", "dict"):
        source = open_source(str(tmp_path / name), ["target=image", "prompt=text", "condition=extra"])
        assert len(source) == 3
        row = source.row(2, 0)
        assert (row.prompt, len(row.conditions), row.name) == ("a red pot 2", 2, f"{name} row 2")
        assert row.target.tobytes() == make_photo(40, 24, 2).tobytes()
    with pytest.raises(Failure, match=r"one must have a column 'target', got \['image', 'text', 'extra'\]"):
        open_source(str(tmp_path / "one"))


def test_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hf:NAME:CONFIG@SPLIT reaches load_dataset; what is not there is one line."""
    datasets = pytest.importorskip("datasets")
    asked = []
    made = datasets.Dataset.from_dict({"target": [picture(0)], "prompt": ["a"]})

    def load(name: str, config: str | None, split: str) -> object:
        asked.append((name, config, split))
        return made

    monkeypatch.setattr(datasets, "load_dataset", load)
    for path in ("hf:owner/name", "hf:owner/name:depth@validation"):
        assert open_source(path).row_name(0) == "name row 0"
    assert asked == [("owner/name", None, "train"), ("owner/name", "depth", "validation")]
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(Failure, match=r"data hf:owner/nothing must be a data set that can be loaded, got: ."):
        open_source("hf:owner/nothing")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install is said."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"data hf:a/b needs the package datasets: pip install 'realgeneral\[datasets\]'"):
        open_source("hf:a/b")


def test_small_data_is_shuffled_as_a_whole(tmp_path: Path) -> None:
    """Several row groups below the window give the order of a single one."""
    one, many = dataset(write_parquet(tmp_path / "a", good_rows(6))), dataset(str(write_groups(tmp_path / "d.parquet", 6, 2)))
    assert [one[n].prompt for n in range(12)] == [many[n].prompt for n in range(12)]
    assert tables.WINDOW_BYTES > 2**20


def test_stamps(tmp_path: Path) -> None:
    """Of `datasets` too: the same in the next process, another for other rows or columns, so that sizes are read once."""
    datasets = pytest.importorskip("datasets")
    rows = good_rows(3)
    for name, count in (("one", 3), ("two", 2)):
        datasets.Dataset.from_list(rows[:count]).save_to_disk(tmp_path / name)
    one = open_source(str(tmp_path / "one")).stamp()
    assert one == open_source(str(tmp_path / "one")).stamp() != ""
    assert one != open_source(str(tmp_path / "two")).stamp()
    parquet = write_parquet(tmp_path / "p", rows)
    for path in (str(tmp_path / "one"), parquet):
        assert open_source(path, ["target=target:left"]).stamp() != open_source(path).stamp()


def test_huggingface_parquet(tmp_path: Path) -> None:
    """Pictures as datasets writes them, {"bytes": ..., "path": ...}."""
    rows = [{"target": {"bytes": picture(0), "path": None}, "prompt": "a", "condition": [{"bytes": picture(1), "path": "x"}]}]
    row = open_source(write_parquet(tmp_path / "d", rows)).row(0, 0)
    assert len(row.conditions) == 1


def test_wrong_types_in_parquet(tmp_path: Path) -> None:
    """Numbers or strings where pictures belong are bad rows."""
    path = write_parquet(tmp_path / "d", [{"target": "file.png", "prompt": "a"}])
    with pytest.raises(Failure, match=r"pictures in data.parquet must be bytes, got str"):
        dataset(path, strict=True)[0]
    path = write_parquet(tmp_path / "e", [{"target": {"path": "x"}, "prompt": "a"}])
    with pytest.raises(Failure, match=r"pictures in data.parquet must be bytes, got NoneType"):
        dataset(path, strict=True)[0]


def test_parquet_without_the_columns(tmp_path: Path) -> None:
    """The columns that are needed and those that are there."""
    path = write_parquet(tmp_path / "d", [{"image": picture(0), "prompt": "a"}])
    with pytest.raises(Failure, match=r"must have a column 'target', got \['image', 'prompt'\]"):
        open_source(path)
