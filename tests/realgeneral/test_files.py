"""Files written whole or not at all, and folders that one process at a time writes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from realgeneral.errors import Failure
from realgeneral.files import decoded, file_digest, locked, replacing, sort_metadata, write_text


def test_replacing_a_file(tmp_path: Path) -> None:
    """The new file takes the place of the old one at the end; after an error the old one stays, and nothing else does."""
    path = tmp_path / "made" / "a.txt"
    write_text(path, "old")
    with pytest.raises(FileNotFoundError), replacing(path) as partial:
        partial.write_text("half") and (tmp_path / "nothing").read_text()
    assert path.read_text() == "old"
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_replacing_a_folder(tmp_path: Path) -> None:
    """A folder with all that is in it; what a killed process left beside it is gone."""
    folder = tmp_path / "a"
    (folder / "old").mkdir(parents=True)
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "left").touch()
    with replacing(folder) as partial:
        partial.mkdir()
        (partial / "new").touch()
    assert [p.name for p in folder.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_shared_writers_do_not_meet(tmp_path: Path) -> None:
    """Two at once write under names of their own; the last to end wins."""
    path = tmp_path / "a"
    with replacing(path, shared=True) as one, replacing(path, shared=True) as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_digests_are_of_contents(tmp_path: Path) -> None:
    """The known digest of nothing; one bit more is another."""
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "b").write_bytes(b"\x01")
    assert file_digest(tmp_path / "a").startswith("e3b0c44298fc1c14")
    assert file_digest(tmp_path / "a") != file_digest(tmp_path / "b")


HOLDER = (
    "import sys, time\nfrom realgeneral.files import locked\n"
    "with locked(sys.argv[1], sys.argv[2]):\n    print('held', flush=True)\n    time.sleep(60)\n"
)


@pytest.mark.parametrize("name", ["", "000-of-002"])
def test_a_folder_is_held_by_one_process(tmp_path: Path, name: str) -> None:
    """The second is told which process holds it; one that was killed holds nothing; no file stays."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run"), name], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(
                Failure, match=rf"run must be written by one process at a time, but process {holder.pid} on .* holds"
            ),
            locked(tmp_path / "run", name),
        ):
            pass
        with locked(tmp_path / "run", "another"):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()
    with locked(tmp_path / "run", name):
        assert len(os.listdir(tmp_path / "run")) == 1
    assert os.listdir(tmp_path / "run") == []


def test_many_processes_at_one_folder(tmp_path: Path) -> None:
    """Eight that come and go: at no time do two of them hold it, and each gets it in the end."""
    code = (
        "import sys, os, time\nfrom pathlib import Path\n"
        "from realgeneral.errors import Failure\nfrom realgeneral.files import locked\n"
        "mark = Path(sys.argv[2])\n"
        "for _ in range(20):\n"
        "    while True:\n"
        "        try:\n"
        "            with locked(sys.argv[1]):\n"
        "                os.close(os.open(mark, os.O_CREAT | os.O_EXCL))\n"
        "                time.sleep(0.001)\n"
        "                mark.unlink()\n"
        "            break\n"
        "        except Failure:\n"
        "            time.sleep(0.001)\n"
    )
    began = time.monotonic()
    command = [sys.executable, "-c", code, str(tmp_path / "run"), str(tmp_path / "mark")]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(8)]
    errors = [process.communicate(timeout=60)[1] for process in started]
    assert errors == [""] * 8, f"after {time.monotonic() - began:.1f} s"


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
