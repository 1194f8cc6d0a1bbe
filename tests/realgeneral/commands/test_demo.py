"""`realgeneral demo`: its pictures and its table, on nano and on a tiny base that stands for it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from realgeneral.commands.demo import demo
from realgeneral.nano import assets as nano_assets
from realgeneral.settings.sampling import DemoConfig
from tests.realgeneral.helpers.nano_like import SPECS

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_demo_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`realgeneral demo` end to end at a tiny size: pictures, metrics, and a table on the screen."""
    metrics = demo(DemoConfig(output=str(tmp_path), concepts=1, steps=1, train_steps=2))
    for name in ("grid.png", "loss.png", "before_after.png"):
        Image.open(io.BytesIO((tmp_path / name).read_bytes())).verify()
    assert len(metrics["training"]["losses"]) == 2
    printed = capsys.readouterr().out
    assert "colouring" in printed and "grid.png" in printed


@pytest.mark.usefixtures("_captions_fit")
@pytest.mark.parametrize("train_steps", [0, 2])
def test_demo(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_steps: int) -> None:
    """The demo leaves its pictures, a metrics.json with the losses of a real training, and says where they are."""
    monkeypatch.setattr(nano_assets, "ASSETS", assets)
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "mine.txt").write_text("a user's own")
    (tmp_path / "training.partial" / "run").mkdir(parents=True)  # of a demo that was killed
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
