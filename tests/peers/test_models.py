"""diffusers' model mixins on a patched stock model, and on the RealGeneral transformer as stock model and with a condition."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel

import rgkernels
from realgeneral import RealGeneralTransformer3DModel
from tests.peers.theirs import theirs

mixins = theirs("models.testing_utils")
cogvideox = theirs("models.transformers.test_models_transformer_cogvideox")

# not TaylorSeer's, which fail on the stock model too: it is not for CogVideoX
MIXINS = (
    *"ModelTesterMixin MemoryTesterMixin AttentionTesterMixin TrainingTesterMixin LoraTesterMixin".split(),
    *"LoraHotSwappingForModelTesterMixin TorchCompileTesterMixin AttentionBackendTesterMixin".split(),
    *"PyramidAttentionBroadcastTesterMixin FirstBlockCacheTesterMixin FasterCacheTesterMixin MagCacheTesterMixin".split(),
)
GEOMETRIES = {"2B": cogvideox.CogVideoXTransformerTesterConfig, "15": cogvideox.CogVideoX15TransformerTesterConfig}


class PatchedCogVideoX(CogVideoXTransformer3DModel):
    """A stock model that is patched from its start."""

    @functools.wraps(CogVideoXTransformer3DModel.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rgkernels.patch(self)


class Patched:
    model_class = PatchedCogVideoX


class Stock:
    """RealGeneral without a condition."""

    model_class = RealGeneralTransformer3DModel


class Conditioned(Stock):
    """RealGeneral with one condition image."""

    def get_init_dict(self) -> dict[str, Any]:
        # their 1.5 has heads of 8, for which rotary tables cannot be made; its tests hand it none
        return {**super().get_init_dict(), "num_attention_heads": 1, "attention_head_dim": 16}  # type: ignore[misc]

    def get_dummy_inputs(self, batch_size: int = 2) -> dict[str, torch.Tensor]:
        inputs = super().get_dummy_inputs(batch_size)  # type: ignore[misc]
        latents = inputs["hidden_states"]
        generator = torch.Generator().manual_seed(1)
        condition = torch.randn(batch_size, 1, *latents.shape[2:], generator=generator).to(latents)
        return {**inputs, "condition_latents": condition, "task_ids": torch.zeros_like(inputs["timestep"])}


class Checkpointing:
    """Their test wants the name of the class that keeps checkpoints."""

    def test_gradient_checkpointing_is_applied(self) -> None:
        super().test_gradient_checkpointing_is_applied(expected_set={self.model_class.__name__})  # type: ignore[misc]


for subject in (Patched, Stock, Conditioned):
    for geometry, config in GEOMETRIES.items():
        for mixin in MIXINS:
            bases = (subject, config, getattr(mixins, mixin))
            if mixin == "TrainingTesterMixin":
                bases = (Checkpointing, *bases)
            title = f"Test{subject.__name__}{geometry}{mixin.removesuffix('TesterMixin')}"
            globals()[title] = type(title, bases, {})
