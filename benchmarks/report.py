"""Turn benchmark rows into Markdown tables and plots: `make report`.

    python -m benchmarks.report                                    outputs/benchmarks.jsonl -> outputs/report/
    python -m benchmarks.report FILE.jsonl ... --out FOLDER        these rows, into FOLDER/report.md and FOLDER/*.png

One section per device, versions and commit: rows that differ in any of them never share a table. Rows of a dirty tree, of an
unknown commit and malformed ones are refused with file and line. Of rows that were measured twice the newest counts. Where rows
are of an H100 SXM, the newest committed prediction (`python -m benchmarks.predict --json`) stands beside them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.reporting.rows import Origin, Row, best_peer, cases, ceilings, grouped, is_ours, read_rows
from realgeneral.errors import Failure

ROWS = Path("outputs") / "benchmarks.jsonl"
OUT = Path("outputs") / "report"
PREDICTIONS = Path(__file__).parents[1] / "docs" / "results"
HEAD = """# Benchmarks

Median milliseconds, and the 20th and 80th percentiles. Providers that run our kernels are bold; `-unmasked` ones do another job
and are upper lines, not competitors."""


def speed_up(row: Row, peer: Row) -> str:
    """How many times faster than a peer, and whether the two spreads keep apart."""
    ratio = f"{peer['ms_p50'] / row['ms_p50']:.2f}x {peer['provider']}"
    apart = row["ms_p80"] < peer["ms_p20"] or peer["ms_p80"] < row["ms_p20"]
    return ratio if apart else f"{ratio}, within the spread"


def table(by_shape: dict[tuple[str, str], list[Row]], predictions: dict[tuple[str, ...], Row]) -> str:
    """One op in one mode: a line per shape and provider."""
    columns = ["shape", "dtype", "provider", "ms (p20 .. p80)", "rate", "of ceiling", "ours against the best peer", "peak MiB"]
    right = [name in ("ms (p20 .. p80)", "rate", "of ceiling", "peak MiB") for name in columns]
    paired = any(row.get("ratio") for rows in by_shape.values() for row in rows)
    if paired:
        columns, right = [*columns, "paired ratio"], [*right, False]
    if predictions:
        columns, right = [*columns, "predicted ms", "measured / predicted"], [*right, True, True]
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join("---:" if flag else "---" for flag in right) + "|"]
    for (shape, dtype), rows in by_shape.items():
        peer = best_peer(rows)
        for row in rows:
            ours = is_ours(row["provider"])
            cells = [
                shape, dtype, f"**{row['provider']}**" if ours else row["provider"],
                f"{_digits(row['ms_p50'])} ({_digits(row['ms_p20'])} .. {_digits(row['ms_p80'])})", _rate(row),
                "" if row.get("share_of_ceiling") is None else f"{row['share_of_ceiling']:.0%}",
                speed_up(row, peer) if ours and peer else "",
                "" if row.get("peak_mib") is None else f"{row['peak_mib']:,.0f}",
            ]  # fmt: skip
            if paired:
                cells.append(f"{row['ratio']:.2f}x {row.get('against', '')}".rstrip() if row.get("ratio") else "")
            if predictions:
                predicted = predictions.get((row["op"], row["mode"], shape, dtype)) if ours else None
                cells += [_digits(predicted["ms"]), f"{row['ms_p50'] / predicted['ms']:.2f}"] if predicted else ["", ""]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _digits(ms: float) -> str:
    return f"{ms:.4f}" if ms < 1 else f"{ms:.3f}" if ms < 100 else f"{ms:.1f}"


def _figures(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:.3g}"


def _rate(row: Row) -> str:
    if row.get("gb_per_s"):
        return f"{_figures(row['gb_per_s'])} GB/s"
    return f"{_figures(row['tflop_per_s'])} TFLOP/s" if row.get("tflop_per_s") else ""


def read_predictions(folder: Path) -> tuple[str, dict[tuple[str, ...], Row]]:
    """The newest committed predictions: file name, and rows by (op, mode, shape, dtype)."""
    files = sorted(folder.rglob("*-predicted-h100.json"), key=lambda path: path.name)
    if not files:
        return "", {}
    rows = json.loads(files[-1].read_text(encoding="utf-8"))["rows"]
    return files[-1].name, {(row["op"], row["mode"], row["shape"], row["dtype"]): row for row in rows}


def is_h100_sxm(device: str) -> bool:
    """Whether predictions are of this device."""
    return "H100" in device and not any(other in device for other in ("PCIe", "NVL", "H100L"))


def section(origin: Origin, rows: list[Row], predictions: tuple[str, dict[tuple[str, ...], Row]], images: Iterable[str]) -> str:
    """Markdown of one device: where rows come from, its ceilings, plots and tables."""
    dates = [row["date"].date().isoformat() for row in rows]
    days = dates[0] if min(dates) == max(dates) else f"{min(dates)} to {max(dates)}"
    parts = [f"## {origin.title}", f"{origin.versions}, {days}."]
    if origin.device_type == "cpu":
        parts.append("**These are CPU times**: small shapes, and only what runs without a GPU. They say nothing about a GPU.")
    measured = [
        f"{'..'.join(f'{v:,.3g}' for v in sorted({min(found), max(found)}))} {name}" for name, found in ceilings(rows).items()
    ]
    if measured:
        parts.append(f"Ceilings measured in the same runs (a large copy, a large matrix product): {'; '.join(measured)}.")
    if any((row.get("share_of_ceiling") or 0) > 1 for row in rows):
        parts.append("A share above 100 % means that the copy or the matrix product is no ceiling: the op was faster.")
    name, predicted = predictions if is_h100_sxm(origin.device) else ("", {})
    if predicted:
        parts.append(f"Predictions: {name}.")
    parts += [f"![{image}]({image})" for image in images]
    for (op, mode), by_shape in cases(rows).items():
        parts += [f"### {op}, {mode}" if mode else f"### {op}", table(by_shape, predicted)]
    commands = sorted({row["command"] for row in rows})
    parts.append("Commands: " + "; ".join(f"`{command}`" for command in commands) + ".")
    return "\n\n".join(parts)


def write_report(rows: list[Row], out: Path) -> Path:
    """Write report.md and its plots; returns the Markdown file."""
    from benchmarks.reporting.plots import draw

    out.mkdir(parents=True, exist_ok=True)
    sections, predictions = [], read_predictions(PREDICTIONS)
    for origin, found in grouped(rows).items():
        sections.append(section(origin, found, predictions, draw(origin, found, out)))
    partial, target = out / "report.md.partial", out / "report.md"
    partial.write_text("\n\n".join([HEAD, *sections]) + "\n", encoding="utf-8")
    return partial.replace(target)


def main(argv: list[str] | None = None) -> int:
    """Write the report; 1 and one line if a row may not be reported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="*", default=[ROWS], metavar="FILE", help=f"JSONL rows (default: {ROWS})")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help=f"where the report goes (default: {OUT})")
    args = parser.parse_args(argv)
    try:
        print(write_report(read_rows(args.rows), args.out))
    except (Failure, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
