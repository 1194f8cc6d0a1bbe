"""Timing and rows: turns, limits, ratios, and where a row says it comes from."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.harness import timing
from benchmarks.harness.timing import Case, environment, measure, summary, usable, write_rows

CPU = torch.device("cpu")
CASE = Case("op", "forward", "nano", torch.float32)
ROOT = Path(__file__).parents[2]
FILES = ("benchmarks/bench_adaln.py", "benchmarks/bench_qk_norm_rope.py")


def test_providers_take_turns_in_both_orders() -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    rows = measure(CASE, runs, CPU, repeats=6)
    assert "".join(calls) == "abc" + "abccba" * 3  # the first round warms up
    assert [row["runs"] for row in rows] == [6, 6, 6]


def test_ratio_is_the_median_over_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One round in which the machine stands still for one provider does not move it."""
    clock = [0.0]
    durations = {"slow": iter([0, 2, 2, 50, 2, 2]), "fast": iter([0, 1, 1, 1, 1, 30])}

    def run(name: str) -> None:
        clock[0] += next(durations[name])

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timing, "SECONDS", 1e9)
    runs = {name: lambda name=name: run(name) for name in durations}
    slow, fast = measure(CASE, runs, CPU, repeats=5, against={"fast": "slow"})
    assert fast["ratio"] == 2 and fast["against"] == "slow" and "ratio" not in slow
    assert (slow["ms_p50"], fast["ms_p50"]) == (2000, 1000)
    assert "2.00x slow" in summary([fast])


def test_no_round_starts_after_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.05)
    rows = measure(CASE, {"a": lambda: time.sleep(0.03)}, CPU, repeats=100, least=3)
    assert 3 <= rows[0]["runs"] < 10
    assert measure(CASE, {"a": lambda: time.sleep(0.06)}, CPU, repeats=1, least=2)[0]["runs"] == 2


def test_a_short_warm_up_takes_the_place_of_a_long_run() -> None:
    calls = []
    measure(CASE, {"a": lambda: calls.append("long")}, CPU, repeats=2, least=1, warm_ups={"a": lambda: calls.append("short")})
    assert calls == ["short", "long", "long"]


def test_shares_are_of_the_measured_ceilings() -> None:
    moved = Case("op", "forward", "nano", torch.float32, bytes=10**6)
    row = measure(moved, {"a": lambda: time.sleep(0.001)}, CPU, repeats=5)[0]
    assert row["gb_per_s"] == pytest.approx(1e-3 / (row["ms_p50"] * 1e-3))
    assert row["share_of_ceiling"] == pytest.approx(row["gb_per_s"] / row["ceiling_gb_per_s"])
    assert row["tflop_per_s"] is None and row["peak_mib"] is None and row["cuda_graph"] is False


def test_cores_used_tells_a_busy_machine() -> None:
    """A process that waits uses no core."""
    assert measure(CASE, {"a": lambda: time.sleep(0.05)}, CPU, repeats=5)[0]["cores_used"] < 0.5


def test_peers_may_fail_but_ours_may_not(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise RuntimeError("no kernel\nfor this")

    assert list(usable({"flex": broken, "stock": lambda: None})) == ["stock"]
    assert "flex left out: RuntimeError: no kernel" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="no kernel"):
        usable({"triton": broken})


def test_a_copy_without_git_is_dirty_unless_its_commit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_output", lambda *command: None)
    for named, dirty in ((None, True), ("0123abc", False)):
        timing._origin.cache_clear()
        if named:
            monkeypatch.setenv("BENCH_COMMIT", named)
        else:
            monkeypatch.delenv("BENCH_COMMIT", raising=False)
        row = environment(CPU)
        assert (row["commit"], row["dirty"]) == (named, dirty)
    timing._origin.cache_clear()


def test_git_is_believed_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_output", lambda *command: {"rev-parse": "fedc", "status": " M x"}.get(command[1]))
    monkeypatch.setenv("BENCH_COMMIT", "0123abc")
    timing._origin.cache_clear()
    row = environment(CPU)
    timing._origin.cache_clear()
    assert (row["commit"], row["dirty"]) == ("fedc", True)


def test_rows_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    for i in range(2):
        write_rows([{"i": i}], path)
    assert [json.loads(line)["i"] for line in path.read_text().splitlines()] == [0, 1]


def collected(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *FILES, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_all_ops_run_at_a_shape_before_the_next() -> None:
    """And an unknown shape is refused with the known ones."""
    done = collected("--shape", "nano", "--shape", "mid")
    shapes = [line.partition("[")[2].partition("-")[0] for line in done.stdout.splitlines() if "::" in line]
    assert shapes == ["nano"] * 4 + ["mid"] * 4
    assert "--shape must be one of ['nano', 'mid', " in collected("--shape", "nono").stdout
