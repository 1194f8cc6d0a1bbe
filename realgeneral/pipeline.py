"""Generation: prompt and condition image(s) in, image out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from realgeneral.arguments import (
    CALLBACK_INPUTS,
    Conditions,
    as_list,
    callback_inputs,
    check_at_least_one,
    check_choices,
    check_embeds,
    check_prompts,
    check_steps,
    condition_lists,
    one_cache,
    prompt_list,
    subject_list,
)
from realgeneral.errors import UsageError
from realgeneral.guidance import Guidance
from realgeneral.model.adapter import load_adapter
from realgeneral.model.adapter_info import AdapterInfo
from realgeneral.model.condition import ConditionCache
from realgeneral.model.geometry import NEWER_SIDES
from realgeneral.model.presets import get_preset
from realgeneral.model.transformer import RealGeneralTransformer3DModel
from realgeneral.model.vae import decode_latents, encode_images
from realgeneral.nano.assets import resolve_base
from realgeneral.pictures import fit_picture, to_pixels
from realgeneral.prompts import pool_subject, subject_span_mask, token_count


@dataclass
class RealGeneralPipelineOutput(BaseOutput):  # type: ignore[misc]
    """Images, one per prompt and `num_images_per_prompt`, prompt-major: a list of PIL images, or an array or tensor."""

    images: Any


class RealGeneralPipeline(CogVideoXPipeline):
    """Text and condition images to image with a RealGeneral transformer; a diffusers pipeline in every other respect.

    A stock CogVideoX transformer is given a fresh condition branch; load an adapter to make it useful.

    Source:
        RealGeneral (arXiv 2503.10406); diffusers `CogVideoXPipeline`. Condition and target are encoded separately, and the
        target alone is decoded.
    """

    _callback_tensor_inputs: ClassVar[list[str]] = list(CALLBACK_INPUTS)

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: AutoencoderKLCogVideoX,
        # both named: `from_pipe` compares types, not classes
        transformer: CogVideoXTransformer3DModel | RealGeneralTransformer3DModel,
        scheduler: Any,
    ) -> None:
        if not isinstance(transformer, RealGeneralTransformer3DModel):
            transformer = RealGeneralTransformer3DModel.from_cogvideox(transformer)
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
        self.adapter: AdapterInfo | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        adapter: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> RealGeneralPipeline:
        """Load a base and, optionally, an adapter.

        Args:
            pretrained_model_name_or_path: Any CogVideoX text-to-video checkpoint (folder or hub id), or "nano".
            adapter: Adapter folder, or "nano".
            **kwargs: As diffusers' `from_pretrained`; `dtype` is float32 unless given.
        """
        if "torch_dtype" not in kwargs:
            # transformers would load a half-precision text encoder as stored, which a CPU cannot run beside float32
            kwargs.setdefault("dtype", torch.float32)
        pipe: RealGeneralPipeline = super().from_pretrained(resolve_base(pretrained_model_name_or_path), **kwargs)
        if adapter is not None:
            pipe.load_adapter(adapter)
        return pipe

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers; pipelines saved before version 0.2 name a module that is gone."""
        config = super().load_config(*args, **kwargs)
        parts = config[0] if isinstance(config, tuple) else config
        if parts.get("transformer", [None])[0] == "realgeneral.model.transformer":
            parts["transformer"] = ["realgeneral", parts["transformer"][1]]
        return config

    def load_adapter(self, adapter: str | os.PathLike[str], *, preset: str | None = None) -> AdapterInfo:
        """Load an adapter folder (or "nano") into the transformer; see `realgeneral.adapter.load_adapter`."""
        self.adapter = load_adapter(self.transformer, adapter, preset=preset)
        return self.adapter

    @wraps(CogVideoXPipeline.save_pretrained)
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers, but refuses a transformer with a LoRA before anything is written."""
        if self.transformer is not None:
            self.transformer.check_no_lora()
        super().save_pretrained(*args, **kwargs)

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Not supported: that offload follows the calls of single layers, and the ops read the norms' weights directly."""
        raise NotImplementedError("sequential CPU offload is not supported, use enable_model_cpu_offload()")

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this many pixels."""
        return int(self.vae_scale_factor_spatial * self.transformer.config.patch_size)

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str] | None = None,
        condition: Conditions | None = None,
        *,
        task: str,
        subject: str | Sequence[str | None] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        image_guidance_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        condition_cache: ConditionCache | Sequence[ConditionCache] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
    ) -> Any:
        """Generate images from prompts and condition images.

        Args:
            prompt: One prompt, or a list of B; with `prompt_embeds` needed for a `subject` alone.
            condition: For one prompt an image or a list of K images; for B prompts a list of B such entries.
            task: Name of a task that the transformer knows.
            subject: Words of the prompt that name the subject (customization), one for all or one per prompt.
            negative_prompt: As in diffusers; empty by default.
            prompt_embeds: What the text encoder gives for the prompts, [B, T, E]: with both of these it is not needed.
            negative_prompt_embeds: As `prompt_embeds`, for the negative prompts, with the same T.
            height: Pixels, a multiple of `size_multiple`; default: the base's own size (1.5: 768 x 1360).
            width: As `height`.
            num_inference_steps: Denoising steps.
            guidance_scale: Classifier-free guidance on the prompt; 1 or less turns it off.
            image_guidance_scale: Guidance on the condition images (`realgeneral.guidance.Guidance`); 1 turns it off. Equal to
                `guidance_scale` it costs no more than guidance on the prompt alone, else a third pass per step.
            num_images_per_prompt: Images per prompt.
            generator: Random state, one for all or one per image.
            latents: Initial noise, [images, F, C, h, w].
            condition_cache: From `encode_condition`, instead of `condition`; a list for images cached each on its own.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: Return `RealGeneralPipelineOutput` instead of a tuple.
            attention_kwargs: {"scale": LoRA scale}.
            callback_on_step_end: Called as in diffusers after each step; None from it changes nothing.
            callback_on_step_end_tensor_inputs: Tensors handed to the callback: "latents", in the order of the images, and
                "prompt_embeds", [passes * images, T, E], the passes of guidance one after the other, the prompt's last.
            max_sequence_length: Text window in tokens; default: the base's.

        Returns:
            `RealGeneralPipelineOutput` (or a tuple): images, prompt-major.

        Raises:
            UsageError: A size, task, subject or prompt does not fit; the message says what would.
        """
        prompts = prompt_list(prompt, prompt_embeds)
        height, width = self._size(height, width)
        negatives = as_list(negative_prompt, len(prompts))
        check_prompts(prompts, negatives)
        embeds = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        check_embeds(len(prompts), self.transformer.config.text_embed_dim, **embeds)
        asked = callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        check_choices(output_type, asked)
        check_steps("num_inference_steps", num_inference_steps, self.scheduler)
        check_at_least_one("num_images_per_prompt", num_images_per_prompt)
        self._task_ids(task, 1)
        if condition is not None and condition_cache is not None:
            raise UsageError("condition and condition_cache must not both be given, got both")
        conditions = condition_lists(condition, len(prompts)) if condition_cache is None else None
        guidance = Guidance(guidance_scale, image_guidance_scale)
        self._guidance_scale, self._interrupt, self._attention_kwargs = guidance_scale, False, attention_kwargs
        device = self._execution_device
        window = self.transformer.config.max_text_seq_length if max_sequence_length is None else max_sequence_length
        check_at_least_one("max_sequence_length", window)
        text, negative = self._encode_texts(prompts, negatives, not all(guidance.prompts), embeds, window)
        if subject is not None and prompt is None:
            raise UsageError("prompt must be given with subject, got None")
        subject_embeds = self._subject_embeds(prompts, subject, text, window)
        inputs, cache = self._condition_inputs(
            conditions, condition_cache, len(prompts), task, subject_embeds, (height, width), guidance.conditions
        )
        images = len(prompts) * num_images_per_prompt
        latents = self._initial_latents(images, height, width, text.dtype, device, generator, latents)
        # samples run image-major, then pass, then prompt, so that tensors of the passes' prompts and conditions tile
        order = torch.arange(images).view(len(prompts), num_images_per_prompt).T.flatten()
        texts = [text if given else negative for given in guidance.prompts]
        text = torch.cat(texts * num_images_per_prompt)
        latents = self._denoise_loop(
            latents[order],
            text,
            guidance,
            inputs,
            cache,
            num_inference_steps,
            num_images_per_prompt,
            generator if not isinstance(generator, list) else [generator[i] for i in order],
            callback_on_step_end,
            asked,
        )
        latents = latents[torch.argsort(order)]
        result = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return RealGeneralPipelineOutput(images=result) if return_dict else (result,)

    @torch.no_grad()
    def encode_condition(
        self,
        condition: Conditions,
        *,
        task: str,
        prompt: str | None = None,
        subject: str | None = None,
        position: int = 0,
        height: int | None = None,
        width: int | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> ConditionCache:
        """Encode the condition image(s) once, to be reused by any number of calls with `condition_cache=` (preset "cached").

        Args:
            condition: An image or a list of K images.
            task: As in `__call__`.
            prompt: Needed only with `subject`.
            subject: Words of `prompt` that name the subject; later prompts should name the same subject.
            position: Place among several condition images that are cached each on its own (0 = first).
            height: Pixels.
            width: Pixels.
            attention_kwargs: {"scale": LoRA scale}.
        """
        size = self._size(height, width)
        subject_embeds = None
        if subject is not None:
            if prompt is None:
                raise UsageError("prompt must be given with subject, got None")
            window = self.transformer.config.max_text_seq_length
            text, _ = self._encode_texts([prompt], None, False, {}, window)
            subject_embeds = self._subject_embeds([prompt], subject, text, window)
        conditions = condition_lists(condition, 1)
        latents = self._condition_latents(conditions, size)
        return self.transformer.encode_condition(
            latents, self._task_ids(task, 1), subject_embeds, position=position, attention_kwargs=attention_kwargs
        )

    def _encode_texts(
        self, prompts: list[str], negatives: list[str] | None, guided: bool, embeds: dict[str, Tensor | None], window: int
    ) -> tuple[Tensor, Tensor]:
        """Text features of the prompts and of the negative ones (if not `guided`: the prompts'), given or encoded."""
        encoded = [] if embeds.get("prompt_embeds") is not None else prompts
        if embeds.get("negative_prompt_embeds") is None:
            encoded = [*encoded, *(negatives or [""] * guided)]
        if encoded and (self.text_encoder is None or self.tokenizer is None):
            raise UsageError("text_encoder and tokenizer must be there unless all text features are given, got none")
        self._check_prompts(encoded, window)
        device = self._execution_device
        pair = self.encode_prompt(prompts, negatives, guided, **embeds, max_sequence_length=window, device=device)
        text, negative = (x.to(device, self.transformer.dtype) for x in (pair if guided else pair[:1] * 2))
        if text.shape[1] != negative.shape[1]:
            raise UsageError(
                f"prompt_embeds and negative_prompt_embeds must have the same number of tokens, got {text.shape[1]} and "
                f"{negative.shape[1]}"
            )
        return text, negative

    def _denoise_loop(
        self,
        latents: Tensor,
        text: Tensor,
        guidance: Guidance,
        inputs: dict[str, Any],
        cache: ConditionCache | None,
        steps: int,
        images: int,
        generator: Any,
        callback: Callable[..., dict[str, Any] | None] | None,
        callback_names: Sequence[str],
    ) -> Tensor:
        self.scheduler.set_timesteps(steps, device=latents.device)
        timesteps, passes, previous = self.scheduler.timesteps, len(guidance.passes), None
        self._num_timesteps = len(timesteps)
        extra = self.prepare_extra_step_kwargs(generator, 0.0)
        embed = partial(self.transformer.embed, **inputs, attention_kwargs=self._attention_kwargs)
        embedded = embed(text)
        with self.progress_bar(total=steps) as bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                scaled = self.scheduler.scale_model_input(latents, t).to(text.dtype)
                model_input = scaled.unflatten(0, (images, 1, -1)).expand(-1, passes, *[-1] * latents.ndim).flatten(0, 2)
                prediction = self.transformer(
                    model_input,
                    embedded,
                    t.expand(model_input.shape[0]),
                    condition_cache=cache,
                    attention_kwargs=self._attention_kwargs,
                    return_dict=False,
                )[0].float()
                prediction = guidance.combine(prediction.unflatten(0, (images, passes, -1)), dim=1).flatten(0, 1)
                if isinstance(self.scheduler, CogVideoXDPMScheduler):
                    before = timesteps[i - 1] if i > 0 else None
                    latents, previous = self.scheduler.step(
                        prediction, previous, t, before, latents, **extra, return_dict=False
                    )
                else:
                    latents = self.scheduler.step(prediction, t, latents, **extra, return_dict=False)[0]
                latents = latents.to(text.dtype)
                if callback is not None:
                    # to the callback, as everywhere outside, images are prompt-major
                    shown = {"latents": _images_last(latents, images), "prompt_embeds": _images_last(text, images, passes)}
                    changed = callback(self, i, t, {k: shown[k] for k in callback_names}) or {}
                    latents = _images_first(changed.get("latents", shown["latents"]), images)
                    if changed.get("prompt_embeds", shown["prompt_embeds"]) is not shown["prompt_embeds"]:
                        text = _images_first(changed["prompt_embeds"], images, passes)
                        embedded = embed(text)
                bar.update()
        self._current_timestep = None
        return latents

    def _condition_inputs(
        self,
        conditions: list[list[Image.Image]] | None,
        cache: ConditionCache | Sequence[ConditionCache] | None,
        prompts: int,
        task: str,
        subject_embeds: Tensor | None,
        size: tuple[int, int],
        given: Sequence[bool],
    ) -> tuple[dict[str, Any], ConditionCache | None]:
        """The conditions of all passes, `given` or empty, as `embed`'s arguments, or as a cache if the preset allows one."""
        inputs = {"task_ids": self._task_ids(task, prompts), "subject_embeds": subject_embeds}
        encode = partial(self.transformer.encode_condition, **inputs, attention_kwargs=self._attention_kwargs)
        if cache is not None:
            height, width = (side // self.vae_scale_factor_spatial for side in size)
            full = one_cache(cache, prompts, self.transformer.geometry.grid(height, width))
        else:
            assert conditions is not None
            latents = self._condition_latents(conditions, size)
            if not get_preset(self.transformer.config.preset).cacheable:
                given = given[:1] if all(given) else given  # one for all passes
                repeated = {name: None if x is None else torch.cat([x] * len(given)) for name, x in inputs.items()}
                parts = [latents if g else torch.zeros_like(latents) for g in given]
                return {"condition_latents": torch.cat(parts), **repeated}, None
            full = encode(latents)
        if all(given):
            return {}, full
        empty = encode(self._empty_latents(prompts, full.conditions, size))
        return {}, ConditionCache.stack([full if g else empty for g in given], prompts)

    def _empty_latents(self, prompts: int, conditions: int, size: tuple[int, int]) -> Tensor:
        """What condition dropout makes of a condition."""
        height, width = (side // self.vae_scale_factor_spatial for side in size)
        shape = (prompts, conditions, self.transformer.config.in_channels, height, width)
        return torch.zeros(shape, dtype=self.transformer.dtype, device=self._execution_device)

    def _condition_latents(self, conditions: list[list[Image.Image]], size: tuple[int, int]) -> Tensor:
        """[B, K, C, h, w]; each image is encoded by itself."""
        height, width = size
        pixels = torch.stack([to_pixels(fit_picture(image, width, height)) for row in conditions for image in row])
        latents = encode_images(self.vae, pixels.to(self._execution_device))
        return latents.unflatten(0, (len(conditions), -1)).to(self.transformer.dtype)

    def _subject_embeds(
        self, prompts: list[str], subject: str | Sequence[str | None] | None, text: Tensor, window: int
    ) -> Tensor | None:
        mask = self._subject_mask(prompts, subject, window)
        return None if mask is None else pool_subject(text, mask.to(text.device))

    def _subject_mask(self, prompts: list[str], subject: str | Sequence[str | None] | None, window: int) -> Tensor | None:
        if subject is None:
            return None
        try:
            return subject_span_mask(self.tokenizer, prompts, subject_list(subject, len(prompts)), window)
        except ValueError as error:
            raise UsageError(str(error)) from None

    def _initial_latents(
        self,
        images: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: Any,
        latents: Tensor | None,
    ) -> Tensor:
        factor, frames = self.vae_scale_factor_spatial, self.transformer.geometry.frames_per_image
        shape = (images, frames, self.transformer.config.in_channels, height // factor, width // factor)
        if isinstance(generator, list) and len(generator) != images:
            raise UsageError(f"generator must be one for all or one per image ({images}), got {len(generator)}")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise UsageError(f"latents must have shape {list(shape)}, got {list(latents.shape)}")
        return latents.to(device, dtype) * self.scheduler.init_noise_sigma

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        # the last frame is the target (CogVideoX 1.5 denoises two copies); it is decoded alone
        pixels = decode_latents(self.vae, latents[:, -1])
        return self.video_processor.postprocess(pixels.float(), output_type=output_type)

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        config, factor = self.transformer.config, self.vae_scale_factor_spatial
        own = config.sample_height * factor, config.sample_width * factor
        if config.patch_size_t:
            # 1.5's sample size is the end of its position table, not what it was trained on
            own = min(own[0], NEWER_SIDES[0]), min(own[1], NEWER_SIDES[1])
        height = own[0] if height is None else height
        width = own[1] if width is None else width
        for name, value in (("height", height), ("width", width)):
            if value < self.size_multiple or value % self.size_multiple:
                raise UsageError(f"{name} must be a positive multiple of {self.size_multiple}, got {value}")
        if config.patch_size_t:
            for name, value, limit in (("height", height, config.sample_height), ("width", width, config.sample_width)):
                if value > limit * factor:
                    raise UsageError(f"{name} must be at most {limit * factor}, got {value}")
        return height, width

    def _task_ids(self, task: str, batch: int) -> Tensor:
        try:
            ids: Tensor = self.transformer.task_ids([task] * batch)
        except ValueError as error:
            raise UsageError(str(error)) from None
        return ids.to(self._execution_device)

    def _check_prompts(self, prompts: list[str], window: int, hint: str = "") -> None:
        for prompt in prompts:
            if (length := token_count(self.tokenizer, prompt)) > window:
                raise UsageError(f"prompt must have at most {window} tokens, got {length}: {prompt[:60]!r}{hint}")


def _images_last(x: Tensor, images: int, passes: int = 1) -> Tensor:
    """[images, passes, prompts] samples, as a step takes them -> [passes, prompts, images]."""
    return x.unflatten(0, (images, passes, -1)).movedim(0, 2).flatten(0, 2)


def _images_first(x: Tensor, images: int, passes: int = 1) -> Tensor:
    """The inverse of `_images_last`."""
    return x.unflatten(0, (passes, -1, images)).movedim(2, 0).flatten(0, 2)
