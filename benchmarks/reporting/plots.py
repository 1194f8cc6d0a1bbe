"""Plots of benchmark rows: bars per op against peers, and a roofline with the ceilings of the same run.

Colours are those of Okabe and Ito, which colour-blind people can tell apart; our kernels alone are vermilion. Bars carry their
values and modes have their own markers, so that nothing rests on colour.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.least_work import VECTORS, least_work
from benchmarks.harness.shapes import SHAPES
from benchmarks.reporting.rows import Origin, Row, best_peer, cases, ceilings, is_ours, is_peer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, BEST_PEER, OTHER = "#D55E00", "#0072B2", "#BBBBBB"
PEERS = (BEST_PEER, "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#999999", "#F0E442", "#000000")
MARKERS = {"forward": "o", "backward": "s"}
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
SHAPES_PER_PANEL = 4
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "legend.frameon": False, "savefig.dpi": 150,
}  # fmt: skip

ByShape = dict[tuple[str, str], list[Row]]


def draw(origin: Origin, rows: Sequence[Row], out: Path) -> list[str]:
    """Write all plots of one origin; returns their file names."""
    import matplotlib

    names = []
    with matplotlib.rc_context(STYLE):
        by_case = cases(rows)
        for op, keys in itertools.groupby(by_case, key=lambda key: key[0]):
            names.append(f"{origin.slug}-{op}.png")
            bars(origin, op, {mode: by_case[op, mode] for _, mode in keys}, out / names[-1])
        known = [row for row in rows if row["op"] in VECTORS and row["shape"] in SHAPES and row["dtype"] in BYTES]
        points = [row for row in known if is_ours(row["provider"]) or is_peer(row["provider"])]
        if points:
            names.append(f"{origin.slug}-roofline.png")
            roofline(origin, points, out / names[-1])
    return names


def bars(origin: Origin, op: str, modes: dict[str, ByShape], path: Path) -> None:
    """A group of bars per shape, four shapes to a panel; rates where all rows have them, else milliseconds."""
    from matplotlib.figure import Figure

    names = {row["provider"] for by_shape in modes.values() for found in by_shape.values() for row in found}
    order = sorted(names, key=lambda name: (not is_ours(name), not is_peer(name), name))
    peers = zip((name for name in order if not is_ours(name)), itertools.cycle(PEERS), strict=False)
    colour = dict.fromkeys(filter(is_ours, order), OURS) | dict(peers)
    panels = [
        (mode, dict(chunk)) for mode, by_shape in modes.items() for chunk in _chunks(list(by_shape.items()), SHAPES_PER_PANEL)
    ]
    most = max(len(by_shape) for _, by_shape in panels)
    width = max(6.5, 1.2 + most * (0.5 + 0.33 * len(order)))
    figure = Figure(figsize=(width, 1.3 + 2.3 * len(panels)), layout="constrained")
    columns = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (mode, by_shape) in zip(columns, panels, strict=True):
        _bar_panel(axes, mode, by_shape, order, colour)
    handles = {label: handle for axes in columns for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=max(2, int(width / 1.7)))
    figure.suptitle(f"{op}, {origin.title}\n{origin.versions}", fontsize=9)
    figure.savefig(path)


def _chunks(items: list[tuple[tuple[str, str], list[Row]]], size: int) -> list[list[tuple[tuple[str, str], list[Row]]]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _bar_panel(axes: Axes, mode: str, by_shape: ByShape, order: list[str], colour: dict[str, str]) -> None:
    unit, ceiling, scale = _unit([row for rows in by_shape.values() for row in rows])
    for group, rows in enumerate(by_shape.values()):
        found = {row["provider"]: row for row in rows}
        present = [name for name in order if name in found]
        step = 0.86 / len(present)
        for i, name in enumerate(present):
            low, middle, high = sorted(scale(found[name], found[name][key]) for key in ("ms_p20", "ms_p50", "ms_p80"))
            x, ours = group + (i - (len(present) - 1) / 2) * step, is_ours(name)
            axes.bar(
                x, middle, 0.9 * step, yerr=[[middle - low], [high - middle]], color=colour[name], label=name,
                edgecolor="black" if ours else "white", hatch=None if ours or is_peer(name) else "///",
                linewidth=1.2 if ours else 0.5, error_kw={"linewidth": 0.8, "ecolor": "#333333"},
            )  # fmt: skip
            text = f"{middle:.3g}" if middle < 1000 else f"{middle:,.0f}"
            weight = "bold" if ours else "normal"
            axes.annotate(
                text, (x, high), (0, 2), textcoords="offset points", ha="center", fontsize=7, weight=weight,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            )  # fmt: skip
        if limits := [ceiling(row) for row in rows if ceiling(row)]:
            level, label = statistics.median(limits), "measured ceiling" if group == 0 else None
            axes.hlines(level, group - 0.46, group + 0.46, "black", (0, (4, 2)), linewidth=1, label=label)
    dtypes = {dtype for _, dtype in by_shape}
    names = [shape if len(dtypes) == 1 else f"{shape}\n{dtype}" for shape, dtype in by_shape]
    axes.set_xticks(range(len(names)), names)
    better = "lower is better" if unit == "ms" else "higher is better"
    kind = f", {dtypes.pop()}" if len(dtypes) == 1 else ""
    axes.set(ylabel=f"{unit}\n({better})", title=f"{mode}{kind}".lstrip(", "), xlim=(-0.55, len(names) - 0.45))
    axes.set_ylim(0, axes.get_ylim()[1] * 1.08)
    axes.grid(axis="x", visible=False)


def _unit(rows: Sequence[Row]) -> tuple[str, Callable[[Row], float], Callable[[Row, float], float]]:
    """(unit, a row's ceiling, a row's value at one of its times)."""
    key = next((key for key in ("gb_per_s", "tflop_per_s") if all(row.get(key) for row in rows)), None)
    if key is None:
        return "ms", lambda row: 0.0, lambda row, ms: ms
    unit, factor = ("GB/s", 1.0) if key == "gb_per_s" else ("TFLOP/s", 1.0)
    if key == "tflop_per_s" and max(row[key] for row in rows) < 1:
        unit, factor = "GFLOP/s", 1e3

    def ceiling(row: Row) -> float:
        return factor * (row.get(f"ceiling_{key}") or 0.0)

    def value(row: Row, ms: float) -> float:
        # a rate scales inversely with the time
        return factor * row[key] * row["ms_p50"] / ms

    return unit, ceiling, value


def roofline(origin: Origin, rows: Sequence[Row], path: Path) -> None:
    """FLOP per byte that an op needs at least, against the FLOP/s reached, under the measured ceilings."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    best = [best_peer(found) for by_shape in cases(rows).values() for found in by_shape.values()]
    figure = Figure(figsize=(8.5, 5.2), layout="constrained")
    axes = figure.subplots()
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        moved, flops = least_work(row["op"], row["mode"], SHAPES[row["shape"]], BYTES[row["dtype"]])
        point = flops / moved, flops / row["ms_p50"] * 1e-9
        points.setdefault(row["op"], []).append(point)
        ours, chosen = is_ours(row["provider"]), any(row is peer for peer in best)
        axes.plot(
            *point, MARKERS.get(row["mode"], "D"), color=OURS if ours else BEST_PEER if chosen else OTHER,
            markersize=8 if ours else 6, markeredgecolor="black" if ours else "white", markeredgewidth=1.0 if ours else 0.5,
            zorder=4 if ours else 3 if chosen else 2,
        )  # fmt: skip
    _roofs(axes, rows, [point for found in points.values() for point in found])
    for op, found in points.items():
        x, y = statistics.geometric_mean([x for x, _ in found]), min(y for _, y in found)
        axes.annotate(op, (x, y), (0, -16), textcoords="offset points", ha="center", fontsize=8)
    mine = sorted({row["provider"] for row in rows if is_ours(row["provider"])})
    for name, colour in [*((name, OURS) for name in mine), ("best peer of a shape", BEST_PEER), ("other peers", OTHER)]:
        axes.plot([], [], "o", color=colour, markeredgecolor="black" if colour == OURS else "white", markersize=7, label=name)
    for mode, marker in MARKERS.items():
        axes.plot([], [], marker, color="none", markeredgecolor="black", label=mode)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte (least work of the op)", ylabel="TFLOP/s reached")
    axes.set_title(f"Roofline, {origin.title}\n{origin.versions}")
    axes.set_ylim(bottom=min(y for found in points.values() for _, y in found) / 2.5)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="lower right")
    figure.savefig(path)


def _roofs(axes: Axes, rows: Sequence[Row], points: Sequence[tuple[float, float]]) -> None:
    """The measured ceilings: a slope, and a level per dtype."""
    levels = {name: statistics.median(values) for name, values in ceilings(rows).items()}
    slope = levels.pop("GB/s", 0.0) * 1e-3
    left, right = min(x for x, _ in points) / 3, max(x for x, _ in points) * 3
    if slope:
        end = max(levels.values()) / slope if levels else right
        right = max(right, 2 * end)
        axes.plot([left, end], [left * slope, end * slope], color="black", linewidth=1.2)
        middle = (left * end) ** 0.5
        offset = {"xytext": (-8, 2), "textcoords": "offset points", "ha": "right", "fontsize": 8}
        axes.annotate(f"copy, {slope * 1e3:,.0f} GB/s", (middle, middle * slope), **offset)
    for name, level in levels.items():
        axes.plot([level / slope if slope else left, right], [level, level], color="black", linewidth=1.2)
        offset = {"xytext": (0, 4), "textcoords": "offset points", "ha": "right", "fontsize": 8}
        axes.annotate(f"matrix product, {level:,.3g} {name}", (right, level), **offset)
