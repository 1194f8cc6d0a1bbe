"""Worker processes of the tuner, with a stand-in for compilers: real processes, nothing that needs a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.tuning.builders import Builders

ROOT = Path(__file__).parents[2]


def work(folder: Path, name: str) -> None:
    """Leaves a file that holds the worker's id; some names do more."""
    (folder / name).write_text(str(os.getpid()))
    print("said by a worker")
    os.write(2, b"said by a worker")
    if name == "raises":
        raise ValueError
    if name == "dies":
        os._exit(1)
    if name.startswith(("nap", "slow")):
        time.sleep(1 if name.startswith("nap") else 60)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_work_is_done_in_workers_until_time_is_up(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], ended: Callable[[int], bool]
) -> None:
    """All of it if there is time; what is late is neither waited for nor begun, and what still runs ends with the block."""
    with Builders(2) as builders:
        builders.run(work, [(tmp_path, name) for name in ("a", "raises", "b")], time.monotonic() + 60)
        assert names(tmp_path) == {"a", "raises", "b"}
        assert str(os.getpid()) not in {path.read_text() for path in tmp_path.iterdir()}
        start = time.monotonic()
        builders.run(work, [(tmp_path, name) for name in ("slow-1", "slow-2", "c", "d", "e", "f", "g")], start + 3)
        assert 3 <= time.monotonic() - start < 20
        start = time.monotonic()
        builders.run(work, [(tmp_path, "h")], start - 1)
        pids = [int((tmp_path / name).read_text()) for name in ("slow-1", "slow-2")]
    assert time.monotonic() - start < 20
    assert all(ended(pid) for pid in pids)
    assert names(tmp_path) == {"a", "raises", "b", "slow-1", "slow-2"}
    assert "".join(capfd.readouterr()) == ""


def test_what_was_handed_out_too_late_is_not_begun(tmp_path: Path) -> None:
    """The pool hands out a little more than is begun, and that cannot be cancelled."""
    with Builders(2) as builders:
        builders.run(work, [(tmp_path, "a")], time.monotonic() + 60)
        builders.run(work, [(tmp_path, f"nap-{i}") for i in range(8)], time.monotonic() + 0.3)
        builders.run(work, [(tmp_path, "b")], time.monotonic() + 60)
    assert {"a", "b"} <= names(tmp_path) <= {"a", "b", "nap-0", "nap-1"}


def test_goes_on_without_a_pool_that_broke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Builders(2) as builders:
        builders.run(work, [(tmp_path, "dies"), (tmp_path, "slow")], time.monotonic() + 60)
        assert "dies" in names(tmp_path)
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and "no more workers" in said
        builders.run(work, [(tmp_path, "a")], time.monotonic() + 60)
    assert "a" not in names(tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("workers", [0, 1])
def test_without_workers_nothing_is_started(workers: int, tmp_path: Path) -> None:
    with Builders(workers) as builders:
        assert builders.pool is None
        builders.run(work, [(tmp_path, "a")], time.monotonic() + 60)
    assert names(tmp_path) == set()


def test_a_program_ends_while_a_worker_does_not(tmp_path: Path) -> None:
    """The interpreter joins pools at exit: it must not wait for a long compilation."""
    (tmp_path / "program.py").write_text(
        "import time\nfrom benchmarks.tuning.builders import Builders\n"
        "if __name__ == '__main__':\n"
        "    with Builders(2) as builders:\n"
        "        builders.run(time.sleep, [(600,)] * 9, time.monotonic() + 3)\n"
        "    print('done')\n"
    )
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
