"""The optimizer of a training run and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from realgeneral.errors import UsageError
from realgeneral.settings.train import TrainConfig


def check_optimizer(config: TrainConfig, device: torch.device) -> None:
    """UsageError if 8-bit states are asked for without CUDA or without bitsandbytes."""
    if config.optimizer == "adamw":
        return
    if device.type != "cuda":
        raise UsageError(f"--optimizer {config.optimizer} needs a CUDA device, found none")
    try:
        import bitsandbytes.optim  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"--optimizer {config.optimizer} needs the package bitsandbytes (pip install 'realgeneral[8bit]'), got: {error}"
        ) from None


def make_optimizer(config: TrainConfig, parameters: Sequence[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    """AdamW over the trained weights, with float32 or 8-bit states; UsageError as `check_optimizer`."""
    check_optimizer(config, device)
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        # fused: no temporary copies of all weights, where a GPU's memory is scarce
        return torch.optim.AdamW(parameters, **settings, fused=True if device.type == "cuda" else None)
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    kind = AdamW8bit if config.optimizer == "adamw8bit" else PagedAdamW8bit
    optimizer: torch.optim.Optimizer = kind(parameters, **settings)
    return optimizer


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """Factor on the peak learning rate before optimizer step `step` (from 0): linear warm-up, then constant or cosine to 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
