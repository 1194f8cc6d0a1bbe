"""Rows to tables and plots: what is refused, what is kept apart, what is compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from benchmarks import report
from benchmarks.reporting.plots import BEST_PEER, OTHER, OURS
from benchmarks.reporting.rows import best_peer, grouped, read_rows
from realgeneral.errors import Failure

ROW: dict[str, Any] = {
    "op": "segment_attention", "mode": "forward", "provider": "triton", "shape": "5b-480x720-b1", "dtype": "bfloat16",
    "ms_p20": 0.24, "ms_p50": 0.25, "ms_p80": 0.26, "gb_per_s": None, "tflop_per_s": 392.0, "share_of_ceiling": 0.49,
    "ceiling_gb_per_s": None, "ceiling_tflop_per_s": 800.0, "peak_mib": 18.0, "device_type": "cuda",
    "device": "NVIDIA H100 80GB HBM3", "driver": "570.1", "cuda": "13.0", "torch": "2.13.0", "triton": "3.7.1",
    "commit": "a" * 40, "dirty": False, "date": "2026-11-24T10:00:00+00:00", "command": "pytest benchmarks/",
}  # fmt: skip
CPU = {
    "device_type": "cpu",
    "device": "x86_64",
    "driver": None,
    "cuda": None,
    "peak_mib": None,
    "dtype": "float32",
    "shape": "nano",
}


def write(path: Path, *changes: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(ROW | change) + "\n" for change in changes))
    return path


def with_ms(ms: float, **changes: Any) -> dict[str, Any]:
    return {"ms_p20": 0.99 * ms, "ms_p50": ms, "ms_p80": 1.01 * ms, **changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dirty": True}, "dirty must be false, got True"),
        ({"dirty": None}, "dirty must be false, got None"),
        ({"commit": None}, "commit must be text, got None"),
        ({"ms_p50": None}, "ms_p50 must be a positive number, got None"),
        ({"ms_p50": float("nan")}, "ms_p50 must be a positive number, got nan"),
        ({"ms_p50": 0.0}, "ms_p50 must be a positive number, got 0.0"),
        ({"ms_p50": "0.25"}, "ms_p50 must be a positive number, got '0.25'"),
        ({"peak_mib": -1.0}, "peak_mib must be a number of 0 or more, or null, got -1.0"),
        ({"tflop_per_s": float("inf")}, "tflop_per_s must be"),
        ({"ms_p20": 0.3}, "ms_p20, ms_p50, ms_p80 must ascend"),
        ({"date": "yesterday"}, "date must be ISO 8601, got 'yesterday'"),
        ({"date": "2026-11-24T10:00:00"}, "date must be ISO 8601 with a time zone"),
        ({"device": 3}, "device must be text, got 3"),
        ({"triton": 3}, "triton must be text or null, got 3"),
    ],
)
def test_bad_rows_are_refused_with_file_and_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {}, change)
    with pytest.raises(Failure) as error:
        read_rows([path])
    assert str(error.value).startswith(f"{path}:2: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"op": 1}', "\udcff"])
def test_lines_that_are_no_rows(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(Failure, match=r"rows\.jsonl"):
        read_rows([path])


def test_command_fails_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Missing and empty files, and a dirty row, end with status 1; nothing is written."""
    out = tmp_path / "out"
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "taken").touch()
    assert report.main([str(write(tmp_path / "good.jsonl", {})), "--out", str(tmp_path / "taken")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    for path in (tmp_path / "none.jsonl", tmp_path / "empty.jsonl", write(tmp_path / "dirty.jsonl", {"dirty": True})):
        assert report.main([str(path), "--out", str(out)]) == 1
        message = capsys.readouterr().err
        assert path.name in message
        assert message.count("\n") == 1
    assert not out.exists()


def test_origins_never_share_a_table(tmp_path: Path) -> None:
    """Another device, version or commit is another section; CPU sections say so and come last."""
    path = write(
        tmp_path / "rows.jsonl",
        CPU | {"provider": "eager"},
        {},
        {"device": "NVIDIA H200"},
        {"torch": "2.14.1"},
        {"commit": "b" * 40},
        {"driver": "580.2"},
    )
    groups = grouped(read_rows([path]))
    assert [len(rows) for rows in groups.values()] == [1] * 6
    assert [origin.device_type for origin in groups] == ["cuda"] * 5 + ["cpu"]
    assert len({origin.slug for origin in groups}) == 6
    text = report.write_report(read_rows([path]), tmp_path / "out").read_text()
    assert text.count("## ") - text.count("### ") == 6
    assert "## CPU (x86_64)" in text
    assert text.count("These are CPU times") == 1


def test_newest_row_counts(tmp_path: Path) -> None:
    """A repeated measurement replaces the older one, whatever their order in the file and their time zones."""
    newer = with_ms(0.2, date="2026-11-24T11:30:00+02:00")
    newest = with_ms(0.3, date="2026-11-24T10:30:00+00:00")
    (rows,) = grouped(read_rows([write(tmp_path / "rows.jsonl", newest, newer)])).values()
    assert [row["ms_p50"] for row in rows] == [0.3]


def test_speed_up_is_over_the_best_peer(tmp_path: Path) -> None:
    """Upper lines that do another job are no peers, and a difference within the spread is called that."""
    rows = read_rows(
        [
            write(
                tmp_path / "rows.jsonl",
                with_ms(0.25),
                with_ms(0.5, provider="flex"),
                with_ms(0.3, provider="sdpa-split-cudnn"),
                with_ms(0.2, provider="sdpa-cudnn-unmasked"),
                with_ms(0.1, provider="triton-unmasked"),
            )
        ]
    )
    peer = best_peer(rows)
    assert peer is not None and peer["provider"] == "sdpa-split-cudnn"
    assert report.speed_up(rows[0], peer) == "1.20x sdpa-split-cudnn"
    close = rows[2] | with_ms(0.252)
    assert report.speed_up(rows[0], close) == "1.01x sdpa-split-cudnn, within the spread"
    text = report.write_report(rows, tmp_path / "out").read_text()
    assert text.count("1.20x sdpa-split-cudnn") == 1
    assert text.index("| **triton** |") < text.index("| sdpa-split-cudnn |") < text.index("| flex |")


def test_predictions_stand_beside_h100_rows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predicted = {"op": ROW["op"], "mode": "forward", "shape": ROW["shape"], "dtype": "bfloat16", "ms": 0.125}
    for date, ms in (("2026-11-23", 0.5), ("2026-11-24", 0.125)):
        (tmp_path / f"{date}-predicted-h100.json").write_text(json.dumps({"rows": [predicted | {"ms": ms}]}))
    monkeypatch.setattr(report, "PREDICTIONS", tmp_path)
    rows = [{}, {"provider": "flex"}, {"device": "NVIDIA H100 PCIe"}, {"device": "NVIDIA H200"}]
    text = report.write_report(read_rows([write(tmp_path / "rows.jsonl", *rows)]), tmp_path / "out").read_text()
    assert text.count("measured / predicted") == 1
    assert text.count("| 0.1250 | 2.00 |") == 1
    assert "Predictions: 2026-11-24-predicted-h100.json." in text


def test_plots_are_written_for_every_op(tmp_path: Path) -> None:
    """Bars per op and a roofline per origin, with rows of unknown ops, modes without peers, and rows without rates."""
    changes = [
        with_ms(ms, provider=provider, mode=mode, shape=shape)
        for mode in ("forward", "backward")
        for shape in ("5b-480x720-b1", "2b-480x720-b1", "2b-480x720-b4", "5b-1024x1024-b1", "5b-1024x1024-b4")
        for provider, ms in (("triton", 0.2), ("flex", 0.4), ("sdpa-cudnn-unmasked", 0.1))
    ]
    site = {
        "op": "qk_norm_rope",
        "gb_per_s": 2000.0,
        "tflop_per_s": None,
        "ceiling_gb_per_s": 3000.0,
        "ceiling_tflop_per_s": None,
    }
    step = {"op": "training_step", "mode": "", "tflop_per_s": None, "shape": "somewhere", "share_of_ceiling": None}
    path = write(tmp_path / "rows.jsonl", *changes, site, site | {"dtype": "float32"}, step, CPU | {"tflop_per_s": 0.07})
    out = tmp_path / "out"
    text = report.write_report(read_rows([path]), out).read_text()
    names = sorted(image.name for image in out.glob("*.png"))
    assert [name.rsplit("-", 1)[1] for name in names if name.startswith("cpu-x86-64-aaaaaaa-")] == [
        "roofline.png",
        "segment_attention.png",
    ]
    assert [name.rsplit("-", 1)[1] for name in names if name.startswith("nvidia-h100-80gb-hbm3-aaaaaaa-")] == [
        "qk_norm_rope.png",
        "roofline.png",
        "segment_attention.png",
        "training_step.png",
    ]
    assert len(names) == 6
    assert all(f"]({name})" in text for name in names)
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in names)


def drawn(changes: list[dict[str, Any]], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures of a report by the last word of their files' names."""
    figures: dict[str, Figure] = {}
    save = Figure.savefig

    def keep(figure: Figure, path: Path) -> None:
        figures[path.stem.rsplit("-", 1)[1]] = figure
        save(figure, path)

    monkeypatch.setattr(Figure, "savefig", keep)
    report.write_report(read_rows([write(folder / "rows.jsonl", *changes)]), folder / "out")
    return figures


def lines(axes: Axes, length: int) -> list[tuple[Any, Any]]:
    """x and y of what is drawn with so many points: 1 are markers, 2 are roofs."""
    return [(line.get_xdata(), line.get_ydata()) for line in axes.lines if len(line.get_xdata()) == length]


def test_no_point_lies_above_its_roof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An op that passes the copy or the matrix product is the roof itself, and the plot says so."""
    site = {"op": "qk_norm_rope", "gb_per_s": 2000.0, "ceiling_gb_per_s": 3000.0}
    site |= {"tflop_per_s": None, "ceiling_tflop_per_s": None}
    rows = [with_ms(0.05), with_ms(0.5, provider="flex"), with_ms(0.001, **site), with_ms(0.5, provider="eager", **site)]
    (axes,) = drawn(rows, tmp_path, monkeypatch)["roofline"].axes
    (slope_x, slope_y), (_, (top, _)) = lines(axes, 2)
    markers = [(x[0], y[0]) for x, y in lines(axes, 1)]
    assert len(markers) == 4
    assert all(y <= min(slope_y[0] / slope_x[0] * x, top) * (1 + 1e-9) for x, y in markers)
    words = " ".join(text.get_text().replace("\n", " ") for text in axes.texts)
    assert "reached by qk_norm_rope (copy: 3,000)" in words
    assert "reached by segment_attention (matrix product: 800)" in words


def test_no_marker_is_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, the best peer and another peer show where all of them took the same time."""
    rows = [
        with_ms(0.25),
        with_ms(0.25, provider="flex"),
        with_ms(0.25, provider="sdpa-mask"),
        with_ms(0.5, provider="xformers"),
    ]
    figure = drawn(rows, tmp_path, monkeypatch)["roofline"]
    (axes,) = figure.axes
    (path,) = (tmp_path / "out").glob("*-roofline.png")
    image = matplotlib.image.imread(path)[::-1, :, :3]
    x, y = lines(axes, 1)[0]
    column, row = (axes.transData.transform((x[0], y[0])) * image.shape[0] / figure.bbox.height).astype(int)
    around = image[row - 20 : row + 20, column - 20 : column + 20]
    for colour in (OURS, BEST_PEER, OTHER):
        assert (np.abs(around - to_rgb(colour)).max(axis=-1) < 0.02).sum() > 20, colour


def test_cached_generation_is_shown_in_milliseconds_on_one_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What skips work takes less time at a lower rate: its bar is the shorter one, beside that of the whole work."""
    generation = CPU | {"op": "generation", "provider": "split-sdpa"}
    rows = [
        generation | with_ms(1000.0, mode="cached", tflop_per_s=0.070),
        generation | with_ms(1600.0, mode="uncached", tflop_per_s=0.074),
    ]
    cached, uncached = drawn(rows, tmp_path, monkeypatch)["generation"].axes
    assert cached.get_ylabel().startswith("ms") and uncached.get_ylabel().startswith("ms")
    assert cached.get_ylim() == uncached.get_ylim()
    assert (cached.patches[0].get_height(), uncached.patches[0].get_height()) == (1000, 1600)
