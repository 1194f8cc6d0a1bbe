"""The held-out table and the demo, on a tiny base that stands for nano."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from realgeneral import RealGeneralPipeline
from realgeneral.commands.demo import demo
from realgeneral.errors import UsageError
from realgeneral.evaluation.evaluate import evaluate
from realgeneral.evaluation.nano_table import generate_all, interval, markdown, nano_pairs, scores
from realgeneral.model.adapter import save_adapter
from realgeneral.model.adapter_info import adapter_info
from realgeneral.nano import assets as nano_assets
from realgeneral.settings.evaluate import EvaluateConfig
from realgeneral.settings.sampling import DemoConfig
from realgeneral.tasks import get_task
from tests.realgeneral.helpers.checkpoints import save_checkpoint, tiny_transformer
from tests.realgeneral.helpers.models import trained_model

SPECS = ("canny", "colouring")
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like nano's: a 64 px base and an adapter."""
    folder = tmp_path_factory.mktemp("assets")
    save_checkpoint(folder / "base", "5b")
    tiny_transformer("5b", sample_width=8).save_pretrained(folder / "base" / "transformer")
    model = trained_model(folder / "base", "cached").float()
    model.register_to_config(tasks=tuple(get_task(spec).name for spec in SPECS))
    save_adapter(model, folder / "adapter", adapter_info(model, SPECS, "tiny"))
    return folder


@pytest.fixture
def _captions_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emoji names are longer than the tiny text window."""
    monkeypatch.setattr("realgeneral.data.sources.packaged.caption", lambda concept, style, colours=(): "a red pot")
    monkeypatch.setattr(RealGeneralPipeline, "_subject_embeds", lambda *_: None)
    monkeypatch.setattr("realgeneral.data.samples.subject_span_mask", lambda *_: None)
    monkeypatch.setattr("realgeneral.training.objective.subject_span_mask", lambda *args: torch.zeros(len(args[1]), args[3]))


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


@pytest.mark.usefixtures("_captions_fit")
@pytest.mark.parametrize("train_steps", [0, 2])
def test_demo(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_steps: int) -> None:
    """The demo leaves its pictures, a metrics.json with the losses of a real training, and says where they are."""
    monkeypatch.setattr(nano_assets, "ASSETS", assets)
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "mine.txt").write_text("a user's own")
    config = DemoConfig(output=str(tmp_path), concepts=2, steps=1, train_steps=train_steps, train_task="colouring")
    demo(config)
    made = {p.name for p in tmp_path.iterdir() if p.is_file()}
    wanted = {"grid.png", "metrics.json"} | ({"loss.png", "before_after.png"} if train_steps else set())
    assert made == wanted
    # the user's folder is as it was, and the demo's own training is gone
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["training"]
    assert (tmp_path / "training" / "mine.txt").read_text() == "a user's own"
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics["generation"]) == set(SPECS)
    assert ("training" in metrics) == bool(train_steps)
    if train_steps:
        assert len(metrics["training"]["losses"]) == train_steps
        demo(config)  # a second run starts afresh
