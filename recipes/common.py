"""Helpers that the nano recipes share: files, logs, random state, EMA."""

from __future__ import annotations

import csv
import math
import os
import platform
import random
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


def log(message: str) -> None:
    """Print one line with the time of day, flushed so that a log file can be followed."""
    print(time.strftime("%H:%M:%S"), message, flush=True)


def log_settings(settings: dict[str, Any]) -> None:
    """Print the versions and settings that a run depends on."""
    import diffusers
    import transformers

    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    log(f"versions {versions}")
    log(f"settings {settings}")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def save_atomic(obj: Any, path: Path) -> None:
    """`torch.save` to a temporary file, then rename: a reader never sees half a file."""
    tmp = path.with_suffix(path.suffix + ".tmp")
    torch.save(obj, tmp)
    os.replace(tmp, path)


def append_csv(path: Path, row: dict[str, Any]) -> None:
    """Append one row, with a header if the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def rounded(values: dict[str, float], digits: int) -> dict[str, float]:
    """Round every value, for logs."""
    return {k: round(v, digits) for k, v in values.items()}


def warmup_cosine(progress: float, warmup: float, floor: float = 0.02) -> float:
    """Learning-rate factor for `progress` in [0, 1]: linear warm-up, then cosine down to `floor`."""
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    phase = min(1.0, (progress - warmup) / (1.0 - warmup))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * phase))


class Ema:
    """Exponential moving average of the floating-point parameters of `module`.

    The decay ramps up as (1 + n) / (10 + n), so that early averages forget the random initialisation.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.decay = decay
        self.updates = 0
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the current parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        params = dict(module.named_parameters())
        names = list(self.shadow)
        torch._foreach_lerp_([self.shadow[n] for n in names], [params[n].detach() for n in names], 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the average into `module`."""
        for name, p in module.named_parameters():
            p.copy_(self.shadow[name])

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs."""
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the average."""
        self.updates = state["updates"]
        self.shadow = state["shadow"]


def command_line() -> str:
    """Return the arguments of this run, without the interpreter's path."""
    return " ".join(sys.argv[1:])


def image_grid(rows: Iterable[Iterable[np.ndarray]]) -> np.ndarray:
    """Join equally sized uint8 [H, W, 3] images, row by row, into one picture."""
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
