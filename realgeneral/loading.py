"""What the commands make of their data settings: sizes, order, checks and the store of a run's samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from realgeneral.data.order import Bucketed, OneSize, Order
from realgeneral.data.rows import Source
from realgeneral.data.samples import PairDataset, TextCheck
from realgeneral.data.shapes import Size, bucket_sizes, read_shapes
from realgeneral.data.sources.lists import read_entries
from realgeneral.data.sources.packaged import BUILT_IN
from realgeneral.data.store import Store
from realgeneral.errors import UsageError
from realgeneral.generation.bases import fingerprints
from realgeneral.generation.pipeline import RealGeneralPipeline
from realgeneral.model.geometry import NEWER_SIDES
from realgeneral.objective import StoredTexts, TextCache, Texts
from realgeneral.settings.data import DataSettings
from realgeneral.settings.train import TrainConfig
from realgeneral.tasks import DEFAULT_TASKS, get_task


def run_tasks(specs: Sequence[str], data: str) -> list[str]:
    """The tasks of a run: those asked for, else nano's six for its data and the paper's seven for others."""
    specs = list(specs)
    if not specs and _packaged(data):
        from realgeneral.data.sources.packaged import NANO_TASKS

        specs = list(NANO_TASKS)
    try:
        tasks = [get_task(spec) for spec in specs or DEFAULT_TASKS]
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


def run_size(config: DataSettings, pipe: RealGeneralPipeline) -> Size:
    """(width, height) in pixels, checked against the geometry."""
    height, width = pipe.image_size(config.height or None, config.width or None)
    return width, height


def run_buckets(config: DataSettings, pipe: RealGeneralPipeline) -> tuple[Size, ...]:
    """The buckets of a run; none without `--buckets`."""
    geometry = pipe.transformer.config
    limit = None
    if geometry.patch_size_t:
        limit = min(geometry.sample_height, geometry.sample_width) * pipe.vae_scale_factor_spatial
    return bucket_sizes(config.buckets, run_size(config, pipe), pipe.size_multiple, limit, NEWER_SIDES if limit else None)


def run_order(config: DataSettings, pipe: RealGeneralPipeline, source: Source, batch_size: int, seed: int) -> Order:
    """One size, or buckets."""
    sizes = run_buckets(config, pipe)
    if sizes:
        return Bucketed(read_shapes(source), sizes, source.blocks, batch_size, seed)
    return OneSize(source.blocks, seed, run_size(config, pipe))


def training_dataset(config: TrainConfig, pipe: RealGeneralPipeline, tasks: Sequence[str], source: Source) -> PairDataset:
    """The samples of a run.

    Raises:
        UsageError: Sizes do not fit the base, or `variants` is not the store's.
        StoreFailure: The store was made with other encoders.
    """
    store, variants = None, config.variants
    if config.precomputed:
        store = Store(config.precomputed)
        window = pipe.transformer.config.max_text_seq_length
        store.check(*fingerprints(config.base), encoder_dtype(config.mixed_precision), window)
        if variants not in (0, store.settings.variants):
            raise UsageError(f"variants must be those of the store, {store.settings.variants}, got {variants}")
        variants = store.settings.variants
    order = run_order(config, pipe, source, config.batch_size, config.seed)
    check = TextCheck(pipe.tokenizer, pipe.transformer.config.max_text_seq_length, config.truncate_prompts)
    size = run_size(config, pipe)
    return PairDataset(
        source, tasks, config.task_weights, size, config.seed, config.strict, check, order=order, variants=variants, store=store
    )


def training_texts(pipe: RealGeneralPipeline, dataset: PairDataset, device: torch.device) -> Texts:
    """Text features of a run: from its store, or encoded as they are needed."""
    return TextCache(pipe) if dataset.store is None else StoredTexts(dataset.store, device)


def encoder_dtype(mixed_precision: str) -> str:
    """Dtype of VAE and text encoder."""
    return "bfloat16" if mixed_precision == "bf16" else "float32"


def describe(size: Size) -> str:
    """HEIGHTxWIDTH of a (width, height)."""
    return f"{size[1]}x{size[0]}"
