"""Gradient checkpointing: the same gradients, attention run once or twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from realgeneral.training.models import ATTENTION_OPS, checkpointing
from tests.realgeneral.helpers.models import make_inputs, run, trained_model


class Count(TorchDispatchMode):
    """How often each op runs."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[func.name()] += 1
        return func(*args, **(kwargs or {}))

    @property
    def attention(self) -> int:
        return sum(self.ops[name] for name in ATTENTION_OPS)


@pytest.mark.parametrize("preset", ["paper", "cached"])
def test_selective_keeps_attention(base: Path, preset: str) -> None:
    """Gradients have the bits of an ordinary step; "full" runs attention twice, "selective" once, both the products twice."""
    inputs, seen = None, {}
    for kind in ("none", "full", "selective"):
        model = trained_model(base, preset).float().train()
        inputs = inputs or make_inputs(model, (6, 6), conditions=2)
        for name, value in vars(inputs).items():
            if value.is_floating_point():
                setattr(inputs, name, value.float())
        if kind != "none":
            model.enable_gradient_checkpointing(checkpointing(kind))
        with Count() as count:
            run(model, inputs).square().mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        seen[kind] = (count, gradients)
    plain, full, selective = (seen[kind][0] for kind in ("none", "full", "selective"))
    assert plain.attention > 0
    assert (full.attention, selective.attention) == (2 * plain.attention, plain.attention)
    assert selective.ops["aten::addmm"] == full.ops["aten::addmm"] > plain.ops["aten::addmm"]
    for kind in ("full", "selective"):
        assert seen[kind][1].keys() == seen["none"][1].keys()
        assert all(torch.equal(g, seen[kind][1][name]) for name, g in seen["none"][1].items())
