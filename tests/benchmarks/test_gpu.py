"""`make gpu` and `make bench`: the time budget, what is refused, and what a run that is cut off leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import MARGIN, Outcome, Session

ROOT = Path(__file__).parents[2]
SLEEP = ["-c", "import time; print('started', flush=True); time.sleep(60)"]


class Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def results(folder: Path) -> dict[str, str]:
    return {outcome["phase"]: outcome["result"] for outcome in json.loads((folder / "summary.json").read_text())}


def test_time_that_a_phase_saves_goes_to_the_next(tmp_path: Path) -> None:
    clock = Clock()
    session = Session(tmp_path, 100 + MARGIN, now=clock)
    assert session.limit(0.5) == 50
    clock.time = 20
    assert session.limit(0.65) == pytest.approx(52)
    clock.time = 120
    assert session.limit(1.0) == 0


def test_phases_fit_the_budget_even_if_all_are_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, limits = Clock(), []

    def use_it_up(commands: object, logs: list[Path], limit: float) -> list[int | None]:
        limits.append(limit)
        clock.time += limit
        for log in logs:
            log.touch()
        return [0] if len(limits) == 1 else [None]

    monkeypatch.setattr(gpu, "run_together", use_it_up)
    monkeypatch.setattr(gpu, "collect", lambda selection: ["tests/x.py::test_a"])
    assert gpu.run_phases(Session(tmp_path, 540, now=clock), models=False, rehearse=False, arguments=[]) == 1
    assert clock.time <= 540 - MARGIN + 1e-6
    assert len(limits) == 3 and min(limits) > 60
    assert results(tmp_path) == {"parity": "passed", "benchmarks": "cut off", "tuner": "cut off"}


def test_a_phase_is_ended_at_its_limit_with_its_children_and_its_log_stays(
    tmp_path: Path, ended: Callable[[int], bool]
) -> None:
    child = (
        f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, *{SLEEP!r}]); print(p.pid, flush=True); p.wait()"
    )
    session = Session(tmp_path, MARGIN + 3)
    start = time.monotonic()
    assert (
        session.run("benchmarks", 1.0, [["-c", child], ["-c", "print('quick')"]], [tmp_path / "a", tmp_path / "b"]) == "cut off"
    )
    assert time.monotonic() - start < 20
    pid = int((tmp_path / "a").read_text().split()[0])
    assert "quick" in (tmp_path / "b").read_text()
    assert ended(pid)


@pytest.mark.parametrize("result", ["failed", "cut off"])
def test_nothing_is_timed_unless_parity_is_green(
    result: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also when the tests did not finish."""

    def only_parity(commands: object, logs: list[Path], limit: float) -> list[int | None]:
        assert all(log.name.startswith("parity") for log in logs), "only parity may run"
        for i, log in enumerate(logs):
            log.write_text(f"log {i}\n")
        return [0] * (len(logs) - 1) + [1 if result == "failed" else None]

    monkeypatch.setattr(gpu, "run_together", only_parity)
    monkeypatch.setattr(gpu, "collect", lambda selection: [f"tests/x.py::test_{i}" for i in range(5)])
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert gpu.run_phases(Session(tmp_path, 540), models=False, rehearse=False, arguments=[]) == 1
    assert results(tmp_path) == {"parity": result, "benchmarks": "not run", "tuner": "not run"}
    assert (tmp_path / "parity.log").read_text() == "log 0\nlog 1\nlog 2\n"
    assert not list(tmp_path.glob("parity-*"))
    assert "nothing is timed" in capsys.readouterr().err


def test_tests_that_cannot_be_collected_are_red(tmp_path: Path) -> None:
    assert not gpu.parity(Session(tmp_path, 540), 0.5, ["tests/rgkernels/test_segments.py", "-k", "no_such_test"])
    assert results(tmp_path) == {"parity": "failed"}
    assert "deselected" in (tmp_path / "parity.log").read_text()


def test_a_red_test_is_seen_among_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing test, and one that warns, which is no failure: another version of torch may."""
    tests = tmp_path / "test_some.py"
    tests.write_text(
        "import warnings\ndef test_a():\n    warnings.warn('odd')\ndef test_b():\n    assert False, 'wrong gradient'\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    assert not gpu.parity(Session(out, 540), 0.5, ["test_some.py"])
    log = (out / "parity.log").read_text()
    assert "wrong gradient" in log and "1 failed" in log and "1 passed" in log


def test_a_rehearsal_runs_all_phases_and_leaves_rows(tmp_path: Path) -> None:
    arguments = ["--rehearse", "--out", str(tmp_path), "--minutes", "3", "--", "-k", "qk_norm_rope"]
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + (tmp_path / "benchmarks.log").read_text()
    assert results(tmp_path) == {"parity": "passed", "benchmarks": "passed"}
    rows = [json.loads(line) for line in (tmp_path / "benchmarks.jsonl").read_text().splitlines()]
    assert {row["shape"] for row in rows} == {"nano"} and {row["mode"] for row in rows} == {"forward", "backward"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "benchmarks.gpu needs a CUDA device, found none\n"


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name in ("triton", "diffusers") else object())
    assert gpu.missing(models=False, rehearse=True) == "needs torch, triton, pytest, numpy; not installed: triton"
    assert "not installed: triton, diffusers" in str(gpu.missing(models=True, rehearse=True))


def test_too_little_time_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--minutes", "0.1"])
    assert stop.value.code == 2 and "--minutes must be more than 10 s, got 0.1" in capsys.readouterr().err


def test_a_summary_is_whole_after_each_phase(tmp_path: Path) -> None:
    session = Session(tmp_path, 60)
    for phase in ("parity", "benchmarks"):
        session.note(Outcome(phase, "passed"))
        assert phase in results(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("status", [0, 1])
def test_make_bench_refuses_red_tests(status: int, tmp_path: Path) -> None:
    """The real Makefile, with a Python that records its arguments instead of running them."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncase "$*" in *tests/rgkernels*) exit {status};; esac\n')
    python.chmod(0o755)
    (tmp_path / "venv" / ".installed").touch()
    done = subprocess.run(["make", "bench", f"VENV={tmp_path / 'venv'}"], cwd=ROOT, capture_output=True, text=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0].startswith("-m pytest") and "tests/rgkernels" in calls[0]
    if status:
        assert done.returncode != 0 and "the kernel tests are red, so nothing was timed" in done.stderr
        assert len(calls) == 1
    else:
        assert done.returncode == 0 and calls[1:] == ["-m pytest benchmarks"]
