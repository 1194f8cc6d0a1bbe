"""The pipeline as users of diffusers know one: callbacks, schedulers, given text features, components of another pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline, EulerDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from PIL import Image

from realgeneral import RealGeneralPipeline
from realgeneral.errors import UsageError
from realgeneral.model.lora import add_lora
from realgeneral.settings.train import LORA_TARGETS
from tests.realgeneral.helpers.checkpoints import TEXT_WINDOW
from tests.realgeneral.helpers.pipelines import PROMPTS, OpenPipeline, alive, assert_same, call, seeded

TWO_OF_TWO: dict[str, Any] = {"num_images_per_prompt": 2, "guidance_scale": 3.0, "output_type": "latent"}


@torch.no_grad()
def text_features(pipe: RealGeneralPipeline, prompts: list[str]) -> dict[str, torch.Tensor]:
    text, negative = pipe.encode_prompt(prompts, None, True, max_sequence_length=TEXT_WINDOW)
    return {"prompt_embeds": text, "negative_prompt_embeds": negative}


def test_callbacks_see_images_in_their_order(pipe: RealGeneralPipeline, photo: Image.Image) -> None:
    """With several prompts and images of each, what a callback sees and changes at place i is image i, as in the result."""
    alive(pipe, "paper")
    seen: list[dict[str, torch.Tensor]] = []

    def look(p: Any, step: int, t: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append({name: tensor.clone() for name, tensor in tensors.items()})
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def blank(p: Any, step: int, t: Any, tensors: dict[str, torch.Tensor]) -> None:
        if step == 1:
            tensors["latents"][1] = 0  # in place, as many callbacks do

    arguments = {"condition": [photo, photo], **TWO_OF_TWO}
    names = ["latents", "prompt_embeds"]
    wanted = call(pipe, PROMPTS, **arguments, generator=seeded(0, 1, 2, 3))
    result = call(
        pipe, PROMPTS, **arguments, generator=seeded(0, 1, 2, 3), callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=names,
    )  # fmt: skip
    assert torch.equal(result, wanted)
    assert torch.equal(seen[-1]["latents"], result)
    features = text_features(pipe, PROMPTS)
    rows = [features[name].repeat_interleave(2, dim=0) for name in ("negative_prompt_embeds", "prompt_embeds")]
    assert_same(seen[0]["prompt_embeds"], torch.cat(rows))
    blanked = call(pipe, PROMPTS, **arguments, generator=seeded(0, 1, 2, 3), callback_on_step_end=blank)
    assert [bool(image.any()) for image in blanked] == [True, False, True, True]
    assert torch.equal(blanked[[0, 2, 3]], wanted[[0, 2, 3]])


def test_callback_objects_know_their_tensors(pipe: RealGeneralPipeline, photo: Image.Image) -> None:
    """A `PipelineCallback`, or several, gets the tensors that it names; those that the pipeline advertises are taken."""
    seen: list[set[str]] = []

    class Watch(PipelineCallback):  # type: ignore[misc]
        tensor_inputs = ("latents", "prompt_embeds")

        def callback_fn(self, pipeline: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            seen.append(set(tensors))
            return tensors

    for callback in (Watch(), MultiPipelineCallbacks([Watch()])):
        call(pipe, "a red pot", photo, callback_on_step_end=callback)
    assert seen == [{"latents", "prompt_embeds"}] * 4
    advertised = pipe._callback_tensor_inputs
    call(
        pipe, "a red pot", photo, callback_on_step_end=lambda *args: args[3], callback_on_step_end_tensor_inputs=advertised
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' call of NumPy
def test_schedulers_that_scale_their_input(pipe: RealGeneralPipeline, photo: Image.Image) -> None:
    """The model gets what the scheduler makes of the latents: Euler divides them by sqrt(sigma^2 + 1)."""
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    inputs: list[torch.Tensor] = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    noise = torch.randn(1, 1, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    call(pipe, "a red pot", photo, latents=noise)
    sigma = pipe.scheduler.sigmas[0]
    assert sigma > 2
    wanted = noise * pipe.scheduler.init_noise_sigma / (sigma**2 + 1) ** 0.5
    torch.testing.assert_close(inputs[0][-1:], wanted)


def test_text_features_replace_prompts(pipe: RealGeneralPipeline, photo: Image.Image) -> None:
    """With both features neither prompt, tokenizer nor text encoder is needed, and a prompt that is there may be long."""
    alive(pipe, "paper")
    arguments: dict[str, Any] = {"condition": [photo, photo], "guidance_scale": 3.0}
    wanted = call(pipe, PROMPTS, **arguments, generator=seeded(0, 1))
    features = text_features(pipe, PROMPTS)
    assert_same(call(pipe, ["a long story " * 9] * 2, **arguments, **features, generator=seeded(0, 1)), wanted)
    with pytest.raises(UsageError, match="prompt must be given with subject, got None"):
        call(pipe, None, **arguments, **features, subject="pot")
    pipe.tokenizer = pipe.text_encoder = None
    assert_same(call(pipe, None, **arguments, **features, generator=seeded(0, 1)), wanted)
    with pytest.raises(UsageError, match="text_encoder and tokenizer must be there unless all text features are given"):
        call(pipe, None, **arguments, prompt_embeds=features["prompt_embeds"])
    with pytest.raises(UsageError, match="prompt must be given unless prompt_embeds are, got neither"):
        call(pipe, None, **arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt_embeds": (1, TEXT_WINDOW, 23)}, r"^prompt_embeds must have shape \[1, T, 24\], got \[1, 12, 23\]"),
        ({"prompt_embeds": (1, TEXT_WINDOW)}, r"^prompt_embeds must have shape"),
        ({"negative_prompt_embeds": (1, 11, 24)}, r"must have the same number of tokens, got 12 and 11"),
    ],
)
def test_text_features_of_other_shapes(
    pipe: RealGeneralPipeline, photo: Image.Image, changed: dict[str, tuple[int, ...]], message: str
) -> None:
    """Each is named, with the shape that fits and the one that came."""
    features = {**text_features(pipe, ["a red pot"]), **{name: torch.zeros(shape) for name, shape in changed.items()}}
    with pytest.raises(UsageError, match=message):
        call(pipe, None, photo, guidance_scale=3.0, **features)


def test_from_pipe(base: Path, open_pipeline: OpenPipeline, photo: Image.Image) -> None:
    """The components of a stock pipeline, or of another of ours, make a pipeline without loading anything again."""
    stock = CogVideoXPipeline.from_pretrained(base)
    one = RealGeneralPipeline.from_pipe(stock)
    assert one.vae is stock.vae
    one.set_progress_bar_config(disable=True)
    wanted = call(open_pipeline(base), "a red pot", photo, generator=seeded(0))
    assert torch.equal(call(one, "a red pot", photo, generator=seeded(0)), wanted)
    two = RealGeneralPipeline.from_pipe(one)
    assert two.transformer is one.transformer


def test_pictures_of_any_mode(pipe: RealGeneralPipeline) -> None:
    """A 16-bit depth map is scaled to 8 bits and transparency is white, as in files that the commands read."""
    ramp = np.linspace(0, 65535, 96 * 64).reshape(64, 96)
    deep, flat = Image.fromarray(ramp.astype(np.uint16)), Image.fromarray((ramp // 257).astype(np.uint8))
    for odd, plain in ((deep, flat), (Image.new("RGBA", (96, 64), (9, 9, 9, 0)), Image.new("RGB", (96, 64), "white"))):
        made = [call(pipe, "a red pot", picture, task="depth", generator=seeded(0)) for picture in (odd, plain)]
        assert torch.equal(*made)


def test_fused_projections_with_a_lora_are_refused(pipe: RealGeneralPipeline) -> None:
    """They would leave the LoRA out."""
    add_lora(pipe.transformer, 2, None, LORA_TARGETS)
    with pytest.raises(ValueError, match="transformer must have no LoRA for fused projections"):
        pipe.fuse_qkv_projections()


def test_encode_condition_refuses_a_long_prompt(pipe: RealGeneralPipeline, photo: Image.Image) -> None:
    """As a call does."""
    with pytest.raises(UsageError, match="prompt must have at most 12 tokens"):
        pipe.encode_condition(photo, task="canny", prompt="a red pot " * 9, subject="pot", height=64, width=96)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"negative_prompt": [None]}, r"negative_prompt must be a string or a list of strings, got \[None\]"),
        ({"subject": [3]}, r"subject must be a string, or a list of strings and None, got \[3\]"),
        ({"condition": None, "condition_cache": "x"}, r"condition_cache must be what encode_condition returns, .*, got 'x'"),
        ({"condition": None, "condition_cache": [5]}, r"condition_cache must be what encode_condition returns, .*, got \[5\]"),
        ({"negative_prompt": "far too " * 9, "guidance_scale": 1.0}, "prompt must have at most 12 tokens, got"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_of_other_types(pipe: RealGeneralPipeline, photo: Image.Image, kwargs: dict[str, Any], message: str) -> None:
    """Each is a UsageError that names it."""
    with pytest.raises(UsageError, match=message):
        call(pipe, ["a red pot"], **{"condition": photo, **kwargs})
