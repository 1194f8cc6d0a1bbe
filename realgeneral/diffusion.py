"""The training objective: noising, the v-target and the loss, as pure functions over a diffusers scheduler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sample_timesteps(batch: int, num_train_timesteps: int, generator: torch.Generator) -> Tensor:
    """t uniform in 0..num_train_timesteps - 1, [batch] int64, drawn on the CPU."""
    return torch.randint(0, num_train_timesteps, (batch,), generator=generator)


def noised(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """y_t = sqrt(abar_t) y + sqrt(1 - abar_t) eps."""
    return scheduler.add_noise(latents, noise, timesteps)  # type: ignore[no-any-return]


def v_target(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """v = sqrt(abar_t) eps - sqrt(1 - abar_t) y."""
    return scheduler.get_velocity(latents, noise, timesteps)  # type: ignore[no-any-return]


def v_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Per-sample mean squared error on v in float32, [B].

    CogVideoX's own trainers write the loss on x0 divided by (1 - abar_t); the two are identical, and this one has no division
    that blows up near t = 0.
    """
    return (prediction.float() - target.float()).square().flatten(1).mean(1)
