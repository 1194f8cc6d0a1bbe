"""Training of adapters: LoRA and condition branch on a frozen CogVideoX, nano and real alike, on one device or many.

python -m realgeneral train --base nano --data nano --tasks canny --output outputs/canny
torchrun --nproc-per-node 8 -m realgeneral train --engine fsdp2 --base THUDM/CogVideoX-5b --data pictures --output outputs/five
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from realgeneral.data.order import RunSampler
from realgeneral.data.rows import Source
from realgeneral.data.samples import Batch, PairDataset, collate
from realgeneral.data.shapes import Shape
from realgeneral.data.sources.open import open_source
from realgeneral.data.workers import leave_signals, loaded
from realgeneral.errors import Failure, UsageError
from realgeneral.files import check_output, locked
from realgeneral.generation.pipeline import RealGeneralPipeline
from realgeneral.model.adapter import adapter_tensors, write_adapter
from realgeneral.model.adapter_info import AdapterInfo
from realgeneral.pictures import save_picture
from realgeneral.settings.train import TrainConfig
from realgeneral.training import checkpoint
from realgeneral.training.features import Texts, training_texts
from realgeneral.training.memory import MemoryBudget, StepShape, largest, memory_budget, used_bytes
from realgeneral.training.models import load_models, place_models
from realgeneral.training.objective import Draws, training_loss
from realgeneral.training.optimizers import learning_rate_factor, make_optimizer
from realgeneral.training.plan import Plan, check_training, training_dataset
from realgeneral.training.processes.engine import Engine, Stop
from realgeneral.training.processes.fsdp2 import whole
from realgeneral.training.progress.bad_batch import MicroBatch, save_bad_batch
from realgeneral.training.progress.grids import sample_grid
from realgeneral.training.progress.tracking import MetricsLog, StepRecord, check_tracker


@dataclass
class Run:
    """Everything that a training run holds."""

    config: TrainConfig
    engine: Engine
    output: Path
    source: Source
    pipe: RealGeneralPipeline
    info: AdapterInfo
    plan: Plan
    model: nn.Module  # what is called in training: the pipeline's transformer, perhaps wrapped
    trained: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: EMAModel | None
    texts: Texts
    dataset: PairDataset
    batches: Iterator[Batch]
    start: int
    log: MetricsLog
    budget: MemoryBudget


def train(config: TrainConfig) -> dict[str, Any]:
    """Run or continue a training.

    Returns:
        "loss" (mean of the last tenth), "steps", "skipped" rows, "adapter" (folder), "log" (metrics.jsonl).

    Raises:
        UsageError: A setting does not fit the base, the data, or the run to resume.
        Failure: Data cannot be read, or the loss is not finite; in every process, whichever of them met it.
    """
    engine, stop = Engine(config), Stop()
    with contextlib.ExitStack() as lock:
        run = open_run(config, engine, lock)
        bar = tqdm(
            range(run.start, config.steps), initial=run.start, total=config.steps, disable=not engine.is_main, file=sys.stderr
        )
        with stop.catching():
            for step in bar:
                optimizer_step(run, step, bar)
                done, signal_number = step + 1, engine.largest(stop.asked)
                if done % config.save_every == 0 or done == config.steps or signal_number:
                    save_checkpoint(run, done)
                if config.sample_every and done % config.sample_every == 0 and done < config.steps:
                    save_samples(run, done, run.ema)
                if signal_number:
                    raise Failure(
                        f"stopped by signal {signal_number} after step {done}; the same command with --resume continues"
                    )
        return finish(run)


def open_run(config: TrainConfig, engine: Engine, lock: contextlib.ExitStack) -> Run:
    """Models, data, optimizer and log, fresh or as the newest checkpoint left them; the output folder is held by `lock`."""
    output = Path(config.output)
    with engine.together():
        check_tracker(config)
        check_output(config.output)
        if early := engine.is_main and output.is_dir():
            lock.enter_context(locked(output))
        resumed = checkpoint.start_or_resume(config, output, engine.world, engine.is_main)
        start = int(resumed.name.removeprefix("step-")) if resumed else 0
    agree_on_start(engine, output, start)
    with engine.together():
        source = open_source(config.data, config.columns, allow_outside=config.allow_outside)
        # a checkpoint has all of the adapter that its run started from
        begun = replace(config, init_adapter=str(resumed)) if resumed and config.init_adapter else config
        check_training(begun, source, engine.device)
        pipe, info = load_models(begun, engine.device)
        if resumed:
            checkpoint.load_weights(resumed, pipe.transformer)
            checkpoint.check_base(resumed, pipe.transformer, config.base)
        plan = Plan.of(begun, pipe)
        dataset = training_dataset(config, plan, source)
        if resumed:
            checkpoint.check_data(resumed, dataset)
        batches = open_data(config, engine, dataset, start)
        batches, budget = plan_memory(config, engine, pipe, dataset, batches)
        place_models(pipe, config, engine.device)
        texts = training_texts(pipe, dataset, engine.device)

    model = engine.prepare(pipe.transformer)
    trained = [p for p in pipe.transformer.parameters() if p.requires_grad]
    model, optimizer = engine.prepare_optimizer(model, trained, make_optimizer(config, trained, engine.device))
    ema = EMAModel(trained, decay=config.ema_decay, use_ema_warmup=True) if config.ema_decay else None
    skipped = checkpoint.load_state(resumed, trained, optimizer, ema) if resumed else []
    with engine.together():
        if engine.is_main and not early:  # a folder is made once nothing is wrong with the settings
            lock.enter_context(locked(output))
            if checkpoint.checkpoints(output):
                raise Failure(f"output must be a new folder, got {output} in which another run has begun meanwhile")
        log = MetricsLog(output / "metrics.jsonl", start, config, engine.is_main, skipped)
    return Run(
        config, engine, output, source, pipe, info, plan, model, trained, optimizer, ema, texts, dataset, batches, start, log,
        budget,
    )  # fmt: skip


def agree_on_start(engine: Engine, output: Path, start: int) -> None:
    """UsageError in every process if one would start at another step: only a folder that all see holds the same checkpoints."""
    starts = engine.gather_objects([start])
    for rank, other in enumerate(starts):
        if other != starts[0]:
            raise UsageError(
                f"output must be a folder that all processes see, got {output} with step {starts[0]} in process 0 and step "
                f"{other} in process {rank}"
            )


def open_data(config: TrainConfig, engine: Engine, dataset: PairDataset, start: int) -> Iterator[Batch]:
    """This process' micro-batches; sample numbers continue where the checkpoint stopped."""
    per_step = checkpoint.samples_per_step(config, engine.world)
    sampler = RunSampler(start * per_step, config.steps * per_step, engine.rank, engine.world, dataset.order.run)
    loader = DataLoader(
        dataset,
        config.batch_size,
        sampler=sampler,
        num_workers=config.num_workers,
        collate_fn=collate,
        worker_init_fn=leave_signals,
    )
    return loaded(loader)


def plan_memory(
    config: TrainConfig, engine: Engine, pipe: RealGeneralPipeline, dataset: PairDataset, batches: Iterator[Batch]
) -> tuple[Iterator[Batch], MemoryBudget]:
    """What the run will need, told before anything is moved to the device: by the largest bucket, or its first batch."""
    first = next(batches, None)
    if first is None:  # a finished run
        return batches, MemoryBudget(0, 0, 0, 0, 0)
    factor = pipe.vae_scale_factor_spatial if first.encoded else 1
    height, width = (n * factor for n in first.target.shape[-2:])
    shapes = dataset.order.shapes or [Shape(width, height, first.conditions.shape[1])]
    sizes = [StepShape(config.batch_size, shape.conditions, shape.height, shape.width) for shape in largest(shapes)]
    budgets = [memory_budget(pipe, config, size, engine.world, not first.encoded, engine.device) for size in sizes]
    budget, size = max(zip(budgets, sizes, strict=True), key=lambda pair: pair[0].total)
    if engine.is_main:
        print(f"needs {budget} ({size})", flush=True)
        if config.warmup_steps > config.steps:
            print(
                f"warmup_steps is {config.warmup_steps} and the run has {config.steps} steps: "
                f"the learning rate ends at {config.steps / config.warmup_steps:.2g} of --learning-rate",
                flush=True,
            )
    return itertools.chain([first], batches), budget


def optimizer_step(run: Run, step: int, bar: Any) -> None:
    """Step `step` (from 0): micro-steps forward and backward, one update, one row in the log."""
    config, engine, began = run.config, run.engine, time.perf_counter()
    rate = config.learning_rate * learning_rate_factor(config, step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    parts: list[MicroBatch] = []
    for micro in range(config.gradient_accumulation_steps):
        with engine.together():
            batch = next(run.batches).to(engine.device)
        draws = Draws.of(config, batch.numbers, run.pipe.scheduler.config.num_train_timesteps)
        with engine.micro_step(run.model, last=micro == config.gradient_accumulation_steps - 1):
            losses = training_loss(run.pipe, run.model, run.texts, batch, draws)
            engine.backward(losses.mean() / config.gradient_accumulation_steps)
        parts.append(MicroBatch(batch, draws, losses.detach()))
    norm = engine.clip_gradients(run.trained, config.max_grad_norm)
    check_finite(run, step + 1, parts, norm)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if run.ema is not None:
        run.ema.step(run.trained)
    log_step(run, step + 1, parts, time.perf_counter() - began, rate, norm, bar)


def check_finite(run: Run, step: int, parts: list[MicroBatch], norm: Tensor) -> None:
    """Failure in every process, before anything reaches a weight, if a loss or the gradient is NaN or infinite."""
    folder = run.output / f"bad_batch-{step:06d}"
    kept = (
        f"the batch is in {folder}, earlier checkpoints are intact; --resume meets it again, and may have another "
        "--learning-rate or --max-grad-norm"
    )
    with run.engine.together():
        losses = torch.cat([part.losses for part in parts])
        if not torch.isfinite(losses).all():
            names = [name for part in parts for name in part.batch.names]
            bad = [name for name, good in zip(names, torch.isfinite(losses).tolist(), strict=True) if not good]
            save_bad_batch(folder, step, run.engine.rank, parts)
            raise Failure(f"loss must be finite, got {losses.mean().item()} at step {step} for rows {bad[:4]}; {kept}")
    with run.engine.together():
        if not torch.isfinite(norm):
            save_bad_batch(folder, step, run.engine.rank, parts)
            raise Failure(f"gradient must be finite, got norm {norm.item()} at step {step}; {kept}")


def log_step(run: Run, step: int, parts: list[MicroBatch], seconds: float, rate: float, norm: Tensor, bar: Any) -> None:
    """Gather what the processes saw of a step, and write its row."""
    engine, names = run.engine, run.info.task_names
    losses = torch.cat([part.losses for part in parts])
    timesteps = torch.cat([part.draws.timesteps for part in parts]).to(losses)
    tasks = torch.tensor([names.index(task) for part in parts for task in part.batch.tasks]).to(losses)
    skipped = [row for part in parts for row in part.batch.skipped]
    # one exchange: three numbers a sample, and whether there is more to tell
    table = engine.gather(torch.stack([losses, timesteps, tasks, torch.full_like(losses, len(skipped))], dim=1)).cpu()
    if table[:, 3].any():
        run.log.skipped(engine.gather_objects(skipped))
    used = used_bytes(engine.device)
    record = StepRecord(
        losses=table[:, 0].tolist(),
        tasks=[names[int(task)] for task in table[:, 2]],
        timesteps=(table[:, 1] / run.pipe.scheduler.config.num_train_timesteps).tolist(),
        seconds=seconds,
        learning_rate=rate,
        gradient_norm=norm.item(),
        memory=used,
    )
    with engine.together():
        run.log.step(step, record, bar)
    # the first step creates the optimizer's states, the second one has all of it
    if step == run.start + 2 and engine.is_main and engine.device.type == "cuda":
        bar.write(f"uses {used / 2**30:.3g} GiB, needed by plan {run.budget.total / 2**30:.3g} GiB", file=sys.stdout)


def save_checkpoint(run: Run, done: int) -> None:
    """A checkpoint after `done` steps, written by the main process; if it cannot, all stop."""
    engine = run.engine
    adapter, state = checkpoint.snapshot(
        run.config, done, engine.world, run.dataset, run.pipe.transformer, run.optimizer, run.ema, run.log.bad, engine.is_main
    )
    with engine.together():
        if engine.is_main:
            checkpoint.save(run.output, run.info, adapter, state)


def save_samples(run: Run, step: int, ema: EMAModel | None) -> None:
    """A sample grid with the averaged weights, through the same pipeline as inference."""
    config, engine, transformer = run.config, run.engine, run.pipe.transformer
    if not config.sample_count:
        return
    if ema is not None:
        ema.store(run.trained)
        ema.copy_to(run.trained)
    transformer.eval()
    picture = None
    # shards are gathered by all processes together, each of which makes the same pictures
    with contextlib.nullcontext() if engine.sharded else engine.together():
        if engine.is_main or engine.sharded:
            # a compiled model would be compiled again for the sampler's batch and its condition cache
            with torch.compiler.set_stance("force_eager" if config.compile else "default"):
                picture = sample_grid(run.pipe, config, run.plan, run.source, run.texts, run.dataset.variants)
    transformer.train()
    if ema is not None:
        ema.restore(run.trained)
    with engine.together():
        if engine.is_main and picture is not None:
            save_picture(picture, run.output / "samples" / f"step-{step:06d}.png")


def finish(run: Run) -> dict[str, Any]:
    """Write the adapter, averaged if there is an average, and the last samples."""
    engine, folder = run.engine, run.output / "adapter"
    if run.ema is not None:
        run.ema.copy_to(run.trained)
    tensors = adapter_tensors(run.pipe.transformer, partial(whole, keep=engine.is_main))
    with engine.together():
        if engine.is_main:
            write_adapter(tensors, folder, run.info)
    save_samples(run, run.config.steps, None)
    summary = run.log.summary(run.config.steps, folder)
    engine.close()
    return summary
