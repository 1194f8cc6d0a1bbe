"""The tuner without a GPU: which launches it tries, what it keeps, and the file it writes."""

from __future__ import annotations

import importlib.util
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.interpreter import InterpretedFunction

from benchmarks import tune
from benchmarks.harness.shapes import Shape
from benchmarks.tune import TARGETS, Bench, Target, difference, is_faster, launched_as, neighbours, search
from benchmarks.tuning import launch_writer
from benchmarks.tuning.builders import Builders
from rgkernels._triton.launch_data import LAUNCHES, MEASURED
from rgkernels._triton.launch_table import KINDS, Launch, RowTile, ScoreTile, find, size_class

TARGET = TARGETS[0]
CURRENT = ScoreTile(128, 64, 32, 8, 3, 128)


class FakeTimer:
    """Times a launch by a formula and a relative spread; counts what it was asked."""

    def __init__(self, ms: Callable[[Any], float], spread: float = 0.02) -> None:
        self.ms, self.spread, self.asked = ms, spread, []

    def __call__(self, launches: Sequence[Launch], repeats: int) -> tune.Times:
        self.asked.append((list(launches), repeats))
        half = self.spread / 2
        return {x: [(self.ms(x) * (1 - half), self.ms(x), self.ms(x) * (1 + half))] * 2 for x in launches}


def run_search(timer: FakeTimer, accept: Callable[[Launch], bool] = lambda launch: True, rounds: int = 10**6) -> tune.Outcome:
    left = iter(range(rounds))
    return search(TARGET, CURRENT, accept, timer, lambda: next(left, None) is not None)


def test_finds_a_faster_launch_two_steps_away() -> None:
    """Coordinates are followed as long as they pay, and the final times are of both ends."""
    ms = {(64, 4): 0.8, (64, 8): 0.9}
    timer = FakeTimer(lambda x: ms.get((x.block_n, x.num_stages), 1.0) * (1.1 if x.block_m != 128 else 1.0))
    outcome = run_search(timer)
    assert outcome.best == CURRENT._replace(num_stages=4)
    assert (outcome.before[0][1], outcome.after[0][1]) == (1.0, 0.8)
    chain = FakeTimer(lambda x: 1.0 - 0.1 * (x.tail == 16) - 0.2 * (x.tail == 16 and x.num_stages == 4 and x.maxnreg == 255))
    assert run_search(chain).best.tail == 16


def test_keeps_the_current_launch_within_the_spread() -> None:
    """One per cent is nothing where the spread is two."""
    timer = FakeTimer(lambda x: 1.0 if x == CURRENT else 0.99)
    outcome = run_search(timer)
    assert outcome.best == CURRENT
    assert outcome.before == outcome.after
    assert run_search(FakeTimer(timer.ms, spread=0.001)).best != CURRENT


def test_the_lucky_one_is_timed_again() -> None:
    """A launch that was fast once, among many, must be so again."""

    def ms(launch: Any) -> float:
        return 0.5 if launch.tail == 16 and timer.asked[-1][1] == tune.QUICK else 1.0

    timer = FakeTimer(ms)
    assert run_search(timer).best == CURRENT


def test_a_round_is_handed_over_before_it_is_looked_at() -> None:
    """Once per round, and exactly those launches that are then looked at, in their order."""
    events: list[Any] = []
    timer = FakeTimer(lambda x: 1.0 - 0.2 * (x.tail == 16) - 0.3 * (x.tail == 16 and x.num_stages == 4))
    outcome = search(
        TARGET, CURRENT, lambda x: not events.append(x), timer, lambda: True, lambda found: events.append(list(found))
    )
    rounds = [i for i, event in enumerate(events) if isinstance(event, list)]
    assert outcome.best == CURRENT._replace(tail=16, num_stages=4) and len(rounds) >= 3
    for start, stop in zip(rounds, [*rounds[1:], len(events)], strict=True):
        assert events[start + 1 : stop] == events[start]
    assert outcome.looked_at == len(events) - len(rounds)
    # no time: nothing is handed over
    search(TARGET, CURRENT, lambda x: True, timer, lambda: False, lambda found: pytest.fail("time is up"))


def test_refused_launches_are_never_timed() -> None:
    timer = FakeTimer(lambda x: 0.1 if x.num_warps == 4 else 1.0)
    assert run_search(timer, accept=lambda x: x.num_warps != 4).best == CURRENT
    assert all(launch.num_warps != 4 for launches, _ in timer.asked for launch in launches)


def test_no_time_and_nothing_acceptable_keep_the_current_launch() -> None:
    fast = FakeTimer(lambda x: 1.0 if x == CURRENT else 0.1)
    assert run_search(fast, rounds=0).best == CURRENT
    assert fast.asked == [([CURRENT], tune.THOROUGH)]
    assert run_search(FakeTimer(fast.ms), accept=lambda x: False).looked_at > 0
    # cut off after two launches were built: one of those may win
    assert run_search(FakeTimer(fast.ms), rounds=3).looked_at <= 2


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        ([(0.79, 0.8, 0.81)] * 2, [(0.99, 1.0, 1.01)] * 2, True),
        # faster at one shape only, slower at the other
        ([(0.49, 0.5, 0.51), (1.09, 1.1, 1.11)], [(0.99, 1.0, 1.01)] * 2, False),
        # faster at one shape, the same at the other
        ([(0.79, 0.8, 0.81), (0.99, 1.0, 1.01)], [(0.99, 1.0, 1.01)] * 2, True),
        # a noisy machine
        ([(0.6, 0.8, 1.2)], [(0.99, 1.0, 1.01)], False),
    ],
)
def test_is_faster(new: Any, old: Any, expected: bool) -> None:
    assert is_faster(new, old) is expected


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.kernel}-{target.size}")
def test_neighbours_are_launches_of_the_kind(target: Target) -> None:
    """Distinct, valid, never the current one, in fields that the kernel reads."""
    current = find(target.kernel, "sm_90", torch.bfloat16, target.size)
    found = neighbours(target, current)
    assert len(found) == len(set(found)) > 3
    assert current not in found
    for launch in found:
        assert type(launch) is KINDS[target.kernel]
        assert all(getattr(launch, name) == getattr(current, name) for name in target.idle)
        if isinstance(launch, ScoreTile):
            assert launch.tail <= (launch.block_m if target.kernel == "attn_bwd_dkdv" else launch.block_n)


def test_launched_as_restores_the_table() -> None:
    key, before = ("sm_90", "half", 4096), dict(LAUNCHES["adaln_bwd"])
    with launched_as("adaln_bwd", key, KINDS["adaln_bwd"](1, 16, 2, 1, None)):
        assert find("adaln_bwd", "sm_90", torch.bfloat16, 3072).num_warps == 16
        assert find("adaln_bwd", "sm_90", torch.float32, 3072).num_warps == 8
    assert LAUNCHES["adaln_bwd"] == before
    assert find("adaln_bwd", "sm_90", torch.bfloat16, 3072).num_warps == 8


@pytest.mark.parametrize("kernel", dict.fromkeys(target.kernel for target in TARGETS))
def test_candidates_are_checked_for_real(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter: a launch with other tiles agrees, and one that returns something else is refused."""
    target = next(target for target in TARGETS if target.kernel == kernel)._replace(shapes=("tiny",))
    monkeypatch.setitem(tune.SHAPES, "tiny", Shape("tiny", heads=2, head_dim=64, text=5, image=9))
    monkeypatch.setattr(tune, "DTYPE", torch.float16)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    bench = Bench(target, torch.device("cpu"))
    other = bench.current._replace(num_warps=16)
    other = other._replace(block_m=32) if isinstance(other, ScoreTile) else other
    assert bench.accept(other)
    bench.expected = [x + 0.1 * x.abs().max() for x in bench.expected]
    assert not bench.accept(other)
    bench.calls = [lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: an illegal memory access was encountered"))]
    with pytest.raises(RuntimeError, match="CUDA error"):
        bench.accept(other)


def test_workers_compile_and_run_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel of a target is asked for, none is run, and the inputs of one target at a time are kept."""
    launched: list[tuple[int, bool]] = []
    run = InterpretedFunction.run

    def watched(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        launched.append((kwargs["num_warps"], warmup))
        return run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", watched)
    monkeypatch.setattr(tune, "default_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(tune, "_bench", {})
    monkeypatch.setattr(tune, "DTYPE", torch.float16)
    monkeypatch.setitem(tune.SHAPES, "tiny", Shape("tiny", heads=2, head_dim=64, text=5, image=9))
    getitem = tune.KernelInterface.__getitem__
    for target in (TARGETS[1]._replace(shapes=("tiny",)), TARGETS[4]._replace(size=128, shapes=("tiny", "tiny"))):
        launched.clear()
        launch = find(target.kernel, "interpreter", torch.float16, target.size)
        for num_warps in (16, 2):
            tune.build(target, launch._replace(num_warps=num_warps))
            assert [warps for warps, _ in launched].count(num_warps) >= len(target.shapes)
        assert all(warmup for _, warmup in launched)
        assert list(tune._bench) == [target]
    assert tune.KernelInterface.__getitem__ is getitem


def test_rounds_are_built_in_half_of_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent hands its workers this target's launches, and time for looking at them remains."""
    handed: list[Any] = []

    class FakeBuilders(Builders):
        def run(self, work: Any, items: Any, until: float) -> None:
            handed.append((work, list(items), until - time.monotonic()))

    class FakeBench:
        def __init__(self, target: Target, device: torch.device) -> None:
            self.key, self.current = ("sm_90", "half", 4096), find(target.kernel, "sm_90", torch.bfloat16, target.size)
            self.times = FakeTimer(lambda launch: 1.0)

        def accept(self, launch: Launch) -> bool:
            return True

    monkeypatch.setattr(tune, "Bench", FakeBench)
    monkeypatch.setattr(tune, "Builders", FakeBuilders)
    tune.tune([TARGETS[3]], 1.0, tmp_path / "launch_data.py", torch.device("cpu"), workers=0)
    [(work, items, seconds)] = handed
    assert work is tune.build and 25 < seconds <= 30
    assert items == [
        (TARGETS[3], launch) for launch in neighbours(TARGETS[3], find("adaln_bwd", "sm_90", torch.bfloat16, 4096))
    ]


def test_tunes_a_kernel_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, from inputs to the file: every launch is built, checked and timed, and evidence names its origin."""
    monkeypatch.setattr(tune, "DTYPE", torch.float16)
    monkeypatch.setattr(tune, "QUICK", 1)
    monkeypatch.setattr(tune, "THOROUGH", 2)
    monkeypatch.setitem(tune.VALUES, RowTile, {"block_s": (8, 16), "num_warps": (4, 8)})
    monkeypatch.setitem(tune.SHAPES, "tiny", Shape("tiny", heads=2, head_dim=64, text=5, image=9))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    target = next(target for target in TARGETS if target.kernel == "adaln_fwd")._replace(size=128, shapes=("tiny", "tiny"))
    out = tmp_path / "launch_data.py"
    tune.tune([target], 1.0, out, torch.device("cpu"))
    module = imported(out)
    evidence = module.MEASURED["adaln_fwd"]["interpreter", "half", 128]
    assert ("interpreter", "half", 128) in module.LAUNCHES["adaln_fwd"]
    assert evidence["launch_before"] == LAUNCHES["adaln_fwd"]["any", "any", 128]
    assert evidence["looked_at"] >= len(neighbours(target, find("adaln_fwd", "interpreter", torch.float16, 128)))
    assert all(before > 0 and after > 0 for before, after in evidence["ms_before_after"].values())
    assert f"torch {torch.__version__}" in evidence["versions"]
    assert ("interpreter", "half", 128) not in LAUNCHES["adaln_fwd"]


def test_launches_that_fail_or_spill_are_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench.__new__(Bench)
    bench.target, bench.device, bench.key = TARGET, torch.device("cpu"), ("sm_90", "half", 64)
    bench.calls, bench.expected = [lambda: torch.ones(2)], [torch.ones(2)]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    assert bench.accept(CURRENT)
    bench.calls = [lambda: (_ for _ in ()).throw(RuntimeError("out of resource: shared memory\nhint"))]
    assert not bench.accept(CURRENT)
    bench.calls = [lambda: torch.full((2,), float("nan"))]
    assert not bench.accept(CURRENT)

    class Compiled:
        n_spills = 12

    class Spilling(tune.KernelInterface):
        def run(self, *args: Any, **kwargs: Any) -> Any:
            return Compiled()

    bench.calls = [lambda: (Spilling()[None](), torch.ones(2))[1]]
    assert not bench.accept(CURRENT)
    said = capsys.readouterr().out
    assert "out of resource: shared memory" in said
    assert "hint" not in said
    assert "12 spills" in said
    assert "differ by inf" in said


def test_difference() -> None:
    x = torch.randn(1000)
    assert difference([x], [x]) == 0
    assert difference([x.bfloat16()], [x.bfloat16() * (1 + 2**-8)]) <= torch.finfo(torch.bfloat16).eps
    assert difference([x, -x], [x, x]) == pytest.approx(2)
    assert difference([x * float("nan")], [x]) == math.inf
    assert difference([torch.zeros(3)], [torch.zeros(3)]) == 0


def imported(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("emitted", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def emitted(tmp_path: Path) -> Path:
    """A table with a measurement in it, written as the tuner does."""
    key = ("sm_90", "half", size_class("adaln_bwd", 3072))
    launches = {kernel: dict(rows) for kernel, rows in LAUNCHES.items()}
    launches["adaln_bwd"][key] = (1, 8, 2, 2, None)
    evidence = {
        "launch_before": (1, 8, 3, 2, 128), "ms_before_after": {"5b-480x720-b1": (0.0512, 0.0487)}, "looked_at": 28,
        "device": "NVIDIA H100 80GB HBM3", "versions": "driver 570.86.15, CUDA 13.0, torch 2.13.0+cu130, Triton 3.7.1",
        "commit": None, "dirty": True, "date": "2026-11-24T10:00:00+00:00",
    }  # fmt: skip
    path = tmp_path / "folder" / "launch_data.py"
    launch_writer.write(path, launches, {"adaln_bwd": {key: evidence}})
    return path


def test_emitted_file_imports_and_holds_what_was_found(tmp_path: Path) -> None:
    """Everything else is carried over, and nothing half-written stays behind."""
    path = emitted(tmp_path)
    module = imported(path)
    found, key = module.LAUNCHES, ("sm_90", "half", 4096)
    expected = {**LAUNCHES, "adaln_bwd": LAUNCHES["adaln_bwd"] | {key: (1, 8, 2, 2, None)}}
    assert found == expected
    assert module.MEASURED["adaln_bwd"][key]["ms_before_after"]["5b-480x720-b1"] == (0.0512, 0.0487)
    assert [file.name for file in path.parent.iterdir()] == ["launch_data.py"]


@pytest.mark.skipif(shutil.which("ruff", path=str(Path(sys.executable).parent)) is None, reason="needs ruff")
def test_emitted_file_is_formatted(tmp_path: Path) -> None:
    """The tuner runs where ruff is not installed: its text must already be what ruff makes of it."""
    path = emitted(tmp_path)
    config = Path(__file__).parents[2] / "pyproject.toml"
    for command in (["format", "--check"], ["check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", "--config", str(config), str(path)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_committed_table_is_what_the_writer_writes() -> None:
    """No edit by hand that the next run of the tuner would undo."""
    import rgkernels._triton.launch_data as data

    assert Path(data.__file__).read_text() == launch_writer.render(LAUNCHES, MEASURED)


def test_commands_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 1
    assert capsys.readouterr().err == "tuning needs a CUDA device, got none (--dry-run lists the candidates)\n"
    assert tune.main(["--dry-run", "--op", "adaln_fwd"]) == 0
    listed = capsys.readouterr().out
    assert listed.count("candidates") == 2
    assert "current RowTile(block_s=2, num_warps=4)" in listed
    for arguments in (["--minutes", "0"], ["--minutes", "nan"], ["--op", "none"], ["--workers", "-1"]):
        with pytest.raises(SystemExit) as stop:
            tune.main(arguments)
        assert stop.value.code == 2


def test_tune_writes_after_each_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies at the third target leaves a complete table with what the first two found."""

    class FakeBench:
        def __init__(self, target: Target, device: torch.device) -> None:
            if target is TARGETS[4]:
                raise KeyboardInterrupt
            self.key = ("sm_90", "half", size_class(target.kernel, target.size))
            self.current = find(target.kernel, "sm_90", torch.bfloat16, target.size)
            self.times = FakeTimer(lambda launch: 0.5 if launch.num_warps == 4 else 1.0)

        def accept(self, launch: Launch) -> bool:
            return True

    monkeypatch.setattr(tune, "Bench", FakeBench)
    out = tmp_path / "launch_data.py"
    with pytest.raises(KeyboardInterrupt):
        tune.tune([TARGETS[0], TARGETS[3], TARGETS[4]], 1.0, out, torch.device("cpu"))
    module = imported(out)
    for kernel, size in (("attn_fwd", 64), ("adaln_bwd", 4096)):
        row = KINDS[kernel]._make(module.LAUNCHES[kernel]["sm_90", "half", size])
        assert row.num_warps == 4
        assert module.MEASURED[kernel]["sm_90", "half", size]["ms_before_after"] == dict.fromkeys(
            ("5b-480x720-b1", "5b-1024x1024-b1"), (1.0, 0.5)
        )
