"""Noising, v-prediction and the loss: the identities that training relies on."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

from realgeneral.model.cogvideox import VPrediction
from realgeneral.training.objective import sample_timesteps, v_loss


def scheduler(folder: Path) -> CogVideoXDDIMScheduler:
    loaded = CogVideoXPipeline.from_pretrained(folder).scheduler
    assert isinstance(loaded, CogVideoXDDIMScheduler)
    return loaded


def test_v_recovers_the_image_and_the_noise(base: Path) -> None:
    """With a = sqrt(abar), s = sqrt(1 - abar): y = a y_t - s v and eps = s y_t + a v, at every t, the last one included."""
    process = scheduler(base)
    y, eps = torch.randn(4, 1, 4, 2, 3, dtype=torch.float64), torch.randn(4, 1, 4, 2, 3, dtype=torch.float64)
    t = torch.tensor([0, 250, 750, 999])
    a = process.alphas_cumprod[t].double().sqrt().view(-1, 1, 1, 1, 1)
    s = (1 - process.alphas_cumprod[t].double()).sqrt().view(-1, 1, 1, 1, 1)
    y_t, v = VPrediction.noised(process, y, eps, t), VPrediction.target(process, y, eps, t)
    torch.testing.assert_close(a * y_t - s * v, y, rtol=0, atol=1e-6)
    torch.testing.assert_close(s * y_t + a * v, eps, rtol=0, atol=1e-6)


def test_the_last_step_is_pure_noise(base: Path) -> None:
    """Zero terminal SNR: at t = 999 nothing of the image is left, and v is minus the image."""
    process = scheduler(base)
    y, eps, t = torch.randn(1, 1, 4, 2, 2), torch.randn(1, 1, 4, 2, 2), torch.tensor([999])
    torch.testing.assert_close(VPrediction.noised(process, y, eps, t), eps)
    torch.testing.assert_close(VPrediction.target(process, y, eps, t), -y)


def test_timesteps_are_uniform_and_repeatable() -> None:
    """All of 0..999, drawn from the generator alone."""
    one, two = (sample_timesteps(50_000, 1000, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert (one.min(), one.max()) == (0, 999)
    counts = torch.bincount(one // 100, minlength=10)
    assert (counts - 5000).abs().max() < 5 * 5000**0.5


def test_loss_is_per_sample_in_float32() -> None:
    """Mean over everything but the batch, in float32 whatever comes in."""
    loss = v_loss(
        torch.ones(2, 1, 4, 2, 2, dtype=torch.bfloat16), torch.tensor([0.0, 3.0]).view(2, 1, 1, 1, 1).expand(2, 1, 4, 2, 2)
    )
    assert loss.dtype == torch.float32
    assert loss.tolist() == [1.0, 4.0]
