"""Encoders from folders in the format of transformers: what comes out, and what is said when they cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPModel, ViTModel

from realgeneral.errors import Failure, UsageError
from realgeneral.evaluation.encoders import (
    ClipEncoder,
    EfficientNetEncoder,
    ImageEncoder,
    efficientnet_features,
    label_of,
    to_uint8,
)
from tests.realgeneral.helpers.pictures import make_photo

CPU = torch.device("cpu")


def test_clip(encoders: Path) -> None:
    """Unit features of one space for pictures of any size and prompts of any length, those of the stored model."""
    clip = ClipEncoder(str(encoders / "clip"), CPU)
    pictures = [make_photo(40, 40, 0), make_photo(97, 33, 1)]
    images, texts = clip.images(pictures), clip.texts(["a cat", "a very long prompt " * 40])
    assert images.shape == texts.shape == (2, 16)
    torch.testing.assert_close(torch.cat([images, texts]).norm(dim=1), torch.ones(4))
    inputs = clip.processor(images=pictures, return_tensors="pt")
    plain = CLIPModel.from_pretrained(encoders / "clip")(**inputs, input_ids=torch.tensor([[0, 2, 1]])).image_embeds
    torch.testing.assert_close(images, plain)
    assert clip.label == "clip"


def test_dino_is_the_class_token(encoders: Path) -> None:
    """Not the pooler's output, which is random in DINO's checkpoints."""
    dino, photo = ImageEncoder(str(encoders / "dino"), CPU, "dino"), make_photo()
    plain = ViTModel.from_pretrained(encoders / "dino").eval()(**dino.processor(images=[photo], return_tensors="pt"))
    torch.testing.assert_close(dino.encode([photo]), plain.last_hidden_state[:, 0])
    assert not torch.allclose(dino.encode([photo]), plain.pooler_output)


@pytest.mark.parametrize(("name", "features"), [("dino", 32), ("resnet", 12), ("clip", 16)])
def test_features_of_any_image_model(encoders: Path, name: str, features: int) -> None:
    """Tokens, feature maps or CLIP: [B, D], the same from pictures and from uint8 tensors."""
    encoder, photos = ImageEncoder(str(encoders / name), CPU, "fid-features"), [make_photo(64, 64, i) for i in range(3)]
    assert encoder.encode(photos).shape == (3, features)
    assert encoder.num_features == features
    torch.testing.assert_close(encoder(to_uint8(photos)), encoder.encode(photos))


def test_efficientnet_needs_no_download() -> None:
    """The encoder of the extra "eval": 1,280 features, the same for float and uint8 pictures."""
    images = to_uint8([make_photo(64, 64, i) for i in range(2)])
    features = EfficientNetEncoder()(images)
    assert features.shape == (2, EfficientNetEncoder.num_features)
    torch.testing.assert_close(features, efficientnet_features(images.float() / 255))


def test_what_cannot_be_loaded(encoders: Path, tmp_path: Path) -> None:
    """One line that names the option and the model."""
    with pytest.raises(Failure, match=f"clip must be the hub id or folder of a transformers model, got {tmp_path}: "):
        ClipEncoder(str(tmp_path), CPU)
    with pytest.raises(Failure, match="dino must be the hub id or folder of a transformers model, got no/such-model: "):
        ImageEncoder("no/such-model", CPU, "dino")
    with pytest.raises(UsageError, match="clip must be a model with image and text features, got ViTModel"):
        ClipEncoder(str(encoders / "dino"), CPU)


def test_labels(encoders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder's own name, however it is written; a hub id as it is."""
    monkeypatch.chdir(encoders / "clip")
    assert label_of(".") == label_of(str(encoders / "clip") + "/") == "clip"
    assert label_of("openai/clip-vit-base-patch32") == "openai/clip-vit-base-patch32"
