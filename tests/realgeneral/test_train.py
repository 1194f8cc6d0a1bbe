"""The trainer: exact continuation, what is trained and what is not, and every way a run can end early."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import random
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
from checkpoints import tiny_transformer
from conftest import make_photo
from PIL import Image
from processes import start
from safetensors.torch import load_file

from realgeneral import RealGeneralPipeline, checkpoint, samples, tracking
from realgeneral import train as train_module
from realgeneral.adapter import CONDITION_FILE, LORA_FILE, LORA_TARGETS, read_adapter_info
from realgeneral.bad_batch import load_bad_batch
from realgeneral.config import TrainConfig
from realgeneral.diffusion import v_loss
from realgeneral.errors import Failure, UsageError
from realgeneral.loading import run_tasks
from realgeneral.optimizers import learning_rate_factor
from realgeneral.train import train

# rounding of some thousand float32 operations
ROUNDING32 = 2e3 * torch.finfo(torch.float32).eps
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six captioned pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(6):
        make_photo(48, 32, i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(["a red pot", "blue cat", "a fox on the table"][i % 3])
    return folder


@pytest.fixture
def config(bases: dict[str, Path], data: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(output: str = "run", **changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "base": str(bases["5b"]), "data": str(data), "tasks": ["canny", "colouring"], "output": str(tmp_path / output),
            "height": 16, "width": 32, "rank": 2, "alpha": 4.0, "steps": 6, "batch_size": 2, "warmup_steps": 2, "save_every": 2,
            "keep_checkpoints": 9, "sample_count": 0, "learning_rate": 1e-2,
        }  # fmt: skip
        return TrainConfig(**{**settings, **changes})

    return make


def rows(run: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path | str) -> list[float]:
    return [row["loss"] for row in rows(run)]


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return {**load_file(Path(folder) / LORA_FILE), **load_file(Path(folder) / CONDITION_FILE)}


def assert_same_weights(a: Path | str, b: Path | str) -> None:
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


class Killed(BaseException):
    """Stands for SIGKILL in-process: nothing catches it."""


def train_until(config: TrainConfig, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run and die right after the row of `step` is logged."""
    original = tracking.MetricsLog.step

    def dying(self: Any, done: int, *args: Any) -> None:
        original(self, done, *args)
        if done == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(tracking.MetricsLog, "step", dying)
        with pytest.raises(Killed):
            train(config)


# --- the run -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["paper", "cached"])
def test_trains_only_lora_and_condition_branch(
    base: Path, config: Callable[..., TrainConfig], preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After training every base weight, VAE and text encoder included, is bit-equal; LoRA and condition branch moved."""
    pipes: list[RealGeneralPipeline] = []
    original = train_module.load_models

    def keep(*args: Any) -> Any:
        pipe, info = original(*args)
        pipes.append(pipe)
        return pipe, info

    monkeypatch.setattr(train_module, "load_models", keep)
    result = train(config(base=str(base), preset=preset, steps=2))
    untouched = RealGeneralPipeline.from_pretrained(base)
    transformer = pipes[0].transformer
    after = {name.replace(".base_layer", ""): value for name, value in transformer.state_dict().items()}
    before = untouched.transformer.state_dict()
    stock = [name for name in before if not name.startswith("condition_")]
    assert stock
    assert all(torch.equal(before[name], after[name]) for name in stock)
    for name, value in untouched.text_encoder.state_dict().items():
        assert torch.equal(value, pipes[0].text_encoder.state_dict()[name])
    trained = weights(result["adapter"])
    fresh = RealGeneralPipeline.from_pretrained(base).transformer
    fresh.configure_condition(["canny", "colouring"], preset)
    for name, value in fresh.condition_parameters().items():
        if "1.norm2" not in name and "subject" not in name:
            assert not torch.equal(value, trained[name]), name
    assert all(value.any() for name, value in trained.items() if "lora_B" in name)
    info = read_adapter_info(result["adapter"])
    assert (info.preset, info.rank, info.alpha, info.tasks) == (preset, 2, 4.0, ("canny", "colouring"))
    assert info.base == base.name
    assert (result["steps"], result["skipped"]) == (2, 0)


def test_overfits_a_tiny_set(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """The loss on a single picture goes down clearly: the last tenth is well below the first."""
    make_photo(48, 32).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a red pot")
    made = config(
        data=str(tmp_path), tasks=["colouring"], steps=60, batch_size=8, rank=8, warmup_steps=1, save_every=60,
        learning_rate=2e-2, text_dropout=0.0, condition_dropout=0.0,
    )  # fmt: skip
    train(made)
    values = losses(made.output)
    assert sum(values[-6:]) < 0.8 * sum(values[:6])


def test_adapter_is_usable(config: Callable[..., TrainConfig], bases: dict[str, Path]) -> None:
    """What training leaves is what from_pretrained takes."""
    result = train(config(steps=1))
    pipe = RealGeneralPipeline.from_pretrained(bases["5b"], adapter=result["adapter"])
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red pot", make_photo(), task="canny", height=16, width=32, num_inference_steps=1).images[0]
    assert image.size == (32, 16)


def test_subjects_train_the_subject_projection(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """A row with a subject moves W_s, a data set without one leaves it zero."""
    make_photo(48, 32).save(tmp_path / "a.png")
    record = {"target": "a.png", "prompt": "a red pot", "condition": "a.png", "task": "customization"}
    for subject in (None, "pot"):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({**record, "subject": subject}))
        made = config(
            f"run-{subject}", data=str(tmp_path), tasks=["customization"], steps=2, learning_rate=1e-2, text_dropout=0.0
        )
        train(made)
        moved = weights(Path(made.output) / "adapter")["condition_embedding.subject.weight"].any()
        assert moved == (subject is not None)


@pytest.mark.parametrize("geometry", ["2b", "1.5"])
def test_several_conditions(bases: dict[str, Path], geometry: str, config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """Rows with two condition pictures train in every geometry."""
    for name in "abc":
        make_photo(48, 32, ord(name)).save(tmp_path / f"{name}.png")
    row = {"target": "a.png", "prompt": "a cat", "condition": ["b.png", "c.png"], "task": "customization"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    result = train(config(base=str(bases[geometry]), data=str(tmp_path), tasks=["customization"], steps=1))
    assert math.isfinite(result["loss"])


def test_bf16(config: Callable[..., TrainConfig]) -> None:
    """mixed_precision bf16: base in bfloat16, trained weights and adapter in float32, losses near float32's."""
    made = config(mixed_precision="bf16", steps=3, sample_count=1, sample_steps=1)
    train(made)
    assert {value.dtype for value in weights(Path(made.output) / "adapter").values()} == {torch.float32}
    bf16 = losses(made.output)
    plain = config("plain", steps=3)
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    train(plain)
    assert all(abs(a - b) < 0.1 * b for a, b in zip(bf16, losses(plain.output), strict=True))


def test_gradient_accumulation_is_the_larger_batch(config: Callable[..., TrainConfig]) -> None:
    """The optimizer step sees the mean over micro-steps: samples, loss and gradient are those of one larger batch."""
    small, large = config("small", gradient_accumulation_steps=2, batch_size=2), config("large", batch_size=4)
    names: dict[str, list[str]] = {"small": [], "large": []}
    for key, made in (("small", small), ("large", large)):
        original = train_module.collate

        def spy(samples: Any, key: str = key, original: Any = original) -> Any:
            names[key] += [sample.name for sample in samples]
            return original(samples)

        train_module.collate = spy
        try:
            train(made)
        finally:
            train_module.collate = original
    assert names["small"] == names["large"]
    assert len(names["small"]) == 24
    # AdamW would hide a wrong scale, so the gradient itself; after the first update rounding has grown
    first, expected = rows(small.output)[0], rows(large.output)[0]
    for name in ("loss", "gradient_norm"):
        assert first[name] == pytest.approx(expected[name], rel=16 * torch.finfo(torch.float32).eps)


def test_gradient_checkpointing_trains_the_same(config: Callable[..., TrainConfig]) -> None:
    """Recomputation changes no loss and no weight."""
    one, two = config("one", steps=3), config("two", steps=3, gradient_checkpointing=True)
    train(one)
    train(two)
    assert losses(one.output) == losses(two.output)
    assert_same_weights(Path(one.output) / "adapter", Path(two.output) / "adapter")


def test_workers_train_the_same(config: Callable[..., TrainConfig]) -> None:
    """Data-loading processes change nothing but speed."""
    one, two = config("one", steps=2), config("two", steps=2, num_workers=2)
    train(one)
    train(two)
    assert losses(one.output) == losses(two.output)


def test_log_and_samples(config: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]) -> None:
    """One row per step with loss, speed and loss by task; grids during training and at the end; TensorBoard events."""
    made = config(steps=4, sample_count=2, sample_every=2, sample_steps=1, tensorboard=True, log_every=1, ema_decay=0.9)
    result = train(made)
    table = rows(made.output)
    assert [row["step"] for row in table] == [1, 2, 3, 4]
    assert all(row["samples_per_second"] > 0 for row in table)
    assert {task for row in table for task in row["tasks"]} <= {"canny", "colouring"}
    assert sorted(p.name for p in (Path(made.output) / "samples").iterdir()) == ["step-000002.png", "step-000004.png"]
    with Image.open(Path(made.output) / "samples" / "step-000004.png") as grid:
        assert grid.width > 3 * 32
    assert list((Path(made.output) / "tensorboard").glob("events*"))
    assert result["log"] == str(Path(made.output) / "metrics.jsonl")
    assert "4/4" in capsys.readouterr().err


def test_samples_do_not_change_the_run(config: Callable[..., TrainConfig]) -> None:
    """Sampling in between, with averaged weights put in and taken out, leaves losses and weights bit-equal."""
    one = config("one", steps=4, ema_decay=0.5)
    two = config("two", steps=4, ema_decay=0.5, sample_every=1, sample_count=1, sample_steps=1)
    train(one)
    train(two)
    assert losses(one.output) == losses(two.output)
    assert_same_weights(Path(one.output) / "adapter", Path(two.output) / "adapter")


def test_bad_rows_are_counted(config: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bad rows are named once and counted at the end; with strict they stop the run."""
    lines = []
    for i in range(3):
        make_photo(48, 32, i).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"target": f"{i}.png", "prompt": "a cat"}))
    lines += [
        json.dumps({"target": "nothing.png", "prompt": "a"}),
        "{broken",
        json.dumps({"target": "0.png", "prompt": "a cat " * 30}),
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    result = train(config(data=str(tmp_path), steps=8))
    assert result["skipped"] == 3
    out = capsys.readouterr().out
    assert out.count("skipped: metadata.jsonl line 4") == out.count("skipped: metadata.jsonl line 5") == 1
    assert "skipped: metadata.jsonl line 6 must have a prompt of at most 12 tokens" in out
    for workers in (0, 1):
        with pytest.raises(Failure, match=r"^metadata.jsonl line \d") as caught:
            train(config(f"strict-{workers}", data=str(tmp_path), steps=8, strict=True, num_workers=workers))
        assert "Traceback" not in str(caught.value)


# --- resume --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"ema_decay": 0.9}, {"gradient_accumulation_steps": 2}, {"lr_schedule": "constant", "preset": "paper"}],
    ids=lambda changes: next(iter(changes), "plain"),
)
def test_resumed_equals_uninterrupted(
    config: Callable[..., TrainConfig], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dying after step 5 and resuming from step 4 gives the losses and the final weights of a run that never stopped."""
    whole, broken = config("whole", **changes), config("broken", **changes)
    train(whole)
    train_until(broken, 5, monkeypatch)
    assert [p.name for p in checkpoint.checkpoints(Path(broken.output))] == ["step-000002", "step-000004"]
    train(config("broken", resume=True, **changes))
    assert losses(broken.output) == losses(whole.output)
    assert [row["tasks"] for row in rows(broken.output)] == [row["tasks"] for row in rows(whole.output)]
    assert_same_weights(Path(broken.output) / "adapter", Path(whole.output) / "adapter")
    assert_same_weights(Path(broken.output) / "checkpoints/step-000006", Path(whole.output) / "checkpoints/step-000006")


def test_resume_of_a_finished_run(config: Callable[..., TrainConfig]) -> None:
    """Resuming what is done changes nothing and returns the same."""
    made = config(steps=2)
    first = train(made)
    before = weights(first["adapter"])
    again = train(config(steps=2, resume=True))
    assert again["loss"] == first["loss"]
    assert all(torch.equal(value, before[name]) for name, value in weights(again["adapter"]).items())


def test_resume_without_a_run_starts_one(config: Callable[..., TrainConfig]) -> None:
    """--resume in a new folder is a fresh run, so that one command line serves a queue."""
    assert train(config(steps=1, resume=True))["steps"] == 1


def test_output_that_holds_a_run(config: Callable[..., TrainConfig]) -> None:
    """Without --resume an old run is not overwritten."""
    train(config(steps=2))
    before = losses(config().output)
    with pytest.raises(UsageError, match=r"output must be a new folder, got .* which holds step-000002; add --resume"):
        train(config(steps=2))
    assert losses(config().output) == before


@pytest.mark.parametrize(
    "change", [{"weight_decay": 0.5}, {"tasks": ["canny"]}, {"rank": 3}, {"seed": 1}, {"preset": "paper"}, {"width": 48}]
)
def test_changed_setting_on_resume(config: Callable[..., TrainConfig], change: dict[str, Any]) -> None:
    """A continuation that would differ names the setting, what it was and what it is."""
    train(config(steps=2))
    (name,) = change
    with pytest.raises(UsageError, match=f"^{name} must be .* as in the run to resume, got "):
        train(config(steps=2, resume=True, **change))


def test_data_that_changed_on_resume(config: Callable[..., TrainConfig], data: Path, tmp_path: Path) -> None:
    """Another number of rows would be another order: refused with both; the same rows elsewhere go on."""
    shutil.copytree(data, tmp_path / "moved")
    train(config(steps=2, lr_schedule="constant"))
    again = config(steps=3, lr_schedule="constant", resume=True, data=str(tmp_path / "moved"))
    assert train(again)["steps"] == 3
    make_photo(48, 32, 9).save(tmp_path / "moved" / "more.png")
    (tmp_path / "moved" / "more.txt").write_text("a cat")
    with pytest.raises(UsageError, match=r"^data must have 6 rows as in the run to resume, got 7$"):
        train(again)


def test_adjusted_on_resume(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another rate or clip goes into force with the schedule, and is told once with both values."""
    train(config("whole"))
    train_until(config("broken"), 3, monkeypatch)
    capsys.readouterr()
    train_until(config("broken", resume=True, learning_rate=1e-3, max_grad_norm=1e-4), 4, monkeypatch)
    told = [line for line in capsys.readouterr().out.splitlines() if "from here on" in line]
    assert told == [
        "learning_rate is 0.001 from here on, 0.01 before (step-000002)",
        "max_grad_norm is 0.0001 from here on, 1.0 before (step-000002)",
    ]
    mine, theirs = (rows(config(name).output) for name in ("broken", "whole"))
    rates = [[row["learning_rate"] for row in run] for run in (mine, theirs)]
    assert rates[0][:2] == rates[1][:2]
    assert rates[0][2:4] == pytest.approx([rate / 10 for rate in rates[1][2:4]])
    # step 3 meets the same weights, step 4 what the new settings made of them
    assert mine[2]["loss"] == theirs[2]["loss"]
    assert mine[3]["loss"] != theirs[3]["loss"]


def test_checkpoint_of_an_earlier_version(config: Callable[..., TrainConfig]) -> None:
    """A state without what this version needs is refused in one line."""
    train(config(steps=2))
    state = Path(config().output) / "checkpoints" / "step-000002" / checkpoint.STATE_FILE
    old = torch.load(state, weights_only=True)
    del old["samples_per_step"]
    torch.save(old, state)
    with pytest.raises(UsageError, match=r"output must hold a run of this version, got step-000002 of an earlier one"):
        train(config(steps=2, resume=True))


def test_settings_that_may_change_on_resume(config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """How often to save, sample and log, workers, checkpointing: free, and the result is the same."""
    train(config("whole"))
    train_until(config("broken"), 3, monkeypatch)
    train(config("broken", resume=True, save_every=3, num_workers=1, log_every=1, gradient_checkpointing=True))
    assert losses(config("broken").output) == losses(config("whole").output)
    assert_same_weights(Path(config("broken").output) / "adapter", Path(config("whole").output) / "adapter")


def test_half_a_line_in_the_log(config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that a kill left with half a line is mended."""
    made = config(steps=4)
    train_until(made, 3, monkeypatch)
    with (Path(made.output) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    train(config(steps=4, resume=True))
    assert [row["step"] for row in rows(made.output)] == [1, 2, 3, 4]


def test_damaged_newest_checkpoint(config: Callable[..., TrainConfig]) -> None:
    """A checkpoint that a disk damaged is named, with what to do."""
    made = config(steps=4)
    train(made)
    state = Path(made.output) / "checkpoints/step-000004/training_state.pt"
    state.write_bytes(state.read_bytes()[:500])
    with pytest.raises(Failure, match=r"training_state.pt must be a complete file.*remove step-000004"):
        train(config(steps=4, resume=True))
    lora = Path(made.output) / "checkpoints/step-000002" / LORA_FILE
    lora.write_bytes(lora.read_bytes()[:100])
    state.write_bytes(bytes(5000))  # what a power loss can leave
    with pytest.raises(Failure, match=r"training_state.pt must be a complete file.*remove step-000004"):
        train(config(steps=4, resume=True))
    shutil.rmtree(state.parent)
    with pytest.raises(Failure, match=r"complete safetensors file.*; remove step-000002 to resume before it"):
        train(config(steps=4, resume=True))


def test_checkpoint_is_on_the_disk_before_older_ones_go(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files, then its name, are flushed before the last good checkpoint is removed."""
    events: list[str] = []
    fsync, replace, rmtree = os.fsync, os.replace, shutil.rmtree

    def flush(handle: int) -> None:
        events.append(f"flush {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        fsync(handle)

    def rename(source: Any, target: Any) -> None:
        events.append(f"rename {Path(target).name}")
        replace(source, target)

    def remove(folder: Any, **options: Any) -> None:
        if Path(folder).exists():
            events.append(f"remove {Path(folder).name}")
        rmtree(folder, **options)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    monkeypatch.setattr(shutil, "rmtree", remove)
    train(config(steps=2, save_every=1, keep_checkpoints=1))
    pruned, renamed = events.index("remove step-000001"), events.index("rename step-000002")
    for name in (LORA_FILE, CONDITION_FILE, checkpoint.STATE_FILE, "step-000002.partial"):
        assert f"flush {name}" in events[events.index("rename step-000001") : renamed]
    assert "flush checkpoints" in events[renamed:pruned]


def test_new_process_makes_the_same_picture(
    config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`realgeneral generate` in a new process repeats a validation picture bit for bit, scale (alpha 4 of rank 2) included."""
    grids: list[Any] = []
    original = samples.picture_grid
    monkeypatch.setattr(samples, "picture_grid", lambda *args: grids.append(args) or original(*args))
    made = config(sample_count=1, sample_steps=3, seed=5, tasks=["colouring"], ema_decay=0.5)
    result = train(made)
    ((condition, picture, _),), _, (label,), _ = grids[0]
    condition.save(tmp_path / "condition.png")
    arguments = {
        "prompt": label.split("\n")[1], "condition": tmp_path / "condition.png", "task": "colouring",
        "adapter": result["adapter"], "base": made.base, "height": 16, "width": 32, "steps": 3, "seed": 5,
        "guidance-scale": made.guidance_scale,
        "output": tmp_path / "same.png",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "realgeneral.cli", "generate", *(f"--{key}={value}" for key, value in arguments.items())],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "same.png") as same:
        assert same.convert("RGB").tobytes() == picture.tobytes()
    # the picture would show another scale
    pipe = RealGeneralPipeline.from_pretrained(made.base, adapter=result["adapter"])
    pipe.set_progress_bar_config(disable=True)
    half = pipe(
        arguments["prompt"], condition, task="colouring", height=16, width=32, num_inference_steps=3,
        guidance_scale=made.guidance_scale, generator=torch.Generator().manual_seed(5), attention_kwargs={"scale": 0.5},
    ).images[0]  # fmt: skip
    assert half.tobytes() != picture.tobytes()


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_init_adapter(config: Callable[..., TrainConfig], mixed_precision: str) -> None:
    """Training goes on from a given adapter, unrounded, with its tasks, rank and alpha; other settings are refused."""
    config = functools.partial(config, mixed_precision=mixed_precision)
    first = train(config("first", steps=2, lr_schedule="constant"))
    made = config(
        "second", steps=1, init_adapter=first["adapter"], tasks=[], learning_rate=1e-9, warmup_steps=0, weight_decay=0.0,
    )  # fmt: skip
    second = train(made)
    one, two = weights(first["adapter"]), weights(second["adapter"])
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-7)
    assert read_adapter_info(second["adapter"]).tasks == ("canny", "colouring")
    with pytest.raises(UsageError, match=r"tasks must be those of the adapter to start from"):
        train(config("third", init_adapter=first["adapter"], tasks=["canny"]))
    with pytest.raises(UsageError, match="adapter must be of preset 'paper', got one trained in preset 'cached'"):
        train(config("fourth", init_adapter=first["adapter"], preset="paper"))
    with pytest.raises(
        UsageError, match=r"lora_targets must have those of the adapter to start from, \[.*'to_v'\], got \['to_q'\]"
    ):
        train(config("fifth", init_adapter=first["adapter"], lora_targets=["to_q"]))
    with pytest.raises(UsageError, match=r"LoRA target must name linear layers of the base .*, got 'ff.net.7'"):
        train(config("sixth", init_adapter=first["adapter"], lora_targets=[*LORA_TARGETS, "ff.net.7"]))
    wide = train(dataclasses.replace(made, output=made.output + "-wide", lora_targets=[*LORA_TARGETS, "ff.net.2"]))
    three = weights(wide["adapter"])
    for name in one:
        torch.testing.assert_close(one[name], three[name], rtol=0, atol=1e-7)
    added = {name for name in three if name not in one}
    assert added
    assert all("ff.net.2.lora_" in name for name in added)
    assert max(three[name].abs().max() for name in added if "lora_B" in name) <= 1e-8  # one step at a rate of 1e-9


def test_init_adapter_of_other_weights(
    config: Callable[..., TrainConfig], bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter may go on on another base of the same geometry, which is said; from then on it is that base's."""
    first = train(config("first", steps=1))
    other = shutil.copytree(bases["5b"], tmp_path / "other")
    tiny_transformer("5b", seed=7).save_pretrained(other / "transformer")
    second = train(config("second", steps=1, base=str(other), init_adapter=first["adapter"], tasks=[]))
    assert f"note: {first['adapter']} was trained on other weights than those of {other}" in capsys.readouterr().out
    RealGeneralPipeline.from_pretrained(other, adapter=second["adapter"])
    with pytest.raises(UsageError, match="whose weights are others"):
        RealGeneralPipeline.from_pretrained(bases["5b"], adapter=second["adapter"])


# --- ways to end ---------------------------------------------------------------------------------------------------------


def poison(name: str, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """At micro-step `at` of a run, put NaN into the loss or into a gradient."""
    original, calls = train_module.training_loss, [0]

    def poisoned(pipe: Any, model: Any, *args: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == at and name == "weight":
            with torch.no_grad():
                pipe.transformer.proj_out.weight.fill_(float("nan"))
        loss: torch.Tensor = original(pipe, model, *args)
        if calls[0] == at and name == "gradient":
            loss.register_hook(lambda grad: grad * float("nan"))
        return loss

    monkeypatch.setattr(train_module, "training_loss", poisoned)


@pytest.mark.parametrize(
    ("name", "message"), [("weight", "loss must be finite, got nan"), ("gradient", "gradient must be finite, got norm nan")]
)
def test_not_finite_stops_with_the_checkpoint_intact(
    config: Callable[..., TrainConfig], name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in loss or gradient ends the run before it reaches a weight; the run resumes from before as if nothing was."""
    train(config("whole"))
    with monkeypatch.context() as patch:
        poison(name, patch, at=4)
        with pytest.raises(Failure, match=message + r".* at step 4[ ;]"):
            train(config("broken", save_every=1))
    found = checkpoint.checkpoints(Path(config("broken").output))
    assert found[-1].name == "step-000003"
    assert all(torch.isfinite(value).all() for value in weights(found[-1]).values())
    train(config("broken", save_every=1, resume=True))
    assert losses(config("broken").output) == losses(config("whole").output)
    assert_same_weights(Path(config("broken").output) / "adapter", Path(config("whole").output) / "adapter")


def test_bad_batch_runs_again(config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """From what is saved of a bad step its losses come out again bit for bit: rows, noise and dropout are all there."""
    original, seen = train_module.training_loss, []

    def spoiled(pipe: Any, model: Any, texts: Any, *args: Any) -> torch.Tensor:
        loss = original(pipe, model, texts, *args)
        seen.append((pipe, model, texts, loss.detach().clone()))
        return loss * (float("inf") if len(seen) == 3 else 1.0)

    monkeypatch.setattr(train_module, "training_loss", spoiled)
    with pytest.raises(Failure, match=r"loss must be finite, got inf at step 2 .*the batch is in .*bad_batch-000002, earlier"):
        train(config(gradient_accumulation_steps=2, text_dropout=0.5, condition_dropout=0.5))
    folder = Path(config().output) / "bad_batch-000002"
    told = json.loads((folder / "rank-0.json").read_text())
    assert told["step"] == 2
    assert [entry["batch"]["numbers"] for entry in told["micro_batches"]] == [[4, 5], [6, 7]]
    assert all(name.endswith(".png") for entry in told["micro_batches"] for name in entry["batch"]["names"])
    assert [len(entry["timesteps"]) for entry in told["micro_batches"]] == [2, 2]
    again = [original(*seen[-1][:3], *pair) for pair in load_bad_batch(folder)]
    assert all(torch.equal(mine, theirs) for mine, (*_, theirs) in zip(again, seen[2:], strict=True))


def test_checkpoints_are_pruned(config: Callable[..., TrainConfig]) -> None:
    """Only the newest stay, and numbers beyond six digits count as numbers."""
    made = config(save_every=1, keep_checkpoints=2)
    train(made)
    folder = Path(made.output) / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step-000005", "step-000006"]
    (folder / "step-000006").rename(folder / "step-1000000")
    (folder / "step-000005").rename(folder / "step-999999")
    assert [p.name for p in checkpoint.checkpoints(Path(made.output))] == ["step-999999", "step-1000000"]


def test_full_disk_keeps_old_checkpoints(config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that cannot be written is a one-line failure; earlier ones stay, nothing half-written does, resume works."""
    train(config("whole"))
    original, calls = torch.save, [0]

    def full(*args: Any, **kwargs: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            Path(args[1]).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(*args, **kwargs)

    made = config("broken")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(Failure, match=r"checkpoint of step 4 could not be written to .*No space left.*earlier ones"):
            train(made)
    assert [p.name for p in (Path(made.output) / "checkpoints").iterdir()] == ["step-000002"]
    train(config("broken", resume=True))
    assert_same_weights(Path(made.output) / "adapter", Path(config("whole").output) / "adapter")


def command(config: TrainConfig, *more: str) -> list[str]:
    arguments = [sys.executable, "-m", "realgeneral.train"]
    for name in ("base", "data", "output", "height", "width", "rank", "alpha", "steps", "batch_size", "learning_rate"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    arguments += ["--tasks", *config.tasks, "--sample-count", "0", "--warmup-steps", "2", *more]
    return arguments


def environment(**changes: str | None) -> dict[str, str]:
    root = str(Path(train_module.__file__).parents[1])
    merged = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **changes}
    return {k: v for k, v in merged.items() if v is not None}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_process_resumes_to_the_same_losses(config: Callable[..., TrainConfig], number: signal.Signals) -> None:
    """A real process killed in the middle, then --resume: the losses of an uninterrupted run; SIGTERM saves first.

    Its data-loading processes get what torchrun and Ctrl-C send to the whole group, and end with it even if it is killed.
    """
    steps = 400
    whole, broken = config("whole", steps=steps), config("broken", steps=steps)
    process = subprocess.Popen(
        command(broken, "--save-every", "7", "--num-workers", "2"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log = Path(broken.output) / "metrics.jsonl"
    wait_for(lambda: log.is_file() and log.read_text().count("\n") > 10, process)
    (os.kill if number == signal.SIGKILL else os.killpg)(process.pid, number)
    _, err = process.communicate(timeout=120)  # until no process holds the pipe any more
    reached = checkpoint.checkpoints(Path(broken.output))
    assert reached
    if number != signal.SIGKILL:
        assert process.returncode == 1
        last = err.strip().splitlines()[-1]
        assert last.startswith(f"realgeneral train: stopped by signal {int(number)} after step ")
        assert f"after step {int(reached[-1].name[5:])};" in last
        assert "Traceback" not in err
    else:
        assert process.returncode == -number
    # a shorter horizon would change the schedule, so compare the first steps of both after the break
    stop_at = int(reached[-1].name[5:]) + 12

    def first_steps(made: TrainConfig, **changes: Any) -> list[float]:
        resumed = config(Path(made.output).name, steps=steps, save_every=7, keep_checkpoints=2, **changes)
        with pytest.MonkeyPatch.context() as patch:
            original = tracking.MetricsLog.step

            def dying(self: Any, done: int, *args: Any) -> None:
                original(self, done, *args)
                if done == stop_at:
                    raise Killed

            patch.setattr(tracking.MetricsLog, "step", dying)
            with pytest.raises(Killed):
                train(resumed)
        return losses(made.output)

    assert first_steps(broken, resume=True) == first_steps(whole)


@pytest.mark.slow
def test_killed_twenty_times(config: Callable[..., TrainConfig]) -> None:
    """SIGKILL at twenty random moments, while loading, stepping or saving: the final weights are those of an unbroken run."""
    settings: dict[str, Any] = {"steps": 260, "save_every": 2, "keep_checkpoints": 2, "ema_decay": 0.9}
    train(config("whole", **settings))
    made, rng, reached = config("broken", resume=True, **settings), random.Random(0), [0]
    for kill in range(20):
        process, receiver = start(train, made)
        if kill % 4 == 0:
            done = receiver.poll(rng.uniform(0, 2))
        else:
            # some steps further than ever before, then anywhere within a step and its checkpoint
            wanted, done = reached[-1] + rng.randint(1, 8), False
            while not done and logged(made) < wanted:
                done = receiver.poll(0.005)
            done = done or receiver.poll(rng.uniform(0, 0.03))
        process.kill()
        process.join()
        assert not done, receiver.recv()
        found = checkpoint.checkpoints(Path(made.output))
        reached.append(int(found[-1].name[5:]) if found else 0)
    assert reached == sorted(reached)
    assert 20 < reached[-1] < 260
    train(made)
    assert losses(made.output) == losses(config("whole").output)
    assert_same_weights(Path(made.output) / "adapter", Path(config("whole").output) / "adapter")
    assert {p.name for p in (Path(made.output) / "checkpoints").iterdir()} == {"step-000258", "step-000260"}


def logged(made: TrainConfig) -> int:
    """Steps in the log at this moment."""
    log = Path(made.output) / "metrics.jsonl"
    return log.read_text().count("\n") if log.is_file() else 0


# --- usage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"height": 20}, UsageError, "height must be a positive multiple of 16, got 20"),
        ({"tasks": ["cany"]}, UsageError, "task must be one of .* got 'cany'"),
        ({"tasks": ["canny", "canny:low=5"]}, UsageError, r"tasks must each be given once, got \['canny', 'canny'\]"),
        ({"data": "/nowhere"}, Failure, "data must be an existing folder or file, got /nowhere"),
        ({"preset": "fast"}, ValueError, "preset must be one of"),
        ({"lora_targets": ["nonsense"]}, UsageError, "nonsense"),
        ({"base": "/nowhere"}, Exception, "/nowhere"),
    ],
)
def test_wrong_settings(
    config: Callable[..., TrainConfig], change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    """Settings that fit no model or data are told before the first step; no checkpoint or adapter is left."""
    with pytest.raises(kind, match=message):
        train(config(**change))
    left = list(Path(config().output).rglob("*")) if Path(config().output).exists() else []
    assert not [p for p in left if p.is_file() and p.name != "metrics.jsonl"]


def test_output_that_cannot_be_a_folder(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """An output that is a file is one line."""
    (tmp_path / "run").write_text("x")
    with pytest.raises(Failure, match=r"output must be a folder that can be written, got .*run"):
        train(config())


@pytest.mark.parametrize("preset", ["paper", "cached"])
def test_fused_kernels_follow_the_reference_step_by_step(config: Callable[..., TrainConfig], preset: str) -> None:
    """With kernels (on a CPU in the interpreter) each step's loss is the reference run's to float32 rounding."""
    settings: dict[str, Any] = {"steps": 4, "batch_size": 1, "warmup_steps": 0, "preset": preset, "lr_schedule": "constant"}
    runs = [
        losses(Path(train(config(name, fused_kernels=name == "fused", **settings))["log"]).parent)
        for name in ("reference", "fused")
    ]
    unlike = losses(Path(train(config("other", **(settings | {"learning_rate": 9e-3})))["log"]).parent)
    bound = ROUNDING32 * max(runs[0])
    assert all(abs(a - b) <= bound for a, b in zip(*runs, strict=True)), (runs, bound)
    # the test can fail: updates that are a tenth smaller are seen
    assert max(abs(a - b) for a, b in zip(runs[0], unlike, strict=True)) > 3 * bound


def test_fused_kernels_without_a_gpu(config: Callable[..., TrainConfig]) -> None:
    """--fused-kernels where Triton cannot run is exit status 2 with what is missing."""
    if torch.cuda.is_available():
        pytest.skip("kernels can run here")
    done = subprocess.run(
        command(config(), "--fused-kernels"),
        env=environment(TRITON_INTERPRET=None),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("realgeneral train: --fused-kernels cannot run here: ")
    assert "CUDA" in last or "triton" in last
    assert "Traceback" not in done.stderr
    assert not (Path(config().output) / "checkpoints").exists()


def test_learning_rate_schedule(config: Callable[..., TrainConfig]) -> None:
    """Linear warm-up to 1, then cosine to 0 or constant."""
    cosine = config(steps=10, warmup_steps=4)
    factors = [learning_rate_factor(cosine, step) for step in range(11)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[10] == pytest.approx(0.0)
    assert factors[7] == pytest.approx(0.5)
    assert factors[4:] == sorted(factors[4:], reverse=True)
    constant = config(steps=10, warmup_steps=0, lr_schedule="constant")
    assert {learning_rate_factor(constant, step) for step in range(10)} == {1.0}


def test_default_tasks() -> None:
    """Nano data has its six tasks, other data the paper's seven."""
    assert len(run_tasks([], "nano")) == 6
    assert len(run_tasks([], "/folder")) == 7


def test_loss_is_per_sample_in_float32() -> None:
    """Mean over everything but the batch, in float32 whatever comes in."""
    loss = v_loss(
        torch.ones(2, 1, 4, 2, 2, dtype=torch.bfloat16), torch.tensor([0.0, 3.0]).view(2, 1, 1, 1, 1).expand(2, 1, 4, 2, 2)
    )
    assert loss.dtype == torch.float32
    assert loss.tolist() == [1.0, 4.0]
