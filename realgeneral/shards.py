"""Tensors that are shared out over processes (FSDP2's DTensors), to whole ones and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


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
