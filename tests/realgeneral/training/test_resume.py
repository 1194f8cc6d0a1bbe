"""The trainer: exact continuation, and every way a run can end early."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from realgeneral.errors import Failure, UsageError
from realgeneral.files import locked
from realgeneral.model.adapter import CONDITION_FILE, LORA_FILE, AdapterTensors
from realgeneral.settings.train import TrainConfig
from realgeneral.training import checkpoint
from realgeneral.training import train as train_module
from realgeneral.training.progress.bad_batch import load_bad_batch
from realgeneral.training.train import train
from tests.realgeneral.helpers.checkpoints import tiny_transformer
from tests.realgeneral.helpers.pictures import make_photo
from tests.realgeneral.helpers.processes import start
from tests.realgeneral.helpers.runs import assert_same_weights, command, environment, losses, rows, train_until, weights

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


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


@pytest.mark.parametrize("resume", [False, True])
def test_output_that_holds_an_adapter_alone(config: Callable[..., TrainConfig], resume: bool) -> None:
    """A finished run whose checkpoints were deleted is not overwritten either."""
    adapter = Path(train(config(steps=1))["adapter"])
    shutil.rmtree(adapter.parent / "checkpoints")
    before = weights(adapter)
    with pytest.raises(UsageError, match=r"output must be a new folder, got .* holds a finished adapter and no checkpoint"):
        train(config(steps=1, seed=1, resume=resume))
    assert all(torch.equal(value, before[name]) for name, value in weights(adapter).items())


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


def test_base_that_changed_on_resume(config: Callable[..., TrainConfig], bases: dict[str, Path], tmp_path: Path) -> None:
    """Other weights in the folder of the same name are refused: the run would go on from what it never saw."""
    base = shutil.copytree(bases["5b"], tmp_path / "base")
    settings = {"base": str(base), "lr_schedule": "constant"}
    train(config(steps=2, **settings))
    tiny_transformer("5b", seed=7).save_pretrained(base / "transformer")
    with pytest.raises(UsageError, match=r"base must have the weights of the run to resume, got .*base with others"):
        train(config(steps=3, resume=True, **settings))


def test_fewer_steps_on_resume(config: Callable[..., TrainConfig]) -> None:
    """A run cannot end before where it is."""
    train(config(steps=4, lr_schedule="constant"))
    with pytest.raises(UsageError, match="steps must be at least the 4 of the run to resume, got 3"):
        train(config(steps=3, lr_schedule="constant", resume=True))


def test_skipped_rows_are_counted_across_a_break(
    config: Callable[..., TrainConfig], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The count at the end is that of an unbroken run, also when a finished one is resumed."""
    folder = shutil.copytree(data, tmp_path / "with bad rows")
    for name in ("1.png", "4.png"):
        (folder / name).write_bytes(b"no picture")
    assert train(config("whole", data=str(folder)))["skipped"] == 2
    train_until(config("broken", data=str(folder)), 5, monkeypatch)
    for _ in range(2):
        assert train(config("broken", data=str(folder), resume=True))["skipped"] == 2


def test_resume_without_the_adapter_that_it_started_from(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint has all of it."""
    start = train(config("start", steps=1))["adapter"]
    train(config("whole", init_adapter=start))
    train_until(config("broken", init_adapter=start), 3, monkeypatch)
    shutil.rmtree(start)
    train(config("broken", init_adapter=start, resume=True))
    assert losses(config("broken").output) == losses(config("whole").output)
    assert_same_weights(Path(config("broken").output) / "adapter", Path(config("whole").output) / "adapter")


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
    with pytest.raises(Failure, match=r"must be a complete file, got a damaged one .*; remove step-000002 to resume before it"):
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
    again = [original(*seen[-1][:3], *pair) for pair in load_bad_batch(str(folder))]
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


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_process_resumes_to_the_same_losses(
    config: Callable[..., TrainConfig], number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        train_until(resumed, stop_at, monkeypatch)
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


# --- damaged files, useless numbers, two runs of one folder --------------------------------------------------------------


def test_flipped_bits_of_a_checkpoint(config: Callable[..., TrainConfig]) -> None:
    """Wherever a bit of any of its files is flipped, resuming is refused in one line; with the bit back it goes on."""
    train(config(steps=2))
    folder = Path(config().output) / "checkpoints" / "step-000002"
    rng, resumed = random.Random(0), config(steps=2, resume=True)
    for name in sorted(path.name for path in folder.iterdir()):
        content = (folder / name).read_bytes()
        for place in (rng.randrange(len(content) * 8) for _ in range(12)):
            damaged = bytearray(content)
            damaged[place // 8] ^= 1 << place % 8
            (folder / name).write_bytes(damaged)
            with pytest.raises((Failure, UsageError)) as caught:
                checkpoint.start_or_resume(resumed, Path(resumed.output))
            assert "\n" not in str(caught.value)
        (folder / name).write_bytes(content)
    assert checkpoint.start_or_resume(resumed, Path(resumed.output)) == folder


def test_a_checkpoint_of_version_0_1_has_no_digests(config: Callable[..., TrainConfig]) -> None:
    """It goes on as before."""
    first = train(config(steps=2))
    (Path(config().output) / "checkpoints" / "step-000002" / checkpoint.DIGESTS_FILE).unlink()
    assert train(config(steps=2, resume=True))["loss"] == first["loss"]


def test_a_file_that_vanishes_is_not_called_damaged(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process dropped the checkpoint between listing and reading: nobody is told to remove a good one."""
    train(config(steps=2))
    folder = Path(config().output) / "checkpoints" / "step-000002"
    monkeypatch.setattr(checkpoint, "checkpoints", lambda output: [folder])
    shutil.move(folder / checkpoint.STATE_FILE, folder.parent)
    with pytest.raises(Failure, match=r"training_state.pt must stay while it is read, got a file that is gone") as caught:
        checkpoint.start_or_resume(config(steps=2, resume=True), Path(config().output))
    assert "remove" not in str(caught.value)


def test_weights_that_are_no_numbers_are_not_written(config: Callable[..., TrainConfig]) -> None:
    """A rate that throws the weights out of all bounds: the message names the last sane step, and nothing useless is kept."""
    constant = {"lr_schedule": "constant", "output": "run"}
    train(config(steps=2, **constant))
    output = Path(config().output)
    with pytest.raises(Failure, match=r"nothing was written; the newest checkpoint is step-000002|, earlier checkpoints are"):
        train(config(steps=4, resume=True, learning_rate=1e10, **constant))
    kept = checkpoint.checkpoints(output)
    assert [path.name for path in kept] == ["step-000002"]
    assert all(torch.isfinite(tensor).all() for folder in (kept[-1], output / "adapter") for tensor in weights(folder).values())


@pytest.mark.parametrize("part", ["weight", "average", "optimizer"])
def test_the_last_check_sees_every_number(config: Callable[..., TrainConfig], tmp_path: Path, part: str) -> None:
    """Each part of a checkpoint is looked at before it is written; without an earlier one that is said."""
    bad, good = torch.tensor([1.0, math.nan]), torch.ones(2)
    adapter = AdapterTensors({"a": bad if part == "weight" else good}, {}, {})
    state: dict[str, Any] = {
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": bad if part == "optimizer" else good}}},
        "ema": {"shadow_params": [bad if part == "average" else good]},
    }
    with pytest.raises(Failure, match=r"got nan in .* after step 3, and nothing was written; there is no checkpoint yet"):
        checkpoint.check_training_state(tmp_path, 3, adapter, state)


def test_two_runs_of_one_folder(config: Callable[..., TrainConfig]) -> None:
    """The second is refused before it does anything, with the process that holds the folder; afterwards it may."""
    made = config(steps=2)
    Path(made.output).mkdir(parents=True)
    with locked(made.output):
        before = sorted(Path(made.output).rglob("*"))
        with pytest.raises(Failure, match=f"must be written by one process at a time, but process {os.getpid()} on .* holds"):
            train(made)
        assert sorted(Path(made.output).rglob("*")) == before
    train(made)
    assert not list(Path(made.output).glob(".*"))


def test_another_run_has_begun_meanwhile(config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two started together on a new folder, one of them slow: it does not write over what the other one made."""
    original = train_module.load_models

    def slow(settings: TrainConfig, device: torch.device) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(train_module, "load_models", original)
            train(config(steps=2))
        return original(settings, device)

    monkeypatch.setattr(train_module, "load_models", slow)
    with pytest.raises(Failure, match="in which another run has begun meanwhile"):
        train(config(steps=4))
    assert [path.name for path in checkpoint.checkpoints(Path(config().output))] == ["step-000002"]
