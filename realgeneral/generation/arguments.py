"""What a call of the pipeline may be given: checks that name the argument, what it must be, and what came."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from PIL import Image
from torch import Tensor

from realgeneral.errors import Failure, UsageError
from realgeneral.generation.guidance import Guidance
from realgeneral.model.condition import ConditionCache

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CALLBACK_INPUTS = ("latents", "prompt_embeds")
Conditions = Image.Image | Sequence[Image.Image] | Sequence[Sequence[Image.Image]]


def check_kinds(texts: dict[str, Any], tensors: dict[str, Any], callback: Any, callback_inputs: Any) -> None:
    """Texts are strings or several of them, features and latents tensors, the callback a function and its inputs names."""
    for name, value in texts.items():
        if value is not None and not isinstance(value, Iterable):
            raise UsageError(f"{name} must be a string or a list of strings, got {value!r}")
    for name, value in tensors.items():
        if value is not None and not (isinstance(value, Tensor) and value.ndim):
            raise UsageError(f"{name} must be a tensor of several dimensions, got {value!r}")
    if callback is not None and not callable(callback):
        raise UsageError(f"callback_on_step_end must be a function, got {callback!r}")
    names = callback_inputs if isinstance(callback_inputs, list | tuple) else [None]
    if not all(isinstance(name, str) for name in names):
        raise UsageError(f"callback_on_step_end_tensor_inputs must be a list of names, got {callback_inputs!r}")


def prompt_list(prompt: str | Sequence[str] | None, embeds: Tensor | None) -> list[str]:
    """The prompts; none are needed where their features are given, one row each."""
    if prompt is None:
        if embeds is None:
            raise UsageError("prompt must be given unless prompt_embeds are, got neither")
        return [""] * len(embeds)
    return [prompt] if isinstance(prompt, str) else list(prompt)


def as_list(value: str | Sequence[str] | None, count: int) -> list[str] | None:
    """One for all, or one for each."""
    return value if value is None else [value] * count if isinstance(value, str) else list(value)


def _check_prompts(prompts: list[str], negatives: list[str] | None) -> None:
    """At least one prompt, all strings, and a negative prompt for each if there are any."""
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise UsageError(f"prompt must be a string or a list of strings, got {prompts!r}")
    if negatives is not None and not all(isinstance(negative, str) for negative in negatives):
        raise UsageError(f"negative_prompt must be a string or a list of strings, got {negatives!r}")
    if negatives is not None and len(negatives) != len(prompts):
        raise UsageError(f"negative_prompt must be one for all or one per prompt ({len(prompts)}), got {len(negatives)}")


def check_choices(output_type: str, callback_inputs: Sequence[str]) -> None:
    """Known output type and callback tensors."""
    if output_type not in OUTPUT_TYPES:
        raise UsageError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
    if not set(callback_inputs) <= set(CALLBACK_INPUTS):
        raise UsageError(f"callback_on_step_end_tensor_inputs must be among {CALLBACK_INPUTS}, got {list(callback_inputs)}")


def check_steps(name: str, steps: int, scheduler: Any) -> None:
    """Denoising steps that a schedule has; `name` is the argument's."""
    most = scheduler.config.num_train_timesteps
    if not 1 <= steps <= most:
        raise UsageError(f"{name} must be between 1 and {most}, got {steps}")


def check_parts(pipe: Any) -> None:
    """The parts that every call needs."""
    for name in ("transformer", "scheduler"):
        if getattr(pipe, name) is None:
            raise UsageError(f"{name} must be there to generate, got a pipeline without one")


def check_scheduler(scheduler: Any, snr_shift_scale: float) -> None:
    """A schedule that steps from v-predictions, with the shift that the base was trained with."""
    name, config = type(scheduler).__name__, scheduler.config
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UsageError(f"scheduler must have alphas, as CogVideoXDDIMScheduler has, got {name}")
    if config.get("prediction_type") != "v_prediction":
        raise UsageError(
            f"scheduler must have prediction_type 'v_prediction', got {name} with {config.get('prediction_type')!r}"
        )
    own = float(config.get("snr_shift_scale", 1.0)) if name.startswith("CogVideoX") else 1.0
    if own != snr_shift_scale:
        raise UsageError(
            f"scheduler must shift its alphas by the base's snr_shift_scale {snr_shift_scale:g}, got {name} with {own:g}; "
            "CogVideoXDDIMScheduler and CogVideoXDPMScheduler can"
        )


def check_whole(**numbers: Any) -> None:
    """Whole numbers, by the argument's name."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise UsageError(f"{name} must be a whole number, got {value!r}")


def check_finite_images(images: Tensor, what: str) -> None:
    """Failure if a picture would be black or noise: NaN and infinity are no pixels."""
    if not torch.isfinite(images).all():
        raise Failure(
            f"{what} must be finite, got NaN or infinity: look at guidance scales, text features and the LoRA's scale"
        )


def generator_list(generator: Any, images: int) -> torch.Generator | list[torch.Generator] | None:
    """One random state for all images, or a list with one for each."""
    generators = list(generator) if isinstance(generator, list | tuple) else generator
    every = generators if isinstance(generators, list) else [generators]
    if generators is not None and not all(isinstance(one, torch.Generator) for one in every):
        raise UsageError(f"generator must be a torch.Generator or a list of those, got {generator!r}")
    if isinstance(generators, list) and len(generators) != images:
        raise UsageError(f"generator must be one for all or one per image ({images}), got {len(generators)}")
    return generators


def check_at_least_one(name: str, count: int) -> None:
    """At least one of what `name` counts."""
    if count < 1:
        raise UsageError(f"{name} must be at least 1, got {count}")


def condition_lists(condition: Conditions | None, batch: int) -> list[list[Image.Image]]:
    """The condition images of each prompt: an image for all; for one prompt a list of K; for B prompts a list of B entries."""
    if condition is None:
        raise UsageError("condition must be an image or a list of images, got None")
    if isinstance(condition, Image.Image):
        condition = [condition] * batch
    if not isinstance(condition, (list, tuple)):
        raise UsageError(f"condition must be an image or a list of images, got {type(condition).__name__}")
    single = batch == 1 and isinstance(next(iter(condition), None), Image.Image)
    rows: list[Any] = [list(condition)] if single else list(condition)
    lists = [list(row) if isinstance(row, (list, tuple)) else [row] for row in rows]
    for image in (image for row in lists for image in row):
        if not isinstance(image, Image.Image):
            raise UsageError(f"condition must be an image or a list of images, got a list with {type(image).__name__}")
    if len(lists) != batch:
        raise UsageError(f"condition must have one entry per prompt ({batch}), got {len(lists)}")
    if len({len(row) for row in lists}) != 1 or not lists[0]:
        raise UsageError(f"condition must have the same number of images for each prompt, got {[len(r) for r in lists]}")
    return lists


def check_embeds(prompts: int, width: int, **embeds: Tensor | None) -> None:
    """Text features that are given are [prompts, T, width]."""
    for name, tensor in embeds.items():
        if tensor is None:
            continue
        if len(tensor) != prompts:
            raise UsageError(f"{name} must have one row per prompt ({prompts}), got {len(tensor)}")
        if tensor.ndim != 3 or tensor.shape[2] != width:
            raise UsageError(f"{name} must have shape [{prompts}, T, {width}], got {list(tensor.shape)}")


def subject_list(subject: str | Sequence[str | None], prompts: int) -> list[str | None]:
    """One subject for all prompts, or one or none for each."""
    subjects: list[str | None] = [subject] * prompts if isinstance(subject, str) else list(subject)
    if not all(name is None or isinstance(name, str) for name in subjects):
        raise UsageError(f"subject must be a string, or a list of strings and None, got {subject!r}")
    if len(subjects) != prompts:
        raise UsageError(f"subject must be one for all or one per prompt ({prompts}), got {len(subjects)}")
    return subjects


def one_cache(cache: ConditionCache | Sequence[ConditionCache], prompts: int, grid: tuple[int, int]) -> ConditionCache:
    """A cache for all prompts or with a sample for each, of images that are cached together or each on its own."""
    caches = [cache] if isinstance(cache, ConditionCache) else cache
    if not isinstance(caches, (list, tuple)) or not all(isinstance(part, ConditionCache) for part in caches):
        raise UsageError(f"condition_cache must be what encode_condition returns, or a list of those, got {cache!r}")
    full = cache if isinstance(cache, ConditionCache) else ConditionCache.join(caches)
    if full.batch not in (1, prompts):
        raise UsageError(f"condition_cache must hold 1 sample or one per prompt ({prompts}), got {full.batch}")
    if full.grid != grid:
        raise UsageError(f"condition_cache must be of a {grid} token grid, got {full.grid}: encode it at this height and width")
    return full


def callback_inputs(callback: Any, names: Sequence[str]) -> Sequence[str]:
    """The tensors that a callback asks for: diffusers' callback objects know them."""
    return callback.tensor_inputs if isinstance(callback, PipelineCallback | MultiPipelineCallbacks) else names


@dataclass(frozen=True)
class Call:
    """The arguments of a pipeline's call, checked and filled in.

    Attributes:
        prompts: B prompts, empty strings where their features are given.
        negatives: B negative prompts, None = empty ones.
        embeds: "prompt_embeds" and "negative_prompt_embeds", as given.
        conditions: The K condition images of each prompt; None with a cache.
        cache: The condition cache, joined to one; None with conditions.
        task: Name of a task that the transformer knows.
        size: (height, width) in pixels.
        guidance: Passes of a step.
        images: Number of images, all prompts together.
        generator: As given.
        window: Length of the text window.
        callback_inputs: Tensors that the callback is shown.
    """

    prompts: list[str]
    negatives: list[str] | None
    embeds: dict[str, Tensor | None]
    conditions: list[list[Image.Image]] | None
    cache: ConditionCache | None
    task: str
    size: tuple[int, int]
    guidance: Guidance
    images: int
    generator: Any
    window: int
    callback_inputs: Sequence[str]

    @classmethod
    def checked(
        cls,
        pipe: Any,
        *,
        prompt: str | Sequence[str] | None,
        condition: Conditions | None,
        condition_cache: ConditionCache | Sequence[ConditionCache] | None,
        task: str,
        subject: str | Sequence[str | None] | None,
        negative_prompt: str | Sequence[str] | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        latents: Tensor | None,
        height: int | None,
        width: int | None,
        num_inference_steps: int,
        guidance_scale: float,
        image_guidance_scale: float,
        num_images_per_prompt: int,
        generator: Any,
        output_type: str,
        attention_kwargs: dict[str, Any] | None,
        callback_on_step_end: Any,
        callback_on_step_end_tensor_inputs: Sequence[str],
        max_sequence_length: int | None,
    ) -> Call:
        """Check what `RealGeneralPipeline.__call__` was given, in its words; UsageError says what would fit."""
        check_parts(pipe)
        check_scheduler(pipe.scheduler, pipe.snr_shift_scale)
        texts = {"prompt": prompt, "negative_prompt": negative_prompt, "subject": subject}
        embeds = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        asked = callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        check_kinds(texts, {**embeds, "latents": latents}, callback_on_step_end, asked)
        prompts = prompt_list(prompt, prompt_embeds)
        whole = {"num_inference_steps": num_inference_steps, "num_images_per_prompt": num_images_per_prompt}
        optional = {"height": height, "width": width, "max_sequence_length": max_sequence_length}
        check_whole(**whole, **{name: value for name, value in optional.items() if value is not None})
        if not isinstance(task, str):
            raise UsageError(f"task must be a string, got {task!r}")
        if attention_kwargs is not None and not isinstance(attention_kwargs, dict):
            raise UsageError(f'attention_kwargs must be {{"scale": LoRA scale}}, got {attention_kwargs!r}')
        size = pipe.image_size(height, width)
        negatives = as_list(negative_prompt, len(prompts))
        _check_prompts(prompts, negatives)
        check_embeds(len(prompts), pipe.transformer.geometry.text_dim, **embeds)
        check_choices(output_type, asked)
        check_steps("num_inference_steps", num_inference_steps, pipe.scheduler)
        check_at_least_one("num_images_per_prompt", num_images_per_prompt)
        images = len(prompts) * num_images_per_prompt
        generator = generator_list(generator, images)
        pipe.task_ids(task, 1)
        if condition is not None and condition_cache is not None:
            raise UsageError("condition and condition_cache must not both be given, got both")
        if subject is not None and prompt is None:
            raise UsageError("prompt must be given with subject, got None")
        conditions, cache = None, None
        if condition_cache is None:
            conditions = condition_lists(condition, len(prompts))
        else:
            height, width = (side // pipe.vae_scale_factor_spatial for side in size)
            cache = one_cache(condition_cache, len(prompts), pipe.transformer.geometry.grid(height, width))
        window = pipe.transformer.geometry.text_window if max_sequence_length is None else max_sequence_length
        check_at_least_one("max_sequence_length", window)
        if window > (most := pipe.transformer.geometry.text_window):
            raise UsageError(f"max_sequence_length must be at most the base's {most}, got {window}")
        guidance = Guidance(guidance_scale, image_guidance_scale)
        return cls(prompts, negatives, embeds, conditions, cache, task, size, guidance, images, generator, window, asked)
