"""Generation: prompt and condition image(s) in, image out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from realgeneral.errors import UsageError
from realgeneral.generation.arguments import (
    CALLBACK_INPUTS,
    Call,
    Conditions,
    check_finite_images,
    check_parts,
    condition_lists,
    subject_list,
)
from realgeneral.generation.denoising import Conditioning, denoise
from realgeneral.model.adapter import CONDITION_FILE, load_adapter
from realgeneral.model.adapter_info import AdapterInfo
from realgeneral.model.cogvideox import RealGeneralTransformer3DModel
from realgeneral.model.condition import ConditionCache
from realgeneral.model.presets import get_preset
from realgeneral.model.vae import whole_tiles
from realgeneral.nano.assets import resolve_base
from realgeneral.pictures import fit_picture, to_pixels
from realgeneral.prompts import pool_subject, subject_span_mask, token_count
from realgeneral.tasks import TASKS, DepthTask, get_task

logger = logging.get_logger(__name__)


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
        if transformer is not None and not isinstance(transformer, RealGeneralTransformer3DModel):
            transformer = RealGeneralTransformer3DModel.from_stock(transformer)
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
        if vae is not None:
            whole_tiles(vae)
        self.adapter: AdapterInfo | None = None
        # of the base's own schedule, by which another scheduler is judged
        self.snr_shift_scale = float(scheduler.config.get("snr_shift_scale", 1.0)) if scheduler is not None else 1.0

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
        """As in diffusers; pipelines saved before 2026-11-28 name a module that is gone."""
        config = super().load_config(*args, **kwargs)
        parts = config[0] if isinstance(config, tuple) else config
        if parts.get("transformer", [None])[0] == "realgeneral.transformer":
            parts["transformer"] = ["realgeneral", parts["transformer"][1]]
        return config

    def load_adapter(self, adapter: str | os.PathLike[str], *, preset: str | None = None) -> AdapterInfo:
        """Load an adapter folder (or "nano") into the transformer; see `realgeneral.model.adapter.load_adapter`."""
        self.adapter = load_adapter(self.transformer, adapter, preset=preset)
        return self.adapter

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any) -> None:
        """As in diffusers, beside the LoRAs that are active; an adapter folder of ours is loaded whole, by `load_adapter`."""
        given = pretrained_model_name_or_path_or_dict
        if isinstance(given, str | os.PathLike) and (Path(given) / CONDITION_FILE).is_file():
            if args or kwargs:
                raise UsageError(f"an adapter of RealGeneral must be loaded without further arguments, got {args or kwargs}")
            self.load_adapter(given)
            return
        had = self.transformer.active_adapters() if getattr(self.transformer, "peft_config", None) else []
        super().load_lora_weights(given, *args, **kwargs)
        if had:
            new = [name for name in self.transformer.active_adapters() if name not in had]
            self.transformer.set_adapters([*had, *new])

    @wraps(CogVideoXPipeline.save_pretrained)
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers, but refuses a transformer with a LoRA before anything is written."""
        if self.transformer is not None:
            self.transformer.check_no_lora()
        super().save_pretrained(*args, **kwargs)

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Not supported: that offload follows the calls of single layers, and the ops read the norms' weights directly."""
        raise NotImplementedError("sequential CPU offload is not supported, use enable_model_cpu_offload()")

    def derive_condition(
        self, picture: Image.Image, task: str, *, seed: int = 0, height: int | None = None, width: int | None = None
    ) -> Image.Image:
        """Make a task's condition from a picture, as the adapter was trained with it.

        Args:
            picture: Any size; it is scaled and cropped to `height` x `width`.
            task: Name of a task, or a spec with options of your own such as "deblurring:radius=8".
            seed: Of what is random in it (the hole of inpainting).
            height: Pixels; default: the base's own.
            width: As `height`.

        Returns:
            What `__call__` takes as `condition`.

        Raises:
            UsageError: Unknown task, one that derives no condition, or one whose model would be fetched on the adapter's word.
        """
        height, width = self.image_size(height, width)
        fitted = fit_picture(picture, width, height)
        try:
            name = get_task(task).name
            chosen = get_task(task if ":" in task or self.adapter is None else self.adapter.task_spec(name))
            if isinstance(chosen, DepthTask) and ":" not in task and chosen.model and not Path(chosen.model).is_dir():
                raise UsageError(
                    f"task must name its depth model, {name}:model={chosen.model}, since it would be fetched; the adapter "
                    f"alone asks for it, got {task!r}"
                )
            return chosen.condition(fitted, seed)
        except ValueError as error:
            raise UsageError(str(error)) from None

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this many pixels."""
        return int(self.vae_scale_factor_spatial * self.transformer.geometry.patch_size)

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
            condition: An image for all prompts; for one prompt a list of K images; for B prompts a list of B such entries.
            task: Name of a task that the transformer knows.
            subject: Words of the prompt that name the subject (customization), one for all or one per prompt.
            negative_prompt: As in diffusers; empty by default.
            prompt_embeds: What the text encoder gives for the prompts, [B, T, E]: with both of these it is not needed.
            negative_prompt_embeds: As `prompt_embeds`, for the negative prompts, with the same T.
            height: Pixels, a multiple of `size_multiple`; default: the base's own size (1.5: 768 x 1360).
            width: As `height`.
            num_inference_steps: Denoising steps.
            guidance_scale: Classifier-free guidance on the prompt; 1 or less turns it off.
            image_guidance_scale: Guidance on the condition images; 1 turns it off. Equal to `guidance_scale` it takes the two
                passes of guidance on the prompt alone, else a third one; see `realgeneral.generation.guidance`.
            num_images_per_prompt: Images per prompt.
            generator: Random state, one for all or one per image.
            latents: Initial noise, [images, F, C, h, w].
            condition_cache: From `encode_condition`, instead of `condition`; a list for images cached each on its own.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: Return `RealGeneralPipelineOutput` instead of a tuple.
            attention_kwargs: {"scale": LoRA scale}, finite.
            callback_on_step_end: Called as in diffusers after each step; None from it changes nothing.
            callback_on_step_end_tensor_inputs: Tensors handed to the callback: "latents", in the order of the images, and
                "prompt_embeds", [passes * images, T, E], the passes of guidance one after the other, the prompt's last.
            max_sequence_length: Text window in tokens; default: the base's.

        Returns:
            `RealGeneralPipelineOutput` (or a tuple): images, prompt-major.

        Raises:
            UsageError: A size, task, subject, prompt, generator or scheduler does not fit; the message says what would.
            Failure: The result is not finite: guidance, text features or a LoRA are out of all proportion.
        """
        call = Call.checked(
            self,
            prompt=prompt,
            condition=condition,
            condition_cache=condition_cache,
            task=task,
            subject=subject,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            latents=latents,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            output_type=output_type,
            attention_kwargs=attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
        )
        self._warn(call)
        self._guidance_scale, self._interrupt, self._attention_kwargs = guidance_scale, False, attention_kwargs
        guided = not all(call.guidance.prompts)
        text, negative = self._encode_texts(call.prompts, call.negatives, guided, call.embeds, call.window)
        subject_embeds = self._subject_embeds(call.prompts, subject, text, call.window)
        latents = denoise(
            self,
            self._initial_latents(call, text.dtype, latents),
            [text if given else negative for given in call.guidance.prompts],
            self._conditioning(call, subject_embeds),
            call.guidance,
            steps=num_inference_steps,
            images_per_prompt=num_images_per_prompt,
            generator=call.generator,
            callback=callback_on_step_end,
            callback_inputs=call.callback_inputs,
        )
        check_finite_images(latents, "latents after denoising")
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
        check_parts(self)
        size = self.image_size(height, width)
        subject_embeds = None
        if subject is not None:
            if prompt is None:
                raise UsageError("prompt must be given with subject, got None")
            window = self.transformer.geometry.text_window
            text, _ = self._encode_texts([prompt], None, False, {}, window)
            subject_embeds = self._subject_embeds([prompt], subject, text, window)
        conditions = condition_lists(condition, 1)
        latents = self._condition_latents(conditions, size)
        return self.transformer.encode_condition(
            latents, self.task_ids(task, 1), subject_embeds, position=position, attention_kwargs=attention_kwargs
        )

    def _warn(self, call: Call) -> None:
        """Say what is allowed and hardly meant."""
        # in preset "open" the fresh branch is the stock model, which the tables compare with
        fresh = self.transformer.config.preset != "open" and not self.transformer.condition_embedding.task.weight.any()
        if self.adapter is None and fresh:
            logger.warning("the condition branch is untrained: load an adapter, or pictures follow the condition by chance")
        for image in (image for row in call.conditions or [] for image in row):
            if call.task in TASKS and (oddity := TASKS[call.task]().odd(image)):
                logger.warning(oddity)
                return

    def _encode_texts(
        self, prompts: list[str], negatives: list[str] | None, guided: bool, embeds: dict[str, Tensor | None], window: int
    ) -> tuple[Tensor, Tensor]:
        """Text features of the prompts and of the negative ones (if not `guided`: the prompts'), given or encoded."""
        encoded = [] if embeds.get("prompt_embeds") is not None else prompts
        if embeds.get("negative_prompt_embeds") is None:
            encoded = [*encoded, *(negatives or [""] * guided)]
        if encoded and (self.text_encoder is None or self.tokenizer is None):
            raise UsageError("text_encoder and tokenizer must be there unless all text features are given, got none")
        self.check_prompts(encoded, window)
        device = self._execution_device
        pair = self.encode_prompt(prompts, negatives, guided, **embeds, max_sequence_length=window, device=device)
        text, negative = (x.to(device, self.transformer.dtype) for x in (pair if guided else pair[:1] * 2))
        if text.shape[1] != negative.shape[1]:
            raise UsageError(
                f"prompt_embeds and negative_prompt_embeds must have the same number of tokens, got {text.shape[1]} and "
                f"{negative.shape[1]}"
            )
        return text, negative

    def _conditioning(self, call: Call, subject_embeds: Tensor | None) -> Conditioning:
        """The conditions of all passes, given or empty; as a cache if the preset allows one."""
        prompts, given = len(call.prompts), call.guidance.conditions
        inputs = {"task_ids": self.task_ids(call.task, prompts), "subject_embeds": subject_embeds}
        encode = partial(self.transformer.encode_condition, **inputs, attention_kwargs=self._attention_kwargs)
        if call.cache is not None:
            full = call.cache
        else:
            assert call.conditions is not None
            latents = self._condition_latents(call.conditions, call.size)
            if not get_preset(self.transformer.config.preset).cacheable:
                given = given[:1] if all(given) else given  # one for all passes
                repeated = {name: None if x is None else torch.cat([x] * len(given)) for name, x in inputs.items()}
                parts = [latents if g else torch.zeros_like(latents) for g in given]
                return Conditioning({"condition_latents": torch.cat(parts), **repeated}, None)
            full = encode(latents)
        if all(given):
            return Conditioning({}, full)
        empty = encode(self._empty_latents(prompts, full.conditions, call.size))
        return Conditioning({}, ConditionCache.stack([full if g else empty for g in given], prompts))

    def _empty_latents(self, prompts: int, conditions: int, size: tuple[int, int]) -> Tensor:
        """What condition dropout makes of a condition."""
        height, width = (side // self.vae_scale_factor_spatial for side in size)
        shape = (prompts, conditions, self.transformer.geometry.channels, height, width)
        return torch.zeros(shape, dtype=self.transformer.dtype, device=self._execution_device)

    def _condition_latents(self, conditions: list[list[Image.Image]], size: tuple[int, int]) -> Tensor:
        """[B, K, C, h, w]; each image is encoded by itself."""
        height, width = size
        pixels = torch.stack([to_pixels(fit_picture(image, width, height)) for row in conditions for image in row])
        latents = self.transformer.images.encode(self.vae, pixels.to(self._execution_device))
        return latents.unflatten(0, (len(conditions), -1)).to(self.transformer.dtype)

    def _subject_embeds(
        self, prompts: list[str], subject: str | Sequence[str | None] | None, text: Tensor, window: int
    ) -> Tensor | None:
        mask = self.subject_mask(prompts, subject, window)
        return None if mask is None else pool_subject(text, mask.to(text.device))

    def subject_mask(self, prompts: list[str], subject: str | Sequence[str | None] | None, window: int) -> Tensor | None:
        """Which text tokens name the subject, [prompts, window]; UsageError if a subject is not in its prompt."""
        if subject is None:
            return None
        try:
            return subject_span_mask(self.tokenizer, prompts, subject_list(subject, len(prompts)), window)
        except ValueError as error:
            raise UsageError(str(error)) from None

    def _initial_latents(self, call: Call, dtype: torch.dtype, latents: Tensor | None) -> Tensor:
        """The noise of all images, drawn unless given."""
        height, width = (side // self.vae_scale_factor_spatial for side in call.size)
        frames, channels = self.transformer.geometry.frames_per_image, self.transformer.geometry.channels
        shape, device = (call.images, frames, channels, height, width), self._execution_device
        if latents is None:
            latents = randn_tensor(shape, generator=call.generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise UsageError(f"latents must have shape {list(shape)}, got {list(latents.shape)}")
        return latents.to(device, dtype) * self.scheduler.init_noise_sigma

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        # the last frame is the target (CogVideoX 1.5 denoises two copies); it is decoded alone
        pixels = self.transformer.images.decode(self.vae, latents[:, -1])
        check_finite_images(pixels, "decoded pixels")
        return self.video_processor.postprocess(pixels.float(), output_type=output_type)

    def image_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """(height, width) in pixels, those of the base where none are given; UsageError if the base cannot have them."""
        geometry, factor = self.transformer.geometry, self.vae_scale_factor_spatial
        own, most = geometry.default_size(factor), geometry.largest_size(factor) or (None, None)
        size = own[0] if height is None else height, own[1] if width is None else width
        for name, value, limit in zip(("height", "width"), size, most, strict=True):
            if value < self.size_multiple or value % self.size_multiple:
                raise UsageError(f"{name} must be a positive multiple of {self.size_multiple}, got {value}")
            if limit is not None and value > limit:
                raise UsageError(f"{name} must be at most {limit}, got {value}")
        return size

    def task_ids(self, task: str, batch: int) -> Tensor:
        """Rows of the task embedding for `batch` samples of a task, [batch] int64; UsageError if there is no such task."""
        try:
            ids: Tensor = self.transformer.task_ids([task] * batch)
        except ValueError as error:
            raise UsageError(str(error)) from None
        return ids.to(self._execution_device)

    def check_prompts(self, prompts: Sequence[str], window: int, hint: str = "") -> None:
        """UsageError if a prompt is longer than the text window; `hint` ends the message."""
        for prompt in prompts:
            if (length := token_count(self.tokenizer, prompt)) > window:
                raise UsageError(f"prompt must have at most {window} tokens, got {length}: {prompt[:60]!r}{hint}")
