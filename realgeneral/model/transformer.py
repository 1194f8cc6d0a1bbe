"""RealGeneral's transformer: diffusers' CogVideoX with a condition branch, over one joint sequence.

`forward` reads like the paper's figure "Unified Stream DiT Block": embed, concatenate, modulate each segment with its own
branch, attend under the preset's visibility, predict on the target tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial, wraps
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from realgeneral.model.checks import check_base, check_conditions, check_joint, check_target
from realgeneral.model.condition import ConditionAdaLN, ConditionCache, Site, norm_sites
from realgeneral.model.embedding import Embedded, UnifiedConditionEmbedding
from realgeneral.model.geometry import Geometry, image_tokens, unpatchify
from realgeneral.model.presets import condition_names, get_preset, joint_layout, sublayout
from realgeneral.tasks import DEFAULT_TASKS
from rgkernels.cogvideox import KeyValue, Rotary, block_forward, finish
from rgkernels.segments import SegmentLayout


class RealGeneralTransformer3DModel(CogVideoXTransformer3DModel):
    """CogVideoX with Unified Condition Embedding, Separated Condition AdaLN and Frame-Condition Decoupling.

    All stock weights keep their names; `condition_embedding.*` and `condition_adaln.*` are new. Without a condition it is the
    stock model. Text-to-video checkpoints of CogVideoX 2B, 5B and 1.5 fit.

    Args:
        tasks: Names of the tasks, one row of the task embedding each.
        preset: "paper", "cached" or "open"; see `realgeneral.model.presets.Preset`.
        **base: The stock model's config.

    Raises:
        ValueError: Unknown preset, or a base that is not a text-to-video checkpoint.

    Source:
        RealGeneral (arXiv 2503.10406), figure "Unified Stream DiT Block"; diffusers `CogVideoXTransformer3DModel`.
    """

    # what a saved pipeline names, wherever this file is
    __module__ = "realgeneral"
    # hooks on single layers never run: the ops read the norms' weights directly
    _supports_group_offloading = False
    # a sharded model puts in its place what gathers a block's weights around it
    run_block = staticmethod(block_forward)

    @register_to_config
    def __init__(self, *, tasks: Sequence[str] = DEFAULT_TASKS, preset: str = "paper", **base: Any) -> None:
        super().__init__(**base)
        # the decorator takes **base for an argument of that name, which no config file can hold
        self._internal_dict = FrozenDict({k: v for k, v in self.config.items() if k != "base"})
        get_preset(preset)
        check_base(self.config)
        self.geometry = Geometry.of(self.config)
        self.condition_embedding = UnifiedConditionEmbedding(len(tasks), self.geometry.dim, self.config.text_embed_dim)
        self.condition_adaln = nn.ModuleList(
            ConditionAdaLN(self.config.time_embed_dim, self.geometry.dim) for _ in self.transformer_blocks
        )
        self.impl = "reference"

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        # **base hides the stock arguments from the signature that diffusers filters configs by
        keys = ConfigMixin._get_init_keys(input_class) | ConfigMixin._get_init_keys(CogVideoXTransformer3DModel)
        return set(keys) - {"base"}

    @classmethod
    def from_cogvideox(
        cls, stock: CogVideoXTransformer3DModel, *, tasks: Sequence[str] = DEFAULT_TASKS, preset: str = "paper"
    ) -> RealGeneralTransformer3DModel:
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

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> RealGeneralTransformer3DModel:
        """Load a stock CogVideoX checkpoint (the condition branch starts fresh) or one saved by this class.

        Args:
            pretrained_model_name_or_path: Folder or hub id.
            **kwargs: `tasks` and `preset` for a stock checkpoint; the rest goes to diffusers' `from_pretrained`.
        """
        hub = {k: kwargs[k] for k in ("subfolder", "revision", "cache_dir", "token", "local_files_only") if k in kwargs}
        config = cls.load_config(pretrained_model_name_or_path, **hub)
        if config.get("_class_name") == cls.__name__:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[no-any-return]
        added = {k: kwargs.pop(k) for k in ("tasks", "preset") if k in kwargs}
        stock = CogVideoXTransformer3DModel.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return cls.from_cogvideox(stock, **added)

    @wraps(CogVideoXTransformer3DModel.save_pretrained)
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

    def check_no_lora(self) -> None:
        """ValueError if there is a LoRA, which `save_pretrained` cannot write."""
        if getattr(self, "peft_config", None):
            raise ValueError(
                "transformer must have no LoRA to be saved, got one: fuse_lora() and unload_lora() first, "
                "or realgeneral.save_adapter() for the adapter alone"
            )

    def reset_condition_branch(self) -> None:
        """Zero the condition embedding and copy the video modulation into the condition branch."""
        self.condition_embedding.reset_parameters()
        for block, own in self._blocks():
            own.copy_from(block)

    def configure_condition(self, tasks: Sequence[str], preset: str) -> None:
        """Set tasks and preset, and reset the condition branch to its start."""
        get_preset(preset)
        device, dtype = self.condition_embedding.task.weight.device, self.condition_embedding.task.weight.dtype
        embedding = UnifiedConditionEmbedding(len(tasks), self.geometry.dim, self.config.text_embed_dim)
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

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | Embedded,
        timestep: Tensor,
        timestep_cond: Tensor | None = None,
        ofs: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        *,
        condition_latents: Tensor | None = None,
        task_ids: Tensor | None = None,
        subject_embeds: Tensor | None = None,
        condition_cache: ConditionCache | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict v for the target image, or run the stock model if there is no condition.

        Args:
            hidden_states: Noisy target latents, [B, F, C, h, w]; F = `geometry.frames_per_image` (1, or 2 for CogVideoX 1.5).
            encoder_hidden_states: Text features, [B, T, text_embed_dim], or what `embed` made of them.
            timestep: Target timestep, [B].
            timestep_cond: As in the stock model.
            ofs: Stock model only.
            image_rotary_emb: Stock model only; with a condition the tables follow from the sizes.
            attention_kwargs: {"scale": LoRA scale}, as in the stock model.
            return_dict: As in the stock model.
            condition_latents: Clean latents of K condition images, [B, K, C, h, w]; one latent frame each in every geometry.
            task_ids: Task of each sample, [B]; needed with `condition_latents`.
            subject_embeds: Pooled text features of each prompt's subject, [B, text_embed_dim], or None.
            condition_cache: What `encode_condition` returned. The condition comes in one way: as this, as
                `condition_latents`, or within `embed`'s result.

        Returns:
            Prediction for the target, [B, F, C, h, w].

        Raises:
            ValueError: Shapes disagree, or the condition is given more than once.
        """
        text = encoder_hidden_states
        embedded = text.condition if isinstance(text, Embedded) else None
        given = [x is not None for x in (condition_latents, embedded, condition_cache)]
        if not any(given) and not isinstance(text, Embedded):
            return super().forward(  # type: ignore[no-any-return]
                hidden_states, text, timestep, timestep_cond, ofs, image_rotary_emb, attention_kwargs, return_dict
            )
        if sum(given) != 1:
            raise ValueError(
                f"exactly one of condition_latents, embedded condition, condition_cache must be given, got {sum(given)}"
            )
        output = self._predict(
            hidden_states,
            text,
            timestep,
            timestep_cond,
            condition_latents,
            task_ids,
            subject_embeds,
            condition_cache,
            attention_kwargs=attention_kwargs,
        )
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    @apply_forward_hook
    @apply_lora_scale("attention_kwargs")
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
            subject_embeds: [B, text_embed_dim] or None.
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
        rotary = self._rotary(height, width, frames, tokens.device, start=0)
        temb = self._time_embedding(torch.zeros(batch, device=tokens.device), tokens.dtype)

        cached: list[KeyValue] = []
        residual, branch, gate = tokens, None, None
        last = len(self.transformer_blocks) - 1
        for i, (block, own) in enumerate(self._blocks()):
            norm1, norm2 = norm_sites(block, own, None, temb, conditions)
            # nothing after the last block's keys and values is used
            keep = () if i == last else None
            residual, branch, keys = self.run_block(
                block, residual, branch, gate, norm1, norm2, rows, rows, rotary, keep=keep, impl=self.impl
            )
            gate = norm2.gate
            cached.append(keys)
        return ConditionCache(cached, frames, self.geometry.grid(height, width))

    @apply_forward_hook
    @apply_lora_scale("attention_kwargs")
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
            encoder_hidden_states: Text features, [B, T, text_embed_dim].
            condition_latents: [b, K, C, h, w], b a divisor of B; None with a condition cache.
            task_ids: [b]; needed with `condition_latents`.
            subject_embeds: [b, text_embed_dim] or None.
            attention_kwargs: {"scale": LoRA scale}; must equal that of the steps.
        """
        return self._embed(encoder_hidden_states, condition_latents, task_ids, subject_embeds)

    def _embed(
        self, text: Tensor, condition_latents: Tensor | None, task_ids: Tensor | None, subject_embeds: Tensor | None
    ) -> Embedded:
        text_tokens = self.patch_embed.text_proj(text)
        if condition_latents is None:
            return Embedded(text_tokens)
        if task_ids is None:
            raise ValueError("task_ids must be given with condition_latents, got None")
        conditions = condition_latents.shape[1]
        tokens = self._condition_tokens(condition_latents, task_ids, subject_embeds, tuple(range(conditions)))
        grid = self.geometry.grid(condition_latents.shape[-2], condition_latents.shape[-1])
        return Embedded(text_tokens, tokens, grid, conditions)

    @apply_lora_scale("attention_kwargs")
    def _predict(
        self,
        latents: Tensor,
        text: Tensor | Embedded,
        timestep: Tensor,
        timestep_cond: Tensor | None,
        condition_latents: Tensor | None,
        task_ids: Tensor | None,
        subject_embeds: Tensor | None,
        cache: ConditionCache | None,
        *,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        check_target(latents, self.geometry, self.config.in_channels)
        if condition_latents is not None:
            check_conditions(condition_latents, latents.shape)
        if not isinstance(text, Embedded):
            text = self._embed(text, condition_latents, task_ids, subject_embeds)
        preset = get_preset(self.config.preset)
        conditions = check_joint(latents, text, cache, self.geometry, self.config.in_channels, preset)
        return self._denoise(latents, text, timestep, timestep_cond, cache, conditions)

    def _denoise(
        self,
        latents: Tensor,
        embedded: Embedded,
        timestep: Tensor,
        timestep_cond: Tensor | None,
        cache: ConditionCache | None,
        conditions: int,
    ) -> Tensor:
        preset = get_preset(self.config.preset)
        height, width = latents.shape[-2:]

        temb = self._time_embedding(timestep, latents.dtype, timestep_cond)
        target = image_tokens(self.patch_embed, self.geometry, latents, (conditions,))
        joint = joint_layout(preset, embedded.text.shape[1], target.shape[1], conditions)
        tokens, frames = [embedded.text, target], (conditions,)
        condition_temb = None
        if cache is None:
            assert embedded.condition is not None
            copies = latents.shape[0] // embedded.condition.shape[0]
            tokens.append(embedded.condition if copies == 1 else embedded.condition.repeat(copies, 1, 1))
            rows, frames = joint, (conditions, *range(conditions))
            condition_temb = (
                self._time_embedding(torch.zeros_like(timestep), latents.dtype) if preset.condition_time_zero else temb
            )
        else:
            rows = sublayout(joint, ("text", "target"))
        residual = self.embedding_dropout(torch.cat(tokens, dim=1))
        rotary = self._rotary(height, width, frames, residual.device, start=embedded.text.shape[1])
        sites = [norm_sites(block, own, temb, condition_temb, conditions) for block, own in self._blocks()]

        residual, branch, gate = self._run_blocks(residual, sites, rows, joint, rotary, cache)
        residual = finish(residual, branch, gate, SegmentLayout(("target",), (target.shape[1],)), self.impl)
        output = self.proj_out(self.norm_out(self.norm_final(residual), temb=temb))
        return unpatchify(self.geometry, output, latents.shape)

    def _blocks(self) -> Iterator[tuple[Any, ConditionAdaLN]]:
        return zip(self.transformer_blocks, self.condition_adaln, strict=True)  # type: ignore[arg-type]

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
        last = len(self.transformer_blocks) - 1
        for i, (block, (norm1, norm2)) in enumerate(zip(self.transformer_blocks, sites, strict=True)):
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

    def _time_embedding(self, timestep: Tensor, dtype: torch.dtype, timestep_cond: Tensor | None = None) -> Tensor:
        """[B] -> [B, time_embed_dim]; the sinusoid is float32, the MLP runs in the model's dtype, as in diffusers."""
        embedded: Tensor = self.time_embedding(self.time_proj(timestep).to(dtype), timestep_cond)
        return embedded

    def _condition_tokens(
        self, latents: Tensor, task_ids: Tensor, subject_embeds: Tensor | None, frames: tuple[int, ...]
    ) -> Tensor:
        """Unified Condition Embedding: [B, K, C, h, w] -> [B, K * N, d] at the given frame indices."""
        copies = latents.repeat_interleave(self.geometry.frames_per_image, dim=1)
        tokens = image_tokens(self.patch_embed, self.geometry, copies, frames)
        return tokens + self.condition_embedding(task_ids, subject_embeds)[:, None].to(tokens.dtype)

    def _rotary(self, height: int, width: int, frames: tuple[int, ...], device: torch.device, start: int) -> Rotary:
        cos, sin = self.geometry.rotary_tables(height, width, frames, device)
        return Rotary(cos, sin, start)
