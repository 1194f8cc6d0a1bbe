"""Launch lines of the documentation, and what `--engine` refuses before anything is loaded."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from realgeneral.errors import UsageError
from realgeneral.settings.train import TrainConfig
from realgeneral.training.train import train
from tests.realgeneral.helpers.deepspeed import NEEDS_DEEPSPEED, compile_for_deepspeed
from tests.realgeneral.helpers.runs import rows

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# --multi_gpu also means several processes on a CPU; port 0: one that is free
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")


@pytest.mark.parametrize(
    ("launcher", "engine"),
    [
        pytest.param(TORCHRUN, "ddp", marks=pytest.mark.slow),
        (TORCHRUN, "fsdp2"),
        (ACCELERATE, "ddp"),
        pytest.param(ACCELERATE, "deepspeed", marks=[NEEDS_DEEPSPEED, pytest.mark.slow]),
    ],
    ids=["torchrun-ddp", "torchrun-fsdp2", "accelerate-ddp", "accelerate-deepspeed"],
)
def test_launched(config: Callable[..., TrainConfig], launcher: tuple[str, ...], engine: str) -> None:
    """The documented launch lines; one summary, one log."""
    if engine == "deepspeed":
        compile_for_deepspeed()
    made = config(steps=2, engine=engine)
    arguments = [sys.executable, "-m", *launcher, "-m", "realgeneral", "train"]
    names = "base data output height width rank steps batch_size learning_rate deepspeed_config"
    for name in names.split():
        arguments += [f"--{name.replace('_', '-')}", str(getattr(made, name))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*arguments, "--tasks", "canny", "--sample-count", "0", "--engine", engine],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=180)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    assert out.count("needs about") == 1
    assert [row["step"] for row in rows(made.output)] == [1, 2]
    assert load_file(Path(made.output) / "adapter/realgeneral.safetensors")


def test_samples_per_step_must_stay(config: Callable[..., TrainConfig]) -> None:
    """A run of two micro-steps continues in one process only with two."""
    train(config(steps=2, gradient_accumulation_steps=2))
    with pytest.raises(UsageError, match=r"batch_size \* gradient_accumulation_steps \* processes must be 2 as in the run"):
        train(config(steps=2, gradient_accumulation_steps=3, resume=True))


def test_engine_of_the_launcher(config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher that sets DeepSpeed up itself is refused, on a CPU too."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match="the launcher must start plain processes"):
        train(config())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, r"engine fsdp2 needs several processes \(torchrun or accelerate launch\), got 1"),
        ({"optimizer": "adamw8bit"}, "engine fsdp2"),
        ({"engine": "deepspeed"}, "engine deepspeed needs several processes"),
    ],
)
def test_engine_in_one_process(config: Callable[..., TrainConfig], change: dict[str, Any], message: str) -> None:
    """Told before anything is loaded."""
    with pytest.raises(UsageError, match=message):
        train(config(**{"engine": "fsdp2", **change}))
    assert not Path(config().output).exists()
