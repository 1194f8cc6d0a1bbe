"""Precomputed inputs: the losses of training on the fly bit for bit, nothing stale, nothing lost by a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5EncoderModel

from realgeneral.commands import precompute as precompute_module
from realgeneral.commands.precompute import parse_shard, precompute
from realgeneral.data.store import Store, StoreFailure
from realgeneral.errors import Failure, UsageError
from realgeneral.model.cogvideox import RealGeneralTransformer3DModel
from realgeneral.settings.data import PrecomputeConfig
from realgeneral.settings.train import TrainConfig
from realgeneral.training.train import train
from tests.realgeneral.helpers.checkpoints import tiny_vae
from tests.realgeneral.helpers.datasets import picture, write_folder
from tests.realgeneral.helpers.pictures import encoded, make_photo
from tests.realgeneral.helpers.runs import losses, weights

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
IMAGES = RealGeneralTransformer3DModel.images
TASKS = ["canny", "inpainting", "image-to-sketch"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Plain pictures of three shapes, rows with one and two given conditions, a subject, and three bad rows."""
    shapes = [(48, 32), (48, 32), (32, 48), (40, 40), (48, 32)]
    prompts = ["a red pot", "blue cat", "a fox on the table"]
    rows: list[dict[str, Any]] = [
        {"target": encoded(make_photo(*shape, i)), "prompt": prompts[i % 3]} for i, shape in enumerate(shapes)
    ]
    rows[0]["subject"] = "pot"
    rows[1]["condition"], rows[4]["condition"] = [picture(20)], [picture(21), picture(22)]
    rows[1]["task"] = rows[4]["task"] = "canny"
    rows += [
        {"target": encoded(make_photo(48, 32, 9))[:-40], "prompt": "a cat"},
        {"target": picture(3), "prompt": "a cat " * 30},
        {"target": "nothing.png", "prompt": "a cat"},
    ]
    return Path(write_folder(tmp_path / "data", rows))


@pytest.fixture
def settings(bases: dict[str, Path], data: Path, tmp_path: Path) -> Callable[..., PrecomputeConfig]:
    def make(**changes: Any) -> PrecomputeConfig:
        fixed: dict[str, Any] = {
            "base": str(bases["5b"]), "data": str(data), "tasks": TASKS, "output": str(tmp_path / "store"),
            "buckets": ["16x32", "32x16"], "variants": 2,
        }  # fmt: skip
        return PrecomputeConfig(**{**fixed, **changes})

    return make


@pytest.fixture
def training(bases: dict[str, Path], data: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(output: str, **changes: Any) -> TrainConfig:
        fixed: dict[str, Any] = {
            "base": str(bases["5b"]), "data": str(data), "tasks": TASKS, "output": str(tmp_path / output),
            "buckets": ["16x32", "32x16"], "rank": 2, "steps": 8, "batch_size": 2, "warmup_steps": 1, "save_every": 99,
            "sample_count": 0, "learning_rate": 1e-2,
        }  # fmt: skip
        return TrainConfig(**{**fixed, **changes})

    return make


def forbidden(*_: Any, **__: Any) -> None:
    raise AssertionError("an encoder was used")


# --- the same run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_losses_equal_those_on_the_fly(
    settings: Callable[..., PrecomputeConfig],
    training: Callable[..., TrainConfig],
    mixed_precision: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bit for bit: losses, weights, bad rows, with buckets, mixed numbers of conditions, dropout, subjects and random holes.

    The text encoder is not loaded, the VAE not used.
    """
    train(training("plain", variants=2, mixed_precision=mixed_precision))
    plain = capsys.readouterr().out
    result = precompute(settings(mixed_precision=mixed_precision))
    assert len(result["bad"]) == 3
    assert {problem.split(":")[0].split(" must")[0] for problem in result["bad"]} == {
        f"metadata.jsonl line {i}" for i in (6, 7, 8)
    }
    capsys.readouterr()

    monkeypatch.setattr(T5EncoderModel, "from_pretrained", forbidden)
    monkeypatch.setattr(RealGeneralTransformer3DModel, "images", IMAGES._replace(encode=forbidden))
    stored = training("stored", precomputed=settings().output, mixed_precision=mixed_precision)
    train(stored)
    assert losses(stored.output) == losses(training("plain").output)
    one, two = (weights(Path(training(name).output) / "adapter") for name in ("plain", "stored"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    told = [line for line in plain.splitlines() if line.startswith("skipped")]
    assert len(told) == 3
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped")] == told


def test_endless_draws_equal_where_nothing_is_drawn(
    settings: Callable[..., PrecomputeConfig], training: Callable[..., TrainConfig]
) -> None:
    """Tasks without a random condition train the same from a store as on the fly without --variants; workers included."""
    tasks = ["canny", "colouring"]
    train(training("plain", tasks=tasks, steps=4))
    precompute(settings(tasks=tasks, num_workers=1))
    stored = training("stored", tasks=tasks, steps=4, precomputed=settings().output, num_workers=1)
    train(stored)
    assert losses(stored.output) == losses(training("plain").output)


def test_nano_data(training: Callable[..., TrainConfig], settings: Callable[..., PrecomputeConfig], monkeypatch: Any) -> None:
    """The packaged data augments its pictures at random: its draws are stored too."""
    from realgeneral.data.sources import packaged as pairs

    monkeypatch.setattr(pairs, "load_emoji", lambda split, load=pairs.load_emoji: load(split)[:2])
    # as many colours as a draw tells, in words of the tiny text window
    monkeypatch.setattr(pairs, "caption", lambda concept, style, colours=(): " ".join(["a", *["red"] * len(colours), "pot"]))
    monkeypatch.setattr("realgeneral.data.samples.subject_span_mask", lambda *_: None)
    monkeypatch.setattr("realgeneral.training.objective.subject_span_mask", lambda *args: torch.zeros(len(args[1]), args[3]))
    monkeypatch.setattr("realgeneral.generation.pipeline.subject_span_mask", lambda *args: torch.zeros(len(args[1]), args[3]))
    common: dict[str, Any] = {"data": "nano", "tasks": ["colouring", "customization"], "buckets": []}
    precompute(settings(**common))
    train(training("plain", steps=4, variants=2, **common))
    train(training("stored", steps=4, precomputed=settings().output, sample_count=6, sample_steps=1, **common))
    assert losses(training("stored").output) == losses(training("plain").output)
    assert (Path(training("stored").output) / "samples" / "step-000004.png").is_file()


def test_samples_need_no_text_encoder(
    settings: Callable[..., PrecomputeConfig], training: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grids during and after a precomputed run are those of a run on the fly, and change nothing in it."""
    common: dict[str, Any] = {"sample_count": 3, "sample_every": 1, "sample_steps": 1, "steps": 2, "tasks": ["canny"]}
    precompute(settings(tasks=["canny"]))
    plain, stored = training("plain", **common), training("stored", precomputed=settings().output, **common)
    train(plain)
    monkeypatch.setattr(T5EncoderModel, "from_pretrained", forbidden)
    train(stored)
    assert losses(plain.output) == losses(stored.output)
    for name in ("step-000001.png", "step-000002.png"):
        one, two = (Path(made.output) / "samples" / name for made in (plain, stored))
        assert one.read_bytes() == two.read_bytes()


# --- the store -----------------------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_what_is_encoded(settings: Callable[..., PrecomputeConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """The entries of the rows before are there, and the next run adds the others."""
    whole = precompute(settings(output=settings().output + "-whole"))
    original, rows = precompute_module._Encoder.row, [0]

    def interrupted(self: Any, row: Any) -> None:
        rows[0] += 1
        if rows[0] == 4:
            raise KeyboardInterrupt
        original(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(precompute_module._Encoder, "row", interrupted)
        with pytest.raises(KeyboardInterrupt):
            precompute(settings())
    kept = len(Store(settings().output).places)
    assert 0 < kept < whole["encoded"]
    assert precompute(settings())["encoded"] == whole["encoded"] - kept


def test_time_makes_shards_too(settings: Callable[..., PrecomputeConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed run loses a minute at most."""
    monkeypatch.setattr(precompute_module, "FLUSH_SECONDS", 0.0)
    precompute(settings())
    assert len(list((Path(settings().output) / "shards").glob("*.safetensors"))) > 3


def test_shards_are_one_store(settings: Callable[..., PrecomputeConfig], tmp_path: Path) -> None:
    """Three processes, one with RANK and WORLD_SIZE, give the entries of one; a second run encodes nothing."""
    whole = precompute(settings())
    for i in range(3):
        part = precompute(settings(output=str(tmp_path / "parts"), shard=f"{i}/3"))
        assert part["rows"] in (2, 3)
    one, parts = Store(settings().output), Store(tmp_path / "parts")
    assert one.places.keys() == parts.places.keys()
    assert one.bad.keys() == parts.bad.keys()
    assert whole["encoded"] == len(one.places)
    for key in one.places:
        assert torch.equal(one._get(key, ""), parts._get(key, ""))
    again = precompute(settings())
    assert (again["encoded"], again["kept"]) == (0, whole["encoded"])
    assert again["bad"] == whole["bad"]


def test_encoded_together(settings: Callable[..., PrecomputeConfig], tmp_path: Path) -> None:
    """Batches of pictures and prompts fill the same store, up to rounding; pictures of different sizes are never joined."""
    one = precompute(settings())
    many = precompute(settings(output=str(tmp_path / "many"), encode_batch=3))
    assert (one["encoded"], one["bad"]) == (many["encoded"], many["bad"])
    first, second = Store(settings().output), Store(tmp_path / "many")
    assert first.places.keys() == second.places.keys()
    for key in first.places:
        torch.testing.assert_close(first._get(key, ""), second._get(key, ""))


def test_equal_inputs_are_stored_once(settings: Callable[..., PrecomputeConfig], data: Path) -> None:
    """The target of canny and inpainting is one entry; two rows with one picture share it."""
    rows = [json.dumps({"target": "target-0-0.png", "prompt": "a cat"})] * 2
    (data / "metadata.jsonl").write_text("\n".join(rows))
    precompute(settings())
    # picture, its edges, two holes per row, sketch and its condition; two prompts
    assert len(Store(settings().output).places) == 1 + 1 + 2 * 2 + 2 + 2


@pytest.mark.parametrize("shard", ["3/3", "1", "a/b", "-1/2", "1/0"])
def test_wrong_shards(shard: str) -> None:
    """Named with what was given."""
    with pytest.raises(UsageError, match=f'shard must be "i/n" with 0 <= i < n, got {shard!r}'):
        parse_shard(shard)


def test_torchrun_sets_the_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    """RANK and WORLD_SIZE, unless --shard says otherwise; alone it is the whole."""
    assert parse_shard("") == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert parse_shard("") == (2, 4)
    assert parse_shard("0/2") == (0, 2)


# --- stale entries -------------------------------------------------------------------------------------------------------


def test_a_changed_picture_or_prompt_is_not_found(
    settings: Callable[..., PrecomputeConfig], training: Callable[..., TrainConfig], data: Path
) -> None:
    """Under the same name with other contents: the run stops and says so; precompute adds what is missing, then it runs."""
    precompute(settings())
    listing = (data / "metadata.jsonl").read_text()
    changes: list[Callable[[], Any]] = [
        lambda: (data / "target-2-0.png").write_bytes(encoded(make_photo(32, 48, 77))),
        lambda: (data / "condition-1-0.png").write_bytes(picture(78)),
        lambda: (data / "metadata.jsonl").write_text(listing.replace("a fox on the table", "a dog")),
    ]
    for i, change in enumerate(changes):
        change()
        for workers in (0, 1) if i == 0 else (0,):
            with pytest.raises(Failure, match=r"^[^\n]*store must hold the .*: run realgeneral precompute again") as caught:
                train(training(f"run-{i}-{workers}", precomputed=settings().output, num_workers=workers))
            assert "Traceback" not in str(caught.value)
        # picture, edges, two holes, sketch and its condition
        assert 1 <= precompute(settings())["encoded"] <= 6
    train(training("last", precomputed=settings().output))


@pytest.mark.parametrize("part", ["vae", "tokenizer"])
def test_changed_encoders_are_refused(
    settings: Callable[..., PrecomputeConfig], training: Callable[..., TrainConfig], tmp_path: Path, part: str, bases: Any
) -> None:
    """Another VAE or tokenizer in a folder of the same name: refused before the first step."""
    base = tmp_path / "base"
    shutil.copytree(bases["5b"], base)
    precompute(settings(base=str(base), tasks=["canny"]))
    if part == "vae":
        tiny_vae(seed=1).save_pretrained(base / "vae")
    else:
        (base / "tokenizer" / "extra.txt").write_text("x")
    word = "the VAE of this base" if part == "vae" else "the text encoder and tokenizer of this base"
    with pytest.raises(StoreFailure, match=f"store must be precomputed with {word}"):
        train(training("run", base=str(base), tasks=["canny"], precomputed=settings().output))
    with pytest.raises(StoreFailure, match=f"store must be precomputed with {word}"):
        precompute(settings(base=str(base), tasks=["canny"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["canny:low=50"]}, "store must hold the latents of metadata.jsonl line"),
        ({"buckets": ["32x32"]}, "store must hold the latents of metadata.jsonl line"),
        ({"mixed_precision": "bf16"}, "store must be precomputed with dtype bfloat16"),
        ({"variants": 3}, "variants must be those of the store, 2, got 3"),
        ({"precomputed": "nowhere"}, "precomputed must be a folder that realgeneral precompute wrote, got nowhere"),
    ],
)
def test_other_settings_in_training(
    settings: Callable[..., PrecomputeConfig], training: Callable[..., TrainConfig], changes: dict[str, Any], message: str
) -> None:
    """A task option, size or dtype that was not precomputed is one line, not a silent encoding."""
    precompute(settings(tasks=["canny"]))
    with pytest.raises((Failure, UsageError), match=message):
        train(training("run", **{"tasks": ["canny"], "precomputed": settings().output, **changes}))


# --- ways to end ---------------------------------------------------------------------------------------------------------


def test_strict(settings: Callable[..., PrecomputeConfig]) -> None:
    """The first bad row ends the run; what was encoded before it stays."""
    with pytest.raises(Failure, match=r"metadata.jsonl line 6: .*complete picture"):
        precompute(settings(strict=True))
    assert len(Store(settings().output).places) > 5


def test_nothing_but_bad_rows(settings: Callable[..., PrecomputeConfig], tmp_path: Path) -> None:
    """A script must not go on to train with a store of nothing."""
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "metadata.jsonl").write_text('{"target": "nothing.png", "prompt": "a"}\n' * 3)
    with pytest.raises(Failure, match=r"data must hold good rows, got 3 bad ones; the first: .* line 1: .*no such file"):
        precompute(settings(data=str(tmp_path / "bad"), buckets=[]))


def test_a_run_that_dies_goes_on(settings: Callable[..., PrecomputeConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """Dead after three pictures: the next run keeps them and encodes the rest only."""
    total = precompute(settings(output=settings().output + "-whole"))["encoded"]
    calls = [0]

    def dies(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 6:
            raise KeyboardInterrupt
        return IMAGES.encode(*args)

    with monkeypatch.context() as patch:
        patch.setattr(RealGeneralTransformer3DModel, "images", IMAGES._replace(encode=dies))
        with pytest.raises(KeyboardInterrupt):
            precompute(_tiny_shards(settings()))
    result = precompute(_tiny_shards(settings()))
    assert result["kept"] >= 5
    assert result["encoded"] + result["kept"] == total


def _tiny_shards(config: PrecomputeConfig) -> PrecomputeConfig:
    object.__setattr__(config, "shard_megabytes", 0)  # every entry a shard
    return config


@pytest.mark.slow
def test_a_killed_process_goes_on(settings: Callable[..., PrecomputeConfig], tmp_path: Path, bases: dict[str, Path]) -> None:
    """SIGKILL at several moments: the store can be read after each, and the last run makes the whole of it."""
    for i in range(300):
        make_photo(32, 16, i).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a red pot")
    common = {"data": str(tmp_path), "tasks": ["inpainting"]}
    command = [
        sys.executable, "-c",
        "from realgeneral.settings.data import PrecomputeConfig\nfrom realgeneral.commands.precompute import precompute\n"
        f"config = PrecomputeConfig(base={str(bases['5b'])!r}, data={str(tmp_path)!r}, tasks=['inpainting'], variants=2,"
        f" buckets=['16x32', '32x16'], output={settings().output!r})\n"
        "object.__setattr__(config, 'shard_megabytes', 0)\nprecompute(config)",
    ]  # fmt: skip
    shards = Path(settings().output) / "shards"
    for kill in range(3):
        before = len(list(shards.glob("*.json")))
        process = subprocess.Popen(command, env=os.environ, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(shards.glob("*.json"))) < before + 40 + 7 * kill:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(Store(settings().output).places) >= 40
    result = precompute(settings(**common))
    assert result["kept"] >= 120
    assert result["encoded"] + result["kept"] == 300 * 3 + 2


def test_corrupt_shard_in_training(settings: Callable[..., PrecomputeConfig], training: Callable[..., TrainConfig]) -> None:
    """The message names the file; after deleting it as told, precompute restores exactly what is gone."""
    total = precompute(settings())["encoded"]
    (shard,) = (Path(settings().output) / "shards").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 255
    shard.write_bytes(data)
    with pytest.raises(Failure, match=f"{shard.name} must be as it was written, got another checksum; delete it and"):
        train(training("run", steps=30, precomputed=settings().output))
    shard.unlink()
    shard.with_suffix(".json").unlink()
    assert precompute(settings())["encoded"] == total
