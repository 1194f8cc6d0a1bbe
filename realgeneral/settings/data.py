"""Settings of data: what `check-data`, `precompute` and `train` share, and the first two commands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from realgeneral.errors import UsageError
from realgeneral.settings.options import TRUNCATE_HELP, Settings, check_at_least_one, option

DATA_HELP = (
    'folder, .parquet or .tar (WebDataset), a folder or glob of those, "hf:NAME[:CONFIG][@SPLIT]", '
    'a folder of datasets\' save_to_disk, "nano" (emoji), "avatars", or a .json list of several'
)
COLUMNS_HELP = (
    "FIELD=COLUMN[:CROP] for target, prompt, condition, task, subject; a .json or .yaml file of those; "
    "or subjects200k, multigen-depth, controlnet"
)
OUTSIDE_HELP = "pictures that a listing names may lie outside the folder of the data"
BUCKETS_HELP = (
    '"standard" and HEIGHTxWIDTH: batches of one size and number of conditions from mixed pictures; none = one size for all'
)


@dataclass(frozen=True)
class DataSettings(Settings):
    """What `check-data`, `precompute` and `train` are asked of their data in the same words."""

    base: str = option('CogVideoX checkpoint (folder or hub id), or "nano"', "nano", group="base")
    data: str = option(DATA_HELP, "nano", group="data")
    columns: list[str] = option(COLUMNS_HELP, many=())
    allow_outside: bool = option(OUTSIDE_HELP, False)
    tasks: list[str] = option('task specs such as canny or "deblurring:radius=16"; rows that name a task use it', many=())
    height: int = option("height in pixels; 0: the base's own", 0)
    width: int = option("width in pixels; 0: the base's own", 0)
    buckets: list[str] = option(BUCKETS_HELP, many=())
    truncate_prompts: bool = option(TRUNCATE_HELP, False)
    num_workers: int = option("number of data-loading processes; 0: none beside this one", 0)
    debug: bool = option("show the traceback of an error", False, group="run")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_workers < 0:
            raise UsageError(f"num_workers must not be negative, got {self.num_workers}")


@dataclass(frozen=True)
class PrecomputeConfig(DataSettings):
    """Encode the pictures and prompts of a data set once, for training with --precomputed."""

    output: str = option("folder of the store; existing entries are kept", "outputs/precomputed", group="store")
    variants: int = option("number of random draws per row, for tasks such as inpainting", 4)
    mixed_precision: Literal["no", "bf16"] = option("precision of the encoders, as in training", "no")
    shard: str = option('this process\' part, "i/n" from 0; default: RANK and WORLD_SIZE as torchrun sets them', "")
    shard_megabytes: int = option("size of a shard in megabytes", 256)
    encode_batch: int = option(
        "number of pictures, or prompts, encoded together; above 1 the last bits differ from training on the fly", 1
    )
    strict: bool = option("stop at the first bad row instead of noting it", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "variants", "shard_megabytes", "encode_batch")


@dataclass(frozen=True)
class CheckDataConfig(DataSettings):
    """Read a whole data set and report what training would meet; exit status 1 if a row is bad or training would stop."""

    batch_size: int = option(
        "batch size of training; with --buckets, the rows that fill up last batches are counted", 8, group="report"
    )
    headers_only: bool = option("read headers only: much faster, but truncated pictures are not found", False)
    report: str = option("also write the report as JSON", "")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "batch_size")
