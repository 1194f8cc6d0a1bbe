"""Plots of benchmark rows: bars per op against peers, and a roofline whose roofs are the highest rates measured.

Colours are those of Okabe and Ito, which colour-blind people can tell apart; our kernels alone are vermilion. Bars carry their
values, modes have their own markers, and ours, the best peer and other peers their own sizes, so that nothing rests on colour.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.harness.least_work import VECTORS, least_work
from benchmarks.harness.shapes import SHAPES
from benchmarks.reporting.rows import Origin, Row, best_peer, cases, ceilings, is_ours, is_peer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, BEST_PEER, OTHER = "#D55E00", "#0072B2", "#888888"
PEERS = (BEST_PEER, "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#999999", "#F0E442", "#000000")
MARKERS = {"forward": "o", "backward": "s"}
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
SHAPES_PER_PANEL = 4
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "legend.frameon": False, "savefig.dpi": 150,
}  # fmt: skip

ByShape = dict[tuple[str, str], list[Row]]


def _ring(colour: str, size: float, width: float, zorder: int) -> dict[str, Any]:
    return {
        "color": "none", "markerfacecolor": "none", "markeredgecolor": colour,
        "markersize": size, "markeredgewidth": width, "zorder": zorder,
    }  # fmt: skip


# of three sizes: one shows through another, wherever both stand
RINGS = {"ours": _ring(OURS, 10, 1.8, 4), "best": _ring(BEST_PEER, 6.5, 1.5, 5), "other": _ring(OTHER, 3.5, 1.2, 6)}


class Scale(NamedTuple):
    """The vertical axis of bars.

    Args:
        unit: On the axis.
        value: Of a row at one of its times.
        limit: What a row is compared with besides peers, 0 = nothing.
        limit_name: In the legend.
    """

    unit: str
    value: Callable[[Row, float], float]
    limit: Callable[[Row], float]
    limit_name: str


class Point(NamedTuple):
    """A row on a roofline: FLOP per byte, and TFLOP/s."""

    op: str
    dtype: str
    x: float
    y: float


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
    """A group of bars per shape, four shapes to a panel, all panels on one scale; see `_scale` for its unit."""
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
    columns = figure.subplots(len(panels), 1, squeeze=False, sharey=True)[:, 0]
    scale = _scale([row for _, by_shape in panels for found in by_shape.values() for row in found])
    for axes, (mode, by_shape) in zip(columns, panels, strict=True):
        _bar_panel(axes, mode, by_shape, order, colour, scale)
    columns[0].set_ylim(0, columns[0].get_ylim()[1] * 1.08)
    handles = {label: handle for axes in columns for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=max(2, int(width / 1.7)))
    figure.suptitle(f"{op}, {origin.title}\n{origin.versions}", fontsize=9)
    figure.savefig(path)


def _chunks(items: list[tuple[tuple[str, str], list[Row]]], size: int) -> list[list[tuple[tuple[str, str], list[Row]]]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _bar_panel(axes: Axes, mode: str, by_shape: ByShape, order: list[str], colour: dict[str, str], scale: Scale) -> None:
    for group, rows in enumerate(by_shape.values()):
        found = {row["provider"]: row for row in rows}
        present = [name for name in order if name in found]
        step = 0.86 / len(present)
        for i, name in enumerate(present):
            low, middle, high = sorted(scale.value(found[name], found[name][key]) for key in ("ms_p20", "ms_p50", "ms_p80"))
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
        if limits := [limit for row in rows if (limit := scale.limit(row))]:
            level = statistics.median(limits)
            axes.hlines(level, group - 0.46, group + 0.46, "black", (0, (4, 2)), linewidth=1, label=scale.limit_name)
    dtypes = {dtype for _, dtype in by_shape}
    names = [shape if len(dtypes) == 1 else f"{shape}\n{dtype}" for shape, dtype in by_shape]
    axes.set_xticks(range(len(names)), names)
    better = "lower is better" if scale.unit == "ms" else "higher is better"
    kind = f", {dtypes.pop()}" if len(dtypes) == 1 else ""
    axes.set(ylabel=f"{scale.unit}\n({better})", title=f"{mode}{kind}".lstrip(", "), xlim=(-0.55, len(names) - 0.45))
    axes.grid(axis="x", visible=False)


def _scale(rows: Sequence[Row]) -> Scale:
    """Rates for single ops, which do the same work in every row; milliseconds for models, where saved work is the point."""
    single = all(row["op"] in VECTORS for row in rows)
    key = next((key for key in ("gb_per_s", "tflop_per_s") if single and all(row.get(key) for row in rows)), None)
    if key is None:
        return Scale("ms", lambda row, ms: ms, lambda row: 0.0, "")
    unit, factor = ("GB/s", 1.0) if key == "gb_per_s" else ("TFLOP/s", 1.0)
    if key == "tflop_per_s" and max(row[key] for row in rows) < 1:
        unit, factor = "GFLOP/s", 1e3

    def limit(row: Row) -> float:
        return factor * (row.get(f"ceiling_{key}") or 0.0)

    def value(row: Row, ms: float) -> float:
        # a rate scales inversely with the time
        return factor * row[key] * row["ms_p50"] / ms

    return Scale(unit, value, limit, "large copy, same run" if key == "gb_per_s" else "large matrix product, same run")


def roofline(origin: Origin, rows: Sequence[Row], path: Path) -> None:
    """FLOP per byte that an op needs at least, against the FLOP/s reached, under the highest rates measured."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    best = [best_peer(found) for by_shape in cases(rows).values() for found in by_shape.values()]
    figure = Figure(figsize=(8.5, 5.2), layout="constrained")
    axes = figure.subplots()
    points: list[Point] = []
    for row in rows:
        moved, flops = least_work(row["op"], row["mode"], SHAPES[row["shape"]], BYTES[row["dtype"]])
        points.append(Point(row["op"], row["dtype"], flops / moved, flops / row["ms_p50"] * 1e-9))
        kind = "ours" if is_ours(row["provider"]) else "best" if any(row is peer for peer in best) else "other"
        axes.plot(points[-1].x, points[-1].y, MARKERS.get(row["mode"], "D"), **RINGS[kind])
    _roofs(axes, rows, points)
    for i, op in enumerate(dict.fromkeys(point.op for point in sorted(points, key=lambda point: point.x))):
        x = statistics.geometric_mean([point.x for point in points if point.op == op])
        y = min(point.y for point in points if point.op == op)
        axes.annotate(op, (x, y), (0, -16 - 12 * (i % 2)), textcoords="offset points", ha="center", fontsize=8)
    mine = sorted({row["provider"] for row in rows if is_ours(row["provider"])})
    for name, kind in [*((name, "ours") for name in mine), ("best peer of a shape", "best"), ("other peers", "other")]:
        axes.plot([], [], "o", label=name, **RINGS[kind])
    for mode, marker in MARKERS.items():
        axes.plot([], [], marker, color="none", markeredgecolor="black", label=mode)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte (least work of the op)", ylabel="TFLOP/s reached")
    axes.set_title(f"Roofline, {origin.title}\n{origin.versions}")
    axes.set_ylim(bottom=min(point.y for point in points) / 4)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="lower right")
    figure.savefig(path)


def _roofs(axes: Axes, rows: Sequence[Row], points: Sequence[Point]) -> None:
    """A slope, and a level per dtype: the copy and the matrix product, or an op that was faster."""
    measured = {name: values[-1] for name, values in ceilings(rows).items()}
    copied = measured.pop("GB/s", 0.0)
    widest = max(points, key=lambda point: point.y / point.x)
    slope = max(copied * 1e-3, widest.y / widest.x) if copied else 0.0
    levels = []
    for name, product in measured.items():
        top = max((point for point in points if name.endswith(f" {point.dtype}")), key=lambda point: point.y)
        levels.append((max(product, top.y), _roof("matrix product", product, top.op, top.y, name).replace("\n", " ")))
    left, right = min(point.x for point in points) / 3, max(point.x for point in points) * 3
    if slope:
        end = max(levels)[0] / slope if levels else right
        right = max(right, 2 * end)
        axes.plot([left, end], [left * slope, end * slope], color="black", linewidth=1.2)
        middle = (left * end) ** 0.5
        offset: dict[str, Any] = {"xytext": (-8, 2), "textcoords": "offset points", "ha": "right", "fontsize": 8}
        text = _roof("copy", copied, widest.op, slope * 1e3, "GB/s")
        axes.annotate(text, (middle, middle * slope), **offset)
    for level, text in levels:
        axes.plot([level / slope if slope else left, right], [level, level], color="black", linewidth=1.2)
        offset = {"xytext": (0, 4), "textcoords": "offset points", "ha": "right", "fontsize": 8}
        axes.annotate(text, (right, level), **offset)


def _roof(kind: str, measured: float, op: str, reached: float, unit: str) -> str:
    """What a roof is: the measurement meant as one, unless an op was faster."""
    if reached <= measured:
        return f"{kind}, {_figures(measured)} {unit}"
    return f"{_figures(reached)} {unit}, reached by\n{op}\n({kind}: {_figures(measured)})"


def _figures(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
