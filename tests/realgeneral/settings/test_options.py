"""The command line that is made of a settings class."""

from __future__ import annotations

import pytest

from realgeneral.errors import UsageError
from realgeneral.settings.data import CheckDataConfig, PrecomputeConfig
from realgeneral.settings.evaluate import EvaluateConfig
from realgeneral.settings.options import MAX_SEED, Settings, parse
from realgeneral.settings.sampling import DemoConfig, GenerateConfig
from realgeneral.settings.train import TrainConfig


def test_both_spellings_of_options() -> None:
    """--batch-size and --batch_size are the same option."""
    for spelling in ("--batch-size", "--batch_size"):
        assert parse(TrainConfig, "realgeneral train", [spelling, "3"]).batch_size == 3


@pytest.mark.parametrize(
    ("settings", "option", "most"),
    [
        (CheckDataConfig, "num-workers", 512), (CheckDataConfig, "height", 16384), (CheckDataConfig, "width", 16384),
        (CheckDataConfig, "batch-size", 10_000), (PrecomputeConfig, "variants", 10_000),
        (PrecomputeConfig, "encode-batch", 10_000),
        (PrecomputeConfig, "shard-megabytes", 65536), (TrainConfig, "rank", 10_000), (TrainConfig, "steps", 2**31 - 1),
        (GenerateConfig, "num-images", 10_000), (EvaluateConfig, "images-per-prompt", 10_000),
        (DemoConfig, "concepts", 2**31 - 1),
    ],
)  # fmt: skip
def test_numbers_that_would_take_all_memory(settings: type[Settings], option: str, most: int) -> None:
    """Refused by name with both values, before anything is loaded; the limit itself is allowed."""
    needed = ["--prompt", "a", "--task", "canny"] if settings is GenerateConfig else []
    needed += ["--protocol", "canny"] if settings is EvaluateConfig else []
    assert getattr(parse(settings, "x", [*needed, f"--{option}", str(most)]), option.replace("-", "_")) == most
    for value in (most + 1, 2**31, 10**30):
        with pytest.raises(UsageError, match=f"{option.replace('-', '_')} must be at most {most}, got {value}"):
            parse(settings, "x", [*needed, f"--{option}", str(value)])


def test_seeds_of_all_images_are_in_range() -> None:
    """The last image's seed is written into its file, where it must be one that can be given again."""
    GenerateConfig(prompt="a", task="canny", seed=MAX_SEED)
    with pytest.raises(UsageError, match="seed of the last image must be at most 4294967295"):
        GenerateConfig(prompt="a", task="canny", seed=MAX_SEED, num_images=2)
