"""The recipe of the nano base from pools to an exported folder, on a few concepts."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline

from recipes import train_base
from recipes.latents import EMOJI, load_things, render_row, render_rows, renderers


@pytest.fixture
def few_concepts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_base, "load_things", lambda name, icons: load_things(name, icons)[:2])


def steps(out: Path) -> list[int]:
    with (out / "base_eval.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def test_trains_resumes_and_exports(few_concepts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are logged, a second call goes on where the first ended, and what is exported is a CogVideoX folder."""
    monkeypatch.setattr(train_base, "PROMPTS", ["fox, 3d render"])
    monkeypatch.setattr(train_base, "LOG_EVERY", 2)
    monkeypatch.setattr(train_base, "sample_grid", lambda *args, **kwargs: np.zeros((4, 4, 3), np.uint8))
    arguments = ["--out", str(tmp_path), "--layers", "1", "--batch", "4", "--device", "cpu"]
    train_base.main([*arguments, "--steps", "2"])
    train_base.main([*arguments, "--steps", "4", "--resume"])
    assert steps(tmp_path) == [2, 4]
    with (tmp_path / "base_loss.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [2, 4]
    assert {path.stem for path in tmp_path.glob("*.npy")} == {"train", "train_mirrored", "train_recoloured", "held_out"}
    pipeline = CogVideoXPipeline.from_pretrained(tmp_path / "base")
    assert pipeline.transformer.config.num_layers == 1
    # and another run goes on with it: its first step is a small one
    start = tmp_path / "base" / "transformer"
    train_base.main([*arguments[2:], "--out", str(tmp_path / "on"), "--transformer", str(start), "--steps", "1"])
    after = CogVideoXPipeline.from_pretrained(tmp_path / "on" / "base").transformer.state_dict()
    for name, value in pipeline.transformer.state_dict().items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-3)


def test_rows_do_not_depend_on_workers() -> None:
    """Processes render the same rows in the same order as this one, copies each in their own way."""
    things = load_things("train", None)[:3]
    ours = list(render_rows(things, EMOJI, "recoloured", 0))
    with renderers(2) as processes:
        theirs = list(render_rows(things, EMOJI, "recoloured", 0, processes))
    for one, two in zip(ours, theirs, strict=True):
        assert np.array_equal(one.pictures, two.pictures)
        assert (one.motions, one.colours) == (two.motions, two.colours)
    assert not np.array_equal(ours[0].pictures, render_row((0, things[0]), EMOJI, "mirrored", 0).pictures)
    assert set(ours[0].colours) == set(EMOJI.coloured)
