"""The command line that is made of a settings class."""

from __future__ import annotations

from realgeneral.settings.options import parse
from realgeneral.settings.train import TrainConfig


def test_both_spellings_of_options() -> None:
    """--batch-size and --batch_size are the same option."""
    for spelling in ("--batch-size", "--batch_size"):
        assert parse(TrainConfig, "realgeneral train", [spelling, "3"]).batch_size == 3
