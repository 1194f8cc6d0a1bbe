"""FSDP2: a transformer shared out over processes, and its tensors made whole again."""

from __future__ import annotations

import warnings
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from realgeneral.model.cogvideox import RealGeneralTransformer3DModel


def shard(transformer: RealGeneralTransformer3DModel, device: torch.device) -> RealGeneralTransformer3DModel:
    """Share a transformer out over all processes with FSDP2: frozen base, LoRA and condition branch alike.

    A unit, gathered right before use and freed right after, is a block without its modulation, the stock modulation of a block,
    or the condition's own; the rest (embeddings, last norms, output projection) is the root's unit.

    Note:
        The joint sequence runs through `run_block`, not through a block's `forward`, around which FSDP's hooks run: the
        blocks get it as a method that FSDP knows.
    """
    # a block's outputs are views, which would matter if anything here worked in place
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(\w+\) returned a view tensor")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    # the root too: a gathered copy would hide weights that the average or a checkpoint puts into the shards
    run_block = transformer.run_block
    unit = partial(fully_shard, mesh=mesh, reshard_after_forward=True)
    for block, own in zip(transformer.stream_blocks, transformer.condition_adaln, strict=True):
        for layers in transformer.modulation_layers(block, own):
            unit(layers)
        unit(block)
        block.joint_forward = MethodType(run_block, block)  # type: ignore[assignment]
        register_fsdp_forward_method(block, "joint_forward")
    unit(transformer)
    for method in ("encode_condition", "embed"):
        register_fsdp_forward_method(transformer, method)
    transformer.run_block = _joint_forward  # type: ignore[method-assign]
    return transformer


def _joint_forward(block: Any, *args: Any, **kwargs: Any) -> Any:
    return block.joint_forward(*args, **kwargs)


def whole(tree: Any, keep: bool = True) -> Any:
    """Gather the tensors in nested dicts and lists as plain ones on the CPU; if there are shards, all processes must call it.

    Args:
        tree: Dicts, lists and tuples (which become lists) of tensors and other values.
        keep: False takes part in the gathering but keeps nothing: every tensor becomes None.
    """
    if isinstance(tree, dict):
        return {key: whole(value, keep) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [whole(value, keep) for value in tree]
    if not isinstance(tree, Tensor):
        return tree
    gathered = tree.full_tensor() if isinstance(tree, DTensor) else tree
    return gathered.detach().cpu().contiguous() if keep else None


def shard_like(value: Any, parameter: Tensor) -> Any:
    """This process' part of a whole tensor, laid out as `parameter`; what has no shards stays as it is."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    # every process has the whole tensor: nothing to send
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)
