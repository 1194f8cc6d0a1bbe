"""The method: a video transformer with a condition branch, over one joint sequence.

`predict` reads like the paper's figure "Unified Stream DiT Block": embed, concatenate, modulate each segment with its own
branch, attend under the preset's visibility, predict on the target's tokens. What a family of video models says of itself is
in a file of its own (`realgeneral.model.cogvideox`).

Letters: B batch, K condition images, N tokens of an image, T text tokens, E width of text features, d width of a token,
F latent frames of an image, C latent channels, h and w latent sides.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models import ModelMixin
from diffusers.utils import apply_lora_scale
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from realgeneral.model.checks import check_conditions, check_joint, check_target
from realgeneral.model.condition import ConditionCache, Embedded, Site, UnifiedConditionEmbedding
from realgeneral.model.presets import condition_names, get_preset, joint_layout, sublayout
from realgeneral.tasks import DEFAULT_TASKS
from rgkernels.cogvideox import KeyValue, Rotary, finish
from rgkernels.segments import SegmentLayout


def lora_scaled(function: Callable[..., Any]) -> Callable[..., Any]:
    """diffusers' `apply_lora_scale`, for a scale that can be taken back again.

    Raises:
        ValueError: A scale that is not finite, which would stay in the layers for good, or that has no effect.
    """
    scaled = apply_lora_scale("attention_kwargs")(function)

    @wraps(function)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("attention_kwargs")
        if given:
            if not isinstance(given, dict) or set(given) != {"scale"}:
                raise ValueError(f'attention_kwargs must be {{"scale": LoRA scale}}, got {given!r}')
            scale = given["scale"]
            if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
                raise ValueError(f"LoRA scale must be a finite number, got {scale!r}")
            if scale != 1 and any(getattr(module, "merged_adapters", None) for module in self.modules()):
                raise ValueError(f"LoRA scale must be 1 once the LoRA is merged, got {scale}: unmerge_lora() first")
        return scaled(self, *args, **kwargs)

    return call


class Images(NamedTuple):
    """What a family does with pictures: its VAE, one picture a frame.

    Attributes:
        encode: (vae, pixels [B, 3, H, W] in [-1, 1]) -> latents [B, C, h, w], as the transformer takes them.
        decode: (vae, latents [B, C, h, w]) -> pixels [B, 3, H, W].
        fold: (vae) -> the same VAE, restricted in place to single frames: less work for the same result.
    """

    encode: Callable[..., Tensor]
    decode: Callable[[Any, Tensor], Tensor]
    fold: Callable[[Any], Any]


class Objective(Protocol):
    """What a family learns to predict."""

    def noised(self, scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Clean latents with the noise of their timesteps."""

    def target(self, scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should predict of them."""


class RealGeneralMixin(ModelMixin):  # type: ignore[misc]
    """Unified Condition Embedding, Separated Condition AdaLN and Frame-Condition Decoupling over a stock video transformer.

    All stock weights keep their names; `condition_embedding.*` and `condition_adaln.*` are new. Without a condition the model
    is the stock model.

    Source:
        RealGeneral (arXiv 2503.10406), figure "Unified Stream DiT Block".
    """

    # hooks on blocks never run: `run_block` goes past a block's forward
    _supports_group_offloading = False

    # --- what a family says ----------------------------------------------------------------------------------------------

    # diffusers' model of the family
    stock_class: ClassVar[Any]
    # its attention processors: the ops compute what these do
    processors: ClassVar[tuple[type, ...]]
    # entries of the config that fix shapes and positions
    geometry_keys: ClassVar[tuple[str, ...]]
    images: ClassVar[Images]
    objective: ClassVar[Objective]
    # one block over the joint sequence; a sharded model puts in its place what gathers a block's weights around it
    run_block: Callable[..., tuple[Tensor, Tensor, KeyValue]]

    @staticmethod
    def check_base(config: Any) -> None:
        """ValueError unless the config is that of a text-to-video model of the family."""
        raise NotImplementedError

    def read_geometry(self) -> Any:
        """Sizes, token grids and the text window; see `realgeneral.model.geometry.Geometry`."""
        raise NotImplementedError

    @property
    def stream_blocks(self) -> Any:
        """The transformer blocks, in order."""
        raise NotImplementedError

    def new_adaln(self) -> nn.Module:
        """The condition's modulation of one block, with `copy_from(block)`: the modulation of the target in a stock block."""
        raise NotImplementedError

    def tokens(self, latents: Tensor, frames: tuple[int, ...]) -> Tensor:
        """Images as tokens with positions: [B, len(frames) * F, C, h, w] -> [B, len(frames) * N, d], one frame index each."""
        raise NotImplementedError

    def rotary(self, height: int, width: int, frames: tuple[int, ...], device: torch.device, start: int) -> Rotary:
        """Rotary tables of the tokens of the given frame indices, which begin at token `start`."""
        raise NotImplementedError

    def text(self, features: Tensor) -> Tensor:
        """Text features [B, T, E] as tokens of the joint sequence, [B, T, d]."""
        raise NotImplementedError

    def time(self, timestep: Tensor, dtype: torch.dtype, **inputs: Any) -> Any:
        """What the modulations are made of at timesteps [B]; `inputs` are further ones that the stock model takes."""
        raise NotImplementedError

    def sites(self, block: Any, own: Any, time: Any, condition_time: Any, conditions: int) -> Site:
        """Modulation of both norm sites of a block, segments in the joint order.

        Args:
            block: A stock block.
            own: The condition's modulation of this block.
            time: `time` of text and target; None without them.
            condition_time: That of the conditions; None without them.
            conditions: Number of condition images.
        """
        raise NotImplementedError

    def head(self, residual: Tensor, time: Any, shape: torch.Size) -> Tensor:
        """Prediction [B, F, C, h, w] = `shape` from the target's tokens [B, N, d] after the last block."""
        raise NotImplementedError

    def modulation_layers(self, block: Any, own: Any) -> list[list[nn.Module]]:
        """Layers of a block's modulation, which run apart from the block, in groups that run together."""
        raise NotImplementedError

    def enter(self, tokens: Tensor) -> Tensor:
        """What becomes of the joint sequence before the first block: nothing, or the stock model's dropout."""
        return tokens

    def signature_weights(self) -> list[Tensor]:
        """Weights that a LoRA usually leaves alone: their mean magnitudes tell two bases of one geometry apart."""
        raise NotImplementedError

    # --- the condition branch --------------------------------------------------------------------------------------------

    def add_condition_branch(self, tasks: Sequence[str], preset: str) -> None:
        """The new weights; a family's constructor calls it after the stock model's."""
        get_preset(preset)
        self.check_base(self.config)
        self.geometry = self.read_geometry()
        self.condition_embedding = UnifiedConditionEmbedding(len(tasks), self.geometry.dim, self.geometry.text_dim)
        self.condition_adaln = nn.ModuleList(self.new_adaln() for _ in self.stream_blocks)
        self.impl = "reference"

    @classmethod
    def from_stock(cls, stock: Any, *, tasks: Sequence[str] = DEFAULT_TASKS, preset: str = "paper") -> Any:
        """Add a condition branch to a loaded stock model; its modules are taken over, not copied.

        At step 0 in preset "open" the result predicts for the target frame what `stock` predicts for the two-frame clip.
        """
        if getattr(stock, "peft_config", None):
            raise ValueError("stock must have no LoRA loaded yet (fuse or unload it first), got one with peft_config")
        base = {k: v for k, v in stock.config.items() if not k.startswith("_")}
        with torch.device("meta"):
            model = cls(tasks=tuple(tasks), preset=preset, **base)
        for name, child in stock.named_children():
            setattr(model, name, child)
        model.condition_embedding.to_empty(device=stock.device).to(stock.dtype)
        model.condition_adaln.to_empty(device=stock.device).to(stock.dtype)
        model.reset_condition_branch()
        return model.train(stock.training)

    def reset_condition_branch(self) -> None:
        """Zero the condition embedding and copy the target's modulation into the condition branch."""
        self.condition_embedding.reset_parameters()
        for block, own in zip(self.stream_blocks, self.condition_adaln, strict=True):
            own.copy_from(block)  # type: ignore[operator]

    def configure_condition(self, tasks: Sequence[str], preset: str) -> None:
        """Set tasks and preset, and reset the condition branch to its start."""
        get_preset(preset)
        device, dtype = self.condition_embedding.task.weight.device, self.condition_embedding.task.weight.dtype
        embedding = UnifiedConditionEmbedding(len(tasks), self.geometry.dim, self.geometry.text_dim)
        self.condition_embedding = embedding.to(device, dtype)
        self.register_to_config(tasks=tuple(tasks), preset=preset)
        self.reset_condition_branch()

    def condition_parameters(self) -> dict[str, nn.Parameter]:
        """The weights that this class adds to the stock model, by state-dict name."""
        return {n: p for n, p in self.named_parameters() if n.startswith(("condition_embedding.", "condition_adaln."))}

    def task_ids(self, tasks: Sequence[str]) -> Tensor:
        """Rows of the task embedding, [len(tasks)] int64; ValueError with the known tasks for an unknown one."""
        known = list(self.config.tasks)
        for task in tasks:
            if task not in known:
                raise ValueError(f"task must be one of {known}, got {task!r}")
        return torch.tensor([known.index(task) for task in tasks], device=self.device)

    @property
    def base_dtype(self) -> torch.dtype:
        """Dtype of the base's weights; trained weights may be of another."""
        return self.proj_out.weight.dtype  # type: ignore[no-any-return]

    # --- files -----------------------------------------------------------------------------------------------------------

    @classmethod
    def _get_init_keys(cls, input_class: type) -> set[str]:
        # **base hides the stock arguments from the signature that diffusers filters configs by
        keys = ConfigMixin._get_init_keys(input_class) | ConfigMixin._get_init_keys(cls.stock_class)
        return set(keys) - {"base"}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a stock checkpoint (the condition branch starts fresh) or one saved by this class.

        Args:
            pretrained_model_name_or_path: Folder or hub id.
            **kwargs: `tasks` and `preset` for a stock checkpoint; the rest goes to diffusers' `from_pretrained`.
        """
        hub = {k: kwargs[k] for k in ("subfolder", "revision", "cache_dir", "token", "local_files_only") if k in kwargs}
        config = cls.load_config(pretrained_model_name_or_path, **hub)
        if config.get("_class_name") == cls.__name__:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        added = {k: kwargs.pop(k) for k in ("tasks", "preset") if k in kwargs}
        return cls.from_stock(cls.stock_class.from_pretrained(pretrained_model_name_or_path, **kwargs), **added)

    # diffusers' pipelines look in the signature for what they may pass on (`variant`, say)
    @wraps(ModelMixin.save_pretrained)
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers, but refuses a model with a LoRA, whose weights would be written under names that nothing loads."""
        self.check_no_lora()
        super().save_pretrained(*args, **kwargs)

    def fuse_qkv_projections(self) -> None:
        """As in diffusers, but ValueError if there is a LoRA, which the fused projections would leave out."""
        if getattr(self, "peft_config", None):
            raise ValueError(
                "transformer must have no LoRA for fused projections, got one: fuse_lora() and unload_lora() first"
            )
        super().fuse_qkv_projections()

    def set_adapters(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers, but ValueError after `merge_lora`, when weights and choice of adapters would have no effect."""
        if any(getattr(module, "merged_adapters", None) for module in self.modules()):
            raise ValueError("transformer must have no merged LoRA to choose adapters, got one: unmerge_lora() first")
        super().set_adapters(*args, **kwargs)

    def enable_cache(self, config: Any) -> None:
        """Not supported: diffusers' caches hook the forward of each block, and the path with a condition calls none."""
        raise NotImplementedError(
            f"enable_cache({type(config).__name__}) is not supported by this model; preset 'cached' computes the condition once"
        )

    def set_attention_backend(self, backend: Any) -> None:
        """Not supported: the model's attribute `impl` says what computes the attention."""
        raise NotImplementedError(f"set_attention_backend({backend!r}) is not supported by this model; set its attribute impl")

    def set_attn_processor(self, processor: Any) -> None:
        """As in diffusers, but NotImplementedError for processors other than the stock model's, which nothing would call."""
        for one in processor.values() if isinstance(processor, dict) else [processor]:
            if type(one) not in self.processors:
                known = " or ".join(kind.__name__ for kind in self.processors)
                raise NotImplementedError(f"attention processors must be {known}, got {type(one).__name__}")
        super().set_attn_processor(processor)

    def check_no_lora(self) -> None:
        """ValueError if there is a LoRA, which `save_pretrained` cannot write."""
        if getattr(self, "peft_config", None):
            raise ValueError(
                "transformer must have no LoRA to be saved, got one: fuse_lora() and unload_lora() first, "
                "or realgeneral.save_adapter() for the adapter alone"
            )

    # --- the method ------------------------------------------------------------------------------------------------------

    @apply_forward_hook
    @lora_scaled
    def embed(
        self,
        encoder_hidden_states: Tensor,
        condition_latents: Tensor | None = None,
        task_ids: Tensor | None = None,
        subject_embeds: Tensor | None = None,
        *,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Embedded:
        """Text and condition tokens as they enter the blocks: the same in every step, so a sampler computes them once.

        Args:
            encoder_hidden_states: Text features, [B, T, E].
            condition_latents: [b, K, C, h, w], b a divisor of B; None with a condition cache.
            task_ids: [b]; needed with `condition_latents`.
            subject_embeds: [b, E] or None.
            attention_kwargs: {"scale": LoRA scale}; must equal that of the steps.
        """
        return self._embed(encoder_hidden_states, condition_latents, task_ids, subject_embeds)

    def _embed(
        self, text: Tensor, condition_latents: Tensor | None, task_ids: Tensor | None, subject_embeds: Tensor | None
    ) -> Embedded:
        text_tokens = self.text(text)
        if condition_latents is None:
            return Embedded(text_tokens)
        if task_ids is None:
            raise ValueError("task_ids must be given with condition_latents, got None")
        conditions = condition_latents.shape[1]
        tokens = self._condition_tokens(condition_latents, task_ids, subject_embeds, tuple(range(conditions)))
        grid = self.geometry.grid(condition_latents.shape[-2], condition_latents.shape[-1])
        return Embedded(text_tokens, tokens, grid, conditions)

    def _condition_tokens(
        self, latents: Tensor, task_ids: Tensor, subject_embeds: Tensor | None, frames: tuple[int, ...]
    ) -> Tensor:
        """Unified Condition Embedding: [B, K, C, h, w] -> [B, K * N, d] at the given frame indices."""
        tokens = self.tokens(latents.repeat_interleave(self.geometry.frames_per_image, dim=1), frames)
        return tokens + self.condition_embedding(task_ids, subject_embeds)[:, None].to(tokens.dtype)

    @lora_scaled
    def predict(
        self,
        latents: Tensor,
        text: Tensor | Embedded,
        timestep: Tensor,
        condition_latents: Tensor | None = None,
        task_ids: Tensor | None = None,
        subject_embeds: Tensor | None = None,
        condition_cache: ConditionCache | None = None,
        *,
        attention_kwargs: dict[str, Any] | None = None,
        **time_inputs: Any,
    ) -> Tensor:
        """Predict on the target's tokens, given its conditions in one of three ways; arguments as in `forward`.

        Raises:
            ValueError: Shapes disagree, or the condition is given more or less than once.
        """
        embedded = text.condition if isinstance(text, Embedded) else None
        if (given := sum(x is not None for x in (condition_latents, embedded, condition_cache))) != 1:
            raise ValueError(
                f"exactly one of condition_latents, embedded condition, condition_cache must be given, got {given}"
            )
        check_target(latents, self.geometry)
        if condition_latents is not None:
            check_conditions(condition_latents, latents.shape)
        if not isinstance(text, Embedded):
            text = self._embed(text, condition_latents, task_ids, subject_embeds)
        conditions = check_joint(latents, text, condition_cache, self.geometry, get_preset(self.config.preset))
        return self._denoise(latents, text, timestep, condition_cache, conditions, time_inputs)

    def _denoise(
        self,
        latents: Tensor,
        embedded: Embedded,
        timestep: Tensor,
        cache: ConditionCache | None,
        conditions: int,
        time_inputs: dict[str, Any],
    ) -> Tensor:
        preset = get_preset(self.config.preset)
        height, width = latents.shape[-2:]

        time = self.time(timestep, latents.dtype, **time_inputs)
        target = self.tokens(latents, (conditions,))
        joint = joint_layout(preset, embedded.text.shape[1], target.shape[1], conditions)
        tokens, frames = [embedded.text, target], (conditions,)
        condition_time = None
        if cache is None:
            assert embedded.condition is not None
            copies = latents.shape[0] // embedded.condition.shape[0]
            tokens.append(embedded.condition if copies == 1 else embedded.condition.repeat(copies, 1, 1))
            rows, frames = joint, (conditions, *range(conditions))
            condition_time = self.time(torch.zeros_like(timestep), latents.dtype) if preset.condition_time_zero else time
        else:
            rows = sublayout(joint, ("text", "target"))
        residual = self.enter(torch.cat(tokens, dim=1))
        rotary = self.rotary(height, width, frames, residual.device, start=embedded.text.shape[1])
        branches = zip(self.stream_blocks, self.condition_adaln, strict=True)
        sites = [self.sites(block, own, time, condition_time, conditions) for block, own in branches]

        residual, branch, gate = self._run_blocks(residual, sites, rows, joint, rotary, cache)
        residual = finish(residual, branch, gate, SegmentLayout(("target",), (target.shape[1],)), self.impl)
        return self.head(residual, time, latents.shape)

    def _run_blocks(
        self,
        residual: Tensor,
        sites: list[Site],
        rows: SegmentLayout,
        joint: SegmentLayout,
        rotary: Rotary,
        cache: ConditionCache | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        branch: Tensor | None = None
        gate: Tensor | None = None
        last = len(self.stream_blocks) - 1
        for i, (block, (norm1, norm2)) in enumerate(zip(self.stream_blocks, sites, strict=True)):
            args = (block, residual, branch, gate, norm1, norm2, rows, joint, rotary)
            # the last block computes only what the target needs: every key and value, but one segment's queries
            kwargs: dict[str, Any] = {"keep": ("target",) if i == last else None, "impl": self.impl}
            if cache is not None:
                kwargs["cached"] = cache.blocks[i]
            step: Any = partial(self.run_block, **kwargs)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                # diffusers' checkpointing function takes positional arguments alone
                residual, branch, _ = self._gradient_checkpointing_func(step, *args)
            else:
                residual, branch, _ = step(*args)
            gate = norm2.gate
        assert branch is not None and gate is not None
        return residual, branch, gate[:, rows.index("target"), None]

    @apply_forward_hook
    @lora_scaled
    def encode_condition(
        self,
        condition_latents: Tensor,
        task_ids: Tensor,
        subject_embeds: Tensor | None = None,
        *,
        position: int = 0,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> ConditionCache:
        """Run the condition branch alone and keep its keys and values (after norm and rotation) of every block.

        Args:
            condition_latents: Clean latents, [B, K, C, h, w]; B = 1 is shared by any batch later.
            task_ids: [B].
            subject_embeds: [B, E] or None.
            position: Frame index of the first of the K images; 0 unless earlier ones are cached on their own.
            attention_kwargs: {"scale": LoRA scale}; must equal that of the steps which use the cache.

        Raises:
            ValueError: The preset does not make the condition independent of step, prompt and target.
        """
        preset = get_preset(self.config.preset)
        if not preset.cacheable:
            raise ValueError(f"preset must be 'cached' to cache the condition, got {preset.name!r}")
        batch, conditions, _, height, width = condition_latents.shape
        frames = tuple(range(position, position + conditions))
        tokens = self._condition_tokens(condition_latents, task_ids, subject_embeds, frames).contiguous()
        names = condition_names(conditions)
        joint = joint_layout(preset, 0, tokens.shape[1] // conditions, conditions)
        rows = sublayout(joint, names)
        rotary = self.rotary(height, width, frames, tokens.device, start=0)
        time = self.time(torch.zeros(batch, device=tokens.device), tokens.dtype)

        cached: list[KeyValue] = []
        residual, branch, gate = tokens, None, None
        last = len(self.stream_blocks) - 1
        for i, (block, own) in enumerate(zip(self.stream_blocks, self.condition_adaln, strict=True)):
            norm1, norm2 = self.sites(block, own, None, time, conditions)
            # nothing after the last block's keys and values is used
            keep = () if i == last else None
            residual, branch, keys = self.run_block(
                block, residual, branch, gate, norm1, norm2, rows, rows, rotary, keep=keep, impl=self.impl
            )
            gate = norm2.gate
            cached.append(keys)
        return ConditionCache(cached, frames, self.geometry.grid(height, width))
