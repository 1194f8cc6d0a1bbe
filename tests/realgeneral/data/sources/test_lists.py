"""Several data sets as one: how often, as which task, and what is wrong with a list."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from realgeneral.commands.check_data import check_data
from realgeneral.commands.precompute import precompute
from realgeneral.data import order as buckets
from realgeneral.data.order import epoch_order
from realgeneral.data.rows import Block
from realgeneral.data.samples import PairDataset
from realgeneral.data.sources.open import open_source
from realgeneral.errors import Failure, UsageError
from realgeneral.settings.data import CheckDataConfig, DataSettings, PrecomputeConfig
from realgeneral.settings.train import TrainConfig
from realgeneral.training.plan import run_tasks
from realgeneral.training.train import train
from tests.realgeneral.helpers.datasets import good_rows, picture, write_folder, write_parquet


def mixture(folder: Path, parts: Any) -> str:
    """Write a list; returns its path."""
    path = folder / "mixture.json"
    path.write_text(json.dumps(parts))
    return str(path)


def test_rows_come_as_often_as_the_list_says(tmp_path: Path) -> None:
    """In an epoch each row of a data set comes `repeat` times, as its task; paths are relative to the list."""
    write_folder(tmp_path / "a", good_rows(2))
    write_parquet(tmp_path / "b", good_rows(3))
    path = mixture(tmp_path, [{"data": "a", "repeat": 3, "task": "deblurring"}, {"data": "b/data.parquet"}])
    source = open_source(path)
    assert len(source) == sum(block.rows for block in source.blocks) == 3 * 2 + 3
    tasks = ["colouring", "deblurring"]
    data = PairDataset(source, tasks, [1, 0], (16, 16), 0, strict=True)
    epoch = Counter((data[n].name, data[n].task) for n in range(len(source)))
    assert sorted(epoch.values()) == [1, 1, 1, 3, 3]
    assert {name.partition(": ")[0] for name, _ in epoch} == {"a", "b/data.parquet"}
    assert {task for (_, task), count in epoch.items() if count == 3} == {"deblurring"}
    assert {task for (_, task), count in epoch.items() if count == 1} == {"colouring"}
    stamp = source.stamp()
    assert stamp == open_source(path).stamp()
    mixture(tmp_path, [{"data": "a", "task": "colouring"}])
    assert open_source(path).stamp() != stamp


def test_columns_belong_to_a_part(tmp_path: Path) -> None:
    """Each data set has its own names; a command's --columns are refused."""
    folder = tmp_path / "a [1]"
    write_folder(folder / "a", good_rows(1))
    listing = folder / "a" / "metadata.jsonl"
    listing.write_text(listing.read_text().replace('"prompt"', '"text"'))
    (folder / "map.json").write_text('{"prompt": "text"}')
    for columns in (["prompt=text"], ["map.json"]):
        path = mixture(folder, [{"data": "a", "columns": columns}])
        assert open_source(path).row(0, 0).prompt
    write_parquet(folder / "b", good_rows(2))
    assert len(open_source(mixture(folder, [{"data": "b/*.parquet"}]))) == 2
    with pytest.raises(UsageError, match=r"columns must not be given for .*mixture.json, got"):
        open_source(path, ["prompt=text"])


def test_a_row_of_another_task_is_bad(tmp_path: Path) -> None:
    """Row and list must agree."""
    write_folder(tmp_path / "a", [{**row, "task": "canny"} for row in good_rows(1)])
    source = open_source(mixture(tmp_path, [{"data": "a", "task": "colouring"}]))
    with pytest.raises(Failure, match=r"a: metadata.jsonl line 1: task must be 'colouring', as the list says, got 'canny'"):
        source.record(0, 0)


def test_rows_without_bytes_are_spread_over_all_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside parquet larger than a window, a folder's rows come all along the epoch, each once."""
    monkeypatch.setattr(buckets, "WINDOW_BYTES", 100)
    blocks = [Block(300, 0), *[Block(10, 50)] * 40, Block(100, 0)]
    order = epoch_order(blocks, seed=1, epoch=0)
    assert sorted(order) == list(range(800))
    folder = [row < 300 or row >= 700 for row in order]
    for start in range(0, 800, 80):
        assert 25 < sum(folder[start : start + 80]) < 55
    # and a row group is still read in one window
    groups = [row for row in order if 300 <= row < 700]
    assert len({(row - 300) // 10 for row in groups[:20]}) == 2


def test_what_needs_a_row_once_has_it_once(tmp_path: Path) -> None:
    """Checks and stores see each data set once, and bad rows by data set, as training names them."""
    write_folder(tmp_path / "a", good_rows(2))
    write_folder(tmp_path / "b", [*good_rows(1), {"target": picture(7), "prompt": 3}])
    path = mixture(tmp_path, [{"data": "a", "repeat": 3, "task": "customization"}, {"data": "b"}])
    report = tmp_path / "report.json"
    with pytest.raises(Failure, match=r"3 of 4 rows of .*mixture.json are bad"):
        check_data(CheckDataConfig(data=path, tasks=["customization", "canny"], report=str(report)))
    bad = json.dumps(json.loads(report.read_text()))
    assert "a: metadata.jsonl line 1 must have a condition, since task 'customization' derives none" in bad
    assert "b: metadata.jsonl line 2 must have a prompt string, got 3" in bad
    assert "a: metadata.jsonl line 1 = " not in bad  # no row is its own duplicate


def test_packaged_data_has_nanos_tasks(tmp_path: Path) -> None:
    """A list of nothing else too; and a reference of another style is no depth map."""
    packaged = mixture(tmp_path, [{"data": "nano"}, {"data": "avatars", "task": "customization"}])
    assert run_tasks(DataSettings(data=packaged)) == run_tasks(DataSettings()) == run_tasks(DataSettings(data="avatars"))
    data = PairDataset(open_source("nano"), ["depth", "image-to-depth", "customization", "canny"], [], (16, 16), 0, strict=True)
    assert {data[n].task for n in range(20)} == {"customization", "canny"}


def test_resume_needs_the_same_shares(tmp_path: Path) -> None:
    """Repeats and tasks are settings of a run as --task-weights are."""
    write_folder(tmp_path / "a", good_rows(2))
    path = mixture(tmp_path, [{"data": "a", "task": "canny"}, {"data": "a", "task": "colouring"}])
    settings: dict[str, Any] = {"data": path, "output": str(tmp_path / "run"), "batch_size": 2, "rank": 4, "sample_count": 0}
    train(TrainConfig(tasks=["canny", "colouring"], steps=2, **settings))
    mixture(tmp_path, [{"data": "a", "repeat": 2, "task": "canny"}])
    with pytest.raises(UsageError, match=r"data must have .*'colouring'.* as in the run to resume, got .*'canny'"):
        train(TrainConfig(tasks=["canny", "colouring"], steps=2, resume=True, **settings))
    mixture(tmp_path, [{"data": "a", "task": "canny"}, {"data": "a", "task": "colouring"}])
    train(TrainConfig(tasks=["canny", "colouring"], steps=2, resume=True, **settings))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"data": "nano"}, r"must hold a list of at least one data set, got \{"),
        ([], r"must hold a list of at least one data set, got \[\]"),
        (["nano"], r"entry 1 must be an object with keys of \['data', 'repeat', 'task', 'columns'\], got \"nano\""),
        ([{"data": "nano"}, {"data": "nano", "weight": 2}], r"entry 2 must be an object with keys of"),
        ([{"repeat": 2}], r"entry 1 must have a data set that is not a list itself as data, got None"),
        ([{"data": "mixture.json"}], r"a data set that is not a list itself as data, got 'mixture.json'"),
        ([{"data": "nano", "repeat": 0}], r"a whole number of 1 to 1000 as repeat, got 0"),
        ([{"data": "nano", "repeat": 1.5}], r"a whole number of 1 to 1000 as repeat, got 1.5"),
        ([{"data": "nano", "repeat": 1001}], r"a whole number of 1 to 1000 as repeat, got 1001"),
        ([{"data": "nano", "repeat": True}], r"a whole number of 1 to 1000 as repeat, got True"),
        ([{"data": "nano", "task": "cany"}], r"entry 1 must have one of \[.*'canny'.*\] as task, got 'cany'"),
        ([{"data": "nano", "task": ["canny"]}], r"as task, got \['canny'\]"),
        ([{"data": "nano", "columns": "x"}], r"a list of strings as columns, got 'x'"),
        ([{"data": "nano", "columns": ["target=x"]}], r"entry 1: columns must not be given for nano"),
    ],
)
def test_a_wrong_list_is_named(tmp_path: Path, parts: Any, message: str) -> None:
    """Entry, key and value."""
    with pytest.raises(UsageError, match=message):
        open_source(mixture(tmp_path, parts))


def test_a_list_that_cannot_be_read(tmp_path: Path) -> None:
    """No file, no JSON, no such data set."""
    with pytest.raises(Failure, match=r"data must be an existing folder or file, got .*none.json"):
        open_source(str(tmp_path / "none.json"))
    (tmp_path / "broken.json").write_text("[{")
    with pytest.raises(UsageError, match=r"data must be a JSON list of data sets, got .*broken.json"):
        open_source(str(tmp_path / "broken.json"))
    with pytest.raises(Failure, match=r"mixture.json entry 2: data must be an existing folder or file, got .*nothing"):
        open_source(mixture(tmp_path, [{"data": "nano"}, {"data": "nothing"}]))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(UsageError, match=r"data must be a JSON list of data sets, got .*deep.json"):
        open_source(str(tmp_path / "deep.json"))
    write_folder(tmp_path / "folder.json", good_rows(2))
    assert len(open_source(str(tmp_path / "folder.json"))) == 2


def test_trains_on_avatars_and_emoji(tmp_path: Path) -> None:
    """The mixture of nano's recipe through precompute and train; a run without its task is refused before it starts."""
    path = mixture(tmp_path, [{"data": "nano"}, {"data": "avatars", "task": "customization"}])
    settings = {"data": path, "output": str(tmp_path / "run"), "steps": 2, "batch_size": 2, "rank": 4, "sample_count": 0}
    with pytest.raises(UsageError, match=r"tasks must hold \['customization'\], which the data names, got \['canny'\]"):
        train(TrainConfig(tasks=["canny"], **settings))
    result = train(TrainConfig(tasks=["customization", "canny"], **settings))
    assert Path(result["adapter"]).is_dir()
    write_folder(tmp_path / "a", good_rows(2))
    path = mixture(tmp_path, [{"data": "a", "repeat": 2, "task": "colouring"}])
    done = precompute(PrecomputeConfig(data=path, tasks=["colouring"], output=str(tmp_path / "store")))
    assert (done["rows"], done["bad"]) == (2, [])


def test_a_list_with_a_byte_order_mark(tmp_path: Path) -> None:
    """Windows programs write one."""
    write_folder(tmp_path / "d", good_rows(2))
    path = tmp_path / "list.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([{"data": "d"}]).encode())
    assert len(open_source(str(path))) == 2
