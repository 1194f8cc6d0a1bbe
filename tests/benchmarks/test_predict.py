"""The analytic model: work counted from launches, limits, tile quantisation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import predict
from benchmarks.harness.least_work import MODES, VECTORS, least_work
from benchmarks.harness.shapes import SHAPES
from benchmarks.predict import Work, busiest, launched_work, times


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", VECTORS)
@pytest.mark.parametrize("name", ["nano", "5b-480x720-b1", "2b-1024x1024-b4", "5b-480x720-3conditions-b1", "2b-video-b1"])
def test_every_op_at_every_kind_of_shape(op: str, mode: str, name: str) -> None:
    """A prediction is never below its floor, and launches never ask for less than the op's own work."""
    row = predict.predict(op, mode, SHAPES[name])
    work = launched_work(op, mode, SHAPES[name])
    moved, flops = least_work(op, mode, SHAPES[name], 2)
    assert row["ms"] > row["floor_ms"] > 0
    assert sum(launch.bytes for launch in work) >= moved
    if op == "segment_attention":
        assert sum(launch.flops for launch in work) >= flops
        # the backward computes scores twice: 7 products for the 5 that count
        assert mode == "forward" or sum(launch.flops for launch in work) >= 1.4 * flops
    assert all(launch.imbalance >= 1 and launch.grid > 0 for launch in work)


def test_what_binds() -> None:
    """Norm sites wait for memory, attention for tensor cores and ex2, the smallest shape for its launches."""
    big, small = SHAPES["5b-1024x1024-b1"], SHAPES["nano"]
    assert predict.predict("segment_gate_residual_adaln", "forward", big)["limit"] == "HBM"
    assert predict.predict("segment_attention", "backward", big)["limit"] == "tensor + MUFU"
    assert predict.predict("qk_norm_rope", "backward", small)["limit"] == "launch"


def test_attention_tiles_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grids and padding follow the launch table: 24 tiles of 128 rows per head at S = 2926, 48 of 64."""
    from rgkernels._triton.launch_data import LAUNCHES
    from rgkernels._triton.launch_table import find

    shape = SHAPES["5b-480x720-b1"]
    (work,) = launched_work("segment_attention", "forward", shape)
    assert work.grid == 24 * 48
    launch = LAUNCHES["attn_fwd"]["sm_90", "half", 64]
    monkeypatch.setitem(LAUNCHES["attn_fwd"], ("sm_90", "half", 64), (64, *launch[1:]))
    find.cache_clear()
    try:
        (narrow,) = launched_work("segment_attention", "forward", shape)
    finally:
        find.cache_clear()
    assert narrow.grid == 48 * 48
    # 3072 rows either way, but smaller pieces spread better
    assert narrow.flops == work.flops
    assert narrow.imbalance < work.imbalance


def test_scores_of_a_small_case_by_hand() -> None:
    """nano, 4 heads: text sees 80 keys, target 144, condition 128; tiles of 128 rows, 64 keys at a time, tails of 32."""
    (work,) = launched_work("segment_attention", "forward", SHAPES["nano"])
    # walked keys: 80 -> 64 + 32, 144 -> 128 + 32, 128
    scores = 4 * 128 * (96 + 160 + 128)
    assert work.flops == 4 * 64 * scores
    assert work.mufu == scores


def test_busiest() -> None:
    """In order, each to the first free server; the ideal is not always reached."""
    assert busiest([1.0] * 132, 132) == 1.0
    assert busiest([1.0] * 133, 132) == 2.0
    assert busiest([3.0, 1.0, 1.0, 1.0], 2) == 3.0
    assert busiest([1.0, 1.0, 1.0, 3.0], 2) == 4.0


def test_limits_by_resource() -> None:
    """A second of each resource takes a second, and expected times only add what they should."""
    found = times(Work("k", 132, round(predict.HBM), predict.TENSOR, predict.MUFU, predict.FP32, 1.0))
    assert [round(ms) for ms in (found.hbm, found.tensor, found.mufu, found.fp32)] == [1000] * 4
    assert found.floor == max(found)
    ms, limit = found.expected("forward")
    assert limit == "tensor + MUFU"
    assert ms == pytest.approx(1000 / predict.TENSOR_SHARE + 1000 + predict.LAUNCH_MS)
    assert times(Work("k", 1, 0, predict.TENSOR, 0, 0, 2.0)).tensor == pytest.approx(2000)


def test_command_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.json"
    assert predict.main(["--shape", "nano", "--op", "qk_norm_rope", "--json", str(path)]) == 0
    assert "Predicted, not measured" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert [(row["op"], row["mode"], row["shape"]) for row in found["rows"]] == [("qk_norm_rope", m, "nano") for m in MODES]
    assert found["assumptions"] == predict.ASSUMPTIONS
    assert found["date"] and "commit" in found
    with pytest.raises(SystemExit) as stop:
        predict.main(["--shape", "none"])
    assert stop.value.code == 2
