"""The trainer: what is trained and what is not, what it writes, and the settings that it refuses."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from realgeneral import RealGeneralPipeline
from realgeneral.errors import Failure, UsageError
from realgeneral.model.adapter import read_adapter_info
from realgeneral.settings.train import LORA_TARGETS, TrainConfig
from realgeneral.training import train as train_module
from realgeneral.training.progress import grids as samples
from realgeneral.training.train import train
from tests.realgeneral.helpers.checkpoints import tiny_transformer
from tests.realgeneral.helpers.pictures import make_photo
from tests.realgeneral.helpers.runs import assert_same_weights, command, environment, losses, rows, weights

# rounding of some thousand float32 operations
ROUNDING32 = 2e3 * torch.finfo(torch.float32).eps
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


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
        [sys.executable, "-m", "realgeneral", "generate", *(f"--{key}={value}" for key, value in arguments.items())],
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
    with pytest.raises(UsageError, match=r"LoRA target must name linear layers of the base, got 'ff.net.7'"):
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
