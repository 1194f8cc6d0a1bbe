"""The table of predicted training memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import memory_table

DOCS = Path(__file__).parents[2] / "docs" / "training.md"


def test_table_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A base of two blocks gives a row, whose parts add up to its total."""
    monkeypatch.setitem(memory_table.BASES, "2B", {**memory_table.BASES["2B"], "num_layers": 2})
    monkeypatch.setattr(memory_table, "ROWS", memory_table.ROWS[:1])
    memory_table.main([])
    cells = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert cells[:8] == ["2B", "512x512", "64", "1", "selective", "adamw", "precomputed", "1"]
    *parts, total = map(float, cells[8:])
    assert sum(parts) == pytest.approx(total, abs=0.21)


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--rank", 2)])
def test_arguments_are_not_ignored(argument: str, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        memory_table.main([argument])
    assert ended.value.code == status
    assert "GiB" not in capsys.readouterr().out


def test_every_documented_row_is_made() -> None:
    """The rows of docs/training.md, in its order."""
    lines = [line.strip("| ").split(" | ")[:8] for line in DOCS.read_text().splitlines() if line.count("|") == 14]
    made = [
        [base, f"{height}x{width}", str(rank), str(batch), kind, optimizer, "precomputed" if precomputed else "on the fly",
         f"{processes}, fsdp2" if processes > 1 else "1"]
        for base, (width, height), rank, batch, kind, optimizer, precomputed, processes in memory_table.ROWS
    ]  # fmt: skip
    assert lines[2:] == made
