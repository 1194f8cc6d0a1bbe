"""Which optimizer, what is said where it cannot be had, and the learning rate."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import nn

from realgeneral.errors import UsageError
from realgeneral.settings.train import TrainConfig
from realgeneral.training.optimizers import learning_rate_factor, make_optimizer

PARAMETERS = [nn.Parameter(torch.zeros(3))]


def test_adamw() -> None:
    """Rate and decay are the run's."""
    optimizer = make_optimizer(TrainConfig(learning_rate=0.25, weight_decay=0.5), PARAMETERS, torch.device("cpu"))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.25, 0.5)


@pytest.mark.parametrize("name", ["adamw8bit", "paged-adamw8bit"])
def test_eight_bits_without_cuda_or_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thing that is missing is named; nothing falls back."""
    config = TrainConfig(optimizer=name)
    with pytest.raises(UsageError, match=f"--optimizer {name} needs a CUDA device, found none"):
        make_optimizer(config, PARAMETERS, torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match=rf"--optimizer {name} needs the package bitsandbytes \(pip install"):
        make_optimizer(config, PARAMETERS, torch.device("cuda"))


def test_eight_bits_choose_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain and paged states are bitsandbytes' two classes."""
    optim = ModuleType("bitsandbytes.optim")
    optim.AdamW8bit = type("AdamW8bit", (torch.optim.AdamW,), {})
    optim.PagedAdamW8bit = type("PagedAdamW8bit", (torch.optim.AdamW,), {})
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    for name, kind in (("adamw8bit", optim.AdamW8bit), ("paged-adamw8bit", optim.PagedAdamW8bit)):
        assert type(make_optimizer(TrainConfig(optimizer=name), PARAMETERS, torch.device("cuda"))) is kind


def test_learning_rate_schedule(config: Callable[..., TrainConfig]) -> None:
    """Linear warm-up to 1, then cosine to 0 or constant."""
    cosine = config(steps=10, warmup_steps=4)
    factors = [learning_rate_factor(cosine, step) for step in range(11)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[10] == pytest.approx(0.0)
    assert factors[7] == pytest.approx(0.5)
    assert factors[4:] == sorted(factors[4:], reverse=True)
    constant = config(steps=10, warmup_steps=0, lr_schedule="constant")
    assert {learning_rate_factor(constant, step) for step in range(10)} == {1.0}
