"""diffusers' pipeline mixins on a stock pipeline with a patched transformer, and on RealGeneralPipeline."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
from diffusers import DDIMScheduler
from transformers import T5Config

import rgkernels
from realgeneral import RealGeneralPipeline
from tests.peers.theirs import theirs
from tests.realgeneral.helpers.checkpoints import tiny_tokenizer
from tests.realgeneral.helpers.pictures import make_photo

mixins = theirs("pipelines.testing_utils")
cogvideox = theirs("pipelines.cogvideo.test_cogvideox")

# not TaylorSeer's, which is not for CogVideoX
MIXINS = (
    *"PipelineTesterMixin MemoryTesterMixin LoraTesterMixin LoraMemoryTesterMixin".split(),
    *"PyramidAttentionBroadcastTesterMixin FirstBlockCacheTesterMixin FasterCacheTesterMixin".split(),
    "MagCacheTesterMixin",
)

# a text encoder and a tokenizer of the sizes of theirs, which are on the hub, and as small in its features
SIZES = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4, "initializer_factor": 0.002}
CONFIG = T5Config(vocab_size=len(tiny_tokenizer()), **SIZES)
cogvideox.AutoConfig = SimpleNamespace(from_pretrained=lambda name: CONFIG)
cogvideox.AutoTokenizer = SimpleNamespace(from_pretrained=lambda name: tiny_tokenizer())


class Patched:
    """A stock pipeline on the ops."""

    def get_dummy_components(self, num_layers: int = 1) -> dict[str, Any]:
        components = super().get_dummy_components(num_layers)  # type: ignore[misc]
        if components["transformer"] is not None:
            rgkernels.patch(components["transformer"])
        return components  # type: ignore[no-any-return]


class RealGeneral:
    """Our pipeline, with one condition image."""

    pipeline_class = RealGeneralPipeline
    output_shape = (3, 16, 16)
    optional_input_params = mixins.BasePipelineTesterConfig.optional_input_params
    batch_input_params = frozenset(["prompt", "condition"])

    def get_dummy_components(self, num_layers: int = 1) -> dict[str, Any]:
        components = super().get_dummy_components(num_layers)  # type: ignore[misc]
        # theirs predicts the noise, which no CogVideoX does
        scheduler = DDIMScheduler.from_config(components["scheduler"].config, prediction_type="v_prediction")
        return {**components, "scheduler": scheduler}

    def get_dummy_inputs(self) -> dict[str, Any]:
        inputs = super().get_dummy_inputs()  # type: ignore[misc]
        del inputs["num_frames"]
        return {**inputs, "task": "canny", "condition": make_photo(16, 16)}


# their reader of sources looks for the class here
diffusers.pipelines.RealGeneralPipeline = RealGeneralPipeline

for subject in (Patched, RealGeneral):
    for mixin in MIXINS:
        title = f"Test{subject.__name__}{mixin.removesuffix('TesterMixin')}"
        globals()[title] = type(title, (subject, cogvideox.CogVideoXPipelineTesterConfig, getattr(mixins, mixin)), {})


class TestPatchedCogVideoX(Patched, cogvideox.TestCogVideoXPipeline):  # type: ignore[misc,name-defined]
    """What their test of CogVideoX has beside the mixins."""

    # the numbers that it wants are those of a text encoder on the hub
    test_inference = None
