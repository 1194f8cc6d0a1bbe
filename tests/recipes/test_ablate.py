"""Ablations: what a variant leaves out stays out, variants are matched, and differences are read rightly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from realgeneral import RealGeneralPipeline
from realgeneral.errors import UsageError
from realgeneral.evaluation.metrics import Score
from realgeneral.model.adapter import CONDITION_FILE, LORA_FILE
from realgeneral.settings.train import TrainConfig
from realgeneral.training.train import train
from recipes import ablate
from recipes.ablate import Difference, Values, difference, main, markdown
from tests.realgeneral.helpers.pictures import make_photo

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.mark.parametrize("ablation", ["none", "shared-adaln", "no-embedding"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_what_is_left_out_is_not_trained(base: Path, tmp_path: Path, ablation: str, precision: str) -> None:
    """Shared AdaLN keeps the base's video rows, no embedding keeps zeros, bit for bit; everything else is trained."""
    for i in range(2):
        make_photo(96, 64, i).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a red pot")
    config = TrainConfig(
        base=str(base), data=str(tmp_path), tasks=["canny"], output=str(tmp_path / "run"), steps=2, batch_size=2,
        warmup_steps=0, learning_rate=1e-2, sample_count=0, ablation=ablation, mixed_precision=precision, ema_decay=0.5,
    )  # type: ignore[arg-type]  # fmt: skip
    train(config)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    fresh = RealGeneralPipeline.from_pretrained(base, dtype=dtype).transformer
    fresh.configure_condition(["canny"], "cached")
    start = {name: parameter.detach().float() for name, parameter in fresh.condition_parameters().items()}
    branch = load_file(tmp_path / "run" / "adapter" / CONDITION_FILE)
    kept = {"none": "-", "shared-adaln": "condition_adaln.", "no-embedding": "condition_embedding."}[ablation]
    for name, tensor in branch.items():
        # no row names a subject, so that its projection gets no gradient
        same = name.startswith(kept) or name == "condition_embedding.subject.weight"
        assert torch.equal(tensor, start[name]) == same, name
    lora = load_file(tmp_path / "run" / "adapter" / LORA_FILE)
    assert all(tensor.any() for name, tensor in lora.items() if ".lora_B." in name)


def test_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest run on nano: matched variants, a table, a continuation that trains nothing again."""
    arguments = ["--output", str(tmp_path), "--steps", "1", "--batch-size", "2", "--concepts", "2", "--sample-steps", "1"]
    arguments += ["--tasks", "colouring", "--variants", "cached", "shared-adaln", "--rank", "4"]
    main([*arguments, "--seeds", "0"])
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| colouring | v-loss ↓ |" in table
    assert "shared-adaln - cached" in table
    record = json.loads((tmp_path / "results.json").read_text())
    assert set(record["differences"]) == {"shared-adaln"}
    assert len(record["values"]["cached"]["0"]["colouring"]["v-loss"]) == 2
    losses = [
        json.loads((tmp_path / "runs" / f"{n}-0" / "scores.json").read_text())["loss"] for n in ("cached", "shared-adaln")
    ]
    assert losses[0] == losses[1]  # the same first batch, noise and weights: nothing has been trained yet
    capsys.readouterr()

    def trained(config: TrainConfig) -> dict[str, object]:
        raise AssertionError("trained again")

    monkeypatch.setattr(ablate, "train", trained)
    main([*arguments, "--seeds", "0"])
    assert table in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"steps must be 1 as in the runs in .*, got 2"):
        main([*arguments, "--seeds", "0", "--steps", "2"])
    with pytest.raises(AssertionError, match="trained again"):
        main([*arguments, "--seeds", "0", "1"])


def values(*numbers: float) -> Values:
    return {"colouring": {metric: [float(x) for x in numbers] for metric in ("v-loss", "PSNR dB")}}


def test_differences_are_paired() -> None:
    """A shift by the same amount is certain, however much concepts and seeds differ; only common seeds count."""
    found = {
        "cached": {0: values(1, 5, 9), 1: values(2, 7, 30)},
        "shared-adaln": {0: values(1.5, 5.5, 9.5), 1: values(2.5, 7.5, 30.5), 2: values(0, 0, 0)},
    }
    got = difference(found, "shared-adaln", "colouring", "v-loss")
    assert got is not None
    assert got.score == pytest.approx((0.5, 0.5, 0.5))
    assert got.by_seed == pytest.approx((0.5, 0.5))
    assert got.holds
    assert difference(found, "cached", "colouring", "v-loss") is None
    assert difference({"no-mask": found["cached"]}, "no-mask", "colouring", "v-loss") is None
    table = markdown(found, "setting")
    assert "**+0.5000** [+0.5000, +0.5000]; +0.5000 / +0.5000" in table
    assert "paper" not in table.partition("| task")[2]


@pytest.mark.parametrize(
    ("score", "by_seed", "holds"),
    [
        (Score(1, 0.5, 1.5), (1.0, 1.0), True),
        (Score(-1, -1.5, -0.5), (-1.0, -1.0), True),
        (Score(1, -0.5, 2.5), (1.0, 1.0), False),
        (Score(1, 0.5, 1.5), (2.5, -0.5), False),
        (Score(1), (1.0,), False),
    ],
)
def test_what_holds(score: Score, by_seed: tuple[float, ...], holds: bool) -> None:
    """The interval excludes 0 and all seeds agree; without an interval nothing holds."""
    assert Difference(score, by_seed).holds is holds
