"""Checkpoints and logs of a training run: written whole or not at all, and enough to continue exactly.

A checkpoint `checkpoints/step-000200/` holds the adapter (as trained, float32) and `training_state.pt` (optimizer, average,
step, settings; read with `weights_only=True`). Random numbers need no state: they are functions of (seed, step).
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft.utils import set_peft_model_state_dict

from realgeneral.adapter import CONDITION_FILE, LORA_FILE, AdapterInfo, copy_branch, read_tensors, save_adapter
from realgeneral.config import TrainConfig, check_resumable
from realgeneral.errors import Failure, UsageError

STATE_FILE = "training_state.pt"


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = (output / "checkpoints").glob("step-*")
    complete = (p for p in found if p.name.removeprefix("step-").isdecimal() and (p / STATE_FILE).is_file())
    return sorted(complete, key=lambda p: int(p.name.removeprefix("step-")))


def start_or_resume(config: TrainConfig, output: Path) -> Path | None:
    """The checkpoint to continue from, or None for a fresh run.

    Raises:
        UsageError: The folder holds a run and `resume` is off, or the settings differ from that run's.
        Failure: The output cannot be made a folder.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"output must be a folder that can be written, got {output}: {error.strerror}") from None
    found = checkpoints(output)
    if not found:
        return None
    if not config.resume:
        raise UsageError(f"output must be a new folder, got {output} which holds {found[-1].name}; add --resume to continue it")
    check_resumable(_read_state(found[-1])["config"], config)
    return found[-1]


def save(output: Path, config: TrainConfig, info: AdapterInfo, step: int, transformer: Any, optimizer: Any, ema: Any) -> Path:
    """Write `step-NNNNNN` beside its final name, rename it, and drop the oldest beyond `keep_checkpoints`."""
    final = output / "checkpoints" / f"step-{step:06d}"
    partial = final.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_adapter(transformer, partial, info)
        state = {
            "step": step,
            "config": asdict(config),
            "optimizer": optimizer.state_dict(),
            "ema": ema.state_dict() if ema is not None else None,
        }
        torch.save(state, partial / STATE_FILE)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise Failure(
            f"checkpoint of step {step} could not be written to {final.parent} ({error}); earlier ones are intact"
        ) from None
    for old in checkpoints(output)[: -config.keep_checkpoints]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load(folder: Path, transformer: Any, optimizer: Any, ema: Any) -> int:
    """Restore weights, optimizer and average; returns the number of steps done."""
    state = _read_state(folder)
    copy_branch(transformer, read_tensors(folder / CONDITION_FILE), folder / CONDITION_FILE)
    lora = {name.removeprefix("transformer."): x for name, x in read_tensors(folder / LORA_FILE).items()}
    set_peft_model_state_dict(transformer, lora)
    optimizer.load_state_dict(state["optimizer"])
    if ema is not None:
        ema.load_state_dict(state["ema"])
        ema.to(transformer.device)
    return int(state["step"])


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(folder / STATE_FILE, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        raise Failure(
            f"{folder / STATE_FILE} must be a complete file, got a damaged one; remove {folder.name} to resume before it"
        ) from None
    return state


class MetricsLog:
    """`metrics.jsonl`, one row per step; rows past the checkpoint that a run resumes from are dropped, since they run again."""

    def __init__(self, path: Path, start: int, tensorboard: bool, is_main: bool = True) -> None:
        self.path, self.is_main = path, is_main
        self.bad: list[str] = []
        self.losses: list[float] = []
        self.writer = None
        if not is_main:  # one process writes
            return
        kept = []
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [row for row in map(_parse, lines) if row is not None and row["step"] <= start]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(partial, path)
        self.losses = [row["loss"] for row in kept]
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(path.parent / "tensorboard"), purge_step=start + 1)

    def skipped(self, rows: list[str]) -> None:
        """Note bad rows; each is told once."""
        for row in rows:
            if row not in self.bad:
                self.bad.append(row)
                if self.is_main:
                    print(f"skipped: {row}", flush=True)

    def step(self, step: int, losses: torch.Tensor, tasks: list[str], seconds: float, config: TrainConfig, bar: Any) -> None:
        """Write one row: mean loss, loss by task, learning-rate-free speed."""
        by_task: dict[str, list[float]] = defaultdict(list)
        for task, value in zip(tasks, losses.tolist(), strict=True):
            by_task[task].append(value)
        loss = losses.mean().item()
        row: dict[str, Any] = {
            "step": step,
            "loss": loss,
            "samples_per_second": round(len(losses) / seconds, 2),
            "tasks": {task: sum(values) / len(values) for task, values in sorted(by_task.items())},
        }
        self.losses.append(loss)
        if not self.is_main:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if step % config.log_every == 0:
            recent = self.losses[-config.log_every :]
            bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", samples_s=row["samples_per_second"])
            if self.writer is not None:
                self.writer.add_scalar("loss", sum(recent) / len(recent), step)
                for task, value in row["tasks"].items():
                    self.writer.add_scalar(f"loss/{task}", value, step)
                self.writer.flush()

    def summary(self, steps: int, adapter: Path) -> dict[str, Any]:
        """What `train` returns."""
        tail = self.losses[-max(1, steps // 10) :]
        loss = sum(tail) / len(tail) if tail else float("nan")
        return {"loss": loss, "steps": steps, "skipped": len(self.bad), "adapter": str(adapter), "log": str(self.path)}


def _parse(line: str) -> dict[str, Any] | None:
    # a killed run may leave half a line
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and "step" in row else None
