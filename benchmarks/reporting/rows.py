"""Benchmark rows: reading, refusing what may not be reported, and putting together what may stand in one table."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.shapes import SHAPES
from realgeneral.errors import Failure

Row = dict[str, Any]

TEXT = ("op", "mode", "provider", "shape", "dtype", "device_type", "device", "torch", "commit", "date", "command")
OPTIONAL_TEXT = ("driver", "cuda", "triton")
TIMES = ("ms_p20", "ms_p50", "ms_p80")
OPTIONAL_NUMBERS = (
    "gb_per_s", "tflop_per_s", "share_of_ceiling", "ceiling_gb_per_s", "ceiling_tflop_per_s", "peak_mib", "ratio",
)  # fmt: skip


class Origin(NamedTuple):
    """What rows of one table have in common."""

    device_type: str
    device: str
    driver: str | None
    cuda: str | None
    torch: str
    triton: str | None
    commit: str

    @property
    def title(self) -> str:
        """The device, in words."""
        return f"CPU ({self.device})" if self.device_type == "cpu" else self.device

    @property
    def versions(self) -> str:
        """Everything else, in words."""
        versions = {"driver": self.driver, "CUDA": self.cuda, "torch": self.torch, "Triton": self.triton}
        if self.device_type == "cpu":
            del versions["driver"], versions["CUDA"]
        return ", ".join([f"{name} {value}" for name, value in versions.items() if value] + [f"commit {self.commit[:10]}"])

    @property
    def slug(self) -> str:
        """A file name of it: device, commit, and a few digits that tell versions apart."""
        digits = hashlib.sha256(repr(tuple(self)).encode()).hexdigest()[:4]
        words = f"{self.title} {self.commit[:7]} {digits}".lower()
        return "-".join("".join(c if c.isalnum() else " " for c in words).split())


def is_ours(provider: str) -> bool:
    """Whether a provider runs our kernels."""
    return provider == "triton"


def is_peer(provider: str) -> bool:
    """Whether a provider is something to be compared with: not ours, and not an upper line that does another job."""
    return not is_ours(provider) and not provider.endswith("-unmasked")


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """The rows of JSONL files.

    Raises:
        Failure: Names file and line of the first row that may not be reported.
    """
    rows = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise Failure(f"{path}: cannot be read: {error}") from error
        for number, line in enumerate(lines, 1):
            if line.strip():
                rows.append(_checked(line, f"{path}:{number}"))
    if not rows:
        raise Failure(f"rows must be given, got none in {', '.join(map(str, paths))}")
    return rows


def _checked(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise Failure(f"{where}: a row must be JSON, got {line[:40]!r} ({error.msg})") from error
    if not isinstance(row, dict):
        raise Failure(f"{where}: a row must be a JSON object, got {line[:40]!r}")
    if row.get("dirty") is not False:
        raise Failure(f"{where}: dirty must be false, got {row.get('dirty')!r}: commit, and measure again")
    for name in TEXT:
        if not isinstance(row.get(name), str):
            raise Failure(f"{where}: {name} must be text, got {row.get(name)!r}")
    for name in OPTIONAL_TEXT:
        if not isinstance(row.get(name), str | None):
            raise Failure(f"{where}: {name} must be text or null, got {row[name]!r}")
    for name in TIMES:
        if not _is_number(row.get(name)) or row[name] == 0:
            raise Failure(f"{where}: {name} must be a positive number, got {row.get(name)!r}")
    for name in OPTIONAL_NUMBERS:
        if row.get(name) is not None and not _is_number(row[name]):
            raise Failure(f"{where}: {name} must be a number of 0 or more, or null, got {row[name]!r}")
    if not row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]:
        raise Failure(f"{where}: ms_p20, ms_p50, ms_p80 must ascend, got {[row[name] for name in TIMES]}")
    try:
        date = datetime.datetime.fromisoformat(row["date"])
    except ValueError as error:
        raise Failure(f"{where}: date must be ISO 8601, got {row['date']!r}") from error
    if date.tzinfo is None:
        raise Failure(f"{where}: date must be ISO 8601 with a time zone, got {row['date']!r}")
    row["date"] = date
    return row


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


def grouped(rows: Sequence[Row]) -> dict[Origin, list[Row]]:
    """Rows by origin, GPUs first and then the newest; the last measurement of each row counts."""
    groups: dict[Origin, dict[tuple[str, ...], Row]] = {}
    for row in sorted(rows, key=lambda row: row["date"].timestamp()):
        origin = Origin(*(row.get(name) for name in Origin._fields))
        key = tuple(row[name] for name in ("op", "mode", "shape", "dtype", "provider"))
        groups.setdefault(origin, {})[key] = row
    newest = {origin: max(row["date"].timestamp() for row in found.values()) for origin, found in groups.items()}
    order = sorted(groups, key=lambda origin: (origin.device_type == "cpu", -newest[origin]))
    return {origin: list(groups[origin].values()) for origin in order}


def cases(rows: Iterable[Row]) -> dict[tuple[str, str], dict[tuple[str, str], list[Row]]]:
    """(op, mode) -> (shape, dtype) -> rows, shapes in the order of SHAPES, the fastest provider first."""
    order = {name: i for i, name in enumerate(SHAPES)}
    found: dict[tuple[str, str], dict[tuple[str, str], list[Row]]] = {}
    for row in sorted(rows, key=lambda row: (order.get(row["shape"], len(order)), row["shape"], row["ms_p50"])):
        found.setdefault((row["op"], row["mode"]), {}).setdefault((row["shape"], row["dtype"]), []).append(row)
    # ops in the order of their names, forward before backward
    modes = ("forward", "backward")
    rank = {key: (key[0], modes.index(key[1]) if key[1] in modes else len(modes), key[1]) for key in found}
    return dict(sorted(found.items(), key=lambda item: rank[item[0]]))


def best_peer(rows: Iterable[Row]) -> Row | None:
    """The fastest provider that is something to be compared with."""
    return min((row for row in rows if is_peer(row["provider"])), key=lambda row: row["ms_p50"], default=None)


def ceilings(rows: Iterable[Row]) -> dict[str, list[float]]:
    """Measured ceilings of these rows, ascending: "GB/s", and "TFLOP/s DTYPE"."""
    found: dict[str, set[float]] = {}
    for row in rows:
        if row.get("ceiling_gb_per_s"):
            found.setdefault("GB/s", set()).add(row["ceiling_gb_per_s"])
        if row.get("ceiling_tflop_per_s"):
            found.setdefault(f"TFLOP/s {row['dtype']}", set()).add(row["ceiling_tflop_per_s"])
    return {name: sorted(values) for name, values in sorted(found.items())}
