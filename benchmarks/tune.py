"""Search for faster launch parameters, offline, on the GPU that is here; the library itself never tunes.

    python -m benchmarks.tune --minutes 4 --out outputs/launch_data.py        search, and write the whole table anew
    python -m benchmarks.tune --op attn_fwd adaln_bwd ...                     these kernels only
    python -m benchmarks.tune --dry-run                                       list what would be tried; needs no GPU

Coordinate search: all launches that differ from the best one in one field (or some coupled ones) are built, compared with the
current launch's results, and timed in turns with it; the best of them is the next start. A launch that does not compile, spills
registers or disagrees is left out. The current launch stays unless another is faster by more than the spread, at every shape of
its size class. FILE is complete after each kernel, so a run that is cut off leaves what it found: review it, copy it over
rgkernels/_triton/launch_data.py, and run `python -m benchmarks.static_report --write`. Needs torch, triton and numpy.

Building takes most of the time: `--workers` processes compile the launches of a round side by side into Triton's cache on disk.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import KernelInterface

from benchmarks.harness.shapes import SHAPES
from benchmarks.harness.timing import Case, default_device, environment, measure
from benchmarks.launches.direct import Call, prepare
from benchmarks.tuning.builders import Builders
from benchmarks.tuning.launch_writer import write
from rgkernels._triton.common import architecture
from rgkernels._triton.launch_data import LAUNCHES, MEASURED
from rgkernels._triton.launch_table import HeadTile, Launch, RowLoop, RowTile, ScoreTile, dtype_class, find, size_class

DTYPE = torch.bfloat16
OUT = Path("outputs") / "launch_data.py"
QUICK, THOROUGH, FINALISTS = 15, 60, 2
WORKERS = max(0, min(14, (os.cpu_count() or 1) - 1))  # a kernel's compilation takes one core

# what each field may be
VALUES: dict[type, dict[str, tuple[int | None, ...]]] = {
    RowTile: {"block_s": (1, 2, 4, 8), "num_warps": (2, 4, 8, 16)},
    RowLoop: {
        "block_s": (1, 2, 4), "num_warps": (4, 8, 16), "num_stages": (1, 2, 3, 4), "programs_per_sm": (1, 2, 3, 4),
        "maxnreg": (None, 64, 80, 128, 168),
    },
    HeadTile: {
        "elements": (1024, 2048, 4096), "max_heads": (8, 16, 32), "num_warps": (4, 8, 16), "num_stages": (1, 2, 3),
        "programs_per_sm": (1, 2, 3, 4, 6),
    },
    ScoreTile: {
        "block_m": (32, 64, 128, 256), "block_n": (32, 64, 128, 256), "tail": (16, 32, 64), "num_warps": (4, 8),
        "num_stages": (2, 3, 4), "maxnreg": (None, 128, 168, 255),
    },
}  # fmt: skip
# fields that only make sense together
COUPLED: dict[type, tuple[tuple[str, ...], ...]] = {
    RowLoop: (("num_warps", "maxnreg"), ("num_warps", "programs_per_sm")),
    ScoreTile: (("block_m", "block_n", "num_warps"), ("block_n", "num_stages"), ("num_warps", "maxnreg")),
}

Spread = tuple[float, float, float]  # milliseconds: 20th percentile, median, 80th
Times = dict[Launch, list[Spread]]  # one spread per shape
Timer = Callable[[Sequence[Launch], int], Times]


class Target(NamedTuple):
    """One row of the table to be searched for.

    Args:
        kernel: As the table names it.
        size: The padded width that selects the row.
        op: The op whose launcher runs the kernel.
        mode: "forward" or "backward".
        shapes: Where it is timed.
        gradients: Of attention's backward.
        idle: Fields that the kernel does not read.
    """

    kernel: str
    size: int
    op: str
    mode: str
    shapes: tuple[str, ...]
    gradients: str = "qkv"
    idle: tuple[str, ...] = ()


_5B, _2B = ("5b-480x720-b1", "5b-1024x1024-b1"), ("2b-480x720-b1", "2b-1024x1024-b1")
TARGETS = (
    Target("attn_fwd", 64, "segment_attention", "forward", _5B),
    Target("attn_bwd_dkdv", 64, "segment_attention", "backward", _5B, "kv"),
    Target("attn_bwd_dq", 64, "segment_attention", "backward", _5B, "q"),
    Target("adaln_bwd", 4096, "segment_gate_residual_adaln", "backward", _5B),
    Target("adaln_fwd", 4096, "segment_gate_residual_adaln", "forward", _5B),
    Target("qk_norm_rope_bwd", 64, "qk_norm_rope", "backward", _5B),
    Target("qk_norm_rope_fwd", 64, "qk_norm_rope", "forward", _5B, idle=("num_stages", "programs_per_sm")),
    Target("adaln_bwd", 2048, "segment_gate_residual_adaln", "backward", _2B),
    Target("adaln_fwd", 2048, "segment_gate_residual_adaln", "forward", _2B),
)


def neighbours(target: Target, launch: Launch) -> list[Launch]:
    """All launches that differ in one field or in coupled ones, without those that cannot be meant."""
    values = {name: found for name, found in VALUES[type(launch)].items() if name not in target.idle}
    found = [launch._replace(**{name: value}) for name, options in values.items() for value in options]
    for names in COUPLED.get(type(launch), ()):
        combinations = itertools.product(*(values[name] for name in names))
        found += [launch._replace(**dict(zip(names, chosen, strict=True))) for chosen in combinations]
    return [other for other in dict.fromkeys(found) if other != launch and _sensible(target, other)]


def _sensible(target: Target, launch: Launch) -> bool:
    """The ragged end is walked in steps no wider than the loop's own."""
    if not isinstance(launch, ScoreTile):
        return True
    return launch.tail <= (launch.block_m if target.kernel == "attn_bwd_dkdv" else launch.block_n)


def is_faster(new: Sequence[Spread], old: Sequence[Spread]) -> bool:
    """Whether a launch beats another by more than the spread: on average over the shapes, and at no shape slower than it."""
    ratios = [a[1] / b[1] for a, b in zip(new, old, strict=True)]
    noise = [max((high - low) / middle for low, middle, high in pair) for pair in zip(new, old, strict=True)]
    steady = all(ratio <= 1 + spread for ratio, spread in zip(ratios, noise, strict=True))
    return steady and statistics.geometric_mean(ratios) < 1 - max(noise)


def _total(spreads: Sequence[Spread]) -> float:
    return sum(math.log(middle) for _, middle, _ in spreads)


class Outcome(NamedTuple):
    """What a search found: the launch to use, and times of it and of the one it started from, measured in turns."""

    best: Launch
    before: list[Spread]
    after: list[Spread]
    looked_at: int


def search(
    target: Target,
    current: Launch,
    accept: Callable[[Launch], bool],
    timer: Timer,
    time_left: Callable[[], bool],
    prepare: Callable[[Sequence[Launch]], None] = lambda launches: None,
) -> Outcome:
    """Coordinate search from the current launch until nothing is faster or time is up.

    Args:
        target: What is searched for.
        current: Where to start; it stays unless something beats it.
        accept: Whether a launch may be timed at all: it compiles, does not spill, and agrees.
        timer: Times launches in turns, a given number of repeats each.
        time_left: Asked before each launch is looked at.
        prepare: Given all launches of a round before the first of them is looked at, so that they can be built side by side.
    """
    best, seen = current, {current}
    while time_left():
        fresh, alive = [launch for launch in neighbours(target, best) if launch not in seen], []
        prepare(fresh)
        for launch in fresh:
            if time_left():
                seen.add(launch)
                alive += [launch] if accept(launch) else []
        if not alive:
            break
        quick = timer([best, *alive], QUICK)
        finalists = sorted(alive, key=lambda launch: _total(quick[launch]))[:FINALISTS]
        # timed again: the fastest of many is partly the luckiest
        again = timer([best, *finalists], THOROUGH)
        leader = min(finalists, key=lambda launch: _total(again[launch]))
        if not is_faster(again[leader], again[best]):
            break
        best = leader
    final = timer(list(dict.fromkeys([current, best])), THOROUGH)
    if best != current and not is_faster(final[best], final[current]):
        best = current
    return Outcome(best, final[current], final[best], len(seen) - 1)


@contextlib.contextmanager
def launched_as(kernel: str, key: tuple[str, str, int], launch: Launch) -> Iterator[None]:
    """Let a kernel be launched like this inside the block."""
    rows = LAUNCHES[kernel]
    kept = rows.get(key)
    rows[key] = tuple(launch)
    find.cache_clear()
    try:
        yield
    finally:
        rows.pop(key) if kept is None else rows.update({key: kept})
        find.cache_clear()


class Bench:
    """A target's inputs on the GPU: builds, checks and times launches."""

    def __init__(self, target: Target, device: torch.device) -> None:
        self.target, self.device = target, device
        self.key = architecture(device), dtype_class(DTYPE), size_class(target.kernel, target.size)
        self.current: Launch = find(target.kernel, self.key[0], DTYPE, target.size)
        torch.manual_seed(0)
        self.calls = [prepare(target.op, target.mode, SHAPES[name], self._tensor, target.gradients) for name in target.shapes]
        self.expected = flat(self._run(self.current, self.calls[0]))

    def _tensor(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(size, dtype=dtype or DTYPE, device=self.device)

    def _run(self, launch: Launch, call: Call) -> Any:
        with launched_as(self.target.kernel, self.key, launch):
            return call()

    def accept(self, launch: Launch) -> bool:
        """Build a launch and compare its results; says why it is left out."""
        try:
            with spills_watched() as spills:
                results = flat(self._run(launch, self.calls[0]))
            torch.cuda.synchronize(self.device)
        except Exception as error:  # compilers fail in many ways, and the search goes on
            if any(words in str(error) for words in ("CUDA error", "illegal memory access", "misaligned address")):
                raise  # nothing that runs after these means anything
            return self._refuse(launch, str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
        if sum(spills):
            return self._refuse(launch, f"{sum(spills)} spills")
        if (error := difference(results, self.expected)) > torch.finfo(DTYPE).eps:
            return self._refuse(launch, f"results differ by {error:.1e}")
        return True

    def _refuse(self, launch: Launch, why: str) -> bool:
        print(f"  left out {launch}: {why[:100]}", flush=True)
        return False

    def times(self, launches: Sequence[Launch], repeats: int) -> Times:
        """Milliseconds of each launch at each shape, all of a shape in turns."""
        found: Times = {launch: [] for launch in launches}
        for name, call in zip(self.target.shapes, self.calls, strict=True):
            names = {str(i): launch for i, launch in enumerate(launches)}
            runs = {i: lambda launch=launch, call=call: self._run(launch, call) for i, launch in names.items()}
            for row in measure(Case(self.target.op, self.target.mode, name, DTYPE), runs, self.device, repeats):
                found[names[row["provider"]]].append((row["ms_p20"], row["ms_p50"], row["ms_p80"]))
        return found


@contextlib.contextmanager
def spills_watched() -> Iterator[list[int]]:
    """Collect the register spills of every kernel launched inside the block."""
    spills: list[int] = []
    original = KernelInterface.__getitem__

    def getitem(kernel: Any, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            compiled = original(kernel, grid)(*args, **kwargs)
            spills.append(getattr(compiled, "n_spills", 0) or 0)
            return compiled

        return launch

    KernelInterface.__getitem__ = getitem
    try:
        yield spills
    finally:
        KernelInterface.__getitem__ = original


_bench: dict[Target, Bench] = {}  # a worker's only one


def build(target: Target, launch: Launch) -> None:
    """In a worker: compile a launch into Triton's cache on disk, where `Bench.accept` finds it.

    No kernel runs: it could disturb what the parent times, or fail. All shapes: one may be specialised further.
    """
    with mock.patch.object(KernelInterface, "__getitem__", lambda kernel, grid: partial(kernel.run, grid=grid, warmup=True)):
        if target not in _bench:
            _bench.clear()  # its tensors go before others come
            _bench[target] = Bench(target, default_device())
        for call in _bench[target].calls:
            _bench[target]._run(launch, call)


def flat(results: Any) -> list[Tensor]:
    """The tensors of a launcher's result."""
    return [x.clone() for x in (results if isinstance(results, list | tuple) else [results]) if x is not None]


def difference(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest relative L2 difference of any result; NaN counts as infinite.

    Two roundings of one value differ by at most the dtype's eps: that is the bound of the caller.
    """
    found = [
        ((a.float() - b.float()).norm() / b.float().norm().clamp_min(torch.finfo(torch.float32).tiny)).item()
        for a, b in zip(results, expected, strict=True)
    ]
    return max(math.inf if math.isnan(x) else x for x in found)


def evidence(target: Target, current: Launch, outcome: Outcome, device: torch.device) -> dict[str, Any]:
    """What stands behind a row."""
    origin = environment(device)
    spreads = {
        name: (round(before[1], 5), round(after[1], 5))
        for name, before, after in zip(target.shapes, outcome.before, outcome.after, strict=True)
    }
    versions = f"driver {origin['driver']}, CUDA {origin['cuda']}, torch {origin['torch']}, Triton {origin['triton']}"
    return {
        "launch_before": tuple(current), "ms_before_after": spreads, "looked_at": outcome.looked_at, "device": origin["device"],
        "versions": versions, "commit": origin["commit"], "dirty": origin["dirty"], "date": origin["date"],
    }  # fmt: skip


def tune(targets: Sequence[Target], minutes: float, out: Path, device: torch.device, workers: int = 0) -> None:
    """Search for every target in order, and write the table after each; one may take twice its share of the time left."""
    launches, measured = copy.deepcopy(LAUNCHES), copy.deepcopy(MEASURED)
    deadline = time.monotonic() + 60 * minutes
    with Builders(workers) as builders:
        for i, target in enumerate(targets):
            now = time.monotonic()
            if now >= deadline:
                print(f"time is up before {target.kernel} {target.size}")
                break
            end = min(deadline, now + 2 * (deadline - now) / (len(targets) - i))
            bench = Bench(target, device)

            def build_ahead(found: Sequence[Launch], target: Target = target, end: float = end) -> None:
                # half of the time that is left: what was built must still be timed
                builders.run(build, [(target, launch) for launch in found], (time.monotonic() + end) / 2)

            outcome = search(
                target, bench.current, bench.accept, bench.times, lambda end=end: time.monotonic() < end, build_ahead
            )
            launches[target.kernel][bench.key] = tuple(outcome.best)
            measured.setdefault(target.kernel, {})[bench.key] = evidence(target, bench.current, outcome, device)
            write(out, launches, measured)
            kept = "stays" if outcome.best == bench.current else f"-> {outcome.best}"
            gain = math.exp((_total(outcome.before) - _total(outcome.after)) / len(target.shapes))
            print(
                f"{target.kernel} {bench.key}: {bench.current} {kept}, {gain:.3f}x, {outcome.looked_at} looked at", flush=True
            )
    print(f"written: {out}")


def dry_run(targets: Iterable[Target], arch: str) -> None:
    """List the first round of every target."""
    for target in targets:
        current = find(target.kernel, arch, DTYPE, target.size)
        candidates = neighbours(target, current)
        print(
            f"{target.kernel}, size {target.size}, on {arch}, timed at {', '.join(target.shapes)}: {len(candidates)} candidates"
        )
        print(f"  current {current}")
        for launch in candidates:
            changed = {name: new for name, new, old in zip(launch._fields, launch, current, strict=True) if new != old}
            print("  " + ", ".join(f"{name}={value}" for name, value in changed.items()))


def main(argv: list[str] | None = None) -> int:
    """Tune; 1 and one line where that is not possible."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kernels = list(dict.fromkeys(target.kernel for target in TARGETS))
    parser.add_argument("--minutes", type=float, default=4.0, metavar="M", help="stop after M minutes (default: 4)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help=f"the table (default: {OUT})")
    parser.add_argument("--op", nargs="+", choices=kernels, default=kernels, metavar="KERNEL", help=", ".join(kernels))
    parser.add_argument("--workers", type=int, default=WORKERS, metavar="N", help=f"build in N processes (default: {WORKERS})")
    parser.add_argument("--dry-run", action="store_true", help="list candidates; needs no GPU")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        parser.error(f"--minutes must be positive, got {args.minutes}")
    if args.workers < 0:
        parser.error(f"--workers must not be negative, got {args.workers}")
    targets = [target for target in TARGETS if target.kernel in args.op]
    device = default_device()
    if args.dry_run:
        dry_run(targets, architecture(device) if device.type == "cuda" else "sm_90")
        return 0
    if device.type != "cuda":
        print("tuning needs a CUDA device, got none (--dry-run lists the candidates)", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # through the block that ends workers
    tune(targets, args.minutes, args.out, device, args.workers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
