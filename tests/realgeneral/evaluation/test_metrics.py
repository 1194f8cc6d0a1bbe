"""The metrics: exact on pictures whose score is known."""

from __future__ import annotations

import pytest
import torch

from realgeneral.evaluation.metrics import edge_f1, psnr, ssim
from realgeneral.pictures import to_pixels
from tests.realgeneral.helpers.pictures import make_photo


@pytest.fixture
def images() -> torch.Tensor:
    return torch.stack([to_pixels(make_photo(64, 64, seed)) / 2 + 0.5 for seed in range(3)])


def test_psnr(images: torch.Tensor) -> None:
    """An error of 0.1 everywhere is 20 dB, per sample."""
    images = images * 0.8
    values = psnr(images + torch.tensor([0.1, 0.01, 0.05]).view(3, 1, 1, 1), images)
    torch.testing.assert_close(values, torch.tensor([20.0, 40.0, 26.0206]), atol=1e-3, rtol=0)


def test_ssim(images: torch.Tensor) -> None:
    """The same picture is 1; noise lowers it; one value per sample, independent of the others."""
    noisy = (images + torch.randn_like(images) * 0.2).clamp(0, 1)
    same, worse = ssim(images, images), ssim(noisy, images)
    torch.testing.assert_close(same, torch.ones(3), rtol=0, atol=1e-4)  # float32 sums over windows
    assert (worse < 0.9).all()
    torch.testing.assert_close(ssim(noisy[1:2], images[1:2]), worse[1:2])


def test_edge_f1(images: torch.Tensor) -> None:
    """1 for the same edges or a shift by one pixel, 0 where there are none, 1 if neither has any."""
    blank = torch.zeros(1, 3, 64, 64)
    assert edge_f1(images, images).tolist() == [1.0, 1.0, 1.0]
    assert (edge_f1(images.roll(1, dims=3)[..., 2:], images[..., 2:]) > 0.9).all()
    assert edge_f1(blank, images[:1]).item() == 0.0
    assert edge_f1(blank, blank).item() == 1.0
