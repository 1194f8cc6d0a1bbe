"""Predict the time of every kernel on an H100 SXM, from its launch: bytes, operations, and tiles over 132 multiprocessors.

    python -m benchmarks.predict                                       table of every op at every named shape
    python -m benchmarks.predict --shape 5b-480x720-b1 --json FILE     one shape; also write JSON

Launches are recorded, not run: grids and tiles are those that `rgkernels` would use on sm_90, and bytes are those of their
arguments. A kernel takes as long as its slowest resource; operations of one multiprocessor are those of the busiest one. Two
times are given. `floor_ms` takes every resource at its peak, all of them at once: a measurement below it says that the model or
the timer is wrong. `ms` is the prediction, under `ASSUMPTIONS`. Nothing here is a measurement.
"""

from __future__ import annotations

import argparse
import datetime
import heapq
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.least_work import MODES, VECTORS, least_work
from benchmarks.harness.shapes import SHAPES, Shape

SMS = 132
CLOCK = 1.83e9  # at which the data sheet's 989 TFLOP/s hold: 132 x 4096 per clock
HBM = 3.35e12
TENSOR = 989e12
MUFU = 16 * CLOCK * SMS  # ex2 and rsqrt
FP32 = 128 * CLOCK * SMS  # instructions, a fused multiply-add being one
L2_PORT = 64 * CLOCK  # bytes per second that one multiprocessor can take in

HBM_SHARE = {"forward": 0.90, "backward": 0.80}
TENSOR_SHARE = 0.81
LAUNCH_MS = 3e-3
DTYPE = torch.bfloat16

ASSUMPTIONS = {
    "device": "H100 SXM, 132 multiprocessors, 1.83 GHz",
    "hbm": "3.35 TB/s nominal; 90 % of it in forward and 80 % in backward kernels (the project's goals)",
    "tensor": "989 TFLOP/s dense bfloat16; 81 % of it (798 TFLOP/s, a large matrix product measured on an H100)",
    "mufu": "16 ex2 or rsqrt per clock and multiprocessor",
    "fp32": "128 instructions per clock and multiprocessor, all of it hidden behind other work",
    "overlap": "tensor cores and ex2 do not overlap: their times add; floor_ms overlaps them fully",
    "tiles": "programs go in launch order to the multiprocessor that is free first; padded rows cost as full ones",
    "bytes": "every argument is moved once to or from HBM; the 50 MB L2 cache is ignored, so small sizes may be faster",
    "launch": "3 us per kernel to start and to drain, as one node of a CUDA graph; floor_ms has none",
    "gradients": "tokens, gate, shift and scale; norm parameters frozen, as in LoRA training",
}

# float32 instructions per element or score, counted in the kernels' source; maxima and conversions run at half rate and count
# twice. Attention forward, per 32 scores: 34 FFMA, 36 add, 36 multiply, 36 max, 16 conversions (docs/kernels-attention.md)
INSTRUCTIONS = {
    "_adaln_fwd_kernel": 12, "_adaln_bwd_kernel": 20, "_adaln_bwd_reduce_kernel": 1,
    "_qk_norm_rope_fwd_kernel": 12, "_qk_norm_rope_bwd_kernel": 26, "_attn_bwd_delta_kernel": 3,
    "_attn_fwd_kernel": 6.6, "_attn_bwd_dq_kernel": 4, "_attn_bwd_dkdv_kernel": 5,
}  # fmt: skip
# a reciprocal root per row; the norm sites' backward reads it instead
NORMALISING = ("_adaln_fwd_kernel", "_qk_norm_rope_fwd_kernel", "_qk_norm_rope_bwd_kernel")
# matrix products over the scores, 2 D operations each: q k, p v | q k, do v, ds k | q k, do v, p do, ds q
PRODUCTS = {"_attn_fwd_kernel": 2, "_attn_bwd_dq_kernel": 3, "_attn_bwd_dkdv_kernel": 4}


@dataclass
class Work:
    """What one launch asks of the machine.

    Args:
        kernel: Function name.
        grid: Programs.
        bytes: To and from memory.
        flops: On tensor cores, padding included.
        mufu: ex2 and rsqrt.
        instructions: float32 instructions.
        imbalance: Work of the busiest multiprocessor over the average: tile quantisation.
    """

    kernel: str
    grid: int
    bytes: int
    flops: float
    mufu: float
    instructions: float
    imbalance: float


class Times(NamedTuple):
    """Milliseconds of one kernel by resource, at peak rates, and what is made of them."""

    hbm: float
    l2: float
    tensor: float
    mufu: float
    fp32: float

    @property
    def floor(self) -> float:
        """All resources at their peak and at once."""
        return max(self)

    def expected(self, mode: str) -> tuple[float, str]:
        """(milliseconds, what binds), under the assumptions."""
        limits = {
            "HBM": self.hbm / HBM_SHARE[mode],
            "L2 port": self.l2,
            "FP32": self.fp32,
            "tensor + MUFU": self.tensor / TENSOR_SHARE + self.mufu,
        }
        name = max(limits, key=limits.__getitem__)
        ms = limits[name] + LAUNCH_MS
        return ms, "launch" if limits[name] < LAUNCH_MS else name


def times(work: Work) -> Times:
    """What each resource needs for a launch."""
    slow = work.imbalance * 1e3
    return Times(
        hbm=work.bytes / HBM * 1e3,
        l2=work.bytes / SMS / L2_PORT * slow,
        tensor=work.flops / TENSOR * slow,
        mufu=work.mufu / MUFU * slow,
        fp32=work.instructions / FP32 * slow,
    )


def predict(op: str, mode: str, shape: Shape) -> dict[str, Any]:
    """One row: the op's times, what binds its longest kernel, and its kernels."""
    kernels, total, floor = [], 0.0, 0.0
    for work in launched_work(op, mode, shape):
        by_resource = times(work)
        ms, limit = by_resource.expected(mode)
        total, floor = total + ms, floor + by_resource.floor
        kernels.append(
            {
                "kernel": work.kernel, "grid": work.grid, "ms": _short(ms), "limit": limit, "bytes": work.bytes,
                "tensor_flop": _short(work.flops), "mufu": _short(work.mufu), "imbalance": _short(work.imbalance),
            }
        )  # fmt: skip
    moved, flops = least_work(op, mode, shape, DTYPE.itemsize)
    longest = max(kernels, key=lambda kernel: kernel["ms"])
    return {
        "op": op, "mode": mode, "shape": shape.name, "dtype": str(DTYPE)[6:], "ms": _short(total), "floor_ms": _short(floor),
        "limit": longest["limit"], "gb_per_s": _short(moved / total * 1e-6), "tflop_per_s": _short(flops / total * 1e-9),
        "kernels": kernels,
    }  # fmt: skip


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def launched_work(op: str, mode: str, shape: Shape) -> list[Work]:
    """The launches of one op on an H100, as work; its tensors have no memory."""
    from benchmarks.launches.direct import prepare
    from benchmarks.launches.record import record_launches

    def tensor(*size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(size, dtype=dtype or DTYPE, device="meta")

    with record_launches(sms=SMS, architecture="sm_90") as launches:
        call = prepare(op, mode, shape, tensor)
        launches.clear()
        call()
    work = _attention_work if op == "segment_attention" else _row_work
    return [work(launch, shape) for launch in launches]


def _row_work(launch: Any, shape: Shape) -> Work:
    """A kernel over rows of tokens: bytes as counted by launches/bytes_moved.py, programs of one size."""
    from benchmarks.launches.bytes_moved import bytes_moved

    moved = bytes_moved([launch])
    grid = launch.grid[0]
    found = launch.arguments
    tokens = next((found[name] for name in ("x_ptr", "dres_ptr", "q_ptr") if found.get(name) is not None), None)
    elements = moved.scratch // 4 if tokens is None else tokens.numel() * (2 if "q_ptr" in found else 1)
    roots = elements / found.get("HEAD_DIM", found.get("CHANNELS")) if launch.name in NORMALISING else 0.0
    instructions = INSTRUCTIONS[launch.name] * elements
    return Work(launch.name, grid, moved.total, 0.0, roots, instructions, -(-grid // SMS) * SMS / grid)


def _attention_work(launch: Any, shape: Shape) -> Work:
    """A kernel over scores, tile by tile; the delta pass streams rows."""
    from benchmarks.launches.bytes_moved import distinct_bytes
    from benchmarks.launches.direct import attention_problem
    from benchmarks.launches.record import tensors
    from rgkernels._triton.attention_schedule import tile_table

    found, name, grid = launch.arguments, launch.name, launch.grid[0]
    moved = sum(distinct_bytes(x) for x in tensors(launch).values())
    if name not in PRODUCTS:
        elements = found["o_ptr"].numel()
        return Work(name, grid, moved, 0.0, 0.0, INSTRUCTIONS[name] * elements, -(-grid // SMS) * SMS / grid)
    by_key = "dkdv" in name
    tile, step = (found["BLOCK_N"], found["BLOCK_M"]) if by_key else (found["BLOCK_M"], found["BLOCK_N"])
    tiles, ranges = tile_table(attention_problem(shape), tile, by_key=by_key)
    walked = [hi - lo + _tail_padding(hi - lo, step, found["BLOCK_TAIL"]) for lo, hi in ranges]
    scores = [tile * sum(walked[first:last]) for _, _, first, last in tiles] * (shape.batch * shape.heads)
    total = sum(scores)
    flops = PRODUCTS[name] * 2 * found["BLOCK_D"] * total
    return Work(name, grid, moved, flops, total, INSTRUCTIONS[name] * total, busiest(scores, SMS) / (total / SMS))


def _tail_padding(length: int, step: int, tail: int) -> int:
    """Columns that a ragged end adds: it is walked in steps of its own."""
    return -(length % step) % tail


def busiest(work: Iterable[float], servers: int) -> float:
    """When the last of these tasks is done, each started in order on the first free server."""
    free = [0.0] * servers
    for amount in work:
        heapq.heapreplace(free, free[0] + amount)
    return max(free)


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Predictions as a Markdown table."""
    lines = ["| op | mode | shape | predicted ms | floor ms | rate | limit |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        attention = row["op"] == "segment_attention"
        rate = f"{row['tflop_per_s']:.0f} TFLOP/s" if attention else f"{row['gb_per_s']:.0f} GB/s"
        columns = (row["op"], row["mode"], row["shape"], f"{row['ms']:.4f}", f"{row['floor_ms']:.4f}", rate, row["limit"])
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines)


def write_json(rows: list[dict[str, Any]], path: Path) -> None:
    """Predictions with their assumptions, commit and date, a row per line."""
    from benchmarks.harness.timing import environment

    origin = environment(torch.device("cpu"))
    head = {"date": datetime.date.today().isoformat(), "commit": origin["commit"], "dirty": origin["dirty"]}
    lines = [f' "{name}": {json.dumps(value)}' for name, value in (head | {"assumptions": ASSUMPTIONS}).items()]
    body = ",\n".join("  " + json.dumps(row) for row in rows)
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text("{\n" + ",\n".join(lines) + ',\n "rows": [\n' + body + "\n ]\n}\n")
    partial.replace(path)


def main(argv: list[str] | None = None) -> int:
    """Print the table; write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", nargs="+", choices=list(SHAPES), default=list(SHAPES), metavar="NAME", help="these shapes only"
    )
    parser.add_argument("--op", nargs="+", choices=list(VECTORS), default=list(VECTORS), metavar="NAME", help="these ops only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the predictions to FILE")
    args = parser.parse_args(argv)
    rows = [predict(op, mode, SHAPES[name]) for op in args.op for name in args.shape for mode in MODES]
    print("Predicted, not measured: " + "; ".join(ASSUMPTIONS.values()) + ".\n\n" + table(rows))
    if args.json:
        write_json(rows, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
