"""`make gpu` and `make gpu-model`: everything that waits for a CUDA machine, in one command and within a time limit.

    python -m benchmarks.gpu [--models] [--minutes 9] [--out FOLDER] [-- pytest arguments of the benchmarks]

Parity tests of the kernels, then benchmarks, then the launch-table tuner, each in processes of its own. Red parity tests stop
the rest: a broken kernel has no speed. Needs torch, triton, pytest and numpy; `--models` diffusers, peft and transformers as
well. Every phase writes as it goes, so a run that is cut off leaves what it had: parity.log, benchmarks.jsonl, benchmarks.log,
launch_data.py, tune.log and summary.json in one folder.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARGIN = 10.0  # seconds kept back for ending processes and writing files
# not a new session: whoever ends ours must reach it. process_group came with Python 3.11
OWN_GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}
WORKERS = 14  # a kernel's compilation takes one core
OPS = ("bench_adaln.py", "bench_qk_norm_rope.py", "bench_attention.py")
MODELS = ("bench_block.py", "bench_training_step.py", "bench_generation.py")
# warnings are errors in the tests; those of another torch or Triton say nothing about a kernel's results
PYTEST = ("-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider")


@dataclass
class Outcome:
    """What came of a phase.

    Args:
        phase: Its name.
        result: "passed", "failed", "cut off" or "not run".
        seconds: How long it took.
        limit: How long it might have taken.
    """

    phase: str
    result: str
    seconds: float = 0.0
    limit: float = 0.0


@dataclass
class Session:
    """A time budget, an output folder, and what was done so far.

    Args:
        out: Folder of results.
        seconds: For all phases together.
        now: Clock.
    """

    out: Path
    seconds: float
    now: Callable[[], float] = time.monotonic
    outcomes: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.deadline = self.now() + self.seconds - MARGIN

    def limit(self, share: float) -> float:
        """Seconds for the next phase: a share of what is left, so that time which a phase saves goes to those after it."""
        return max(0.0, (self.deadline - self.now()) * share)

    def run(self, phase: str, share: float, commands: Sequence[Sequence[str]], logs: Sequence[Path]) -> str:
        """Run the commands of a phase side by side, each into its log; returns the result and writes the summary."""
        limit, start = self.limit(share), self.now()
        codes = run_together(commands, logs, limit)
        result = "cut off" if None in codes else "passed" if all(code == 0 for code in codes) else "failed"
        return self.note(Outcome(phase, result, round(self.now() - start, 1), round(limit, 1)))

    def note(self, outcome: Outcome) -> str:
        """Keep an outcome and write it down at once."""
        self.outcomes.append(outcome)
        partial = self.out / "summary.json.partial"
        partial.write_text(json.dumps([asdict(o) for o in self.outcomes], indent=1) + "\n")
        os.replace(partial, self.out / "summary.json")
        print(f"{outcome.phase}: {outcome.result} ({outcome.seconds:.0f} of {outcome.limit:.0f} s)", flush=True)
        return outcome.result


def run_together(commands: Sequence[Sequence[str]], logs: Sequence[Path], limit: float) -> list[int | None]:
    """Exit codes of Python commands that run side by side; None for those still running at the limit, which are ended."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONUNBUFFERED": "1"}
    end = time.monotonic() + limit
    with contextlib.ExitStack() as stack:
        pairs = zip(commands, logs, strict=True)
        running = [stack.enter_context(_process(command, log, environment)) for command, log in pairs]
        codes: list[int | None] = []
        for process in running:
            try:
                codes.append(process.wait(max(0.0, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                codes.append(None)
        return codes


@contextlib.contextmanager
def _process(command: Sequence[str], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, which ends with the block: compilers that it started end as well."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            **OWN_GROUP,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def collect(selection: Sequence[str]) -> list[str]:
    """Node ids of the selected tests; RuntimeError with pytest's words if they cannot be collected, or there are none."""
    command = [sys.executable, *PYTEST, "--collect-only", "-o", "addopts=", *selection]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    ids = [line for line in done.stdout.splitlines() if "::" in line and not line.startswith(("ERROR", "SKIPPED"))]
    if done.returncode != 0 or not ids:
        raise RuntimeError((done.stdout + done.stderr)[-2000:])
    return ids


def parity(session: Session, share: float, selection: Sequence[str]) -> bool:
    """Whether all selected tests pass; they are dealt to several processes, since compiling kernels takes most of the time."""
    start = session.now()
    try:
        ids = collect(selection)
    except RuntimeError as error:
        (session.out / "parity.log").write_text(str(error))
        session.note(Outcome("parity", "failed", round(session.now() - start, 1), round(session.limit(share), 1)))
        return False
    workers = min(WORKERS, os.cpu_count() or 1, len(ids))
    logs = [session.out / f"parity-{i}.log" for i in range(workers)]
    result = session.run("parity", share, [[*PYTEST, *ids[i::workers]] for i in range(workers)], logs)
    with (session.out / "parity.log").open("ab") as file:
        for log in logs:
            file.write(log.read_bytes())
            log.unlink()
    return result == "passed"


def benchmarks(session: Session, share: float, files: Sequence[str], arguments: Sequence[str]) -> str:
    """Run benchmark files; rows are appended to benchmarks.jsonl as they come."""
    rows = ["--rows", str(session.out / "benchmarks.jsonl")]
    command = [*PYTEST, "-s", *(f"benchmarks/{name}" for name in files), *rows, *arguments]
    return session.run("benchmarks", share, [command], [session.out / "benchmarks.log"])


def tuner(session: Session) -> str:
    """Search launch tables in the time that is left."""
    minutes = session.limit(1.0) / 60
    command = ["-m", "benchmarks.tune", "--minutes", f"{minutes:.2f}", "--out", str(session.out / "launch_data.py")]
    return session.run("tuner", 1.0, [command], [session.out / "tune.log"])


def missing(models: bool, rehearse: bool) -> str | None:
    """What this machine lacks, in one line; None if nothing."""
    names = ["torch", "triton", "pytest", "numpy", *(["diffusers", "peft", "transformers"] if models else [])]
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    if absent:
        return f"needs {', '.join(names)}; not installed: {', '.join(absent)}"
    import torch

    return None if rehearse or torch.cuda.is_available() else "needs a CUDA device, found none"


def run_phases(session: Session, models: bool, rehearse: bool, arguments: Sequence[str]) -> int:
    """All phases in order; 0 if all passed."""
    if rehearse:
        selection, shapes = ["tests/rgkernels/test_segments.py"], ["--shape", "nano", "--layers", "2", "--steps", "2"]
    else:
        # before models, the comparisons with the reference are enough; `make gpu` runs them all
        selection, shapes = ["tests/rgkernels", "-m", "gpu", *(["-k", "matches_reference"] if models else [])], []
    # shares of what is left: half for parity, most of the rest for benchmarks, what then remains for the tuner
    if not parity(session, 0.3 if models else 0.5, selection):
        print(f"parity tests are not green, nothing is timed: {session.out / 'parity.log'}", file=sys.stderr)
        for phase in ["benchmarks", *([] if models else ["tuner"])]:
            session.note(Outcome(phase, "not run"))
        return 1
    benchmarks(session, 1.0 if models else 0.65, MODELS if models else OPS, [*shapes, *arguments])
    if not models and not rehearse:
        tuner(session)
    bad = [outcome for outcome in session.outcomes if outcome.result != "passed"]
    for outcome in bad:
        print(f"{outcome.phase} {outcome.result}: see the logs in {session.out}", file=sys.stderr)
    return 1 if bad else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", action="store_true", help="benchmark whole models (needs diffusers) instead of kernels")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all phases together (default: 9)")
    parser.add_argument("--out", type=Path, help="folder of results (default: $OUT, or outputs/gpu)")
    parser.add_argument("--rehearse", action="store_true", help="without CUDA: the phases at their smallest, without the tuner")
    parser.add_argument("arguments", nargs="*", help="pytest arguments of the benchmarks, after --")
    args = parser.parse_args(argv)
    if args.minutes * 60 <= MARGIN:
        parser.error(f"--minutes must be more than {MARGIN:.0f} s, got {args.minutes}")
    if lack := missing(args.models, args.rehearse):
        print(f"benchmarks.gpu {lack}", file=sys.stderr)
        return 2
    out = (args.out or Path(os.environ.get("OUT") or ROOT / "outputs" / "gpu")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # through the blocks that end processes
    return run_phases(Session(out, args.minutes * 60), args.models, args.rehearse, args.arguments)


if __name__ == "__main__":
    sys.exit(main())
