"""Timing, ceilings and result rows, shared by all benchmarks.

On CUDA an op is captured into a CUDA graph where that works, the L2 cache is overwritten before each run, and providers take
turns (every other round in reverse), so that clocks and neighbours affect them alike. Elsewhere the wall clock is read, also in
turns.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], Any]
FLUSH_BYTES = 256 * 2**20  # more than any L2 cache, and long enough to hide the next launch
SECONDS = 10.0  # rounds start within this time, once there are LEAST of them
LEAST = 5
OURS = ("reference", "split-sdpa", "triton")  # and names that begin so


@dataclass
class Case:
    """What is timed: one op in one direction at one shape.

    Args:
        op: Name of the op.
        mode: "forward", "backward", or what a model-level benchmark says.
        shape: Name from benchmarks/harness/shapes.py.
        dtype: Of the tokens.
        bytes: The fewest bytes that the op must move, whoever computes it.
        flops: Floating-point operations, for compute-bound ops.
    """

    op: str
    mode: str
    shape: str
    dtype: torch.dtype
    bytes: int = 0
    flops: int = 0


@dataclass
class Timed:
    """What was measured of one provider.

    Args:
        times: Milliseconds of each run.
        peak_mib: Memory that one run allocates on top of what exists; None where it is not counted.
        resident_mib: What exists before the run: weights, inputs, optimizer state.
        graph: Whether a CUDA graph was replayed.
        cpu_seconds: CPU time of the runs, all threads; counted without CUDA alone.
    """

    times: list[float] = field(default_factory=list)
    peak_mib: float | None = None
    resident_mib: float | None = None
    graph: bool = False
    cpu_seconds: float | None = None


def default_device() -> torch.device:
    """The current CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def leave_default_stream(device: torch.device) -> None:
    """Make a side stream the current one, before any benchmark input exists.

    A backward pass runs on the stream of its forward, and CUDA's default stream cannot be captured into a graph.
    """
    if device.type == "cuda" and torch.cuda.current_stream() == torch.cuda.default_stream():
        torch.cuda.set_stream(torch.cuda.Stream())


def measure(
    case: Case,
    providers: Mapping[str, Run],
    device: torch.device,
    repeats: int | None = None,
    *,
    against: Mapping[str, str] | None = None,
    warm_ups: Mapping[str, Run] | None = None,
    graphs: bool = True,
    least: int = LEAST,
) -> list[dict[str, Any]]:
    """Time the providers in turns and return one row each: what ran, how fast, how near the ceiling, and where.

    Args:
        case: What is timed.
        providers: Name -> one run; the run's inputs must already exist.
        device: Where.
        repeats: Most timed runs per provider; 50 on CUDA, 15 elsewhere if not given.
        against: Provider -> another one; the row then has `ratio`, the median over rounds of the other's time / its own.
        warm_ups: Shorter runs that compile and allocate the same, for providers whose one run is long.
        graphs: Capture CUDA graphs; False for whole models, which nobody runs that way.
        least: Timed runs per provider, however long they take; after those, none starts later than SECONDS from the first.
    """
    repeats = max(least, repeats or (50 if device.type == "cuda" else 15))
    timed = {name: warm_up((warm_ups or providers)[name], device) for name in providers}
    rounds = _rounds(list(providers), least, repeats)
    if device.type == "cuda":
        _time_cuda(providers, rounds, timed, device, graphs)
    else:
        _time_cpu(providers, rounds, timed)
    rows = [_row(case, name, timed[name], device) for name in providers]
    for row in rows:
        if other := (against or {}).get(row["provider"]):
            row |= _ratio(other, timed[other].times, timed[row["provider"]].times)
    return rows


def _rounds(names: list[str], least: int, most: int) -> Iterator[list[str]]:
    """The providers' names in the order of each round: forward, then backward, until time or repeats are used up."""
    start = time.perf_counter()
    for i in range(most):
        if i >= least and time.perf_counter() - start > SECONDS:
            return
        yield names if i % 2 == 0 else names[::-1]


def _time_cpu(providers: Mapping[str, Run], rounds: Iterator[list[str]], timed: Mapping[str, Timed]) -> None:
    for names in rounds:
        for name in names:
            start, used = time.perf_counter(), time.process_time()
            providers[name]()
            timed[name].times.append((time.perf_counter() - start) * 1e3)
            timed[name].cpu_seconds = (timed[name].cpu_seconds or 0.0) + time.process_time() - used


def _time_cuda(
    providers: Mapping[str, Run],
    rounds: Iterator[list[str]],
    timed: Mapping[str, Timed],
    device: torch.device,
    graphs: bool = True,
) -> None:
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
    captured = {name: _capture(run) if graphs else None for name, run in providers.items()}
    for names in rounds:
        events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in names}
        for name in names:
            run = captured[name] or providers[name]
            flush.zero_()
            events[name][0].record()
            run()
            events[name][1].record()
        torch.cuda.synchronize(device)
        for name, (start, stop) in events.items():
            timed[name].times.append(start.elapsed_time(stop))
    for name, graph in captured.items():
        timed[name].graph = graph is not None


def _capture(run: Run) -> Run | None:
    """The run as a CUDA graph's replay, or None where it cannot be captured (a provider that synchronises)."""
    # a backward pass stays on its forward's stream: see leave_default_stream
    stream = torch.cuda.current_stream()
    if stream == torch.cuda.default_stream():
        stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            run()
    except RuntimeError as error:
        torch.cuda.synchronize()
        print(f"not captured into a CUDA graph: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    return graph.replay


def warm_up(run: Run, device: torch.device) -> Timed:
    """Compile what is compiled on first use, and count the memory of a second run."""
    run()
    if device.type != "cuda":
        return Timed()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return Timed(peak_mib=(torch.cuda.max_memory_allocated(device) - before) / 2**20, resident_mib=before / 2**20)


def usable(runs: Mapping[str, Run]) -> dict[str, Run]:
    """The runs that work here, each tried once; a peer that does not is named with the reason. Ours must work."""
    kept = {}
    for name, run in runs.items():
        try:
            run()
        except Exception as error:  # a peer may raise anything, memory errors included
            if name.startswith(OURS):
                raise
            print(f"{name} left out: {type(error).__name__}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        kept[name] = run
    return kept


def gradient_run(outputs: Any, inputs: list[torch.Tensor], upstream: list[torch.Tensor]) -> Run:
    """One backward pass through an existing graph, to all inputs."""
    return lambda: torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` under torch.compile, for fixed sizes, with graphs that `gradient_run` may run backward more than once."""
    from torch._functorch import config

    config.donated_buffer = False
    # fullgraph: past the recompile limit it raises, instead of quietly timing eager code
    return torch.compile(fn, dynamic=False, fullgraph=True)


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of the best large copy on this machine: the ceiling of memory-bound ops."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**24, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    # a kernel too: the driver's own copy moved less than our kernels do on an H100
    seconds = [_least_seconds(run, device) for run in (lambda: target.copy_(source), lambda: torch.neg(source, out=target))]
    return 2 * source.numel() * source.element_size() / min(seconds)


@functools.cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of the best large matrix product on this machine: the ceiling of compute-bound ops."""
    size = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _least_seconds(lambda: left @ right, device)


def _least_seconds(run: Run, device: torch.device) -> float:
    timed = {"run": warm_up(run, device)}
    if device.type == "cuda":
        _time_cuda({"run": run}, _rounds(["run"], 20, 20), timed, device)
    else:
        _time_cpu({"run": run}, _rounds(["run"], 10, 10), timed)
    return min(timed["run"].times) * 1e-3


def _ratio(other: str, theirs: list[float], own: list[float]) -> dict[str, Any]:
    """How many times as fast as `other`, over the pairs of one round each."""
    p20, p50, p80 = _quantiles([a / b for a, b in zip(theirs, own, strict=True)])
    return {"against": other, "ratio": p50, "ratio_p20": p20, "ratio_p80": p80}


def _row(case: Case, provider: str, timed: Timed, device: torch.device) -> dict[str, Any]:
    p20, p50, p80 = _quantiles(timed.times)
    row = {
        "op": case.op,
        "mode": case.mode,
        "provider": provider,
        "shape": case.shape,
        "dtype": str(case.dtype)[6:],
        "ms_p20": p20,
        "ms_p50": p50,
        "ms_p80": p80,
        "gb_per_s": case.bytes / p50 * 1e-6 if case.bytes else None,
        "tflop_per_s": case.flops / p50 * 1e-9 if case.flops else None,
        "ceiling_gb_per_s": copy_bandwidth(device) * 1e-9 if case.bytes else None,
        "ceiling_tflop_per_s": matmul_rate(device, case.dtype) * 1e-12 if case.flops else None,
        "peak_mib": timed.peak_mib,
        "resident_mib": timed.resident_mib,
        "cuda_graph": timed.graph,
        "runs": len(timed.times),
        # below 1 the process waited for a core: the machine was busy with other work
        "cores_used": timed.cpu_seconds and timed.cpu_seconds / sum(timed.times) * 1e3,
    }
    if case.bytes:
        row["share_of_ceiling"] = row["gb_per_s"] / row["ceiling_gb_per_s"]
    elif case.flops:
        row["share_of_ceiling"] = row["tflop_per_s"] / row["ceiling_tflop_per_s"]
    return row | environment(device)


def _quantiles(times: list[float]) -> tuple[float, float, float]:
    if len(times) < 2:
        return times[0], times[0], times[0]
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return tenths[1], statistics.median(times), tenths[7]


def environment(device: torch.device) -> dict[str, Any]:
    """Where a row comes from: machine, versions, commit, date, command.

    A copy of the tree without git is of the commit that BENCH_COMMIT names; where neither says, the row counts as dirty.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    return _origin(device) | {"date": now.isoformat(timespec="seconds")}


@functools.cache
def _origin(device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    head, changes = _output("git", "rev-parse", "HEAD"), _output("git", "status", "--porcelain")
    named = os.environ.get("BENCH_COMMIT")
    return {
        "device_type": device.type,
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "threads": None if cuda else torch.get_num_threads(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": head or named,
        "dirty": bool(changes) if head else not named,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def _output(*command: str) -> str | None:
    """First line of what a command prints; None if it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return None
    return (done.stdout.strip().splitlines() or [""])[0] if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Append rows to a JSONL file as they come, so that a run that is cut off still leaves them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def summary(rows: list[dict[str, Any]]) -> str:
    """Rows as lines: provider, milliseconds, rate, share of the ceiling, memory, ratio."""
    lines = []
    for row in rows:
        rate = f"{row['gb_per_s']:9.1f} GB/s" if row["gb_per_s"] else f"{row['tflop_per_s'] or 0:9.3g} TFLOP/s"
        spread = f"{row['ms_p20']:.3f}..{row['ms_p80']:.3f}"
        name = f"{row['op']} {row['mode']} {row['shape']} {row['dtype']}"
        line = f"{name:58} {row['provider']:16} {row['ms_p50']:9.3f} ms ({spread}) {rate} {row.get('share_of_ceiling', 0):6.1%}"
        if row["peak_mib"] is not None:
            line += f" {row['peak_mib']:8.0f} MiB"
        if "ratio" in row:
            line += f" {row['ratio']:.2f}x {row['against']}"
        lines.append(line)
    return "\n".join(lines)
