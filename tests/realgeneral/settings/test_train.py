"""Settings of a run: switches that mean a choice, and settings that exclude each other."""

from __future__ import annotations

import pytest

from realgeneral.errors import UsageError
from realgeneral.settings.options import parse
from realgeneral.settings.train import TrainConfig, check_resumable


def test_gradient_checkpointing_switch() -> None:
    """The flag alone still means full recomputation; True and False are what they were."""

    def parsed(*arguments: str) -> str:
        return str(parse(TrainConfig, "realgeneral train", list(arguments)).gradient_checkpointing)

    assert parsed() == "none"
    assert parsed("--gradient-checkpointing", "--steps", "3") == "full"
    assert parsed("--gradient-checkpointing", "selective") == "selective"
    assert TrainConfig(gradient_checkpointing=True).gradient_checkpointing == "full"
    assert TrainConfig(gradient_checkpointing=False).gradient_checkpointing == "none"


def test_the_old_switch() -> None:
    """--tensorboard means --tracker tensorboard, and contradicts another tracker."""
    assert TrainConfig(tensorboard=True).tracker == "tensorboard"
    with pytest.raises(UsageError, match="tracker must be tensorboard with --tensorboard, got wandb"):
        TrainConfig(tensorboard=True, tracker="wandb")


def test_ablation_settings() -> None:
    """A trained part cannot be left out of an adapter to start from; an ablated run is not continued as another."""
    with pytest.raises(UsageError, match="ablation must be 'none' with init_adapter"):
        TrainConfig(init_adapter="nano", ablation="shared-adaln")
    with pytest.raises(UsageError, match="ablation must be 'shared-adaln' as in the run to resume, got 'none'"):
        check_resumable({"ablation": "shared-adaln"}, TrainConfig())
