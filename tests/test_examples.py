"""The scripts of examples/ as people run them, with few steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from realgeneral.pictures import load_picture
from tests.realgeneral.helpers.pictures import make_photo

ROOT = Path(__file__).parents[1]


def run(name: str, *arguments: str | Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, ROOT / "examples" / name, *arguments]
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_generate(tmp_path: Path) -> None:
    """A picture of nano's size, and a line that says where it is."""
    make_photo(96, 96).save(tmp_path / "photo.png")
    out = run("generate.py", "--picture", tmp_path / "photo.png", "--prompt", "fox, orange", "--output", tmp_path / "made.png")
    assert out.strip().endswith("made.png")
    assert load_picture(tmp_path / "made.png").size == (64, 64)


def test_train_on_folder(tmp_path: Path) -> None:
    """An adapter, and a picture made with it."""
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        make_photo(80, 64, i).save(tmp_path / "pictures" / f"{i}.png")
        (tmp_path / "pictures" / f"{i}.txt").write_text("a red pot")
    out = run("train_on_folder.py", "--data", tmp_path / "pictures", "--output", tmp_path / "run", "--steps", "2")
    assert "after 2 steps; adapter in" in out
    assert load_picture(tmp_path / "run" / "coloured.png").size == (64, 64)
    assert (tmp_path / "run" / "adapter" / "realgeneral.safetensors").is_file()
