"""The log of a training run: `metrics.jsonl`, one row per optimizer step, and the curves of a tracker."""

from __future__ import annotations

import importlib.util
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from realgeneral.errors import UsageError
from realgeneral.files import write_text
from realgeneral.settings.train import TrainConfig

TIMESTEP_BUCKETS = 10


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step of all processes was like.

    Args:
        losses: Of each sample.
        tasks: Task of each sample.
        timesteps: Timestep of each sample as a share of all timesteps, in [0, 1).
        seconds: Wall clock.
        learning_rate: Of the step.
        gradient_norm: Before clipping.
        memory: Bytes: peak on the GPU so far, or resident in RAM.
    """

    losses: Sequence[float]
    tasks: Sequence[str]
    timesteps: Sequence[float]
    seconds: float
    learning_rate: float
    gradient_norm: float
    memory: int

    def row(self, step: int) -> dict[str, Any]:
        """The row of metrics.jsonl."""
        return {
            "step": step,
            "loss": sum(self.losses) / len(self.losses),
            "learning_rate": self.learning_rate,
            "gradient_norm": self.gradient_norm,
            "samples_per_second": round(len(self.losses) / self.seconds, 2),
            "memory_gib": round(self.memory / 2**30, 3),
            "tasks": _means(zip(self.tasks, self.losses, strict=True)),
            "timesteps": _means(zip(map(timestep_bucket, self.timesteps), self.losses, strict=True)),
        }


def timestep_bucket(share: float) -> str:
    """Name of the tenth of the timesteps that a share in [0, 1) lies in: "0.0-0.1" is the least noisy."""
    tenth = int(share * TIMESTEP_BUCKETS)
    return f"{tenth / TIMESTEP_BUCKETS:.1f}-{(tenth + 1) / TIMESTEP_BUCKETS:.1f}"


def _means(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    groups: dict[str, list[float]] = defaultdict(list)
    for name, value in pairs:
        groups[name].append(value)
    return {name: sum(values) / len(values) for name, values in sorted(groups.items())}


class MetricsLog:
    """`metrics.jsonl` and the tracker's curves; rows past the checkpoint that a run resumes from are dropped: they run again.

    Args:
        path: The file.
        start: Steps that are done.
        config: Of the run.
        is_main: Whether this process writes; the others only count.
        bad: Rows that were skipped in the steps that are done.
    """

    def __init__(self, path: Path, start: int, config: TrainConfig, is_main: bool = True, bad: Sequence[str] = ()) -> None:
        self.path, self.config, self.is_main = path, config, is_main
        self.bad = list(bad)
        self.losses: list[float] = []
        self.recent: list[StepRecord] = []
        self.tracker: Tracker | None = None
        if not is_main:
            return
        kept = []
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [row for row in map(_parse, lines) if row is not None and row["step"] <= start]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.losses = [row["loss"] for row in kept]
        self.tracker = open_tracker(config, path.parent, start)

    def skipped(self, rows: list[str]) -> None:
        """Note bad rows; each is told once."""
        for row in rows:
            if row not in self.bad:
                self.bad.append(row)
                if self.is_main:
                    print(f"skipped: {row}", flush=True)

    def step(self, step: int, record: StepRecord, bar: Any) -> None:
        """Write one row, and every `log_every` steps the means since the last time to the tracker."""
        row = record.row(step)
        self.losses.append(row["loss"])
        if not self.is_main:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.recent.append(record)
        recent = [loss for record in self.recent for loss in record.losses]
        bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", samples_s=row["samples_per_second"], refresh=False)
        # the last point may be of fewer steps
        if step % self.config.log_every == 0 or step == self.config.steps:
            curves = self._curves()
            if self.tracker is not None:
                self.tracker.log(curves, step)

    def _curves(self) -> dict[str, float]:
        recent, self.recent = self.recent, []
        losses = [loss for record in recent for loss in record.losses]
        tasks = _means(zip((t for record in recent for t in record.tasks), losses, strict=True))
        timesteps = _means(zip((timestep_bucket(t) for record in recent for t in record.timesteps), losses, strict=True))
        return {
            "loss": sum(losses) / len(losses),
            **{f"loss/{name}": value for name, value in tasks.items()},
            **{f"loss_by_timestep/{name}": value for name, value in timesteps.items()},
            "learning_rate": recent[-1].learning_rate,
            "gradient_norm": recent[-1].gradient_norm,
            "samples_per_second": len(losses) / sum(record.seconds for record in recent),
            "memory_gib": recent[-1].memory / 2**30,
        }

    def summary(self, steps: int, adapter: Path) -> dict[str, Any]:
        """What `train` returns; closes the tracker."""
        if self.tracker is not None:
            self.tracker.close()
        tail = self.losses[-max(1, steps // 10) :]
        loss = sum(tail) / len(tail) if tail else float("nan")
        return {"loss": loss, "steps": steps, "skipped": len(self.bad), "adapter": str(adapter), "log": str(self.path)}


class Tracker(Protocol):
    """Where curves go."""

    def log(self, curves: dict[str, float], step: int) -> None:
        """Add a point to each curve."""

    def close(self) -> None:
        """Write what is not written yet."""


def check_tracker(config: TrainConfig) -> None:
    """UsageError if the tracker's package is missing: told before a model is loaded."""
    if config.tracker == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UsageError("--tracker wandb needs the package wandb, found none: pip install wandb")


def open_tracker(config: TrainConfig, output: Path, start: int) -> Tracker | None:
    """The tracker of `config`, continued after step `start`; None for "none"."""
    if config.tracker == "tensorboard":
        return _TensorBoard(output, start)
    return _Wandb(config, output) if config.tracker == "wandb" else None


class _TensorBoard:
    def __init__(self, output: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(output / "tensorboard"), purge_step=start + 1)

    def log(self, curves: dict[str, float], step: int) -> None:
        for name, value in curves.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, config: TrainConfig, output: Path) -> None:
        import wandb

        # a resumed run goes on in the same curves
        known = output / "wandb_run_id.txt"
        run_id = known.read_text(encoding="utf-8").strip() if known.is_file() else None
        self.run = wandb.init(
            project="realgeneral", name=output.name, dir=str(output), id=run_id, resume="allow", config=asdict(config)
        )
        known.write_text(self.run.id, encoding="utf-8")

    def log(self, curves: dict[str, float], step: int) -> None:
        self.run.log(curves, step=step)

    def close(self) -> None:
        self.run.finish()


def _parse(line: str) -> dict[str, Any] | None:
    # a killed run may leave half a line
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and "step" in row else None
