"""Timing, ceilings and result rows, shared by all benchmarks.

On CUDA a provider is captured into a CUDA graph where that works, the L2 cache is overwritten before each run, and providers
take turns, so that clocks and neighbours affect them alike. Elsewhere the wall clock is read, and providers take turns as well.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], Any]
FLUSH_BYTES = 256 * 2**20  # more than any L2 cache, and long enough to hide the next launch


@dataclass
class Case:
    """What is timed: one op in one direction at one shape.

    Args:
        op: Name of the op.
        mode: "forward" or "backward".
        shape: Name from benchmarks/shapes.py.
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


def default_device() -> torch.device:
    """The current CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def measure(case: Case, providers: Mapping[str, Run], device: torch.device, repeats: int | None = None) -> list[dict[str, Any]]:
    """Time the providers in turns and return one row each: what ran, how fast, how near the ceiling, and where.

    Args:
        case: What is timed.
        providers: Name -> one run; the run's inputs must already exist.
        device: Where.
        repeats: Timed runs per provider; 50 on CUDA, 15 elsewhere if not given.
    """
    repeats = repeats or (50 if device.type == "cuda" else 15)
    peaks = {name: peak_mib(run, device) for name, run in providers.items()}
    if device.type == "cuda":
        times, graphs = _time_cuda(providers, device, repeats)
    else:
        times, graphs = _time_cpu(providers, repeats), dict.fromkeys(providers, False)
    return [_row(case, name, times[name], peaks[name], graphs[name], device) for name in providers]


def _time_cpu(providers: Mapping[str, Run], repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(repeats):
        for name, run in providers.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def _time_cuda(
    providers: Mapping[str, Run], device: torch.device, repeats: int
) -> tuple[dict[str, list[float]], dict[str, bool]]:
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
    captured = {name: _capture(run) for name, run in providers.items()}
    runs = {name: captured[name] or run for name, run in providers.items()}
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in providers}
    for _ in range(repeats):
        for name, run in runs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            run()
            stop.record()
            events[name].append((start, stop))
    torch.cuda.synchronize(device)
    times = {name: [start.elapsed_time(stop) for start, stop in pairs] for name, pairs in events.items()}
    return times, {name: graph is not None for name, graph in captured.items()}


def _capture(run: Run) -> Run | None:
    """The run as a CUDA graph's replay, or None where it cannot be captured (a provider that synchronises)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def peak_mib(run: Run, device: torch.device) -> float | None:
    """Memory that one run allocates on top of what exists, MiB; None where it is not counted. Also warms the provider up."""
    run()
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def gradient_run(outputs: Any, inputs: list[torch.Tensor], upstream: list[torch.Tensor]) -> Run:
    """One backward pass through an existing graph, to all inputs."""
    return lambda: torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` under torch.compile, for fixed sizes, with graphs that `gradient_run` may run backward more than once."""
    from torch._functorch import config

    config.donated_buffer = False
    return torch.compile(fn, dynamic=False)


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy on this machine: the ceiling of memory-bound ops."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**24, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    run = {"copy": lambda: target.copy_(source)}
    times = _time_cuda(run, device, 20)[0] if device.type == "cuda" else _time_cpu(run, 10)
    return 2 * source.numel() * source.element_size() / (statistics.median(times["copy"]) * 1e-3)


@functools.cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product on this machine: the ceiling of compute-bound ops."""
    size = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    run = {"matmul": lambda: left @ right}
    times = _time_cuda(run, device, 20)[0] if device.type == "cuda" else _time_cpu(run, 5)
    return 2 * size**3 / (statistics.median(times["matmul"]) * 1e-3)


def _row(
    case: Case, provider: str, times: list[float], peak: float | None, graph: bool, device: torch.device
) -> dict[str, Any]:
    p20, p50, p80 = _quantiles(times)
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
        "peak_mib": peak,
        "cuda_graph": graph,
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


@functools.cache
def environment(device: torch.device) -> dict[str, Any]:
    """Where a row comes from: machine, versions, commit, date, command."""
    cuda = device.type == "cuda"
    return {
        "device_type": device.type,
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _output("git", "rev-parse", "HEAD"),
        "dirty": bool(_output("git", "status", "--porcelain")),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


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
    """Rows as lines: provider, milliseconds, rate, share of the ceiling."""
    lines = []
    for row in rows:
        rate = f"{row['gb_per_s']:9.1f} GB/s" if row["gb_per_s"] else f"{row['tflop_per_s'] or 0:9.1f} TFLOP/s"
        spread = f"{row['ms_p20']:.3f}..{row['ms_p80']:.3f}"
        name = f"{row['op']} {row['mode']} {row['shape']} {row['dtype']}"
        lines.append(
            f"{name:64} {row['provider']:12} {row['ms_p50']:9.3f} ms ({spread}) {rate} {row.get('share_of_ceiling', 0):6.1%}"
        )
    return "\n".join(lines)
