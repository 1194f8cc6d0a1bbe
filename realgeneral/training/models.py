"""The models of a training run: base, adapter, dtypes and devices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from realgeneral.errors import UsageError
from realgeneral.generation.bases import load_pipeline, use_kernels
from realgeneral.generation.pipeline import RealGeneralPipeline
from realgeneral.model.adapter import load_adapter, read_adapter_info
from realgeneral.model.adapter_info import AdapterInfo, adapter_info, trained_on
from realgeneral.model.cogvideox import RealGeneralTransformer3DModel
from realgeneral.model.lora import add_lora, mark_trainable
from realgeneral.nano.assets import resolve_adapter
from realgeneral.settings.train import TrainConfig
from realgeneral.tasks import get_task
from realgeneral.training.checkpoint import load_weights
from realgeneral.training.plan import run_tasks

# the costly ops of a block whose outputs are small: recomputing one costs S^2, keeping it S * d
ATTENTION_OPS = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "rgkernels::segment_attention",
        "flash_attn::_flash_attn_forward",
    }
)


def checkpointing(kind: Literal["full", "selective"]) -> Callable[..., Any]:
    """A function for diffusers' `enable_gradient_checkpointing`: runs a block and keeps little of it.

    Args:
        kind: "full" keeps a block's inputs and runs it again in the backward pass; "selective" also keeps the outputs of
            attention, which is then not run again.

    Returns:
        `function(block, *args) -> block(*args)`.

    Note:
        Gradients are bit-equal to those without checkpointing.
    """
    if kind == "full":
        return partial(checkpoint, use_reentrant=False)
    return partial(checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, _policy))


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op.name() in ATTENTION_OPS else CheckpointPolicy.PREFER_RECOMPUTE


ABLATIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "shared-adaln": ("condition_adaln.",),
    "no-embedding": ("condition_embedding.",),
}


def load_models(config: TrainConfig, device: torch.device) -> tuple[RealGeneralPipeline, AdapterInfo]:
    """Base with a fresh or given adapter, frozen but for that; on the CPU until `place_models`."""
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    pipe = load_pipeline(config.base, dtype, **({"text_encoder": None} if config.precomputed else {}))
    pipe.set_progress_bar_config(disable=True)
    transformer = pipe.transformer
    transformer.requires_grad_(False)
    tasks = run_tasks(config)
    if config.init_adapter:
        _start_from_adapter(config, transformer)
    else:
        _add_fresh_adapter(config, transformer, tasks)
    mark_trainable(transformer)
    freeze_for_ablation(transformer, config.ablation)
    if config.gradient_checkpointing != "none":
        transformer.enable_gradient_checkpointing(checkpointing(config.gradient_checkpointing))
    use_kernels(transformer, config.fused_kernels, device)
    transformer.train()
    if config.compile:
        transformer.compile(fullgraph=True)
    return pipe, adapter_info(transformer, tasks, config.base)


def place_models(pipe: RealGeneralPipeline, config: TrainConfig, device: torch.device) -> None:
    """Move the models to their device, but for a transformer that will be sharded, and a VAE for the sample grids alone."""
    staying = (pipe.transformer if config.engine == "fsdp2" else None, pipe.vae if config.precomputed else None)
    for module in _loaded(pipe):
        if module not in staying:
            module.to(device)
    if device.type == "cpu":
        _realign(pipe)


def _loaded(pipe: RealGeneralPipeline) -> list[nn.Module]:
    """The models that are there: with precomputed inputs, no text encoder."""
    return [module for module in (pipe.vae, pipe.text_encoder, pipe.transformer) if module is not None]


def _realign(pipe: RealGeneralPipeline) -> None:
    # a checkpoint file is mapped into memory, where its tensors start anywhere; the bits of a product on a CPU depend on that,
    # and DDP moves weights
    for module in _loaded(pipe):
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()


def _add_fresh_adapter(config: TrainConfig, transformer: RealGeneralTransformer3DModel, tasks: list[str]) -> None:
    transformer.configure_condition([get_task(spec).name for spec in tasks], config.preset)
    torch.manual_seed(config.seed)
    add_lora(transformer, config.rank, config.alpha or None, config.lora_targets)


def _start_from_adapter(config: TrainConfig, transformer: RealGeneralTransformer3DModel) -> None:
    folder = Path(resolve_adapter(config.init_adapter))
    if not trained_on(transformer, read_adapter_info(folder)):
        print(f"note: {folder} was trained on other weights than those of {config.base}, and goes on from there", flush=True)
    info = load_adapter(transformer, folder, preset=config.preset, other_weights=True)
    targets = set(transformer.peft_config["default"].target_modules)
    if not targets <= set(config.lora_targets):
        raise UsageError(
            f"lora_targets must have those of the adapter to start from, {sorted(targets)}, got {sorted(config.lora_targets)}"
        )
    if targets != set(config.lora_targets):  # the other layers start as in a fresh adapter
        transformer.unload_lora()
        torch.manual_seed(config.seed)
        add_lora(transformer, info.rank, info.alpha, config.lora_targets)
    # once more into float32: it was loaded for inference, in the base's dtype
    mark_trainable(transformer)
    load_weights(folder, transformer)


def freeze_for_ablation(transformer: nn.Module, ablation: str) -> None:
    """Leave a part of a fresh condition branch as it starts; "none" leaves nothing.

    "shared-adaln": the condition keeps the modulation of the target, the video rows of the stock linears, at its own timestep:
    two branches in all. "no-embedding": nothing is added to the condition's tokens.
    """
    for name, parameter in transformer.named_parameters():
        if name.startswith(ABLATIONS[ablation]):
            parameter.requires_grad_(False)
