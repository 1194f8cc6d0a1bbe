"""What can be told before weights are loaded: from settings, data, an adapter's metadata and a base's configuration files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from realgeneral.data.rows import Source
from realgeneral.data.samples import check_tasks
from realgeneral.data.store import check_settings, read_settings
from realgeneral.errors import UsageError
from realgeneral.generation.arguments import check_steps
from realgeneral.generation.bases import check_kernels, open_base
from realgeneral.loading import encoder_dtype, run_buckets, run_tasks
from realgeneral.model.adapter import read_adapter_info
from realgeneral.model.adapter_info import check_fits
from realgeneral.model.lora import check_targets
from realgeneral.optimizers import check_optimizer
from realgeneral.settings.train import TrainConfig
from realgeneral.tasks import get_task


def tasks_to_train(config: TrainConfig) -> list[str]:
    """The tasks of a run; UsageError if they, the rank or the alpha are not those of `init_adapter`."""
    if not config.init_adapter:
        return run_tasks(config.tasks, config.data)
    info = read_adapter_info(config.init_adapter)
    if (info.rank, info.alpha) != (config.rank, config.alpha or config.rank):
        raise UsageError(
            f"rank and alpha must be those of the adapter to start from, {info.rank} and {info.alpha:g}, "
            f"got {config.rank} and {config.alpha or config.rank:g}"
        )
    tasks = run_tasks(config.tasks, config.data) if config.tasks else list(info.tasks)
    if tuple(get_task(spec).name for spec in tasks) != info.task_names:
        raise UsageError(f"tasks must be those of the adapter to start from, {list(info.task_names)}, got {tasks}")
    return tasks


def check_training(config: TrainConfig, source: Source, device: torch.device) -> None:
    """What a training run on `source` would meet after its base is loaded: on a large one that takes minutes.

    Raises:
        UsageError: A setting does not fit the base, the adapter to start from, or this machine.
        Failure: The base, the adapter or the store is not one.
    """
    check_kernels(config.fused_kernels, device)
    check_optimizer(config, device)
    base = open_base(config.base)
    if config.init_adapter:
        check_fits(base.transformer, read_adapter_info(config.init_adapter), config.preset)
    check_targets(base.transformer, config.lora_targets)
    check_tasks(source, tasks_to_train(config))
    run_buckets(config, base)
    if config.sample_count:
        check_steps("sample_steps", config.sample_steps, base.scheduler)
    if config.precomputed:
        folder = Path(config.precomputed)
        settings = read_settings(folder)
        window = base.transformer.config.max_text_seq_length
        # the encoders' fingerprints take a reading of all their weights, and come later
        check_settings(folder, settings, replace(settings, dtype=encoder_dtype(config.mixed_precision), window=window))
