"""The held-out table: nano's own, and that of a tiny base that stands for it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from realgeneral import RealGeneralPipeline
from realgeneral.data.sources.packaged import NANO_TASKS
from realgeneral.errors import UsageError
from realgeneral.evaluation.evaluate import evaluate
from realgeneral.evaluation.metrics import psnr
from realgeneral.evaluation.nano_table import (
    FACE_CHANGE,
    STYLE_CHANGE,
    avatar_pairs,
    generate_all,
    interval,
    markdown,
    measures,
    nano_pairs,
    scores,
    table_pairs,
)
from realgeneral.model.adapter import read_adapter_info
from realgeneral.nano.assets import ASSETS
from realgeneral.settings.evaluate import EvaluateConfig
from realgeneral.tasks import get_task
from tests.realgeneral.helpers.nano_like import SPECS

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_interval() -> None:
    """Mean and 1.96 standard errors; of a single value the width is unknown, without a warning."""
    mean, half = interval(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert (mean, half) == (2.5, pytest.approx(1.96 * 1.2909944 / 2))
    assert math.isnan(interval(torch.tensor([1.0]))[1])


@pytest.mark.usefixtures("_captions_fit")
def test_noise_belongs_to_the_sample(assets: Path, open_pipeline: Callable[..., RealGeneralPipeline]) -> None:
    """The table does not depend on the batch size."""
    pipe = open_pipeline(assets / "base", adapter=assets / "adapter")
    pairs = nano_pairs("colouring", 3, (64, 64), 0)
    results = [generate_all(pipe, pairs, EvaluateConfig(batch_size=size, steps=2)) for size in (1, 2)]
    assert results[0].shape == pairs.truth.shape == (3, 3, 64, 64)
    assert (results[0] - results[1]).abs().max() < 1e-3


def test_differences_are_paired_by_concept() -> None:
    """A constant lead is certain however much concepts differ, and is marked; one that has no sign is not."""
    spread = torch.tensor([0.0, 10.0, 20.0])
    values = {
        "adapter": {"SSIM": spread + 1},
        "copy condition": {"SSIM": spread},
        "base": {"SSIM": spread + torch.tensor([0.0, 1.0, 2.0])},
    }
    result = scores(values)
    assert result["scores"]["adapter"]["SSIM"][1] > 10
    assert result["differences"] == {
        "copy condition": {"SSIM": (1.0, 0.0)},
        "base": {"SSIM": (0.0, pytest.approx(1.13161, abs=1e-4))},
    }
    assert result["values"]["base"]["SSIM"] == [0.0, 11.0, 22.0]
    row = markdown({"canny": {"count": 3, **result}}).splitlines()[2]
    assert row.endswith("| **+1.000 ± 0.000** | +0.000 ± 1.132 |")


def test_splits_share_no_concept() -> None:
    """Settings can be chosen on concepts that the table does not hold."""
    train, held_out = (nano_pairs("colouring", 400, (64, 64), 0, split) for split in ("train", "held_out"))
    names = [set(pairs.names) for pairs in (train, held_out)]
    assert len(names[0]) == 400
    assert 0 < len(names[1]) < 400  # all there are
    assert not names[0] & names[1]


@pytest.mark.usefixtures("_captions_fit")
def test_evaluate_writes_the_table(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One row per task and metric for adapter, copy and base; files and print agree."""
    config = EvaluateConfig(
        adapter=str(assets / "adapter"), base=str(assets / "base"), output=str(tmp_path), concepts=3, steps=1, batch_size=2
    )
    results = evaluate(config)
    assert set(results) == set(SPECS)
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert table.count("\n| c") == 3 + 2  # canny: SSIM, PSNR, edge F1; colouring: SSIM, PSNR
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["results"]["canny"]["count"] == 3
    assert record["adapter"]["preset"] == "cached"
    copied = record["results"]["colouring"]["scores"]["copy condition"]["SSIM"][0]
    assert 0.5 < copied < 1
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["canny.png", "colouring.png"]
    evaluate(replace(config, split="train", tasks=["colouring"]))
    assert (tmp_path / "table.md").read_text().startswith("Concepts of the training split: to choose settings by")
    with pytest.raises(UsageError, match="task must be one that the adapter was trained for"):
        evaluate(EvaluateConfig(adapter=config.adapter, base=config.base, output=config.output, tasks=["cany"]))


def test_evaluate_needs_a_64_px_base(bases: dict[str, Path], assets: Path, tmp_path: Path) -> None:
    """A larger base is a usage error."""
    with pytest.raises(UsageError, match="base must be a 64 px model such as nano"):
        evaluate(EvaluateConfig(adapter=str(assets / "adapter"), base=str(bases["1.5"]), output=str(tmp_path)))


def test_adapter_beats_copying_and_the_base(nano: RealGeneralPipeline) -> None:
    """On held-out concepts, deblurring comes closer to the truth than its condition and than the stock base; colouring too.

    In dB of PSNR. The 150 concepts of docs/results.md give more room in colouring than these 8.
    """
    assert set(read_adapter_info(ASSETS / "adapter").task_names) == {get_task(spec).name for spec in NANO_TASKS}
    settings = EvaluateConfig(steps=8, batch_size=8, concepts=8)
    base = RealGeneralPipeline.from_pretrained("nano")
    base.set_progress_bar_config(disable=True)
    base.transformer.configure_condition(["colouring", "deblurring"], "open")
    for spec, above_copy, above_base in (("deblurring:radius=16.0", 1, 1), ("colouring", 0, 0)):
        pairs = nano_pairs(spec, settings.concepts, (64, 64), 0)
        made = interval(psnr(generate_all(nano, pairs, settings), pairs.truth))[0]
        unadapted = interval(psnr(generate_all(base, pairs, replace(settings, image_guidance_scale=1.0)), pairs.truth))[0]
        copied = interval(psnr(pairs.conditions, pairs.truth))[0]
        assert made > copied + above_copy
        assert made > unadapted + above_base


def test_customization_gives_the_subject_the_state_that_is_asked_for(nano: RealGeneralPipeline) -> None:
    """Held-out avatars: on the asked background, and with the asked face more often than the one in six of chance."""
    settings = EvaluateConfig(steps=8, batch_size=12, concepts=12)
    pairs = avatar_pairs(settings.concepts, (64, 64), 0)
    made = generate_all(nano, pairs, settings)
    scores = measures("customization", pairs)
    assert scores["concept in asked state R@1"](made).mean() > 1 / 3
    assert scores["PSNR dB"](made).mean() > scores["PSNR dB"](pairs.conditions).mean() + 8


def test_customization_is_measured_on_concept_and_style() -> None:
    """The truth is found in the style that was asked for; the condition, another style's picture, never."""
    pairs = nano_pairs("customization", 8, (64, 64), 0)
    scores = measures("customization", pairs)
    asked = scores["concept in asked state R@1"]
    assert asked(pairs.truth).min() == 1.0
    assert asked(pairs.conditions).max() == 0.0
    assert scores["same concept R@1"](pairs.conditions).mean() > 0


def test_evaluate_writes_table_json_and_grids(tmp_path: Path) -> None:
    """`realgeneral evaluate` end to end at a tiny size."""
    results = evaluate(
        EvaluateConfig(output=str(tmp_path), tasks=["canny", "customization"], concepts=3, steps=1, batch_size=2)
    )
    assert list(results) == ["canny", "customization", "customization of face", "customization of style"]
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table == markdown(results)
    assert "edge F1" in table and "same concept R@1" in table
    for name in ("results.json", "canny.png", "customization.png", "customization-of-style.png"):
        assert (tmp_path / name).stat().st_size > 0


def test_customization_is_measured_on_subject_and_state() -> None:
    """The truth is found in the state that was asked for; the condition, other faces and other avatars are not."""
    pairs = avatar_pairs(12, (64, 64), 0)
    scores = measures("customization", pairs)
    asked, same = scores["concept in asked state R@1"], scores["same concept R@1"]
    assert asked(pairs.truth).min() == same(pairs.truth).min() == 1.0
    assert asked(pairs.conditions).max() == 0.0
    assert same(pairs.truth.roll(1, 0)).max() == 0.0
    other = torch.stack([torch.from_numpy(np.array(s[i - 1])) for s, i in zip(pairs.states, pairs.asked, strict=True)])
    other = other.permute(0, 3, 1, 2) / 255
    assert asked(other).max() == 0.0
    assert same(other).mean() > 0.8


def test_the_table_has_three_kinds_of_customization() -> None:
    """Avatars under the task's name, avatars on one background and emoji in another style beside them; other tasks on emoji."""
    parts = dict(table_pairs(["customization", "colouring"], 2, (64, 64), 0))
    assert list(parts) == ["customization", FACE_CHANGE, STYLE_CHANGE, "colouring"]
    for name in ("customization", FACE_CHANGE):
        assert {s.subject for s in parts[name].samples} <= {"monster", "face"}
    assert torch.equal(parts[FACE_CHANGE].truth, parts["customization"].truth)
    corners = [pairs[..., 0, 0] for pairs in (parts[FACE_CHANGE].truth, parts[FACE_CHANGE].conditions)]
    assert torch.equal(*corners)
    assert parts[STYLE_CHANGE].names == parts["colouring"].names
    assert {s.task for s in parts[STYLE_CHANGE].samples} == {"customization"}
