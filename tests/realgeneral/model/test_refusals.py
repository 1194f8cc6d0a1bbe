"""What diffusers' models offer and the method's path would pass over: each is refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import FasterCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from diffusers.models.attention_processor import AttnProcessor2_0, CogVideoXAttnProcessor2_0

from realgeneral import RealGeneralPipeline, RealGeneralTransformer3DModel
from tests.realgeneral.helpers.checkpoints import tiny_transformer

CACHES = [PyramidAttentionBroadcastConfig, FirstBlockCacheConfig, FasterCacheConfig, TaylorSeerCacheConfig, MagCacheConfig]


@pytest.fixture
def model() -> RealGeneralTransformer3DModel:
    return RealGeneralTransformer3DModel.from_stock(tiny_transformer("2b"))


@pytest.mark.parametrize("kind", CACHES)
def test_caches(model: RealGeneralTransformer3DModel, kind: type) -> None:
    config = object.__new__(kind)  # some need ratios of the model's own
    with pytest.raises(NotImplementedError, match=rf"enable_cache\({kind.__name__}\) is not supported"):
        model.enable_cache(config)
    assert not model.is_cache_enabled


def test_attention_backends(model: RealGeneralTransformer3DModel) -> None:
    with pytest.raises(NotImplementedError, match=re.escape("set_attention_backend('native') is not supported")):
        model.set_attention_backend("native")


def test_attention_processors(model: RealGeneralTransformer3DModel) -> None:
    """A foreign one is refused, alone or among others, and nothing changed; the stock model's own are taken."""
    before = model.attn_processors
    name = next(iter(before))
    for given in (AttnProcessor2_0(), {**before, name: AttnProcessor2_0()}):
        with pytest.raises(NotImplementedError, match=r"must be CogVideoXAttnProcessor2_0 or Fused.*, got AttnProcessor2_0"):
            model.set_attn_processor(given)
        assert model.attn_processors == before
    own = CogVideoXAttnProcessor2_0()
    model.set_attn_processor(own)
    assert set(model.attn_processors.values()) == {own}


def test_weights_that_are_elsewhere(model: RealGeneralTransformer3DModel) -> None:
    """Offload of single layers leaves the norms' weights where the ops cannot read them."""
    model.transformer_blocks[1].norm2.norm.to("meta")
    latents, text = torch.randn(1, 1, 4, 8, 8), torch.randn(1, 12, 24)
    with pytest.raises(NotImplementedError, match="weights of norms must stay on cpu, got meta: sequential and leaf-level"):
        model(
            latents, text, torch.tensor([3]), condition_latents=torch.randn(1, 1, 4, 8, 8), task_ids=torch.tensor([0])
        )  # fmt: skip


def test_rotary_head_size() -> None:
    model = RealGeneralTransformer3DModel.from_stock(tiny_transformer("5b", attention_head_dim=24))
    latents, text = torch.randn(1, 1, 4, 8, 8), torch.randn(1, 12, 24)
    with pytest.raises(ValueError, match="attention_head_dim must be a multiple of 16 for rotary positions, got 24"):
        model(latents, text, torch.tensor([3]), condition_latents=latents, task_ids=torch.tensor([0]))


def test_variant_of_a_saved_pipeline(pipe: RealGeneralPipeline, tmp_path: Path) -> None:
    """A pipeline's variant and file format reach the transformer's files, as they do the other parts'."""
    pipe.save_pretrained(tmp_path, variant="fp16", safe_serialization=False)
    for part in ("vae", "transformer"):
        assert [path.name for path in (tmp_path / part).glob("*.bin")] == ["diffusion_pytorch_model.fp16.bin"]
