"""CogVideoX (2B, 5B, 1.5) as RealGeneral's base: what the family says, and diffusers' model with the condition branch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from realgeneral.model.condition import ConditionCache, Embedded, Site
from realgeneral.model.geometry import Geometry, image_tokens, unpatchify
from realgeneral.model.transformer import Images, RealGeneralMixin
from realgeneral.model.vae import decode_latents, encode_images, fold_single_frame
from realgeneral.tasks import DEFAULT_TASKS
from rgkernels.cogvideox import Rotary, block_forward, stack_modulation


class ConditionAdaLN(nn.Module):
    """The condition's modulation branch of one block: two Linear(time_embed_dim, 3d) for shift, scale, gate.

    It starts as a copy of the video rows of the stock linears (Separated Condition AdaLN; arrow "copy" in the paper's figure).
    """

    def __init__(self, time_embed_dim: int, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.Linear(time_embed_dim, 3 * dim)
        self.norm2 = nn.Linear(time_embed_dim, 3 * dim)

    @torch.no_grad()
    def copy_from(self, block: Any) -> None:
        """Copy rows 0:3d, the video branch, of a stock block's modulation linears."""
        for own, stock in ((self.norm1, block.norm1.linear), (self.norm2, block.norm2.linear)):
            rows = own.out_features
            own.weight.copy_(stock.weight[:rows])
            own.bias.copy_(stock.bias[:rows])


class VPrediction:
    """The objective: v-prediction over the scheduler's alphas (Salimans and Ho, arXiv 2202.00512)."""

    @staticmethod
    def noised(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """y_t = sqrt(abar_t) y + sqrt(1 - abar_t) eps."""
        return scheduler.add_noise(latents, noise, timesteps)  # type: ignore[no-any-return]

    @staticmethod
    def target(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = sqrt(abar_t) eps - sqrt(1 - abar_t) y."""
        return scheduler.get_velocity(latents, noise, timesteps)  # type: ignore[no-any-return]


class RealGeneralTransformer3DModel(RealGeneralMixin, CogVideoXTransformer3DModel):
    """CogVideoX with RealGeneral's condition branch. Text-to-video checkpoints of CogVideoX 2B, 5B and 1.5 fit.

    Args:
        tasks: Names of the tasks, one row of the task embedding each.
        preset: "paper", "cached" or "open"; see `realgeneral.model.presets.Preset`.
        **base: The stock model's config.

    Raises:
        ValueError: Unknown preset, or a base that is not a text-to-video checkpoint.

    Source:
        RealGeneral (arXiv 2503.10406); diffusers `CogVideoXTransformer3DModel`.
    """

    # what a saved pipeline names, wherever this file is
    __module__ = "realgeneral"
    stock_class = CogVideoXTransformer3DModel
    geometry_keys = (
        "num_layers",
        "num_attention_heads",
        "attention_head_dim",
        "in_channels",
        "text_embed_dim",
        "time_embed_dim",
        "patch_size",
        "patch_size_t",
        "use_rotary_positional_embeddings",
    )
    images = Images(encode_images, decode_latents, fold_single_frame)
    objective = VPrediction()
    run_block = staticmethod(block_forward)

    @register_to_config
    def __init__(self, *, tasks: Sequence[str] = DEFAULT_TASKS, preset: str = "paper", **base: Any) -> None:
        super().__init__(**base)
        # the decorator takes **base for an argument of that name, which no config file can hold
        self._internal_dict = FrozenDict({k: v for k, v in self.config.items() if k != "base"})
        self.add_condition_branch(tasks, preset)

    @classmethod
    def from_cogvideox(
        cls, stock: CogVideoXTransformer3DModel, *, tasks: Sequence[str] = DEFAULT_TASKS, preset: str = "paper"
    ) -> RealGeneralTransformer3DModel:
        """`from_stock`, which see, under the name that it had first."""
        return cls.from_stock(stock, tasks=tasks, preset=preset)  # type: ignore[no-any-return]

    @staticmethod
    def check_base(config: Any) -> None:
        """ValueError unless the config is that of a text-to-video CogVideoX."""
        if config.in_channels != config.out_channels or config.ofs_embed_dim or config.use_learned_positional_embeddings:
            raise ValueError(
                "the base must be a text-to-video CogVideoX (in_channels = out_channels, no ofs_embed_dim, no learned "
                f"positions), got in_channels {config.in_channels}, out_channels {config.out_channels}, ofs_embed_dim "
                f"{config.ofs_embed_dim}, use_learned_positional_embeddings {config.use_learned_positional_embeddings}"
            )

    def read_geometry(self) -> Geometry:
        """Sizes, token grids and the text window."""
        return Geometry.of(self.config)

    @property
    def stream_blocks(self) -> Any:
        """The transformer blocks, in order."""
        return self.transformer_blocks

    def new_adaln(self) -> ConditionAdaLN:
        """The condition's modulation of one block."""
        return ConditionAdaLN(self.config.time_embed_dim, self.geometry.dim)

    def tokens(self, latents: Tensor, frames: tuple[int, ...]) -> Tensor:
        """Patch embedding with positions; 2B adds sin-cos tables here."""
        return image_tokens(self.patch_embed, self.geometry, latents, frames)

    def rotary(self, height: int, width: int, frames: tuple[int, ...], device: torch.device, start: int) -> Rotary:
        """Tables of 5B and 1.5; none for 2B."""
        cos, sin = self.geometry.rotary_tables(height, width, frames, device)
        return Rotary(cos, sin, start)

    def text(self, features: Tensor) -> Tensor:
        """The stock projection."""
        return self.patch_embed.text_proj(features)  # type: ignore[no-any-return]

    def time(  # type: ignore[override]
        self, timestep: Tensor, dtype: torch.dtype, timestep_cond: Tensor | None = None
    ) -> Tensor:
        """[B] -> [B, time_embed_dim]; the sinusoid is float32, the MLP runs in the model's dtype, as in diffusers."""
        return self.time_embedding(self.time_proj(timestep).to(dtype), timestep_cond)  # type: ignore[no-any-return]

    def sites(
        self, block: Any, own: ConditionAdaLN, time: Tensor | None, condition_time: Tensor | None, conditions: int
    ) -> Site:
        """Text uses rows 3d:6d of the stock linears, the target rows 0:3d, the conditions their own linears."""
        sites = []
        for norm, linear in ((block.norm1, own.norm1), (block.norm2, own.norm2)):
            rows: list[Any] = []
            if time is not None:
                parts = norm.linear(norm.silu(time)).chunk(6, dim=1)
                rows += [parts[3:], parts[:3]]
            if condition_time is not None:
                rows += [linear(norm.silu(condition_time)).chunk(3, dim=1)] * conditions
            sites.append(stack_modulation(rows))
        return sites[0], sites[1]

    def modulation_layers(self, block: Any, own: Any) -> list[list[nn.Module]]:
        """The stock linears, and the condition's."""
        return [[block.norm1.linear, block.norm2.linear], [own.norm1, own.norm2]]

    def enter(self, tokens: Tensor) -> Tensor:
        """The stock model's dropout."""
        return self.embedding_dropout(tokens)  # type: ignore[no-any-return]

    def head(self, residual: Tensor, time: Tensor, shape: torch.Size) -> Tensor:
        """Last norms and output projection."""
        output = self.proj_out(self.norm_out(self.norm_final(residual), temb=time))
        return unpatchify(self.geometry, output, shape)

    def signature_weights(self) -> list[Tensor]:
        """Of the embeddings, the first and last feed-forward layer, and the output projection."""
        first, last = self.transformer_blocks[0], self.transformer_blocks[-1]
        linears = (self.patch_embed.proj, self.patch_embed.text_proj, first.ff.net[2], last.ff.net[2], self.proj_out)
        return [getattr(linear, "base_layer", linear).weight for linear in linears]

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
        given = (condition_latents, condition_cache)
        if not isinstance(encoder_hidden_states, Embedded) and all(x is None for x in given):
            return super().forward(  # type: ignore[no-any-return]
                hidden_states,
                encoder_hidden_states,
                timestep,
                timestep_cond,
                ofs,
                image_rotary_emb,
                attention_kwargs,
                return_dict,
            )
        output = self.predict(
            hidden_states,
            encoder_hidden_states,
            timestep,
            condition_latents,
            task_ids,
            subject_embeds,
            condition_cache,
            attention_kwargs=attention_kwargs,
            timestep_cond=timestep_cond,
        )
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)
