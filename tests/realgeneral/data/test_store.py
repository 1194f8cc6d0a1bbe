"""The store of precomputed entries: whole or not at all, and never the wrong entry."""

from __future__ import annotations

import json
import pickle
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from realgeneral.data import store as store_module
from realgeneral.data.store import Store, StoreFailure, StoreSettings, StoreWriter, read_indexes, read_settings
from realgeneral.errors import Failure, UsageError
from tests.realgeneral.helpers.processes import run_processes

SETTINGS = StoreSettings("vae-1", "text-1", "float32", 12, 2)


def made(folder: Path, count: int = 3, shard_bytes: int = 2**20) -> dict[str, torch.Tensor]:
    writer = StoreWriter(folder, SETTINGS, "000-of-001", shard_bytes)
    tensors = {str(i): torch.randn(4, 2, 4, generator=torch.Generator().manual_seed(i)) for i in range(count)}
    for name, tensor in tensors.items():
        writer.add(writer.store.latents_key([name]), tensor)
    writer.add_bad(writer.store.latents_key(["bad"]), "x.png must be a picture")
    writer.flush()
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    """Bits come back, through pickle too, from as many shards as the size asks for."""
    writer = StoreWriter(tmp_path / "s", SETTINGS, "000-of-001", 100)
    value = torch.randn(3, 5).to(dtype)
    writer.add(writer.store.text_key("a cat"), value)
    writer.add(writer.store.text_key(""), value + 1)
    writer.flush()
    assert len(list((tmp_path / "s" / "shards").glob("*.safetensors"))) == 1
    store = pickle.loads(pickle.dumps(Store(tmp_path / "s")))
    assert torch.equal(store.text("a cat"), value)
    assert torch.equal(store.text(""), value + 1)
    assert store.text("a cat").dtype == dtype


def test_added_shards_keep_the_old_ones(tmp_path: Path) -> None:
    """A second writer of the same name numbers on; one of another process writes beside it."""
    tensors = made(tmp_path)
    for prefix in ("000-of-001", "001-of-002"):
        writer = StoreWriter(tmp_path, SETTINGS, prefix, 2**20)
        assert writer.store.latents_key(["0"]) in writer
        writer.add(writer.store.latents_key([prefix]), torch.ones(2))
        writer.flush()
        writer.flush()
    assert sorted(p.stem for p in (tmp_path / "shards").glob("*.safetensors")) == [
        "000-of-001-00000", "000-of-001-00001", "001-of-002-00000",
    ]  # fmt: skip
    store = Store(tmp_path)
    assert all(torch.equal(store.latents([name], "row"), tensor) for name, tensor in tensors.items())


def _write_at_once(rank: int, root: Path, rounds: int) -> int:
    for i in range(rounds):
        (root / f"ready-{i}-{rank}").touch()
        end = time.monotonic() + 30
        while not (root / f"ready-{i}-{1 - rank}").exists():
            assert time.monotonic() < end, "the other process ended"
        writer = StoreWriter(root / f"store-{i}", SETTINGS, f"{rank:03d}-of-002", 2**20)
        writer.add(writer.store.latents_key([rank]), torch.ones(2))
        writer.flush()
    return rounds


def test_processes_that_start_at_once(tmp_path: Path) -> None:
    """Two open a new folder in the same moment, many times over: both write, and one store has the entries of both."""
    outcomes = run_processes(_write_at_once, tmp_path, 20)
    assert [outcome.value for outcome in outcomes] == [20, 20], [outcome.text for outcome in outcomes]
    for i in range(20):
        store = Store(tmp_path / f"store-{i}")
        assert all(torch.equal(store.latents([rank], "row"), torch.ones(2)) for rank in range(2))


def test_a_sibling_that_writes_the_settings(tmp_path: Path) -> None:
    """Half of its file is no reason to refuse the folder; other settings are one, and so is anything else in it."""
    (tmp_path / "precompute.json.1f.partial").touch()
    made(tmp_path)
    with pytest.raises(StoreFailure, match="must be precomputed with 3 variants"):
        StoreWriter(tmp_path, replace(SETTINGS, variants=3), "001-of-002", 100)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(UsageError, match=r"output must be a new folder or one of .*, got .* with notes.txt"):
        StoreWriter(tmp_path / "other", SETTINGS, "001-of-002", 100)


def test_missing_and_bad_entries(tmp_path: Path) -> None:
    """What was never encoded ends the run; what could not be read is a bad row with its reason."""
    made(tmp_path)
    store = Store(tmp_path)
    with pytest.raises(StoreFailure, match=r"must hold the latents of row 5; .*: run realgeneral precompute again"):
        store.latents(["other"], "row 5")
    with pytest.raises(StoreFailure, match="must hold the text features of 'a dog'"):
        store.text("a dog")
    with pytest.raises(Failure, match=r"^x.png must be a picture$") as caught:
        store.latents(["bad"], "row 6")
    assert not isinstance(caught.value, StoreFailure)


@pytest.mark.parametrize("defect", ["truncated", "flipped bit", "header", "removed", "index"])
def test_corrupt_shards(tmp_path: Path, defect: str) -> None:
    """Every damage is one line with the file's name and what to do, at the latest when the entry is used."""
    made(tmp_path)
    path = tmp_path / "shards" / "000-of-001-00000.safetensors"
    data = bytearray(path.read_bytes())
    if defect == "removed":
        path.unlink()
    elif defect == "index":
        path.with_suffix(".json").write_text('{"entries": {')
    else:
        if defect == "truncated":
            data = data[:-8]
        elif defect == "header":
            data[:64] = b"x" * 64
        else:
            data[-3] ^= 1
        path.write_bytes(data)
    message = (
        r"000-of-001-00000.safetensors must be as it was written, got .*; delete it and .*json and run realgeneral precompute"
    )
    with pytest.raises(StoreFailure, match=message) as caught:
        _ = [Store(tmp_path).latents([str(i)], "row") for i in range(3)]
    assert "\n" not in str(caught.value)
    # as the message says
    path.unlink(missing_ok=True)
    path.with_suffix(".json").unlink()
    tensors = made(tmp_path)
    assert torch.equal(Store(tmp_path).latents(["2"], "row"), tensors["2"])


def test_a_shard_without_its_index_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two files: nothing of it is seen, and the next run writes over it."""
    original = store_module.write_text

    def dies(path: Path, text: str, **options: bool) -> None:
        if path.name.startswith("000"):
            raise KeyboardInterrupt
        original(path, text, **options)

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "write_text", dies)
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path)
    assert list((tmp_path / "shards").glob("*.safetensors"))
    assert not Store(tmp_path).places
    tensors = made(tmp_path)
    assert torch.equal(Store(tmp_path).latents(["1"], "row"), tensors["1"])
    assert len(list((tmp_path / "shards").iterdir())) == 2


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier shards stay, nothing half-written does."""
    made(tmp_path)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    writer = StoreWriter(tmp_path, SETTINGS, "000-of-001", 2**20)
    writer.add("x", torch.ones(3))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        Failure, match=r"00001.safetensors could not be written \(.*No space left.*\); shards before it are intact"
    ):
        writer.flush()
    assert len(list((tmp_path / "shards").iterdir())) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vae": "vae-2"}, r"must be precomputed with the VAE of this base \(vae vae-2\), got vae-1; use another folder"),
        ({"text": "text-2"}, "the text encoder and tokenizer of this base"),
        ({"dtype": "bfloat16"}, "dtype bfloat16"),
        ({"window": 226}, "a text window of 226"),
        ({"variants": 3}, "3 variants"),
        ({"format": 0}, "format 0"),
    ],
)
def test_other_settings(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """A store of other encoders is refused, for writing and for reading."""
    made(tmp_path)
    other = replace(SETTINGS, **change)
    with pytest.raises(StoreFailure, match=message):
        StoreWriter(tmp_path, other, "000-of-001", 1)
    if not {"variants", "format"} & set(change):
        with pytest.raises(StoreFailure, match=message):
            Store(tmp_path).check(other.vae, other.text, other.dtype, other.window)


def test_keys_depend_on_everything(tmp_path: Path) -> None:
    """VAE, dtype and identity for latents; text encoder, dtype, window and prompt for text."""
    keys = set()
    for i, change in enumerate([{}, {"vae": "v"}, {"text": "t"}, {"dtype": "bfloat16"}, {"window": 5}]):
        store = StoreWriter(tmp_path / str(i), replace(SETTINGS, **change), "0", 1).store  # type: ignore[arg-type]
        keys |= {store.latents_key(["a", 1, 2]), store.text_key("a")}
    assert len(keys) == 3 + 4
    assert store.latents_key(["a", 1, 2]) != store.latents_key(["a", 12])


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [("precompute.json", '"variants": 2', '"variants": 3'), ("shards/000-of-001-00000.json", "x.png", "y.png")],
)
def test_text_that_changed(tmp_path: Path, name: str, old: str, new: str) -> None:
    """A flipped bit of the settings or of an index is noticed; those of earlier versions, without digests, are read."""
    made(tmp_path)
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(text.replace(old, new))
    with pytest.raises(Failure, match="other text than was written"):
        Store(tmp_path)
    record = json.loads(text)
    del record["digest"]
    (tmp_path / name).write_text(json.dumps(record))
    assert len(Store(tmp_path).places) == 3


def test_folders_that_are_no_store(tmp_path: Path) -> None:
    """Reading one, or writing into one, with something else in it."""
    with pytest.raises(Failure, match="precomputed must be a folder that realgeneral precompute wrote, got"):
        Store(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match="output must be a new folder or one of realgeneral precompute"):
        StoreWriter(tmp_path, SETTINGS, "0", 1)
    with pytest.raises(UsageError, match="output must be a folder, got"):
        StoreWriter(tmp_path / "notes.txt", SETTINGS, "0", 1)
    made(tmp_path / "s")
    settings = json.loads((tmp_path / "s" / "precompute.json").read_text())
    del settings["vae"]
    settings.pop("digest")
    (tmp_path / "s" / "precompute.json").write_text(json.dumps(settings))
    with pytest.raises(Failure, match=r"precompute.json must be as realgeneral precompute wrote it, got: KeyError\('vae'\)"):
        Store(tmp_path / "s")


def test_files_that_are_too_deep_are_damaged(tmp_path: Path) -> None:
    """JSON of a hundred thousand brackets ends in the message of its file."""
    (tmp_path / "precompute.json").write_text("[" * 100_000)
    with pytest.raises(Failure, match=r"precompute.json must be as realgeneral precompute wrote it, got"):
        read_settings(tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.json").write_text("[" * 100_000)
    with pytest.raises(Failure, match=r"a.safetensors must be as it was written, got a damaged index"):
        list(read_indexes(tmp_path))
