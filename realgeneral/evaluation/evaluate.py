"""The door of `realgeneral evaluate`: checks that need no weights, then nano's table or a protocol."""

from __future__ import annotations

from typing import Any

from realgeneral.errors import UsageError
from realgeneral.evaluation.nano_table import nano_table
from realgeneral.evaluation.protocols import run_protocol
from realgeneral.files import check_output
from realgeneral.generation.arguments import check_steps
from realgeneral.generation.bases import open_base
from realgeneral.model.adapter import read_adapter_info
from realgeneral.model.adapter_info import AdapterInfo, check_fits
from realgeneral.settings.evaluate import EvaluateConfig
from realgeneral.settings.sampling import sampling


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score an adapter; see `nano_table` and `run_protocol`.

    Raises:
        UsageError: A task that the adapter was not trained for, or a setting that does not fit the protocol.
        Failure: Something cannot be read or written.
        RuntimeError: The image encoder of the extra "eval" is missing.
    """
    info = _check(config)
    return nano_table(config, info) if config.protocol == "nano" else run_protocol(config)


def _check(config: EvaluateConfig) -> AdapterInfo:
    """What needs no weights to be known; returns the adapter's description."""
    check_output(config.output)
    base, info = open_base(config.base), read_adapter_info(config.adapter)
    height, width = base.image_size()
    if config.protocol == "nano" and (height, width) != (64, 64):
        raise UsageError(f"base must be a 64 px model such as nano for nano's table, got one of {height} x {width} px")
    check_fits(base.transformer, info)
    check_steps("steps", sampling(config, "")[0], base.scheduler)
    return info
