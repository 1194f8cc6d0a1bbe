"""What a call may be given, what its result must be, and which parts and LoRAs may take part."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps

from realgeneral import RealGeneralPipeline
from realgeneral.errors import Failure, UsageError
from realgeneral.generation import pipeline as pipeline_module
from realgeneral.model.adapter import save_adapter
from realgeneral.model.adapter_info import adapter_info
from realgeneral.pictures import fit_picture
from realgeneral.tasks import get_task
from tests.realgeneral.helpers.checkpoints import TEXT_WINDOW
from tests.realgeneral.helpers.models import TASKS, trained_model
from tests.realgeneral.helpers.pictures import make_photo
from tests.realgeneral.helpers.pipelines import PROMPTS, alive, call, seeded


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the pipeline warns of."""
    said: list[str] = []
    monkeypatch.setattr(pipeline_module.logger, "warning", said.append)
    return said


# --- numbers, schedulers, parts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output_type", ["pil", "latent"])
def test_results_are_finite(pipe: RealGeneralPipeline, photo: Image.Image, output_type: str) -> None:
    """Guidance out of all proportion, and features that are NaN, end in a sentence and not in a black picture."""
    alive(pipe)
    with pytest.raises(Failure, match="must be finite, got NaN or infinity"):
        call(pipe, "a red pot", photo, guidance_scale=1e38, num_inference_steps=3, output_type=output_type)
    text = pipe.encode_prompt(["a red pot"], None, False, max_sequence_length=TEXT_WINDOW)[0]
    text[0, 0, 0] = float("nan")
    with pytest.raises(Failure, match="must be finite, got NaN or infinity"):
        call(pipe, None, photo, prompt_embeds=text, output_type=output_type)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generator": 3}, "generator must be a torch.Generator or a list of those, got 3"),
        ({"generator": [3]}, r"generator must be a torch.Generator or a list of those, got \[3\]"),
        ({"height": 64.0}, r"height must be a whole number, got 64\.0"),
        ({"width": "96"}, "width must be a whole number, got '96'"),
        ({"num_inference_steps": 2.0}, r"num_inference_steps must be a whole number, got 2\.0"),
        ({"num_images_per_prompt": True}, "num_images_per_prompt must be a whole number, got True"),
        ({"max_sequence_length": TEXT_WINDOW + 1}, f"max_sequence_length must be at most the base's {TEXT_WINDOW}, got 13"),
        ({"guidance_scale": "6"}, "guidance_scale must be a number, got '6'"),
        ({"image_guidance_scale": None}, "image_guidance_scale must be a number, got None"),
        ({"task": 3}, "task must be a string, got 3"),
        ({"attention_kwargs": 0.5}, r"attention_kwargs must be \{\"scale\": LoRA scale\}, got 0\.5"),
    ],
)
def test_wrong_types(pipe: RealGeneralPipeline, photo: Image.Image, changes: dict[str, Any], message: str) -> None:
    """Each names the argument, what it must be, and what came."""
    with pytest.raises(UsageError, match=message):
        call(pipe, "a red pot", photo, **changes)


def test_generators_may_be_a_tuple(pipe: RealGeneralPipeline, photo: Image.Image) -> None:
    """As a list."""
    alive(pipe)
    one, two = (call(pipe, PROMPTS, [photo, photo], generator=kind(seeded(1, 2))) for kind in (list, tuple))
    assert torch.equal(one, two)


def test_schedulers_that_lose_what_the_base_has(pipe: RealGeneralPipeline, photo: Image.Image) -> None:
    """The shift of the signal-to-noise ratio, v-prediction, alphas at all: what would go unseen is refused by name."""
    pipe = RealGeneralPipeline(
        pipe.tokenizer, pipe.text_encoder, pipe.vae, pipe.transformer,
        CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    call(pipe, "a red pot", photo)
    pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    call(pipe, "a red pot", photo)
    for kind in (EulerDiscreteScheduler, DDIMScheduler):
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
        with pytest.raises(UsageError, match=f"the base's snr_shift_scale 3, got {kind.__name__} with 1"):
            call(pipe, "a red pot", photo)
    pipe.scheduler = CogVideoXDDIMScheduler(snr_shift_scale=3.0)
    with pytest.raises(UsageError, match="must have prediction_type 'v_prediction', got CogVideoXDDIMScheduler with 'epsilon'"):
        call(pipe, "a red pot", photo)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UsageError, match="must have alphas, as CogVideoXDDIMScheduler has, got FlowMatchEuler"):
        call(pipe, "a red pot", photo)


def test_a_pipeline_without_transformer(bases: dict[str, Path], photo: Image.Image) -> None:
    """It loads, as diffusers' do, for its encoders; what needs the transformer says so."""
    pipe = RealGeneralPipeline.from_pretrained(bases["5b"], transformer=None)
    assert pipe.encode_prompt(["a red pot"], None, False, max_sequence_length=TEXT_WINDOW)[0].shape[1] == TEXT_WINDOW
    with pytest.raises(UsageError, match="transformer must be there to generate"):
        call(pipe, "a red pot", photo)
    with pytest.raises(UsageError, match="transformer must be there to generate"):
        pipe.encode_condition(photo, task="canny")


# --- LoRAs beside ours ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_foreign_lora_beside_ours(bases: dict[str, Path], pipe: RealGeneralPipeline, tmp_path: Path) -> None:
    """Both are active, and each changes the picture; an adapter of ours comes whole by the same door."""
    model = trained_model(bases["5b"], "cached").float()
    save_adapter(model, tmp_path / "ours", adapter_info(model, TASKS, "x"))
    style = RealGeneralPipeline.from_pretrained(bases["5b"]).transformer
    style.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipe.save_lora_weights(tmp_path / "style", get_peft_model_state_dict(style))

    pipe.load_lora_weights(tmp_path / "ours")
    assert pipe.adapter is not None
    assert pipe.transformer.config.preset == "cached"
    photo = make_photo()
    ours = call(pipe, "a red pot", photo, generator=seeded(0))
    pipe.load_lora_weights(tmp_path / "style", adapter_name="style")
    assert set(pipe.transformer.active_adapters()) == {"default", "style"}
    both = call(pipe, "a red pot", photo, generator=seeded(0))
    pipe.transformer.set_adapters("style")
    alone = call(pipe, "a red pot", photo, generator=seeded(0))
    assert not torch.equal(both, ours)
    assert not torch.equal(both, alone)
    with pytest.raises(UsageError, match="an adapter of RealGeneral must be loaded without further arguments, got"):
        pipe.load_lora_weights(tmp_path / "ours", adapter_name="other")


# --- help for what is hardly meant ---------------------------------------------------------------------------------------


def test_one_condition_serves_several_prompts(pipe: RealGeneralPipeline, photo: Image.Image) -> None:
    """As if it were given for each."""
    alive(pipe)
    one, each = (call(pipe, PROMPTS, condition, generator=seeded(1, 2)) for condition in (photo, [photo, photo]))
    assert torch.equal(one, each)


def test_an_untrained_branch_is_said(pipe: RealGeneralPipeline, photo: Image.Image, warnings: list[str]) -> None:
    """A pipeline without adapter makes pictures that follow nothing; a branch that was trained says nothing."""
    call(pipe, "a red pot", photo)
    assert any("the condition branch is untrained" in line for line in warnings)
    warnings.clear()
    alive(pipe)
    call(pipe, "a red pot", get_task("canny").condition(photo, 0))
    assert warnings == []


@pytest.mark.parametrize(("kind", "message"), [("photo", "of tones between"), ("inverted", "of white"), ("edges", "")])
def test_a_photograph_as_edges(pipe: RealGeneralPipeline, warnings: list[str], kind: str, message: str) -> None:
    """A condition of canny that is none is noticed; edges are not."""
    alive(pipe)
    grey = Image.linear_gradient("L").convert("RGB")
    edges = get_task("canny").condition(make_photo(), 0)
    call(pipe, "a red pot", {"photo": grey, "inverted": ImageOps.invert(edges), "edges": edges}[kind])
    assert [message in line for line in warnings] == ([True] if message else [])


def test_conditions_derived_in_python(bases: dict[str, Path], pipe: RealGeneralPipeline, tmp_path: Path) -> None:
    """With the adapter's own options, unless others are given; what would be fetched on its word is refused."""
    photo = make_photo(200, 100)
    assert pipe.derive_condition(photo, "canny").size == (96, 64)
    assert pipe.derive_condition(photo, "canny", height=32, width=48).size == (48, 32)
    info = adapter_info(trained_model(bases["5b"], "cached"), ("canny:low=1,high=2", "depth:model=somebody/depth"), "x")
    pipe.adapter = info
    fitted = fit_picture(photo, 96, 64)
    assert list(pipe.derive_condition(photo, "canny").get_flattened_data()) == list(
        get_task("canny:low=1,high=2").condition(fitted, 0).get_flattened_data()
    )
    assert list(pipe.derive_condition(photo, "canny:low=100,high=200").get_flattened_data()) == list(
        get_task("canny").condition(fitted, 0).get_flattened_data()
    )
    with pytest.raises(
        UsageError, match="task must name its depth model, depth:model=somebody/depth, since it would be fetched"
    ):
        pipe.derive_condition(photo, "depth")
    with pytest.raises(UsageError, match="task must be one of"):
        pipe.derive_condition(photo, "cany")


def test_a_stopped_run_has_adapters_in_its_checkpoints(
    pipe: RealGeneralPipeline, bases: dict[str, Path], tmp_path: Path
) -> None:
    """The error names the newest, and it loads."""
    model = trained_model(bases["5b"], "cached").float()
    for step in (2, 4):
        save_adapter(model, tmp_path / "run" / "checkpoints" / f"step-{step:06d}", adapter_info(model, TASKS, "x"))
    for folder in (tmp_path / "run", tmp_path / "run" / "adapter"):
        with pytest.raises(Failure, match=r"the run there was stopped, and .*step-000004 holds an adapter too"):
            pipe.load_adapter(folder)
    pipe.load_adapter(tmp_path / "run" / "checkpoints" / "step-000004")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("prompt", 1.5, "prompt must be a string or a list of strings, got 1.5"),
        ("negative_prompt", 2, "negative_prompt must be a string or a list of strings, got 2"),
        ("subject", object, "subject must be a string or a list of strings, got <class 'object'>"),
        ("prompt_embeds", 3, "prompt_embeds must be a tensor of several dimensions, got 3"),
        ("negative_prompt_embeds", torch.tensor(1.0), "negative_prompt_embeds must be a tensor of several"),
        ("latents", [1], "latents must be a tensor of several dimensions, got [1]"),
        ("callback_on_step_end", "x", "callback_on_step_end must be a function, got 'x'"),
        ("callback_on_step_end_tensor_inputs", 1, "callback_on_step_end_tensor_inputs must be a list of names, got 1"),
    ],
)
def test_kinds(pipe: RealGeneralPipeline, photo: Image.Image, name: str, value: Any, message: str) -> None:
    """An argument of another type is refused in its own words."""
    with pytest.raises(UsageError, match=re.escape(message)):
        pipe(**{"prompt": "a red pot", "condition": photo, "task": "canny", name: value})
