"""Training in two processes on the CPU: equal to one process, and leaving together whatever happens in one of them.

Where equality is demanded it is bit for bit, and this is why it holds. Two processes with micro-batches of one sample see the
samples that one process sees in two micro-steps, in tensors of the same shapes, so each sample's loss and gradient have the
same bits. The mean of two gradients is (a + b) / 2 or a / 2 + b / 2: halving is exact, and a sum of two terms has one order.
Only the norm of a sharded gradient is summed in another order, so these tests keep it from scaling anything.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from realgeneral.settings.train import TrainConfig
from realgeneral.training import checkpoint
from realgeneral.training import train as train_module
from realgeneral.training.processes.engine import Engine
from realgeneral.training.progress import tracking
from realgeneral.training.progress.bad_batch import load_bad_batch
from realgeneral.training.train import train
from tests.realgeneral.helpers.deepspeed import NEEDS_DEEPSPEED, compile_for_deepspeed
from tests.realgeneral.helpers.pictures import make_photo
from tests.realgeneral.helpers.processes import Outcome, run_processes
from tests.realgeneral.helpers.runs import assert_same_weights, losses, rows, weights

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
DEEPSPEED = pytest.param("deepspeed", marks=NEEDS_DEEPSPEED)
ENGINES = ("ddp", "fsdp2", DEEPSPEED)


def in_two(made: TrainConfig, work: Callable[..., Any] | None = None, *args: Any) -> list[Outcome]:
    if made.engine == "deepspeed":
        compile_for_deepspeed()
    return run_processes(work or plain, made, *args)


def assert_done(outcomes: list[Outcome]) -> list[Any]:
    assert [o.trace for o in outcomes] == ["", ""]
    return [o.value for o in outcomes]


def assert_failed_together(outcomes: list[Outcome], kind: str) -> list[str]:
    assert [o.kind for o in outcomes] == [kind, kind], [o.trace for o in outcomes]
    return [o.text for o in outcomes]


# --- what runs in the processes ------------------------------------------------------------------------------------------


def plain(rank: int, made: TrainConfig) -> dict[str, Any]:
    return train(made)


def after_row(step: int, action: Callable[[], None]) -> None:
    """Do something right after the row of `step` is logged."""
    original = tracking.MetricsLog.step

    def acting(self: Any, done: int, *args: Any) -> None:
        original(self, done, *args)
        if done == step:
            action()

    tracking.MetricsLog.step = acting  # type: ignore[method-assign]


def signalled(rank: int, made: TrainConfig, step: int) -> None:
    """The second process alone is asked to stop."""
    if rank == 1:
        after_row(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    train(made)


def counting(rank: int, made: TrainConfig) -> tuple[int, int]:
    """Numbers that this process holds of the transformer, and all of them."""
    original, counts = train_module.finish, []

    def spy(run: Any) -> Any:
        parameters = list(run.pipe.transformer.parameters())
        local = sum(getattr(p, "_local_tensor", p).numel() for p in parameters)
        counts.append((local, sum(p.numel() for p in parameters)))
        return original(run)

    train_module.finish = spy
    train(made)
    return counts[0]


def counting_zero2(rank: int, made: TrainConfig) -> tuple[int, int, int]:
    """Numbers that this process holds of the gradients at the end of a step and of a state, and those trained."""
    original, counts = train_module.check_finite, []

    def spy(run: Any, *args: Any) -> None:
        original(run, *args)
        counts.append(sum(part.numel() for part in run.optimizer.zero.averaged_gradients[0]))

    train_module.check_finite = spy
    original_finish = train_module.finish

    def finish(run: Any) -> Any:
        (states,) = run.optimizer.inner.state.values()
        counts.extend([states["exp_avg"].numel(), sum(p.numel() for p in run.trained)])
        assert all(p.grad is None for p in run.trained)
        return original_finish(run)

    train_module.finish = finish
    train(made)
    return tuple(counts)  # type: ignore[return-value]


def closing(rank: int, made: TrainConfig) -> bool:
    """Whether the reducer of gradients is gone when the group of processes ends."""
    prepare, destroy = Engine.prepare, torch.distributed.destroy_process_group
    reducers, gone = [], []

    def remember(self: Engine, transformer: Any) -> Any:
        model = prepare(self, transformer)
        reducers.append(weakref.ref(model.reducer))
        return model

    def spy(group: Any = None) -> None:
        gone.append(reducers[0]() is None)
        destroy(group)

    Engine.prepare, torch.distributed.destroy_process_group = remember, spy  # type: ignore[method-assign]
    train(made)
    return gone[0]


def poisoned(rank: int, made: TrainConfig, step: int, where: str) -> None:
    """The second process alone meets a NaN in `step`."""
    original, calls = train_module.training_loss, [0]

    def loss_of(pipe: Any, model: Any, texts: Any, batch: Any, draws: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == step and where == "loss":
            batch.target.fill_(float("nan"))
        loss = original(pipe, model, texts, batch, draws)
        if calls[0] == step and where == "gradient":
            loss.register_hook(lambda grad: grad * float("nan"))
        return loss

    if rank == 1:
        train_module.training_loss = loss_of
    train(made)


def full_disk(rank: int, made: TrainConfig) -> None:
    """The main process cannot write its second checkpoint."""
    original, calls = torch.save, [0]

    def save(*args: Any, **kwargs: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise OSError(28, "No space left on device")
        original(*args, **kwargs)

    torch.save = save
    train(made)


def unshared(rank: int, made: TrainConfig) -> None:
    """The second process has a folder of its own at --output."""
    train(dataclasses.replace(made, output=f"{made.output}-of-{rank}") if rank else made)


# --- the same training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one(config: Callable[..., TrainConfig], engine: str) -> None:
    """Losses, tasks, adapter, average and sample pictures have the bits of one process with the same samples per step."""
    sampling = {"sample_count": 1, "sample_every": 2, "sample_steps": 2}
    two = config("two", engine=engine, **sampling)
    assert_done(in_two(two))
    train(config("one", gradient_accumulation_steps=2, **sampling))
    one, run = Path(config("one").output), Path(two.output)
    assert losses(run) == losses(one)
    for mine, theirs in zip(rows(run), rows(one), strict=True):
        assert mine["tasks"] == theirs["tasks"] and mine["timesteps"] == theirs["timesteps"]
        assert len(mine["tasks"]) <= 2
    assert_same_weights(run / "adapter", one / "adapter")
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["step-000002.png", "step-000004.png"]
    for picture in (one / "samples").iterdir():
        assert (run / "samples" / picture.name).read_bytes() == picture.read_bytes()
    # states too are whole and equal, so that any engine continues from them
    mine, theirs = (
        torch.load(folder / "checkpoints/step-000004/training_state.pt", weights_only=True) for folder in (run, one)
    )
    for index, state in theirs["optimizer"]["state"].items():
        assert all(torch.equal(value, mine["optimizer"]["state"][index][name]) for name, value in state.items())
    assert all(torch.equal(a, b) for a, b in zip(mine["ema"]["shadow_params"], theirs["ema"]["shadow_params"], strict=True))


@pytest.mark.parametrize("engine", ["fsdp2", DEEPSPEED])
def test_larger_micro_batches_and_checkpointing(config: Callable[..., TrainConfig], engine: str, tmp_path: Path) -> None:
    """Ragged use: three samples per process over two micro-steps, selective checkpointing, preset paper, sharded, norm clipped.

    DeepSpeed's buckets are smaller than some gradients here.

    Here sums have other orders, and AdamW turns the rounding of a gradient that is nearly zero into a step of up to the
    learning rate: the losses agree as far as those of one process do that accumulates instead of batching.
    """
    shared = {"preset": "paper", "max_grad_norm": 0.1, "steps": 3, "ema_decay": 0.0, "save_every": 1}
    buckets = {"stage": 2, "reduce_bucket_size": 300, "allgather_bucket_size": 1000}
    (tmp_path / "zero2.json").write_text(json.dumps({"zero_optimization": buckets}))
    two = config(
        "two", engine=engine, batch_size=3, gradient_accumulation_steps=2, gradient_checkpointing="selective",
        deepspeed_config=str(tmp_path / "zero2.json") if engine == "deepspeed" else "", **shared,
    )  # fmt: skip
    assert_done(in_two(two))
    values = {}
    for name, batch, micro in (("batched", 12, 1), ("accumulated", 1, 12)):
        train(config(name, batch_size=batch, gradient_accumulation_steps=micro, **shared))
        values[name] = losses(config(name).output)
    # before the first update only the order of sums differs
    first, expected = rows(two.output)[0], rows(config("batched").output)[0]
    assert expected["gradient_norm"] > shared["max_grad_norm"]
    for name in ("loss", "gradient_norm"):
        assert first[name] == pytest.approx(expected[name], rel=16 * torch.finfo(torch.float32).eps)
    # what AdamW saw of the gradient
    assert first_moment(two) == pytest.approx(first_moment(config("batched")), rel=16 * torch.finfo(torch.float32).eps)
    spread = max(abs(a - b) / b for a, b in zip(values["batched"], values["accumulated"], strict=True))
    for mine, theirs in zip(losses(two.output), values["batched"], strict=True):
        assert abs(mine - theirs) / theirs <= 10 * spread + 16 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_in_bfloat16(config: Callable[..., TrainConfig], engine: str) -> None:
    """A frozen base in bfloat16 beside trained weights in float32, autocast: the bits of one process.

    DeepSpeed switches off the autocast around its engine, and the model's own takes its place.
    """
    two = config("two", engine=engine, mixed_precision="bf16", steps=2)
    assert_done(in_two(two))
    train(config("one", mixed_precision="bf16", steps=2, gradient_accumulation_steps=2))
    assert losses(two.output) == losses(config("one").output)
    assert_same_weights(Path(two.output) / "adapter", Path(config("one").output) / "adapter")


def test_shards_are_shares(config: Callable[..., TrainConfig]) -> None:
    """Each process holds half of all weights, frozen ones included, and the main process alone writes."""
    held = assert_done(in_two(config(engine="fsdp2", steps=1), counting))
    total = held[0][1]
    assert sum(local for local, _ in held) == total
    assert all(abs(local - total / 2) < 0.01 * total for local, _ in held)
    assert len(rows(config().output)) == 1


def first_moment(made: TrainConfig) -> float:
    """Norm of AdamW's average gradient after the first step."""
    path = Path(made.output) / "checkpoints/step-000001/training_state.pt"
    states = torch.load(path, weights_only=True)["optimizer"]["state"].values()
    return torch.stack([state["exp_avg"].norm() for state in states]).norm().item()


@NEEDS_DEEPSPEED
def test_zero2_shares_gradients_and_states(config: Callable[..., TrainConfig]) -> None:
    """Each process holds half of the reduced gradients and of AdamW's states, rounded up to DeepSpeed's alignment."""
    held = assert_done(in_two(config(engine="deepspeed", steps=1), counting_zero2))
    trained = held[0][2]
    for gradients, states, _ in held:
        assert trained / 2 <= gradients == states <= trained / 2 + 2


def test_reducer_goes_before_the_group(config: Callable[..., TrainConfig]) -> None:
    """Were it the group's last owner, it would wait with the GIL for threads that need the GIL: a rare hang at the very end."""
    assert assert_done(in_two(config(steps=1), closing)) == [True, True]


# --- leaving together ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "then"),
    [
        ("ddp", "ddp"),
        ("fsdp2", "fsdp2"),
        pytest.param("deepspeed", "deepspeed", marks=NEEDS_DEEPSPEED),
        pytest.param("fsdp2", "deepspeed", marks=[NEEDS_DEEPSPEED, pytest.mark.slow]),
        pytest.param("deepspeed", "fsdp2", marks=[NEEDS_DEEPSPEED, pytest.mark.slow]),
    ],
)
def test_signal_to_one_process_stops_both_and_resumes(config: Callable[..., TrainConfig], engine: str, then: str) -> None:
    """SIGTERM in one process: both save and stop after the same step; two processes, then one, continue to the same bits."""
    train(config("one", gradient_accumulation_steps=2, steps=5))
    broken = {"steps": 5, "save_every": 9}
    for text in assert_failed_together(in_two(config("two", engine=engine, **broken), signalled, 1), "Failure"):
        assert text == f"stopped by signal {int(signal.SIGTERM)} after step 1; the same command with --resume continues"
    for text in assert_failed_together(in_two(config("two", engine=then, resume=True, **broken), signalled, 3), "Failure"):
        assert "after step 3;" in text
    assert [p.name for p in checkpoint.checkpoints(Path(config("two").output))] == ["step-000001", "step-000003"]
    train(config("two", resume=True, steps=5, gradient_accumulation_steps=2))
    assert losses(config("two").output) == losses(config("one").output)
    assert_same_weights(Path(config("two").output) / "adapter", Path(config("one").output) / "adapter")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_in_one_process_stops_both(config: Callable[..., TrainConfig], engine: str, where: str) -> None:
    """Both leave at once with an error that names the rows, the bad batch is saved, the checkpoint before is intact."""
    texts = assert_failed_together(in_two(config(engine=engine, save_every=1), poisoned, 3, where), "Failure")
    run = Path(config().output)
    assert all(text.startswith(f"{where} must be finite, got ") and "at step 3" in text for text in texts)
    if where == "loss":
        assert texts[0] == f"{texts[1]} (in process 1)"
        assert sorted(p.name for p in (run / "bad_batch-000003").iterdir()) == ["rank-1.json", "rank-1.safetensors"]
        ((batch, _),) = load_bad_batch(run / "bad_batch-000003", 1)
        assert batch.target.isnan().all()
        assert all(name in texts[0] for name in batch.names)
    else:
        assert len(list((run / "bad_batch-000003").iterdir())) == 4
    last = checkpoint.checkpoints(run)[-1]
    assert last.name == "step-000002"
    assert all(value.isfinite().all() for value in weights(last).values())


@pytest.mark.parametrize("engine", ENGINES)
def test_bad_row_in_one_process_stops_both(config: Callable[..., TrainConfig], engine: str, tmp_path: Path) -> None:
    """With --strict a bad row that one process meets ends both, with its name."""
    lines = []
    for i in range(3):
        make_photo(48, 32, i).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"target": f"{i}.png", "prompt": "a cat"}))
    lines.append(json.dumps({"target": "nothing.png", "prompt": "a cat"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    outcomes = in_two(config(data=str(tmp_path), strict=True, engine=engine, steps=9))
    texts = assert_failed_together(outcomes, "Failure")
    assert all(text.startswith("metadata.jsonl line 4") for text in texts)
    assert sum("(in process" in text for text in texts) == 1


def test_an_output_that_not_all_see(config: Callable[..., TrainConfig]) -> None:
    """A process that finds no checkpoint where another one does stops both, before anything is trained."""
    train(config(steps=4, gradient_accumulation_steps=2, lr_schedule="constant"))
    made = config(steps=6, resume=True, lr_schedule="constant")
    for text in assert_failed_together(in_two(made, unshared), "UsageError"):
        assert text.startswith("output must be a folder that all processes see, got ")
        assert text.endswith("with step 4 in process 0 and step 0 in process 1")
    assert len(losses(made.output)) == 4


def test_full_disk_stops_both(config: Callable[..., TrainConfig]) -> None:
    """A checkpoint that the main process cannot write ends both; the one before is intact."""
    texts = assert_failed_together(in_two(config(), full_disk), "Failure")
    assert all("checkpoint of step 4 could not be written" in text and "No space left" in text for text in texts)
    assert [p.name for p in checkpoint.checkpoints(Path(config().output))] == ["step-000002"]
