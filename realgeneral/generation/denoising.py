"""The loop over the steps: predictions of the passes, guidance, and the scheduler's step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import CogVideoXDPMScheduler
from torch import Tensor

from realgeneral.generation.guidance import Guidance
from realgeneral.model.condition import ConditionCache


class Conditioning(NamedTuple):
    """The conditions of all passes, in one of two ways.

    Attributes:
        inputs: Arguments of the transformer's `embed`: "condition_latents", "task_ids", "subject_embeds"; empty with a cache.
        cache: What `encode_condition` returned, stacked over the passes if they differ.
    """

    inputs: dict[str, Any]
    cache: ConditionCache | None


def denoise(
    pipe: Any,
    latents: Tensor,
    texts: Sequence[Tensor],
    conditioning: Conditioning,
    guidance: Guidance,
    *,
    steps: int,
    images_per_prompt: int = 1,
    generator: torch.Generator | list[torch.Generator] | None = None,
    callback: Callable[..., dict[str, Any] | None] | None = None,
    callback_inputs: Sequence[str] = (),
) -> Tensor:
    """Latents of images from noise.

    Args:
        pipe: The pipeline: its transformer, scheduler and progress bar.
        latents: Noise, [prompts * images_per_prompt, F, C, h, w], prompt-major.
        texts: For each pass of guidance its text features, [prompts, T, E].
        conditioning: For all passes.
        guidance: The passes, and how their predictions are combined.
        steps: Number of denoising steps.
        images_per_prompt: Images of each prompt.
        generator: For schedulers that add noise, one or one per image.
        callback: As `callback_on_step_end` of the pipeline.
        callback_inputs: Tensors that it is shown.

    Returns:
        As `latents`, denoised.
    """
    # samples run image-major, then pass, then prompt, so that tensors of the passes' prompts and conditions tile
    order = torch.arange(len(latents)).view(-1, images_per_prompt).T.flatten()
    generator = [generator[i] for i in order] if isinstance(generator, list) else generator
    latents, text = latents[order], torch.cat([*texts] * images_per_prompt)
    scheduler, attention_kwargs = pipe.scheduler, pipe.attention_kwargs
    scheduler.set_timesteps(steps, device=latents.device)
    timesteps, passes, previous = scheduler.timesteps, len(guidance.passes), None
    pipe._num_timesteps = len(timesteps)
    extra = pipe.prepare_extra_step_kwargs(generator, 0.0)
    embed = partial(pipe.transformer.embed, **conditioning.inputs, attention_kwargs=attention_kwargs)
    embedded = embed(text)
    with pipe.progress_bar(total=steps) as bar:
        for i, t in enumerate(timesteps):
            if pipe.interrupt:
                continue
            pipe._current_timestep = t
            scaled = scheduler.scale_model_input(latents, t).to(text.dtype)
            inputs = scaled.unflatten(0, (images_per_prompt, 1, -1)).expand(-1, passes, *[-1] * latents.ndim).flatten(0, 2)
            prediction = pipe.transformer(
                inputs,
                embedded,
                t.expand(inputs.shape[0]),
                condition_cache=conditioning.cache,
                attention_kwargs=attention_kwargs,
                return_dict=False,
            )[0].float()
            prediction = guidance.combine(prediction.unflatten(0, (images_per_prompt, passes, -1)), dim=1).flatten(0, 1)
            if isinstance(scheduler, CogVideoXDPMScheduler):  # it has another signature: its second order looks back
                before = timesteps[i - 1] if i > 0 else None
                latents, previous = scheduler.step(prediction, previous, t, before, latents, **extra, return_dict=False)
            else:
                latents = scheduler.step(prediction, t, latents, **extra, return_dict=False)[0]
            latents = latents.to(text.dtype)
            if callback is not None:
                # to the callback, as everywhere outside, images are prompt-major
                shown = {
                    "latents": _images_last(latents, images_per_prompt),
                    "prompt_embeds": _images_last(text, images_per_prompt, passes),
                }
                changed = callback(pipe, i, t, {name: shown[name] for name in callback_inputs}) or {}
                latents = _images_first(changed.get("latents", shown["latents"]), images_per_prompt)
                if changed.get("prompt_embeds", shown["prompt_embeds"]) is not shown["prompt_embeds"]:
                    text = _images_first(changed["prompt_embeds"], images_per_prompt, passes)
                    embedded = embed(text)
            bar.update()
    pipe._current_timestep = None
    return latents[torch.argsort(order)]


def _images_last(x: Tensor, images: int, passes: int = 1) -> Tensor:
    """[images, passes, prompts] samples, as a step takes them -> [passes, prompts, images]."""
    return x.unflatten(0, (images, passes, -1)).movedim(0, 2).flatten(0, 2)


def _images_first(x: Tensor, images: int, passes: int = 1) -> Tensor:
    """The inverse of `_images_last`."""
    return x.unflatten(0, (passes, -1, images)).movedim(2, 0).flatten(0, 2)
