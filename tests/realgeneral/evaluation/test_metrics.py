"""The metrics: exact on pictures whose score is known."""

from __future__ import annotations

import math

import pytest
import torch

from realgeneral.evaluation.metrics import bootstrap, edge_f1, psnr, retrieval_hits, ssim
from realgeneral.nano.emoji import load_emoji
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


def test_metrics_know_identity_and_difference() -> None:
    """Each metric is perfect on equal pictures and clearly lower on another concept's."""
    concepts = load_emoji("held_out")[:8]
    truth = torch.stack([to_pixels(c.image("3d")) for c in concepts]) / 2 + 0.5
    other = truth.roll(1, 0)
    assert ssim(truth, truth).min() > 0.999 > ssim(other, truth).max()
    assert psnr(other, truth).max() < 30
    assert edge_f1(truth, truth).min() == 1.0
    assert edge_f1(other, truth).mean() < 0.8
    index = torch.arange(8)
    assert retrieval_hits(truth, truth, index).mean() == 1.0
    assert retrieval_hits(other, truth, index).mean() == 0.0
    assert retrieval_hits(other, truth, index, top=8).mean() == 1.0


def test_bootstrap_draws_groups() -> None:
    """The interval of grouped values is that of their groups: repeats of one value add no certainty."""
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    alone = bootstrap(values, ["a", "b", "c", "d"])
    repeated = bootstrap(values.repeat_interleave(5), [g for g in "abcd" for _ in range(5)])
    assert alone == pytest.approx(repeated)
    assert alone.mean == 2.5
    assert alone.low is not None and alone.high is not None
    # of the 256 equally likely draws 5 have a mean of at most 1.25 and 15 of at most 1.5; the same from above
    assert (alone.low, alone.high) == (1.5, 3.5)
    assert bootstrap(values, ["a"] * 4).low is None
    assert not math.isnan(bootstrap(values[:1], ["a"]).mean)
