"""The models of a training run: base, adapter, dtypes and devices."""

from __future__ import annotations

import torch
from torch import nn

from realgeneral.adapter import AdapterInfo, adapter_info, add_lora, load_adapter, mark_trainable
from realgeneral.bases import load_pipeline, load_without_encoders
from realgeneral.config import TrainConfig
from realgeneral.kernels import use_kernels
from realgeneral.pipeline import RealGeneralPipeline, resolve_adapter
from realgeneral.preflight import tasks_to_train
from realgeneral.recompute import checkpointing
from realgeneral.tasks import get_task
from realgeneral.transformer import RealGeneralTransformer3DModel

ABLATIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "shared-adaln": ("condition_adaln.",),
    "no-embedding": ("condition_embedding.",),
}


def load_models(config: TrainConfig, device: torch.device) -> tuple[RealGeneralPipeline, AdapterInfo]:
    """Base with a fresh or given adapter, frozen but for that; a transformer that will be sharded stays on the CPU."""
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    pipe = load_without_encoders(config.base, dtype) if config.precomputed else load_pipeline(config.base, dtype)
    pipe.set_progress_bar_config(disable=True)
    transformer = pipe.transformer
    transformer.requires_grad_(False)
    tasks = tasks_to_train(config)
    if config.init_adapter:
        load_adapter(transformer, resolve_adapter(config.init_adapter), preset=config.preset)
    else:
        _add_fresh_adapter(config, transformer, tasks)
    mark_trainable(transformer)
    freeze_for_ablation(transformer, config.ablation)
    if config.gradient_checkpointing != "none":
        transformer.enable_gradient_checkpointing(checkpointing(config.gradient_checkpointing))
    use_kernels(transformer, config.fused_kernels, device)
    info = adapter_info(transformer, tasks, config.base)
    for module in _loaded(pipe):
        if module is not transformer or config.engine != "fsdp2":
            module.to(device)
    if device.type == "cpu":
        _realign(pipe)
    transformer.train()
    if config.compile:
        transformer.compile(fullgraph=True)
    return pipe, info


def _loaded(pipe: RealGeneralPipeline) -> list[nn.Module]:
    """The models that are there: with precomputed inputs, the transformer alone."""
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


def freeze_for_ablation(transformer: nn.Module, ablation: str) -> None:
    """Leave a part of a fresh condition branch as it starts; "none" leaves nothing.

    "shared-adaln": the condition keeps the modulation of the target, the video rows of the stock linears, at its own timestep:
    two branches in all. "no-embedding": nothing is added to the condition's tokens.
    """
    for name, parameter in transformer.named_parameters():
        if name.startswith(ABLATIONS[ablation]):
            parameter.requires_grad_(False)
