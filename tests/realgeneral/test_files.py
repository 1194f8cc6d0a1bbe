"""Files: what a killed process leaves, a full disk, and bytes that are the same each time."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from realgeneral.errors import Failure
from realgeneral.files import decoded, locked, replacing, sort_metadata


def test_a_full_disk_is_named_whoever_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries say "unexpected pos 64 vs 0": on a disk without room that is no space left."""

    def write(error: Exception) -> None:
        with replacing(tmp_path / "x.pt"):
            raise error

    with pytest.raises(RuntimeError, match="unexpected pos"):
        write(RuntimeError("unexpected pos 64 vs 0"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 4096))
    with pytest.raises(OSError, match=r"no space left on the device: .*x\.pt"):
        write(RuntimeError("unexpected pos 64 vs 0"))
    with pytest.raises(Failure, match="own words"):
        write(Failure("own words"))
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """By the next one that holds the folder; files of others stay."""
    for name in ("samples/step-000002.png.partial", "adapter.safetensors.partial", "film.mp4.partial", "samples/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with locked(tmp_path):
        assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [".lock", "a.png", "film.mp4.partial"]


def test_metadata_in_order(tmp_path: Path) -> None:
    """Two writings of the same are the same bytes, and what is read is what was given."""
    metadata = {f"key-{i}": "x" * i + '"\n\\\x7f\u00e4\U0001f98a' for i in range(12)}
    files = [tmp_path / f"{i}.safetensors" for i in range(4)]
    for file in files:
        save_file({"b": torch.ones(3), "a": torch.zeros(2, 2)}, file, metadata)
        sort_metadata(file)
    assert len({file.read_bytes() for file in files}) == 1
    with safe_open(files[0], "pt") as opened:
        assert opened.metadata() == metadata
        assert opened.get_tensor("b").tolist() == [1, 1, 1]


def test_text_is_utf8_with_or_without_a_mark() -> None:
    """Anything else is named."""
    assert decoded(b"\xef\xbb\xbfa", "x.txt") == decoded(b"a", "x.txt") == "a"
    with pytest.raises(Failure, match=r"x.txt must be UTF-8 text, got"):
        decoded(b"\xff\xfe", "x.txt")
