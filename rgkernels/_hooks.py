"""What others have hung around a module's forward: hooks of PyTorch, diffusers and accelerate, told apart by name.

The ops read a norm's parameters without calling the norm. `with_affine` makes up for it: hooks that place or cast parameters
run around the op as they would around the norm. Hooks that look at a bypassed module's inputs or outputs cannot, and are named.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

# these move or cast parameters and care for nothing else: offload of groups, of layers, of models in parts, casting of layers
PARAMETER_HOOKS = frozenset(
    {"group_offloading", "lazy_prefetch_group_offloading", "layer_execution_tracker", "layerwise_casting", "AlignDevicesHook"}
)


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module does anything besides its class's forward."""
    forward = module.__dict__.get("forward")
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        return True
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def watching_hooks(module: nn.Module) -> list[str]:
    """Names of the hooks around a module's forward, those aside that only place or cast its parameters."""
    if not is_hooked(module):
        return []
    registered = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    names = [getattr(hook, "__qualname__", type(hook).__name__) for hooks in registered for hook in hooks.values()]
    registry, hook = module.__dict__.get("_diffusers_hook"), module.__dict__.get("_hf_hook")
    names += [] if registry is None else list(registry.hooks)
    names += [] if hook is None else [type(part).__name__ for part in getattr(hook, "hooks", [hook])]
    return [name for name in names or ["a replaced forward"] if name not in PARAMETER_HOOKS]


def refuse_hooks(name: str, module: nn.Module) -> None:
    """Raise if hooks look at a module whose forward the ops go past."""
    names = watching_hooks(module)
    if names:
        raise NotImplementedError(f"{name} must have no hooks where the ops of rgkernels run in its place, got {names}")


def with_affine(norm: nn.Module, fn: Callable[[Tensor | None, Tensor | None, float], Any]) -> Any:
    """`fn(weight, bias, eps)` of a LayerNorm, with what places, casts or trains its parameters around it (offload, PEFT)."""
    if isinstance(norm, nn.LayerNorm) and not is_hooked(norm):
        return fn(norm.weight, norm.bias, norm.eps)
    refuse_hooks(type(norm).__name__, norm)
    return norm(_Input(fn))


class _Input:
    """Goes through a LayerNorm's call in the tensor's place; where the norm would compute, `fn` gets its parameters."""

    def __init__(self, fn: Callable[[Tensor | None, Tensor | None, float], Any]) -> None:
        self.fn = fn

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is F.layer_norm
        return args[0].fn(kwargs["weight"], kwargs["bias"], kwargs["eps"])
