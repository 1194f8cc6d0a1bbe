"""The README's way with one's own pictures, command by command on nano."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from realgeneral.commands.cli import main
from tests.realgeneral.helpers.pictures import make_photo

CAPTION = "a photograph of a small red pot with a wooden lid that stands on a kitchen table in the morning sun, number "

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        make_photo(96, 80, i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"{CAPTION}{i}")
    return folder


def test_every_command_on_own_pictures(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ordinary captions do not fit nano, which the report says with the way out; with it each command takes the last one's."""
    data = ["--data", str(pictures), "--tasks", "canny", "colouring"]
    store, run, image, table = (str(tmp_path / name) for name in ("store", "run", "fox.png", "table"))
    assert main(["check-data", *data]) == 1
    captured = capsys.readouterr()
    assert "4 of 4 rows" in captured.err
    assert "must have a prompt of at most 16 tokens, got" in captured.out
    assert captured.out.count("--truncate-prompts cuts it") == 4
    data.append("--truncate-prompts")
    assert main(["check-data", *data]) == 0
    assert "of 16 tokens; 4 are cut" in capsys.readouterr().out
    assert main(["precompute", *data, "--output", store]) == 0
    assert "0 of 4 rows bad" in capsys.readouterr().out
    train = ["train", *data, "--precomputed", store, "--output", run, "--rank", "2", "--batch-size", "2", "--warmup-steps", "1"]
    assert main([*train, "--steps", "2", "--sample-count", "1", "--sample-steps", "1"]) == 0
    assert "after 2 steps, 0 rows skipped" in capsys.readouterr().out
    own = ["--adapter", f"{run}/adapter", "--steps", "1"]
    generate = ["generate", *own, "--prompt", CAPTION, "--picture", str(pictures / "0.png"), "--task", "canny"]
    generate += ["--output", image]
    assert main(generate) == 2
    assert "prompt must have at most 16 tokens, got" in capsys.readouterr().err
    assert main([*generate, "--truncate-prompts"]) == 0
    evaluate = ["evaluate", *own, "--protocol", "canny", "--data", str(pictures), "--fid-features", "none", "--output", table]
    assert main(evaluate) == 1
    told = capsys.readouterr().err
    assert "got 4 bad ones; the first: 0.png: prompt must have at most 16 tokens, got" in told
    assert "; --truncate-prompts cuts it" in told
    assert not Path(table).exists()
    assert main([*evaluate, "--truncate-prompts"]) == 0
    assert json.loads(Path(table, "results.json").read_text())["count"] == 4
