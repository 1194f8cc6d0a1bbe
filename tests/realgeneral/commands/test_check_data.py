"""check-data: everything that training would skip is named, and what it would meet is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from realgeneral.commands.check_data import REASONS, check_data
from realgeneral.commands.cli import main
from realgeneral.errors import Failure
from realgeneral.settings.data import CheckDataConfig
from tests.realgeneral.helpers.datasets import BAD, Rows, Writer, good_rows, picture, write_folder, write_parquet, write_tar
from tests.realgeneral.helpers.pictures import encoded, make_photo


def config(bases: dict[str, Path], data: str, **changes: Any) -> CheckDataConfig:
    fixed: dict[str, Any] = {"base": str(bases["5b"]), "data": data, "tasks": ["canny", "colouring"]}
    return CheckDataConfig(**{**fixed, **changes})


def test_a_good_data_set(bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows, buckets with the rows that fill up batches, sizes, conditions, tasks, prompts, duplicates; status 0."""
    rows = good_rows(4)
    rows.append({"target": encoded(make_photo(24, 40)), "prompt": "a red pot on the table"})
    rows.append({"target": picture(1), "prompt": "a cat", "condition": [picture(5), picture(6)], "task": "canny"})
    rows.append(dict(rows[0]))
    path = write_folder(tmp_path / "d", rows)
    report = check_data(config(bases, path, buckets=["16x32", "32x16"], batch_size=4, num_workers=1))
    assert report["rows"] == 7
    assert report["bad_rows"] == []
    assert report["buckets"] == [
        {"size": "32x16", "conditions": 1, "rows": 1, "repeated_to_fill": 3},
        {"size": "16x32", "conditions": 1, "rows": 5, "repeated_to_fill": 3},
        {"size": "16x32", "conditions": 2, "rows": 1, "repeated_to_fill": 3},
    ]
    assert report["sizes"] == {"24x40": 6, "40x24": 1}
    assert report["conditions"] == {"1": 6, "2": 1}
    assert report["tasks"] == {"canny": 7, "colouring": 6}
    assert report["longest_prompt"] == 7
    assert report["duplicates"] == [["metadata.jsonl line 1", "metadata.jsonl line 7"]]
    out = capsys.readouterr().out
    assert f"{path}: 7 rows, 0 bad, 1 duplicates" in out
    assert "5  16x32, 1, 3 repeated to fill the last batch" in out
    assert "metadata.jsonl line 1 = metadata.jsonl line 7" in out
    assert "prompts: the longest has 7 of 12 tokens" in out


@pytest.mark.parametrize("writer", [write_folder, write_parquet, write_tar])
def test_bad_rows_of_every_source(
    writer: Writer, bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each defect is named with its row and a reason of its own; status 1, and the report is written all the same."""
    rows: Rows = good_rows(2)
    for change, _ in BAD.values():
        rows.append({**good_rows(1)[0], **change})
    rows.append({"target": picture(0), "prompt": "a cat " * 30})
    rows.append({"target": picture(0), "prompt": "a cat", "subject": "dog"})
    path = writer(tmp_path / "d", rows)
    report_path = tmp_path / "made" / "report.json"
    arguments = ["check-data", "--base", str(bases["5b"]), "--data", path, "--tasks", "canny", "colouring"]
    assert main([*arguments, "--report", str(report_path)]) == 1
    captured = capsys.readouterr()
    assert f"realgeneral check-data: {len(BAD) + 2} of {len(rows)} rows of {path} are bad" in captured.err
    report = json.loads(report_path.read_text())
    assert [row["row"] for row in report["bad_rows"]] == _names(path, len(rows))[2:]
    assert all(row["message"].startswith(row["row"]) for row in report["bad_rows"])
    reasons = {row["row"]: row["reason"] for row in report["bad_rows"]}
    assert set(reasons.values()) <= {kind for _, kind in REASONS}
    assert len(set(reasons.values())) >= 7
    assert "picture is truncated" in captured.out
    assert report["config"]["data"] == path


def _names(path: str, count: int) -> list[str]:
    if path.endswith(".tar"):
        return [f"data.tar {i:05d}" for i in range(count)]
    return [f"data.parquet row {i}" if path.endswith("parquet") else f"metadata.jsonl line {i + 1}" for i in range(count)]


def test_without_buckets(bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is repeated; rows that training could not put into one batch are an error, as they are there."""
    rows = good_rows(3)
    report = check_data(config(bases, write_folder(tmp_path / "d", rows), batch_size=2))
    assert report["buckets"] == [{"size": "64x96", "conditions": 1, "rows": 3, "repeated_to_fill": 0}]
    assert "repeated to fill" not in capsys.readouterr().out
    rows[0] |= {"condition": [picture(5), picture(6)], "task": "canny"}
    path = write_folder(tmp_path / "mixed", rows)
    message = r"^rows of one batch must have the same number of conditions, got \[1, 2\]: training stops without --buckets$"
    with pytest.raises(Failure, match=message):
        check_data(config(bases, path, batch_size=2))
    for fits in ({"batch_size": 1}, {"batch_size": 2, "buckets": ["16x32"]}):
        assert check_data(config(bases, path, **fits))["conditions"] == {"1": 2, "2": 1}


def test_headers_only(bases: dict[str, Path], tmp_path: Path) -> None:
    """Without decoding, a truncated picture passes and text with a picture's name does not."""
    rows = good_rows(3)
    rows[1]["target"] = rows[1]["target"][:-40]
    path = write_folder(tmp_path / "d", rows)
    assert check_data(config(bases, path, headers_only=True))["bad_rows"] == []
    with pytest.raises(Failure, match="1 of 3 rows of"):
        check_data(config(bases, path))
    (Path(path) / "target-2-0.png").write_bytes(b"hello")
    with pytest.raises(Failure, match="1 of 3 rows of"):
        check_data(config(bases, path, headers_only=True))


def test_small_pictures_are_counted(bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures below their bucket's size would be enlarged: how many, and the smallest by name."""
    rows = [{"target": encoded(make_photo(side, side)), "prompt": "a"} for side in (10, 20, 40)]
    report = check_data(config(bases, write_folder(tmp_path / "d", rows), height=32, width=32))
    assert report["enlarged"] == 2
    assert report["smallest"][0] == {"row": "metadata.jsonl line 1", "size": "10x10"}
    assert "2  smaller than their bucket" in capsys.readouterr().out


def test_long_lists_are_cut(bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A person sees ten examples of a reason and how many more there are."""
    rows = [*good_rows(1), *[{"target": b"x", "prompt": "a"}] * 14]
    with pytest.raises(Failure, match="14 of 15 rows"):
        check_data(config(bases, write_folder(tmp_path / "d", rows)))
    out = capsys.readouterr().out
    assert "... and 4 more (--report has all)" in out
    assert out.count("not an image") == 1 + 10


def test_only_bad_rows(bases: dict[str, Path], tmp_path: Path) -> None:
    """A report without a good row is a report."""
    with pytest.raises(Failure, match="1 of 1 rows"):
        check_data(config(bases, write_folder(tmp_path / "d", [{"target": b"x", "prompt": "a"}])))


def test_the_packaged_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no bad row and fits its base (the first concepts of it, for speed)."""
    from realgeneral.data.sources import packaged as pairs

    monkeypatch.setattr(pairs, "load_emoji", lambda split, load=pairs.load_emoji: load(split)[:20])
    report = check_data(CheckDataConfig(headers_only=True, buckets=["standard"]))
    assert report["bad_rows"] == []
    assert [bucket["size"] for bucket in report["buckets"]] == ["64x64"]


def test_a_report_that_cannot_be_written(bases: dict[str, Path], tmp_path: Path) -> None:
    """One line with the path."""
    path = write_folder(tmp_path / "d", good_rows(1))
    with pytest.raises(Failure, match="report must be a file that can be written, got"):
        check_data(config(bases, path, report=str(Path(path) / "metadata.jsonl" / "x.json")))


def test_empty_captions_are_said(bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row without words trains as one whose text is dropped: allowed, but counted."""
    report = check_data(config(bases, write_folder(tmp_path / "d", [*good_rows(1), {"target": picture(2), "prompt": " "}])))
    assert report["prompts_empty"] == ["metadata.jsonl line 2"]
    assert "1  empty, as training without text; the first: metadata.jsonl line 2" in capsys.readouterr().out
