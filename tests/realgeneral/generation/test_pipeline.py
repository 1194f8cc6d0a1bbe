"""The pipeline as people call it: batches, sizes, guidance, callbacks, caches, offload, and every wrong argument."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXPipeline
from PIL import Image

from realgeneral import RealGeneralPipeline, RealGeneralTransformer3DModel
from realgeneral.errors import UsageError
from realgeneral.model.vae import decode_latents
from tests.realgeneral.helpers.checkpoints import TEXT_WINDOW
from tests.realgeneral.helpers.pictures import make_photo
from tests.realgeneral.helpers.pipelines import PROMPTS, TASKS, OpenPipeline, alive, assert_same, call, seeded


@pytest.mark.parametrize("size", [(None, None), (64, 96), (48, 32), (16, 16), (80, 128)])
def test_sizes(base: Path, open_pipeline: OpenPipeline, size: tuple[int | None, int | None]) -> None:
    """Any multiple of 16 works in every geometry; without a size it is the base's own."""
    pipe = open_pipeline(base)
    default = pipe.transformer.config.sample_height * 8, pipe.transformer.config.sample_width * 8
    images = call(pipe, PROMPTS[0], make_photo(), height=size[0], width=size[1], num_inference_steps=1)
    assert images.shape == (1, 3, size[0] or default[0], size[1] or default[1])
    assert torch.isfinite(images).all()
    assert images.min() >= 0
    assert images.max() <= 1


@pytest.mark.parametrize(
    ("preset", "guidance", "scheduler"),
    [
        ("paper", 4.0, CogVideoXDDIMScheduler),
        ("paper", 1.0, CogVideoXDPMScheduler),
        ("cached", 4.0, CogVideoXDPMScheduler),
        ("cached", 1.0, CogVideoXDDIMScheduler),
    ],
)
def test_image_i_of_a_batch_is_the_single_call(
    base: Path, open_pipeline: OpenPipeline, preset: str, guidance: float, scheduler: Any
) -> None:
    """Prompts x conditions x images per prompt, each with its own generator: every image is that of a call alone, in order."""
    pipe = alive(open_pipeline(base), preset)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    conditions = [[make_photo(seed=1)], [make_photo(seed=2)]]
    kwargs: dict[str, Any] = {"guidance_scale": guidance, "task": "customization"}
    subjects = ["pot", "cat"]
    batch = call(
        pipe, PROMPTS, conditions, generator=seeded(0, 1, 2, 3), num_images_per_prompt=2, subject=subjects,
        negative_prompt=["dog", "fox"], **kwargs,
    )  # fmt: skip
    assert len(batch) == 4
    for i in range(4):
        p = i // 2
        alone = call(
            pipe,
            PROMPTS[p],
            conditions[p],
            generator=seeded(i),
            subject=subjects[p],
            negative_prompt=["dog", "fox"][p],
            **kwargs,
        )
        assert_same(batch[i : i + 1], alone)
    assert (batch[0] - batch[1]).abs().max() > 1e-3
    assert (batch[0] - batch[2]).abs().max() > 1e-3


def test_two_conditions_per_prompt(base: Path, open_pipeline: OpenPipeline) -> None:
    """Several condition images: their order matters, and a batch of such rows is its rows."""
    pipe = alive(open_pipeline(base))
    one, two = [make_photo(seed=1), make_photo(seed=2)], [make_photo(seed=3), make_photo(seed=4)]
    batch = call(pipe, PROMPTS, [one, two], generator=seeded(0, 1))
    assert_same(batch[:1], call(pipe, PROMPTS[0], one, generator=seeded(0)))
    assert_same(batch[1:], call(pipe, PROMPTS[1], [two], generator=seeded(1)))
    assert (call(pipe, PROMPTS[0], one[::-1], generator=seeded(0)) - batch[:1]).abs().max() > 1e-4


def test_one_generator_makes_different_images(pipe: RealGeneralPipeline, photo: Image.Image) -> None:
    """One generator for all images is reproducible and gives each image other noise."""
    kwargs = {"num_images_per_prompt": 2}
    first, again = (call(pipe, "a red pot", photo, generator=seeded(0)[0], **kwargs) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("preset", ["paper", "cached"])
def test_the_condition_matters(base: Path, open_pipeline: OpenPipeline, preset: str) -> None:
    """Another condition, task or subject gives another image."""
    pipe = alive(open_pipeline(base), preset)
    wanted = call(pipe, "a red pot", make_photo(seed=1), generator=seeded(0))
    for other in (
        call(pipe, "a red pot", make_photo(seed=2), generator=seeded(0)),
        call(pipe, "a red pot", make_photo(seed=1), generator=seeded(0), task="customization"),
        call(pipe, "a red pot", make_photo(seed=1), generator=seeded(0), subject="pot"),
    ):
        assert (other - wanted).abs().max() > 1e-4


def test_guidance(pipe: RealGeneralPipeline, photo: Image.Image) -> None:
    """At scale 1 the negative prompt does not count; above it does, and prediction is u + s (c - u)."""
    alive(pipe)
    kwargs: dict[str, Any] = {"generator": None, "latents": torch.randn(1, 1, 4, 8, 12)}
    off = call(pipe, "a red pot", photo, guidance_scale=1.0, **kwargs)
    assert torch.equal(off, call(pipe, "a red pot", photo, guidance_scale=1.0, negative_prompt="blue cat", **kwargs))
    on = call(pipe, "a red pot", photo, guidance_scale=3.0, **kwargs)
    other = call(pipe, "a red pot", photo, guidance_scale=3.0, negative_prompt="blue cat", **kwargs)
    assert not torch.equal(on, other)
    same = call(pipe, "a red pot", photo, guidance_scale=3.0, negative_prompt="a red pot", **kwargs)
    assert_same(same, off)


@pytest.mark.parametrize("preset", ["paper", "cached"])
@pytest.mark.parametrize(
    ("text", "image", "passes"), [(1.0, 1.0, 1), (3.0, 1.0, 2), (3.0, 3.0, 2), (1.0, 2.0, 3), (5.0, 2.0, 3)]
)
def test_guidance_on_prompt_and_condition(
    base: Path,
    open_pipeline: OpenPipeline,
    monkeypatch: pytest.MonkeyPatch,
    preset: str,
    text: float,
    image: float,
    passes: int,
) -> None:
    """One step is n- + s_c (nc - n-) + s_p (pc - nc) of calls without guidance, in as many passes as have a weight.

    Two prompts with a condition each, two images of both.
    """
    pipe = alive(open_pipeline(base), preset)
    pipe.scheduler = CogVideoXDDIMScheduler.from_config(pipe.scheduler.config)  # one step is linear in the prediction
    conditions, negatives = [[make_photo(seed=1)], [make_photo(seed=2)]], ["dog", "fox"]
    common: dict[str, Any] = {
        "num_inference_steps": 1, "num_images_per_prompt": 2, "output_type": "latent", "guidance_scale": 1.0,
    }  # fmt: skip
    full, without_prompt = (call(pipe, p, conditions, generator=seeded(0, 1, 2, 3), **common) for p in (PROMPTS, negatives))
    with monkeypatch.context() as patch:
        patch.setattr(pipe, "_condition_latents", lambda rows, size: torch.zeros(2, 1, 4, 8, 12))
        nothing = call(pipe, negatives, conditions, generator=seeded(0, 1, 2, 3), **common)
    wanted = nothing + image * (without_prompt - nothing) + text * (full - without_prompt)

    sizes: list[int] = []
    pipe.transformer.proj_out.register_forward_hook(lambda m, args, out: sizes.append(len(out)))
    common |= {"guidance_scale": text, "image_guidance_scale": image, "negative_prompt": negatives}
    made = call(pipe, PROMPTS, conditions, generator=seeded(0, 1, 2, 3), **common)
    assert sizes == [4 * passes]
    assert_same(made, wanted)
    assert image == 1 or (wanted - full).abs().max() > 1e-3


def test_guidance_on_a_cached_condition(base: Path, open_pipeline: OpenPipeline) -> None:
    """A condition cache, of one sample for all prompts, gives the images of direct calls under image guidance too."""
    pipe, photo = alive(open_pipeline(base)), make_photo()
    scales = {"guidance_scale": 4.0, "image_guidance_scale": 2.0}
    cache = pipe.encode_condition(photo, task="canny", height=64, width=96)
    direct = call(pipe, PROMPTS, [photo, photo], generator=seeded(0, 1), **scales)
    assert_same(call(pipe, PROMPTS, condition_cache=cache, generator=seeded(0, 1), **scales), direct)
    smaller = pipe.encode_condition(photo, task="canny", height=32, width=32)
    with pytest.raises(UsageError, match=r"condition_cache must be of a \(4, 6\) token grid, got \(2, 2\)"):
        call(pipe, "a red pot", condition_cache=smaller, generator=seeded(0), **scales)


def test_image_guidance_below_one(pipe: RealGeneralPipeline, photo: Image.Image) -> None:
    """Less than no guidance is a usage error."""
    with pytest.raises(UsageError, match=r"image_guidance_scale must be at least 1, got 0\.5"):
        call(pipe, "a red pot", photo, image_guidance_scale=0.5)


def test_text_features_instead_of_the_encoder(pipe: RealGeneralPipeline, photo: Image.Image) -> None:
    """With those of the prompts and of the empty ones a pipeline without text encoder makes the same images."""
    inputs: dict[str, Any] = {
        "prompt": PROMPTS,
        "condition": [photo, photo],
        "task": "customization",
        "subject": ["pot", "cat"],
    }
    wanted = call(alive(pipe), **inputs, generator=seeded(1, 2))
    text, negative = pipe.encode_prompt(PROMPTS, None, True, max_sequence_length=TEXT_WINDOW)
    pipe.text_encoder = None
    given = {"prompt_embeds": text, "negative_prompt_embeds": negative}
    assert_same(call(pipe, **inputs, **given, generator=seeded(1, 2)), wanted)


def test_latents_are_the_noise(base: Path, open_pipeline: OpenPipeline, photo: Image.Image) -> None:
    """Given latents replace the generator, and are left as they were."""
    pipe = open_pipeline(base)
    frames = pipe.transformer.geometry.frames_per_image
    noise = torch.randn(1, frames, 4, 8, 12)
    kept = noise.clone()
    a, b = (call(pipe, "a red pot", photo, latents=noise, generator=seeded(seed)) for seed in (0, 1))
    assert torch.equal(a, b)
    assert torch.equal(noise, kept)
    drawn = torch.randn(1, frames, 4, 8, 12, generator=torch.Generator().manual_seed(3))
    assert torch.equal(call(pipe, "a red pot", photo, latents=drawn), call(pipe, "a red pot", photo, generator=seeded(3)[0]))


def test_1_5_decodes_the_last_frame_alone(bases: dict[str, Path], open_pipeline: OpenPipeline, photo: Image.Image) -> None:
    """CogVideoX 1.5 denoises two copies; the image is frame index 1 decoded by itself."""
    pipe = open_pipeline(bases["1.5"])
    latents = call(pipe, "a red pot", photo, generator=seeded(0), output_type="latent")
    assert latents.shape == (1, 2, 4, 8, 12)
    assert not torch.equal(latents[:, 0], latents[:, 1])
    with torch.no_grad():
        wanted = (decode_latents(pipe.vae, latents[:, 1]) / 2 + 0.5).clamp(0, 1)
    assert torch.equal(call(pipe, "a red pot", photo, generator=seeded(0)), wanted)


def test_output_types(pipe: RealGeneralPipeline, photo: Image.Image) -> None:
    """pil, np, pt and latent are the same image; return_dict=False gives a tuple."""
    kwargs: dict[str, Any] = {"num_images_per_prompt": 2}
    tensor = call(pipe, "a red pot", photo, generator=seeded(0)[0], **kwargs)
    array = call(pipe, "a red pot", photo, generator=seeded(0)[0], output_type="np", **kwargs)
    pictures: Any = call(pipe, "a red pot", photo, generator=seeded(0)[0], output_type="pil", **kwargs)
    assert array.shape == (2, 64, 96, 3)
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert [p.size for p in pictures] == [(96, 64)] * 2
    assert np.array_equal(np.asarray(pictures[1]), (array[1] * 255).round().astype("uint8"))
    result = pipe("a red pot", photo, task="canny", height=64, width=96, num_inference_steps=1, return_dict=False)
    assert isinstance(result, tuple)
    assert len(result) == 1


def test_callback_sees_and_changes_latents(pipe: RealGeneralPipeline, photo: Image.Image) -> None:
    """The callback gets what it asks for after each step, and what it returns is used."""
    seen: list[tuple[int, int, set[str]]] = []
    replaced = torch.zeros(1, 1, 4, 8, 12)

    def callback(p: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any] | None:
        assert p is pipe
        seen.append((step, int(t), set(tensors)))
        return {"latents": replaced} if step == 1 else None

    names = ["latents", "prompt_embeds"]
    latents = call(
        pipe, "a red pot", photo, output_type="latent", callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names
    )
    assert [step for step, _, _ in seen] == [0, 1]
    assert seen[0][1] > seen[1][1]
    assert seen[0][2] == set(names)
    assert torch.equal(latents, replaced)


@pytest.mark.parametrize("preset", ["paper", "cached"])
def test_nothing_is_embedded_twice(base: Path, open_pipeline: OpenPipeline, photo: Image.Image, preset: str) -> None:
    """Text and condition are embedded once per call, the condition once for both guidance branches and all images."""
    pipe = alive(open_pipeline(base), preset)
    text, patches = [], []
    pipe.transformer.patch_embed.text_proj.register_forward_hook(lambda m, args, out: text.append(args[0].shape[0]))
    pipe.transformer.patch_embed.proj.register_forward_hook(lambda m, args, out: patches.append(args[0].shape[0]))
    call(pipe, "a red pot", photo, generator=seeded(0, 1), num_images_per_prompt=2, num_inference_steps=3, guidance_scale=3.0)
    assert text == [4]
    assert patches == [1, 4, 4, 4]


def test_a_callback_may_change_the_prompt(pipe: RealGeneralPipeline, photo: Image.Image) -> None:
    """Text features that a callback returns are used from the next step on."""
    alive(pipe, "paper")
    text = {"a": "a red pot", "b": "a blue cup"}
    window = pipe.transformer.config.max_text_seq_length
    encoded = {k: pipe.encode_prompt([v], None, False, max_sequence_length=window)[0] for k, v in text.items()}

    def callback(p: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": encoded["b"]} if step == 0 else {}

    kwargs = {"generator": seeded(0), "guidance_scale": 1.0, "num_inference_steps": 3}
    changed = call(
        pipe, text["a"], photo, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=("prompt_embeds",), **kwargs
    )
    kwargs["generator"] = seeded(0)
    assert not torch.equal(changed, call(pipe, text["a"], photo, **kwargs))
    kwargs["generator"] = seeded(0)
    assert not torch.equal(changed, call(pipe, text["b"], photo, **kwargs))


def test_interrupt(pipe: RealGeneralPipeline, photo: Image.Image) -> None:
    """Setting _interrupt stops after that step, and the next call runs in full again."""
    steps: list[int] = []

    def callback(p: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        p._interrupt = True
        return tensors

    call(pipe, "a red pot", photo, num_inference_steps=4, callback_on_step_end=callback)
    assert steps == [0]
    call(pipe, "a red pot", photo, num_inference_steps=2, callback_on_step_end=lambda p, i, t, x: steps.append(i) or x)
    assert steps == [0, 0, 1]


def test_progress_bar(pipe: RealGeneralPipeline, photo: Image.Image, capsys: pytest.CaptureFixture[str]) -> None:
    """The bar counts the steps, and can be turned off."""
    call(pipe, "a red pot", photo, num_inference_steps=3)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False)
    call(pipe, "a red pot", photo, num_inference_steps=3)
    assert "3/3" in capsys.readouterr().err


# --- the cache -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", [None, "pot"])
def test_condition_cache_equals_the_direct_call(base: Path, open_pipeline: OpenPipeline, subject: str | None) -> None:
    """A cache made once gives the images of direct calls, for several prompts, seeds and guidance scales."""
    pipe = alive(open_pipeline(base))
    photo = make_photo()
    cache = pipe.encode_condition(photo, task="canny", prompt="a red pot", subject=subject, height=64, width=96)
    for prompt, seed, guidance in (("a red pot", 0, 1.0), ("a red pot", 1, 5.0)):
        kwargs: dict[str, Any] = {"guidance_scale": guidance, "subject": subject}
        direct = call(pipe, prompt, photo, generator=seeded(seed), **kwargs)
        assert torch.equal(call(pipe, prompt, condition_cache=cache, generator=seeded(seed), **kwargs), direct)
    prompts = ["a red pot", "the pot on a table"]
    batch = call(pipe, prompts, condition_cache=cache, generator=seeded(0, 1))
    assert_same(batch[:1], call(pipe, prompts[0], condition_cache=cache, generator=seeded(0)))


def test_caches_of_single_images_join(base: Path, open_pipeline: OpenPipeline) -> None:
    """A list of caches, one per image and position, equals giving the images."""
    pipe = alive(open_pipeline(base))
    photos = [make_photo(seed=1), make_photo(seed=2)]
    caches = [pipe.encode_condition(p, task="canny", height=64, width=96, position=i) for i, p in enumerate(photos)]
    direct = call(pipe, "a red pot", photos, generator=seeded(0))
    assert_same(call(pipe, "a red pot", condition_cache=caches, generator=seeded(0)), direct)


def test_encode_condition_errors(pipe: RealGeneralPipeline, photo: Image.Image) -> None:
    """A subject without its prompt, and a preset that cannot be cached, are usage errors."""
    alive(pipe)
    with pytest.raises(UsageError, match="prompt must be given with subject"):
        pipe.encode_condition(photo, task="canny", subject="pot")
    with pytest.raises(UsageError, match="task must be one of"):
        pipe.encode_condition(photo, task="unknown")
    alive(pipe, "paper")
    with pytest.raises(ValueError, match="preset must be 'cached'"):
        pipe.encode_condition(photo, task="canny")


def test_condition_and_cache_together(pipe: RealGeneralPipeline, photo: Image.Image) -> None:
    """Giving both is an error: one of them would be ignored."""
    alive(pipe)
    cache = pipe.encode_condition(photo, task="canny", height=64, width=96)
    with pytest.raises(UsageError, match="condition and condition_cache must not both be given"):
        call(pipe, "a red pot", photo, condition_cache=cache)


def test_cache_of_another_batch(pipe: RealGeneralPipeline, photo: Image.Image) -> None:
    """A cache of two images fits two prompts, not one: with guidance the two branches would see different conditions."""
    alive(pipe)
    latents = pipe._condition_latents([[photo], [photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]], (64, 96))
    cache = pipe.transformer.encode_condition(latents, pipe.transformer.task_ids(["canny"] * 2))
    with pytest.raises(UsageError, match="condition_cache must hold 1 sample or one per prompt"):
        call(pipe, "a red pot", condition_cache=cache)


# --- files ---------------------------------------------------------------------------------------------------------------


def test_save_and_load_the_pipeline(base: Path, open_pipeline: OpenPipeline, tmp_path: Path) -> None:
    """A saved pipeline loads as RealGeneralPipeline, with its branch, and makes the same image."""
    pipe = alive(open_pipeline(base))
    wanted = call(pipe, "a red pot", make_photo(), generator=seeded(0))
    pipe.save_pretrained(tmp_path)
    loaded = open_pipeline(tmp_path)
    assert isinstance(loaded, RealGeneralPipeline)
    assert tuple(loaded.transformer.config.tasks) == TASKS
    assert_same(call(loaded, "a red pot", make_photo(), generator=seeded(0)), wanted)


def test_saved_pipelines_name_the_package(pipe: RealGeneralPipeline, open_pipeline: OpenPipeline, tmp_path: Path) -> None:
    """No file's place in the package is written, and pipelines of version 0.1, which name one that is gone, still load."""
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["realgeneral", "RealGeneralTransformer3DModel"]
    before = json.loads((Path(__file__).parent / "saved" / "model_index-0.1.json").read_text())
    assert before["transformer"][0] == "realgeneral.transformer"
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"transformer": before["transformer"]}))
    assert isinstance(open_pipeline(tmp_path).transformer, RealGeneralTransformer3DModel)


def test_other_components_can_be_given(bases: dict[str, Path], photo: Image.Image) -> None:
    """from_pretrained takes components as diffusers does, and from_pipe shares them."""
    stock = CogVideoXPipeline.from_pretrained(bases["5b"])
    ours = RealGeneralPipeline.from_pretrained(bases["5b"], scheduler=CogVideoXDPMScheduler.from_config(stock.scheduler.config))
    assert isinstance(ours.scheduler, CogVideoXDPMScheduler)
    shared = RealGeneralPipeline(**stock.components)
    shared.set_progress_bar_config(disable=True)
    assert shared.vae is stock.vae
    assert call(shared, "a red pot", photo).shape == (1, 3, 64, 96)


@pytest.mark.parametrize("preset", ["paper", "cached"])
def test_model_cpu_offload(
    bases: dict[str, Path], open_pipeline: OpenPipeline, photo: Image.Image, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With model offload every component runs only while its hook has it on the device, the condition pass included."""
    pipe = alive(open_pipeline(bases["5b"]), preset)
    wanted = call(pipe, "a red pot", photo, generator=seeded(0), subject="pot")
    log: list[str] = []
    pipe.enable_model_cpu_offload(device="cpu")
    for name in ("text_encoder", "transformer", "vae"):
        hook = getattr(pipe, name)._hf_hook
        original = hook.pre_forward

        def pre_forward(module: Any, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            log.append(_name)
            return _original(module, *args, **kwargs)

        monkeypatch.setattr(hook, "pre_forward", pre_forward)
    got = call(pipe, "a red pot", photo, generator=seeded(0), subject="pot")
    assert_same(got, wanted)
    order = [name for i, name in enumerate(log) if i == 0 or log[i - 1] != name]
    assert order == ["text_encoder", "vae", "transformer", "vae"]
    # one call for the condition in `cached`, one for what does not change, one per step
    assert log.count("transformer") == (4 if preset == "cached" else 3)


def test_layer_wise_offload_is_refused(pipe: RealGeneralPipeline) -> None:
    """Offload by single layers cannot follow ops that read weights directly: it says so and names what works."""
    with pytest.raises(NotImplementedError, match="use enable_model_cpu_offload"):
        pipe.enable_sequential_cpu_offload()
    with pytest.raises(ValueError, match="does not support group offloading"):
        pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


# --- bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"height": 60}, "height must be a positive multiple of 16, got 60"),
        ({"width": -16}, "width must be a positive multiple of 16, got -16"),
        ({"height": 0}, "height must be a positive multiple of 16, got 0"),
        ({"task": "depth"}, r"task must be one of \['canny', 'customization'\], got 'depth'"),
        ({"subject": "fox"}, "subject must occur in the prompt 'a red pot', got 'fox'"),
        ({"subject": ["pot", "cat"]}, r"subject must be one for all or one per prompt \(1\), got 2"),
        ({"prompt": "a cat " * 30}, f"prompt must have at most {TEXT_WINDOW} tokens, got "),
        ({"negative_prompt": "a cat " * 30}, f"prompt must have at most {TEXT_WINDOW} tokens, got "),
        ({"negative_prompt": ["a", "cat"]}, r"negative_prompt must be one for all or one per prompt \(1\), got 2"),
        ({"prompt_embeds": torch.zeros(2, 12, 24)}, r"^prompt_embeds must have one row per prompt \(1\), got 2"),
        (
            {"negative_prompt_embeds": torch.zeros(0, 12, 24)},
            r"negative_prompt_embeds must have one row per prompt \(1\), got 0",
        ),
        ({"condition": None}, "condition must be an image or a list of images, got None"),
        ({"condition": []}, r"condition must have one entry per prompt \(1\), got 0"),
        ({"condition": "photo.png"}, "condition must be an image or a list of images, got str"),
        ({"condition": torch.zeros(3, 64, 64)}, "condition must be an image or a list of images, got Tensor"),
        ({"condition": ["photo.png"]}, "condition must be an image or a list of images, got .*str"),
        ({"prompt": PROMPTS, "condition": [make_photo()]}, r"condition must have one entry per prompt \(2\), got 1"),
        ({"prompt": []}, r"prompt must be a string or a list of strings, got \[\]"),
        ({"generator": [torch.Generator()] * 3}, r"generator must be one for all or one per image \(1\), got 3"),
        ({"latents": torch.zeros(1, 2, 4, 8, 12)}, r"latents must have shape \[1, 1, 4, 8, 12\], got \[1, 2, 4, 8, 12\]"),
        ({"output_type": "jpeg"}, "output_type must be one of .*got 'jpeg'"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1, got 0"),
        ({"max_sequence_length": -1}, "max_sequence_length must be at least 1, got -1"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be finite, got nan"),
        ({"image_guidance_scale": float("inf")}, "image_guidance_scale must be finite, got inf"),
        ({"num_inference_steps": 0}, "num_inference_steps must be .* got 0"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callback_on_step_end_tensor_inputs must be .* got .*noise"),
        ({"max_sequence_length": 2}, "prompt must have at most 2 tokens, got 4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments(pipe: RealGeneralPipeline, photo: Image.Image, kwargs: dict[str, Any], message: str) -> None:
    """Each wrong argument is a UsageError that names it, what is right, and what came; nothing has run by then."""
    alive(pipe)
    pipe.transformer._denoise = None  # type: ignore[method-assign,assignment]
    arguments: dict[str, Any] = {"prompt": "a red pot", "condition": photo, **kwargs}
    with pytest.raises(UsageError, match=message) as caught:
        call(pipe, **arguments)
    assert "\n" not in str(caught.value)


def test_ragged_conditions(pipe: RealGeneralPipeline, photo: Image.Image) -> None:
    """Prompts of one batch must have equally many condition images."""
    with pytest.raises(UsageError, match=r"condition must have the same number of images for each prompt, got \[1, 2\]"):
        call(pipe, PROMPTS, [[photo], [photo, photo]])


def test_1_5_has_a_largest_size(bases: dict[str, Path], open_pipeline: OpenPipeline, photo: Image.Image) -> None:
    """1.5's position table ends at the sample size: a larger image is a usage error in pixels."""
    pipe = open_pipeline(bases["1.5"])
    with pytest.raises(UsageError, match="height must be at most 320, got 336"):
        call(pipe, "a red pot", photo, height=336, width=96)
