"""What people do to a CogVideoX before or after `rgkernels.patch`, and what then runs: the cases of `test_patch_features.py`.

`python -m tests.rgkernels.helpers.patch_cases` writes them as the table of docs/inference.md.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_group_offloading, apply_layer_skip, apply_layerwise_casting
from diffusers.hooks.smoothed_energy_guidance_utils import (
    SmoothedEnergyGuidanceConfig,
    _apply_smoothed_energy_guidance_hook,
)
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from peft import LNTuningConfig, LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import Tensor, nn

CPU = torch.device("cpu")
DOC = Path(__file__).parents[3] / "docs" / "inference.md"
START, END = "<!-- patch table: written by tests/rgkernels/helpers/patch_cases.py -->\n", "<!-- end of the patch table -->\n"

ALL = "norm sites, QK-norm, attention"
NORMS = "norm sites; attention as stock"

# the timesteps of a short sampling run; caches ask which one it is
TIMESTEPS = (950, 700, 650, 400, 350, 100)


class Clock:
    """The pipeline's `current_timestep`."""

    now = TIMESTEPS[0]


@dataclass(frozen=True)
class Case:
    """One thing that is done to a model.

    Args:
        label: Its name for people.
        apply: Does it, to a stock or a patched model.
        ops: Which parts of a block run on the ops: `ALL` or `NORMS`.
        refused: What the error names instead, where the combination is refused.
        exact: The change leaves the numbers of the model as they are.
    """

    label: str
    apply: Callable[[Any], Any]
    ops: str = ALL
    refused: str = ""
    exact: bool = False


class OwnProcessor:
    """A processor that is none of diffusers': attention with a temperature."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        video, text = CogVideoXAttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        return 1.5 * video, 0.5 * text


class Int8Linear(nn.Module):
    """A linear layer as quantising libraries make it: no `weight` of a floating dtype."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """y = x (scale * codes)^T + bias."""
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale, self.bias)


def quantise(model: Any) -> None:
    """Replace every linear layer of the blocks."""
    for block in model.transformer_blocks:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                block.set_submodule(name, Int8Linear(module))


def double_output(module: Any, args: Any, output: Any) -> Any:
    """A user's forward hook."""
    return tuple(2 * part for part in output) if isinstance(output, tuple) else 2 * output


def swap_lora(model: Any) -> None:
    """Load a LoRA, then another into its place."""
    for seed in (1, 2):
        torch.manual_seed(seed)
        donor = type(model).from_config(model.config)
        donor.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        weights = get_peft_model_state_dict(donor)
        model.load_lora_adapter(weights, prefix=None, adapter_name="default", hotswap=seed == 2)
    # the adapter came in float32
    model.to(model.proj_out.weight.dtype)


def train_norms(config: Any) -> Callable[[Any], Any]:
    """PEFT puts trained copies of norms into wrappers of its own."""

    def apply(model: Any) -> None:
        inject_adapter_in_model(config, model)
        generator = torch.Generator().manual_seed(4)
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "ln_tuning" in name:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)

    return apply


def fuse_and_return(model: Any) -> None:
    """Fuse the projections, take the fusion off again, and add a LoRA that only the separate projections have."""
    model.fuse_qkv_projections()
    model.unfuse_qkv_projections()
    torch.manual_seed(3)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))


def drop_blocks(model: Any) -> None:
    """Prune the first and the last block."""
    model.transformer_blocks = nn.ModuleList(list(model.transformer_blocks)[1:-1])


def add_block(model: Any) -> None:
    """Append a stock block."""
    block = copy.deepcopy(model.transformer_blocks[0])
    if hasattr(block, "rgkernels_impl"):
        block.__class__ = type(block).__bases__[0]
        del block.rgkernels_impl, block.rgkernels_flows
    model.transformer_blocks.append(block)


def on_block(method: str) -> Callable[[Any], Any]:
    """Register a PyTorch hook on the second block."""
    return lambda model: getattr(model.transformer_blocks[1], method)(double_output)


def double_input(module: Any, args: Any, kwargs: Any) -> Any:
    """A user's forward pre-hook, on both streams."""
    return args, kwargs | {name: 2 * kwargs[name] for name in ("hidden_states", "encoder_hidden_states")}


def offload(level: str) -> Callable[[Any], Any]:
    """Offload to disk: what is not loaded again is uninitialised memory, also where there is no GPU."""

    def apply(model: Any) -> None:
        folder = tempfile.mkdtemp(prefix="rgkernels-offload-")
        arguments = {"num_blocks_per_group": 1} if level == "block_level" else {}
        apply_group_offloading(model, onload_device=CPU, offload_type=level, offload_to_disk_path=folder, **arguments)

    return apply


def now() -> int:
    """What the pipeline's `current_timestep` says."""
    return Clock.now


CASES: dict[str, Case] = {
    "pab": Case(
        "Pyramid Attention Broadcast",
        lambda model: model.enable_cache(
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=(100, 800),
                current_timestep_callback=now,
            )
        ),
        NORMS,
    ),
    "faster-cache": Case(
        "FasterCache",
        lambda model: model.enable_cache(
            FasterCacheConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=(-1, 681),
                unconditional_batch_skip_range=2,
                unconditional_batch_timestep_skip_range=(-1, 641),
                attention_weight_callback=lambda _: 0.3,
                tensor_format="BFCHW",
                current_timestep_callback=now,
            )
        ),
        NORMS,
    ),
    "first-block-cache": Case("FirstBlockCache", lambda model: model.enable_cache(FirstBlockCacheConfig(threshold=0.5))),
    "mag-cache": Case(
        "MagCache",
        lambda model: model.enable_cache(
            MagCacheConfig(threshold=1.0, retention_ratio=0.2, num_inference_steps=len(TIMESTEPS), mag_ratios=[1.0] * 6)
        ),
    ),
    "taylorseer": Case(
        "TaylorSeer on attention",
        lambda model: model.enable_cache(
            TaylorSeerCacheConfig(
                cache_interval=2, disable_cache_before_step=2, cache_identifiers=[r"transformer_blocks\.\d+\.attn1"]
            )
        ),
        NORMS,
    ),
    "taylorseer-blocks": Case(
        "TaylorSeer on blocks",
        lambda model: model.enable_cache(
            TaylorSeerCacheConfig(
                cache_interval=2, disable_cache_before_step=2, cache_identifiers=[r"transformer_blocks\.[12]"]
            )
        ),
    ),
    "taylorseer-norms": Case(
        "TaylorSeer on norms",
        lambda model: model.enable_cache(
            TaylorSeerCacheConfig(
                cache_interval=2, disable_cache_before_step=2, cache_identifiers=[r"transformer_blocks\.1\.norm1"]
            )
        ),
        refused=r"transformer_blocks\[1\]\.norm1 must have no hooks .*\['taylorseer_cache'\]",
    ),
    "layer-skip": Case("Layer skip: whole blocks", lambda model: apply_layer_skip(model, LayerSkipConfig(indices=[1, 3]))),
    "layer-skip-ff": Case(
        "Layer skip: feed-forward",
        lambda model: apply_layer_skip(model, LayerSkipConfig(indices=[1], skip_attention=False)),
    ),
    "layer-skip-scores": Case(
        "Layer skip: attention (diffusers refuses it for stock CogVideoX too)",
        lambda model: apply_layer_skip(model, LayerSkipConfig(indices=[1], skip_attention=True, skip_ff=False)),
        refused="CogVideoXAttnProcessor2_0'> not registered",
    ),
    "smoothed-energy": Case(
        "Smoothed energy guidance (hook on `to_q`)",
        lambda model: _apply_smoothed_energy_guidance_hook(model, SmoothedEnergyGuidanceConfig(indices=[1]), 1.0),
    ),
    "processor": Case("An attention processor of one's own", lambda model: model.set_attn_processor(OwnProcessor()), NORMS),
    "hook-block": Case("A forward hook on a block", on_block("register_forward_hook")),
    "pre-hook-block": Case(
        "A forward pre-hook on a block",
        lambda model: model.transformer_blocks[1].register_forward_pre_hook(double_input, with_kwargs=True),
    ),
    "hook-attention": Case(
        "A forward hook on `attn1`, `norm_q` or `norm_k`",
        lambda model: [
            model.transformer_blocks[1].attn1.register_forward_hook(double_output),
            model.transformer_blocks[2].attn1.norm_q.register_forward_hook(double_output),
        ],
        NORMS,
    ),
    "hook-linear": Case(
        "A forward hook on a linear layer or `ff`",
        lambda model: [
            model.transformer_blocks[1].norm1.linear.register_forward_hook(double_output),
            model.transformer_blocks[1].attn1.to_out[0].register_forward_hook(double_output),
            model.transformer_blocks[2].ff.register_forward_hook(double_output),
        ],
    ),
    "hook-norm": Case(
        "A forward hook on `norm1`, `norm2` or their LayerNorm",
        lambda model: model.transformer_blocks[1].norm2.register_forward_hook(double_output),
        refused=r"transformer_blocks\[1\]\.norm2 must have no hooks .*\['double_output'\]",
    ),
    "hook-layer-norm": Case(
        "A forward hook on `norm1`, `norm2` or their LayerNorm",
        lambda model: model.transformer_blocks[1].norm2.norm.register_forward_hook(double_output),
        refused=r"LayerNorm must have no hooks .*\['double_output'\]",
    ),
    "offload-blocks": Case("Group offload, block level", offload("block_level"), exact=True),
    "offload-leaves": Case("Group offload, leaf level", offload("leaf_level"), exact=True),
    "sequential-offload": Case("Sequential CPU offload", lambda model: cpu_offload(model, execution_device=CPU), exact=True),
    "layerwise-casting": Case(
        "Layerwise casting",
        lambda model: apply_layerwise_casting(
            model, torch.float8_e4m3fn, model.norm_final.weight.dtype, skip_modules_pattern=["patch_embed"]
        ),
    ),
    "quantised": Case("Quantised linear layers", quantise),
    "lora": Case(
        "LoRA, with or without hot-swap",
        swap_lora,
    ),
    "trained-norms": Case(
        "Norms trained by PEFT (`modules_to_save`, LN tuning)",
        train_norms(LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["norm", "norm_q"])),
    ),
    "ln-tuning": Case(
        "Norms trained by PEFT (`modules_to_save`, LN tuning)", train_norms(LNTuningConfig(target_modules=["norm", "norm_q"]))
    ),
    "fused-qkv": Case("Fused QKV projections", lambda model: model.fuse_qkv_projections(), exact=True),
    "unfused-qkv": Case("Fused QKV taken off again, then a LoRA", fuse_and_return),
    "dropped-blocks": Case("Blocks dropped", drop_blocks),
    "added-block": Case("A block appended", add_block),
}


def table() -> str:
    """The cases in Markdown; cases of one label share a row."""
    lines = ["| feature, set before or after `patch` | result | on the ops |", "|---|---|---|"]
    rows = {
        case.label: f"| {case.label} | refused by name | |"
        if case.refused
        else f"| {case.label} | stock's numbers | {case.ops} |"
        for case in CASES.values()
    }
    return "\n".join([*lines, *rows.values()]) + "\n"


def document(text: str) -> str:
    """`text` with the table between its marks."""
    head, rest = text.split(START)
    return head + START + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    DOC.write_text(document(DOC.read_text()))
