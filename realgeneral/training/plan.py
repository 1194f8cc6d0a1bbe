"""What settings and a base make of a run: tasks, sizes, text window, samples; and checks that need no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from realgeneral.data.order import Bucketed, OneSize, Order
from realgeneral.data.rows import Source
from realgeneral.data.samples import PairDataset, TextCheck, check_tasks
from realgeneral.data.shapes import Size, bucket_sizes, read_shapes
from realgeneral.data.sources.lists import read_entries
from realgeneral.data.sources.packaged import BUILT_IN, NANO_TASKS
from realgeneral.data.store import Store, check_settings, read_settings
from realgeneral.errors import UsageError
from realgeneral.generation.arguments import check_steps
from realgeneral.generation.bases import check_kernels, fingerprints, open_base
from realgeneral.generation.pipeline import RealGeneralPipeline
from realgeneral.model.adapter import read_adapter_info
from realgeneral.model.adapter_info import check_fits
from realgeneral.model.lora import check_targets
from realgeneral.settings.data import DataSettings
from realgeneral.settings.train import TrainConfig
from realgeneral.tasks import DEFAULT_TASKS, get_task
from realgeneral.training.optimizers import check_optimizer


@dataclass(frozen=True)
class Plan:
    """What data settings and a base make of a run: `train`, `precompute` and `check-data` read their data by it.

    Attributes:
        tasks: Specs of the tasks.
        size: (width, height) in pixels of a run without buckets.
        buckets: (width, height) of each bucket; empty without `--buckets`.
        window: Length of the text window.
        dtype: Name of the dtype of VAE and text encoder.
        check: What a row's prompt must be.
    """

    tasks: list[str]
    size: Size
    buckets: tuple[Size, ...]
    window: int
    dtype: str
    check: TextCheck

    @classmethod
    def of(cls, settings: DataSettings, base: RealGeneralPipeline) -> Plan:
        """Plan a run.

        Args:
            settings: Of `train`, `precompute` or `check-data`.
            base: Loaded whole, or by `open_base` or `load_for_data`.

        Raises:
            UsageError: A task, size or bucket that there is not, or that the base cannot have.
        """
        height, width = base.image_size(settings.height or None, settings.width or None)
        geometry = base.transformer.geometry
        largest = geometry.largest_size(base.vae_scale_factor_spatial)
        return cls(
            tasks=run_tasks(settings),
            size=(width, height),
            buckets=bucket_sizes(
                settings.buckets,
                (width, height),
                base.size_multiple,
                min(largest) if largest else None,
                geometry.trained_sides,
            ),
            window=geometry.text_window,
            dtype="bfloat16" if getattr(settings, "mixed_precision", "no") == "bf16" else "float32",
            check=TextCheck(base.tokenizer, geometry.text_window, settings.truncate_prompts),
        )

    def dataset(
        self,
        source: Source,
        *,
        weights: Sequence[float] = (),
        seed: int = 0,
        strict: bool = True,
        batch_size: int = 1,
        one_size: bool = False,
        variants: int = 0,
        store: Store | None = None,
    ) -> PairDataset:
        """The samples of a source.

        Args:
            source: Rows.
            weights: Relative frequency of each task, as in `PairDataset`.
            seed: Seed of order, tasks and conditions.
            strict: Raise at a bad row instead of taking the next one.
            batch_size: Samples of a batch, which are of one bucket.
            one_size: All samples at `size`, whatever the buckets: no picture's size is read beforehand.
            variants: Draws of what is random per row; 0 = a new one each time.
            store: Where latents come from.
        """
        order: Order
        if self.buckets and not one_size:
            order = Bucketed(read_shapes(source), self.buckets, source.blocks, batch_size, seed)
        else:
            order = OneSize(source.blocks, seed, self.size)
        return PairDataset(
            source, self.tasks, weights, self.size, seed, strict, self.check, order=order, variants=variants, store=store
        )


def run_tasks(settings: DataSettings) -> list[str]:
    """The tasks of a run: those asked for, else its first adapter's, nano's six for its data, the paper's seven for others.

    Raises:
        UsageError: Unknown or repeated tasks, or a first adapter of other tasks, rank or alpha.
    """
    first = read_adapter_info(settings.init_adapter) if isinstance(settings, TrainConfig) and settings.init_adapter else None
    if first is None:
        return _specs(settings.tasks or (NANO_TASKS if _packaged(settings.data) else DEFAULT_TASKS))
    assert isinstance(settings, TrainConfig)
    if (first.rank, first.alpha) != (settings.rank, settings.alpha or settings.rank):
        raise UsageError(
            f"rank and alpha must be those of the adapter to start from, {first.rank} and {first.alpha:g}, "
            f"got {settings.rank} and {settings.alpha or settings.rank:g}"
        )
    tasks = _specs(settings.tasks or first.tasks)
    if tuple(get_task(spec).name for spec in tasks) != first.task_names:
        raise UsageError(f"tasks must be those of the adapter to start from, {list(first.task_names)}, got {tasks}")
    return tasks


def _specs(specs: Sequence[str]) -> list[str]:
    try:
        tasks = [get_task(spec) for spec in specs]
    except ValueError as error:
        raise UsageError(str(error)) from None
    names = [task.name for task in tasks]
    if len(set(names)) != len(names):
        raise UsageError(f"tasks must each be given once, got {names}")
    return [task.spec for task in tasks]


def _packaged(data: str) -> bool:
    """Whether it is packaged data, or a list of nothing else."""
    if not data.lower().endswith(".json") or not Path(data).is_file():
        return data in BUILT_IN
    return all(entry.data in BUILT_IN for entry in read_entries(Path(data)))


def training_dataset(config: TrainConfig, plan: Plan, source: Source) -> PairDataset:
    """The samples of a training run, from its store if it has one.

    Raises:
        UsageError: `variants` is not the store's.
        StoreFailure: The store was made with other encoders.
    """
    store, variants = None, config.variants
    if config.precomputed:
        store = Store(config.precomputed)
        store.check(*fingerprints(config.base), plan.dtype, plan.window)
        if variants not in (0, store.settings.variants):
            raise UsageError(f"variants must be those of the store, {store.settings.variants}, got {variants}")
        variants = store.settings.variants
    return plan.dataset(
        source,
        weights=config.task_weights,
        seed=config.seed,
        strict=config.strict,
        batch_size=config.batch_size,
        variants=variants,
        store=store,
    )


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
    plan = Plan.of(config, base)
    check_tasks(source, plan.tasks)
    if config.sample_count:
        check_steps("sample_steps", config.sample_steps, base.scheduler)
    if config.precomputed:
        folder = Path(config.precomputed)
        settings = read_settings(folder)
        # the encoders' fingerprints take a reading of all their weights, and come later
        check_settings(folder, settings, replace(settings, dtype=plan.dtype, window=plan.window))
