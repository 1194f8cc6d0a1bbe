"""Training of adapters: LoRA and condition branch on a frozen CogVideoX, nano and real alike.

python -m realgeneral.train --base nano --data nano --tasks canny --output outputs/canny
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from realgeneral import checkpoint
from realgeneral.adapter import (
    AdapterInfo,
    adapter_info,
    add_lora,
    freeze_for_ablation,
    load_adapter,
    mark_trainable,
    save_adapter,
)
from realgeneral.bases import load_pipeline, load_without_encoders
from realgeneral.config import TrainConfig
from realgeneral.data import RunSampler
from realgeneral.errors import Failure, UsageError
from realgeneral.kernels import use_kernels
from realgeneral.loading import run_tasks, training_dataset, training_texts
from realgeneral.objective import Batch, collate, training_loss
from realgeneral.pipeline import RealGeneralPipeline, resolve_adapter
from realgeneral.records import Source
from realgeneral.samples import sample_grid
from realgeneral.sources import open_source
from realgeneral.tasks import get_task


def load_models(config: TrainConfig, accelerator: Accelerator) -> tuple[RealGeneralPipeline, AdapterInfo]:
    """Base, adapter (fresh, given, or of the newest checkpoint), dtypes and devices."""
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    pipe = load_without_encoders(config.base, dtype) if config.precomputed else load_pipeline(config.base, dtype)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.requires_grad_(False)
    transformer = pipe.transformer
    if config.init_adapter:
        info = load_adapter(transformer, resolve_adapter(config.init_adapter), preset=config.preset)
        if (info.rank, info.alpha) != (config.rank, config.alpha or config.rank):
            raise UsageError(
                f"rank and alpha must be those of the adapter to start from, {info.rank} and {info.alpha:g}, "
                f"got {config.rank} and {config.alpha or config.rank:g}"
            )
        tasks = task_specs(config) if config.tasks else list(info.tasks)
        if tuple(get_task(spec).name for spec in tasks) != info.task_names:
            raise UsageError(f"tasks must be those of the adapter to start from, {list(info.task_names)}, got {tasks}")
    else:
        tasks = task_specs(config)
        transformer.configure_condition([get_task(spec).name for spec in tasks], config.preset)
        torch.manual_seed(config.seed)
        add_lora(transformer, config.rank, config.alpha or None, config.lora_targets)
    mark_trainable(transformer)
    freeze_for_ablation(transformer, config.ablation)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    use_kernels(transformer, config.fused_kernels, accelerator.device)
    pipe.to(accelerator.device)
    transformer.train()
    if config.compile:
        transformer.compile(fullgraph=True)
    return pipe, adapter_info(transformer, tasks, config.base)


def task_specs(config: TrainConfig) -> list[str]:
    """The tasks of a run."""
    return run_tasks(config.tasks, config.data)


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """Factor on the peak learning rate before optimizer step `step` (from 0): linear warm-up, then constant or cosine to 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def train(config: TrainConfig) -> dict[str, Any]:
    """Run or continue a training.

    Returns:
        "loss" (mean of the last tenth), "steps", "skipped" rows, "adapter" (folder), "log" (metrics.jsonl).

    Raises:
        UsageError: A setting does not fit the base, the data, or the run to resume.
        Failure: Data cannot be read, or the loss is not finite.
    """
    # 1. models
    precision = config.mixed_precision
    accelerator = Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available())
    output = Path(config.output)
    resumed = checkpoint.start_or_resume(config, output)
    source = open_source(config.data, config.columns)
    pipe, info = load_models(config, accelerator)
    trainable = [p for p in pipe.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=config.learning_rate, weight_decay=config.weight_decay)
    ema = EMAModel(trainable, decay=config.ema_decay, use_ema_warmup=True) if config.ema_decay else None
    start = checkpoint.load(resumed, pipe.transformer, optimizer, ema) if resumed else 0
    model, optimizer = accelerator.prepare(pipe.transformer, optimizer)

    # 2. data: sample numbers continue where the checkpoint stopped
    dataset = training_dataset(config, pipe, info.tasks, source)
    per_step = config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    rank, world = accelerator.process_index, accelerator.num_processes
    sampler = RunSampler(start * per_step, config.steps * per_step, rank, world, dataset.order.run)
    loader = DataLoader(
        dataset,
        config.batch_size,
        sampler=sampler,
        num_workers=config.num_workers,
        collate_fn=collate,
        worker_init_fn=_leave_interrupts_to_the_trainer,
    )
    batches, texts = iter(loader), training_texts(pipe, dataset)
    log = checkpoint.MetricsLog(output / "metrics.jsonl", start, config.tensorboard, accelerator.is_main_process)

    # 3. steps
    stop = _Stop()
    bar = tqdm(
        range(start, config.steps), initial=start, total=config.steps, disable=not accelerator.is_main_process, file=sys.stderr
    )
    with stop.catching():
        for step in bar:
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * learning_rate_factor(config, step)
            losses, tasks = [], []
            for micro in range(config.gradient_accumulation_steps):
                batch = _to_device(_next(batches), accelerator.device)
                draw = (
                    step * config.gradient_accumulation_steps + micro
                ) * accelerator.num_processes + accelerator.process_index
                last = micro == config.gradient_accumulation_steps - 1
                with accelerator.autocast(), contextlib.nullcontext() if last else accelerator.no_sync(model):
                    loss = training_loss(pipe, model, texts, batch, config, draw)
                    if accelerator.num_processes == 1:  # else all stop together below: NaN reaches every gradient
                        _check_finite(loss, step, batch)
                    accelerator.backward(loss.mean() / config.gradient_accumulation_steps)
                losses.append(accelerator.gather(loss.detach()))
                tasks += gather_object(batch.tasks)
                log.skipped(gather_object(batch.skipped))
            norm = accelerator.clip_grad_norm_(trainable, config.max_grad_norm)
            if not torch.isfinite(norm):  # such a step would put NaN into the weights, and into the next checkpoint
                raise Failure(
                    f"gradient must be finite, got norm {norm.item()} at step {step + 1}; earlier checkpoints are intact"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ema is not None:
                ema.step(trainable)
            log.step(step + 1, torch.cat(losses), tasks, time.perf_counter() - began, config, bar)

            # 4. samples and checkpoints
            done, stopping = step + 1, _any_process(accelerator, bool(stop.asked))
            if accelerator.is_main_process and (done % config.save_every == 0 or done == config.steps or stopping):
                checkpoint.save(output, config, info, done, pipe.transformer, optimizer, ema)
            sampling = config.sample_every and config.sample_count and done % config.sample_every == 0 and done < config.steps
            if accelerator.is_main_process and sampling:
                _sample(pipe, config, info, source, output, done, ema, trainable)
            if stopping:
                raise Failure(f"stopped by signal {stop.asked} after step {done}; the same command with --resume continues")

    # 5. the adapter
    if ema is not None:
        ema.copy_to(trainable)
    if accelerator.is_main_process:
        save_adapter(pipe.transformer, output / "adapter", info)
        if config.sample_count:
            _sample(pipe, config, info, source, output, config.steps, None, trainable)
    accelerator.end_training()
    return log.summary(config.steps, output / "adapter")


def _sample(
    pipe: RealGeneralPipeline,
    config: TrainConfig,
    info: AdapterInfo,
    source: Source,
    output: Path,
    step: int,
    ema: EMAModel | None,
    trainable: list[Any],
) -> None:
    """Write a sample grid with the averaged weights, through the same pipeline as inference."""
    if ema is not None:
        ema.store(trainable)
        ema.copy_to(trainable)
    pipe.transformer.eval()
    # a compiled model would be compiled again for the sampler's batch and its condition cache
    with torch.compiler.set_stance("force_eager" if config.compile else "default"):
        sample_grid(pipe, config, info, source, output / "samples" / f"step-{step:06d}.png")
    pipe.transformer.train()
    if ema is not None:
        ema.restore(trainable)


def _next(batches: Iterator[Batch]) -> Batch:
    try:
        return next(batches)
    except Failure as error:
        # a worker process puts its traceback before the message
        raise Failure(str(error).rpartition("Failure: ")[2].strip()) from None


def _leave_interrupts_to_the_trainer(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether a flag is set in any process: all must leave the loop at the same step."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum").item())


def _to_device(batch: Batch, device: torch.device) -> Batch:
    batch.target, batch.conditions = batch.target.to(device), batch.conditions.to(device)
    return batch


def _check_finite(loss: Tensor, step: int, batch: Batch) -> None:
    if not torch.isfinite(loss).all():
        bad = [name for name, value in zip(batch.names, loss.tolist(), strict=True) if not math.isfinite(value)]
        raise Failure(
            f"loss must be finite, got {loss.mean().item()} at step {step + 1} for rows {bad[:4]}; "
            "earlier checkpoints are intact"
        )


class _Stop:
    """SIGTERM and SIGINT ask the loop to save and stop after the step that runs."""

    def __init__(self) -> None:
        self.asked = 0

    @contextlib.contextmanager
    def catching(self) -> Iterator[None]:
        """Install the handlers, and put back what was there."""
        before = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not in the main thread: someone else handles signals
                before[number] = signal.signal(number, self._ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = number


if __name__ == "__main__":
    from realgeneral.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
