"""Plots of benchmark rows: bars per op against peers, and a roofline with the ceilings of the same run.

Colours are those of Okabe and Ito, which colour-blind people can tell apart; our kernels alone are vermilion. Bars carry their
values, so that nothing rests on colour.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.predict import VECTORS, least_work
from benchmarks.rows import Origin, Row, cases, ceilings, is_ours
from benchmarks.shapes import SHAPES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS = "#D55E00"
PEERS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#999999", "#F0E442", "#000000")
MARKERS = {"forward": "o", "backward": "s"}
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "legend.frameon": False, "savefig.dpi": 150,
}  # fmt: skip


def draw(origin: Origin, rows: Sequence[Row], out: Path) -> list[str]:
    """Write all plots of one origin; returns their file names."""
    import matplotlib

    names = []
    with matplotlib.rc_context(STYLE):
        by_case = cases(rows)
        for op, keys in itertools.groupby(by_case, key=lambda key: key[0]):
            names.append(f"{origin.slug}-{op}.png")
            bars(origin, op, {key[1]: by_case[key] for key in keys}, out / names[-1])
        points = [row for row in rows if row["op"] in VECTORS and row["shape"] in SHAPES and row["dtype"] in BYTES]
        if points:
            names.append(f"{origin.slug}-roofline.png")
            roofline(origin, points, out / names[-1])
    return names


def colours(providers: Sequence[str]) -> dict[str, str]:
    """Ours vermilion, peers in a fixed order by name."""
    peers = [name for name in sorted(set(providers)) if not is_ours(name)]
    return {name: OURS for name in providers if is_ours(name)} | dict(zip(peers, itertools.cycle(PEERS), strict=False))


def bars(origin: Origin, op: str, modes: dict[str, dict[tuple[str, str], list[Row]]], path: Path) -> None:
    """One panel per mode, a group of bars per shape; rates where rows have them, else milliseconds."""
    from matplotlib.figure import Figure

    rows = [row for by_shape in modes.values() for found in by_shape.values() for row in found]
    colour = colours([row["provider"] for row in rows])
    ours_first = sorted(colour, key=lambda name: (not is_ours(name), name.endswith("-unmasked"), name))
    most = max(len(by_shape) for by_shape in modes.values())
    width = min(24.0, max(6.5, 1.2 + most * (0.7 + 0.42 * len(colour))))
    figure = Figure(figsize=(width, 0.9 + 2.9 * len(modes)), layout="constrained")
    panels = figure.subplots(len(modes), 1, squeeze=False)[:, 0]
    for axes, (mode, by_shape) in zip(panels, modes.items(), strict=True):
        _bar_panel(axes, mode, by_shape, ours_first, colour)
    handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=max(2, round(width / 1.7)))
    figure.suptitle(f"{op}\n{origin.title}, {origin.versions}", fontsize=10)
    figure.savefig(path)


def _bar_panel(
    axes: Axes, mode: str, by_shape: dict[tuple[str, str], list[Row]], order: list[str], colour: dict[str, str]
) -> None:
    unit, scale = _unit([row for rows in by_shape.values() for row in rows])
    dtypes = {dtype for _, dtype in by_shape}
    for group, rows in enumerate(by_shape.values()):
        found = {row["provider"]: row for row in rows}
        present = [name for name in order if name in found]
        step = 0.86 / len(present)
        for i, name in enumerate(present):
            row, x = found[name], group + (i - (len(present) - 1) / 2) * step
            low, middle, high = sorted(scale(row, row[key]) for key in ("ms_p20", "ms_p50", "ms_p80"))
            axes.bar(
                x, middle, 0.9 * step, yerr=[[middle - low], [high - middle]], color=colour[name], label=name,
                edgecolor="black" if is_ours(name) else "white", hatch="///" if name.endswith("-unmasked") else None,
                linewidth=1.2 if is_ours(name) else 0.5, error_kw={"linewidth": 0.8, "ecolor": "#333333"},
            )  # fmt: skip
            label = f"{middle:.3g}" if middle < 1000 else f"{middle:,.0f}"
            bold = "bold" if is_ours(name) else "normal"
            axes.annotate(
                label, (x, high), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=7, weight=bold
            )
        key = {"GB/s": "ceiling_gb_per_s", "TFLOP/s": "ceiling_tflop_per_s"}.get(unit)
        limits = [row[key] for row in rows if row.get(key)] if key else []
        if limits:
            label = "measured ceiling" if group == 0 else None
            axes.hlines(statistics.median(limits), group - 0.46, group + 0.46, "black", (0, (4, 2)), linewidth=1, label=label)
    names = [shape if len(dtypes) == 1 else f"{shape}\n{dtype}" for shape, dtype in by_shape]
    rotation = 20 if len(names) > 6 else 0
    axes.set_xticks(range(len(names)), names, rotation=rotation, ha="right" if rotation else "center")
    better = "lower is better" if unit == "ms" else "higher is better"
    kind = f", {dtypes.pop()}" if len(dtypes) == 1 else ""
    axes.set(ylabel=f"{unit} ({better})", title=f"{mode}{kind}".lstrip(", "), xlim=(-0.6, max(0.6, len(names) - 0.4)))
    axes.set_ylim(0, axes.get_ylim()[1] * 1.06)
    axes.grid(axis="x", visible=False)


def _unit(rows: Sequence[Row]) -> tuple[str, Any]:
    """(unit, function of a row and one of its times): a rate scales inversely with the time."""
    for key, unit in (("gb_per_s", "GB/s"), ("tflop_per_s", "TFLOP/s")):
        if all(row.get(key) for row in rows):
            return unit, lambda row, ms, key=key: row[key] * row["ms_p50"] / ms
    return "ms", lambda row, ms: ms


def roofline(origin: Origin, rows: Sequence[Row], path: Path) -> None:
    """FLOP per byte that an op needs at least against the FLOP/s reached, under the measured ceilings."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5.6), layout="constrained")
    axes = figure.subplots()
    colour = colours([row["provider"] for row in rows])
    points = []
    for row in sorted(rows, key=lambda row: is_ours(row["provider"])):
        moved, flops = least_work(row["op"], row["mode"], SHAPES[row["shape"]], BYTES[row["dtype"]])
        # upper lines do more work than the op needs: their own rate is in the row
        reached = row["tflop_per_s"] if row.get("tflop_per_s") else flops / row["ms_p50"] * 1e-9
        points.append((flops / moved, reached))
        ours = is_ours(row["provider"])
        axes.plot(
            *points[-1], MARKERS.get(row["mode"], "D"), color=colour[row["provider"]], markersize=8 if ours else 6,
            markeredgecolor="black" if ours else "white", markeredgewidth=1.0 if ours else 0.5, zorder=3 if ours else 2,
        )  # fmt: skip
    _roofs(axes, rows, points)
    _name_ops(axes, rows, points)
    for name in sorted(colour, key=lambda name: (not is_ours(name), name)):
        axes.plot([], [], "o", color=colour[name], markeredgecolor="black" if is_ours(name) else "white", label=name)
    for mode, marker in MARKERS.items():
        axes.plot([], [], marker, color="none", markeredgecolor="black", label=mode)
    axes.set(
        xscale="log", yscale="log", xlabel="arithmetic intensity: least FLOP / least bytes of the op", ylabel="TFLOP/s reached",
        title=f"Roofline: {origin.title}\n{origin.versions}",
    )  # fmt: skip
    axes.grid(which="major", linewidth=0.6)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path)


def _roofs(axes: Axes, rows: Sequence[Row], points: Sequence[tuple[float, float]]) -> None:
    """The measured ceilings: a slope, and a level per dtype."""
    found = {name: statistics.median(values) for name, values in ceilings(rows).items()}
    slope = found.pop("GB/s", None)
    left, right = min(x for x, _ in points) / 2, max(x for x, _ in points) * 2
    levels = list(found.values())
    if slope:
        end = max(levels) / slope * 1e3 if levels else right
        axes.plot([left, end], [left * slope * 1e-3, end * slope * 1e-3], color="black", linewidth=1.2)
        axes.annotate(
            f"copy, {slope:,.0f} GB/s",
            (left * 1.15, left * 1.15 * slope * 1e-3),
            (0, 8),
            textcoords="offset points",
            fontsize=8,
        )
        right = max(right, end * 2)
    for name, level in found.items():
        start = level / slope * 1e3 if slope else left
        axes.plot([start, right], [level, level], color="black", linewidth=1.2)
        axes.annotate(
            f"matrix product, {level:,.3g} {name}", (right, level), (0, 3), textcoords="offset points", ha="right", fontsize=8
        )


def _name_ops(axes: Axes, rows: Sequence[Row], points: Sequence[tuple[float, float]]) -> None:
    """Write each op's name under its points."""
    by_op: dict[str, list[tuple[float, float]]] = {}
    for row, point in zip(sorted(rows, key=lambda row: is_ours(row["provider"])), points, strict=True):
        by_op.setdefault(row["op"], []).append(point)
    for op, found in by_op.items():
        x = statistics.geometric_mean([x for x, _ in found])
        axes.annotate(op, (x, min(y for _, y in found)), (0, -14), textcoords="offset points", ha="center", fontsize=8)
