"""The memory budget against what PyTorch's profiler sees allocated."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from realgeneral import RealGeneralPipeline
from realgeneral.data.samples import Batch
from realgeneral.data.shapes import Shape
from realgeneral.errors import Failure
from realgeneral.settings.train import TrainConfig
from realgeneral.training import train as train_module
from realgeneral.training.features import TextCache
from realgeneral.training.memory import (
    MemoryBudget,
    PeakBytes,
    StepShape,
    largest,
    memory_budget,
    nbytes,
    sample_bytes,
    step_bytes,
)
from realgeneral.training.models import load_models
from realgeneral.training.objective import Draws, training_loss
from realgeneral.training.train import train
from tests.realgeneral.helpers.checkpoints import tiny_text_encoder, tiny_tokenizer, tiny_transformer, tiny_vae
from tests.realgeneral.helpers.pictures import make_photo

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
GIVEN = 0.15  # what the budget promises


def settings(base: str, **changes: Any) -> TrainConfig:
    fixed: dict[str, Any] = {"data": "unused", "tasks": ["canny"], "rank": 4, "steps": 2, "sample_count": 0}
    return TrainConfig(base=base, **{**fixed, **changes})


def measure(pipe: RealGeneralPipeline, config: TrainConfig, shape: StepShape) -> int:
    """Peak of the bytes that the profiler sees allocated in the second optimizer step."""
    trained = [p for p in pipe.transformer.parameters() if p.requires_grad]
    optimizer, texts = torch.optim.AdamW(trained), TextCache(pipe)
    rows = range(shape.batch)
    pixels = torch.rand(shape.batch, 1 + shape.conditions, 3, shape.height, shape.width) * 2 - 1
    batch = Batch(
        list(rows), pixels[:, 0].clone(), pixels[:, 1:].clone(), ["a red pot"] * shape.batch, ["canny"] * shape.batch,
        [None] * shape.batch, ["x"] * shape.batch, [],
    )  # fmt: skip
    del pixels

    def step() -> None:
        for _ in range(config.gradient_accumulation_steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=config.mixed_precision == "bf16"):
                training_loss(pipe, pipe.transformer, texts, batch, Draws.of(config, batch.numbers, 1000)).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    return peak_of(step)


def peak_of(work: Callable[[], Any]) -> int:
    """Peak of the bytes that the profiler sees allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    live = peak = 0
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": "full"},
        {"gradient_checkpointing": "selective", "preset": "paper"},
        {"mixed_precision": "bf16"},
        {"gradient_accumulation_steps": 2},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "plain",
)
def test_step_of_nano(changes: dict[str, Any]) -> None:
    """The step's peak is as predicted, for the shipped model."""
    config, shape = settings("nano", **changes), StepShape(3, 1, 64, 64)
    pipe, _ = load_models(config, torch.device("cpu"))
    predicted = step_bytes(pipe, config, shape, keep_gradients=config.gradient_accumulation_steps > 1)
    assert predicted == pytest.approx(measure(pipe, config, shape), rel=GIVEN)


@pytest.mark.parametrize("preset", ["cached", "paper"])
def test_sample_grid_of_nano(preset: str, photo: Image.Image) -> None:
    """A picture's peak is as predicted; a VAE that is lent to the device counts too, and the budget has room for all of it."""
    config = settings("nano", preset=preset, guidance_scale=3.0, height=128, width=128)
    pipe, _ = load_models(config, torch.device("cpu"))
    text = torch.zeros(1, pipe.transformer.config.max_text_seq_length, pipe.transformer.config.text_embed_dim)

    def work() -> None:
        pipe(
            "a cat", [photo], task="canny", height=128, width=128, num_inference_steps=2, guidance_scale=3.0, output_type="pt",
            prompt_embeds=text, negative_prompt_embeds=text, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip

    work()
    predicted = sample_bytes(pipe, config, 1)
    assert predicted == pytest.approx(peak_of(work), rel=GIVEN)
    lent = predicted + nbytes(pipe.vae.parameters())
    assert sample_bytes(pipe, config, 1, encode=False) == lent
    sampled = memory_budget(pipe, dataclasses.replace(config, sample_count=1), StepShape(1, 1, 16, 16), encode=False)
    assert sampled.step == lent


def test_step_of_a_middle_sized_model() -> None:
    """Eight blocks of 256 channels at a ragged size with two conditions; each kind of checkpointing holds what is predicted."""
    transformer = tiny_transformer("5b", num_layers=8, num_attention_heads=4, attention_head_dim=64, time_embed_dim=64)
    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    stock = RealGeneralPipeline(tiny_tokenizer(), tiny_text_encoder(), tiny_vae(), transformer, scheduler)
    predicted, shape = {}, StepShape(2, 2, 80, 112)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RealGeneralPipeline, "from_pretrained", lambda *_, **__: copy.deepcopy(stock))
        for kind in ("none", "full", "selective"):
            config = settings("given", gradient_checkpointing=kind)
            pipe, _ = load_models(config, torch.device("cpu"))
            predicted[kind] = step_bytes(pipe, config, shape)
            assert predicted[kind] == pytest.approx(measure(pipe, config, shape), rel=GIVEN)
    assert predicted["full"] < predicted["selective"] < predicted["none"] / 3


def test_budget_counts_every_part(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights by their own bytes, 8-bit states a quarter, shards by their share; nothing of the model changes."""
    config, shape = settings(str(bases["5b"]), ema_decay=0.9), StepShape(2, 1, 16, 32)
    pipe, _ = load_models(config, torch.device("cpu"))
    before = {n: p.clone() for n, p in pipe.transformer.named_parameters()}
    budget = memory_budget(pipe, config, shape)
    trained = nbytes(p for p in pipe.transformer.parameters() if p.requires_grad)
    assert budget.base == nbytes(pipe.transformer.parameters()) - trained
    assert budget.encoders == nbytes([*pipe.vae.parameters(), *pipe.text_encoder.parameters()])
    assert (budget.trained, budget.optimizer) == (2 * trained, 2 * trained)
    assert budget.total == budget.base + budget.encoders + budget.trained + budget.optimizer + budget.step
    eight = memory_budget(pipe, settings(str(bases["5b"]), optimizer="adamw8bit"), shape)
    assert budget.optimizer / 4 < eight.optimizer < budget.optimizer / 3.8
    assert memory_budget(pipe, config, shape, encode=False).encoders == 0
    sharded = memory_budget(pipe, settings(str(bases["5b"]), engine="fsdp2"), shape, processes=4)
    assert sharded.base == budget.base // 4
    summed = memory_budget(pipe, settings(str(bases["5b"]), engine="fsdp2", gradient_accumulation_steps=2), shape, processes=4)
    assert summed.step == sharded.step + trained - trained // 4
    zero2 = {"engine": "deepspeed", "deepspeed_config": "zero2.json"}
    monkeypatch.setattr("realgeneral.training.memory.bucket_bytes", lambda config: 2**20)
    shared = memory_budget(pipe, settings(str(bases["5b"]), **zero2), shape, processes=4)
    assert (shared.base, shared.trained, shared.optimizer) == (budget.base, trained + trained // 4, budget.optimizer // 4)
    copies = memory_budget(pipe, settings(str(bases["5b"])), shape, processes=4)
    assert shared.step == copies.step + 2**20 - trained + 2 * trained // 4
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in pipe.transformer.named_parameters())


def test_text_of_a_budget() -> None:
    """One line that names each part."""
    budget = MemoryBudget(11 * 2**30, 2**29, 2**30, 2**31, 3 * 2**30)
    assert str(budget) == ("about 17.5 GiB: base 11, encoders 0.5, trained weights 1, optimizer 2, gradients and activations 3")


def test_peak_bytes() -> None:
    """A storage counts once, for as long as something refers to it."""
    with PeakBytes() as counter:
        a = torch.ones(1000)
        view = a.view(10, 100).t()
        b = a + 1
        assert counter.live == 8000
        del a, b
        assert counter.live == 4000
        del view
        assert counter.live == 0
        torch.ones(10)
    assert counter.peak == 8000


def test_budget_is_told_before_the_run(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], photo: Any
) -> None:
    """The line comes before the first step, and every row of the log has the memory in use."""
    photo.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a red pot")
    result = train(
        TrainConfig(
            base=str(bases["5b"]), data=str(tmp_path), tasks=["canny"], output=str(tmp_path / "run"), height=16, width=32,
            rank=2, steps=1, batch_size=2, sample_count=0,
        )
    )  # fmt: skip
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("needs about 0.00")
    assert line.endswith("(2 samples per micro-step, 1 condition each, 32 x 16 pixels)")
    (row,) = map(json.loads, Path(result["log"]).read_text().splitlines())
    assert row["memory_gib"] > 0.05  # Python and PyTorch alone


def test_largest_shapes() -> None:
    """The transformer's sequence grows with the conditions, the VAE sees one picture at a time."""
    shapes = [Shape(16, 16, 1), Shape(16, 32, 1), Shape(32, 16, 4), Shape(64, 16, 1)]
    assert largest(shapes) == {Shape(32, 16, 4), Shape(64, 16, 1)}
    assert largest(shapes[:2]) == {Shape(16, 32, 1)}


def test_budget_is_that_of_the_largest_bucket(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever batch comes first; and it is told before anything is moved to the device."""
    for width, height in ((48, 32), (96, 32), (32, 96)):
        make_photo(width, height).save(tmp_path / f"{width}.png")
    rows = [{"target": f"{width}.png", "prompt": "a cat", "task": "canny", "condition": ["48.png"] * (1 + (width == 96))}
            for width in (48, 96, 32, 32, 32)]  # fmt: skip
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def full(pipe: Any, *_: Any) -> None:
        raise Failure("no room on the device")

    monkeypatch.setattr(train_module, "place_models", full)
    shared: dict[str, Any] = {"base": str(bases["5b"]), "data": str(tmp_path), "tasks": ["canny"], "rank": 2, "batch_size": 1}
    for seed in (0, 1, 2):
        made = TrainConfig(output=str(tmp_path / f"{seed}"), seed=seed, buckets=["32x48", "16x48", "48x16"], **shared)
        with pytest.raises(Failure, match="no room on the device"):
            train(made)
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.endswith("(1 samples per micro-step, 1 condition each, 48 x 32 pixels)")
