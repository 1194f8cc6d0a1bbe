"""LoRA on a transformer: fresh layers, what is trained, and merging into the base weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from realgeneral.errors import UsageError
from realgeneral.model.cogvideox import RealGeneralTransformer3DModel


def add_lora(transformer: RealGeneralTransformer3DModel, rank: int, alpha: float | None, targets: Sequence[str]) -> None:
    """Add a fresh LoRA (B = 0, so nothing changes yet) and leave only it and the condition branch trainable.

    Args:
        transformer: The model; changed in place.
        rank: LoRA rank r.
        alpha: LoRA alpha, None = r.
        targets: Names of the linear layers, as PEFT matches them.
    """
    if rank < 1:
        raise UsageError(f"rank must be at least 1, got {rank}")
    check_targets(transformer, targets)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=list(targets)))
    mark_trainable(transformer)


def target_layers(transformer: nn.Module, target: str) -> dict[str, nn.Module]:
    """The modules that a LoRA target names, by name, as PEFT matches it."""
    modules = transformer.named_modules()
    return {name: module for name, module in modules if name == target or name.endswith(f".{target}")}


def check_targets(transformer: nn.Module, targets: Sequence[str]) -> None:
    """UsageError unless each LoRA target names linear layers and nothing else; no weights are read."""
    for target in targets:
        layers = target_layers(transformer, target).values()
        if not layers or not all(isinstance(layer, nn.Linear) for layer in layers):
            raise UsageError(f"LoRA target must name linear layers of the base, got {target!r}")


def mark_trainable(transformer: RealGeneralTransformer3DModel) -> list[nn.Parameter]:
    """Freeze everything but LoRA and the condition branch, keep those in float32, and return them."""
    trainable = []
    for name, parameter in transformer.named_parameters():
        wanted = ".lora_" in name or name.startswith(("condition_embedding.", "condition_adaln."))
        parameter.requires_grad_(wanted)
        if wanted:
            parameter.data = parameter.data.float()
            trainable.append(parameter)
    return trainable


@torch.no_grad()
def merge_lora(transformer: RealGeneralTransformer3DModel) -> None:
    """Add the active LoRA into the base weights, so that it takes no time at inference; the originals are kept on the CPU."""
    for layer in lora_layers(transformer):
        if not layer.merged:
            _restore(layer)  # PEFT has unmerged it in the meantime, with rounding
            layer.unmerged_weight = layer.get_base_layer().weight.detach().to("cpu", copy=True)
            layer.merge()


@torch.no_grad()
def unmerge_lora(transformer: RealGeneralTransformer3DModel) -> None:
    """Undo `merge_lora` bit for bit, whatever PEFT did to the layers since (its own unmerge subtracts, which rounds).

    Raises:
        UsageError: The LoRA was merged otherwise, by `fuse_lora` for example: nobody has the weights of before.
    """
    layers = lora_layers(transformer)
    if any(layer.merged and not hasattr(layer, "unmerged_weight") for layer in layers):
        raise UsageError(
            "transformer must have been merged by merge_lora to be unmerged, got a LoRA of fuse_lora: unfuse_lora()"
        )
    for layer in layers:
        _restore(layer)


def _restore(layer: Any) -> None:
    if hasattr(layer, "unmerged_weight"):
        layer.get_base_layer().weight.copy_(layer.unmerged_weight)
        layer.merged_adapters.clear()
        del layer.unmerged_weight


def lora_layers(transformer: RealGeneralTransformer3DModel) -> list[Any]:
    """The layers that carry a LoRA."""
    return [module for module in transformer.modules() if isinstance(module, LoraLayer)]
