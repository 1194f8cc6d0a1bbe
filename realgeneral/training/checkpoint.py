"""Checkpoints of a training run: written whole or not at all, and enough to continue exactly.

A checkpoint `checkpoints/step-000200/` holds the adapter (as trained, float32), `training_state.pt` (optimizer, average, step,
settings; read with `weights_only=True`) and `digests.json`, by which damaged files are known. Random numbers need no state:
they are functions of (seed, sample number). All tensors are whole, whatever the engine: a run may continue on another number
of processes, or with another engine.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.utils import set_peft_model_state_dict

from realgeneral.data.samples import PairDataset
from realgeneral.errors import Failure, UsageError
from realgeneral.files import check_output, file_digest, replacing, write_json
from realgeneral.model.adapter import (
    CONDITION_FILE,
    LORA_FILE,
    AdapterTensors,
    adapter_tensors,
    check_finite,
    copy_branch,
    read_adapter_info,
    read_tensors,
    write_adapter,
)
from realgeneral.model.adapter_info import AdapterInfo, check_fits, trained_on
from realgeneral.settings.train import TrainConfig, adjusted, check_resumable
from realgeneral.training.processes.fsdp2 import shard_like, whole

STATE_FILE, DIGESTS_FILE = "training_state.pt", "digests.json"


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = (output / "checkpoints").glob("step-*")
    complete = (p for p in found if p.name.removeprefix("step-").isdecimal() and (p / STATE_FILE).is_file())
    return sorted(complete, key=lambda p: int(p.name.removeprefix("step-")))


def start_or_resume(config: TrainConfig, output: Path, processes: int = 1, tell: bool = True) -> Path | None:
    """The checkpoint to continue from, or None for a fresh run.

    Args:
        config: Of this run.
        output: Its folder.
        processes: That take part in it.
        tell: Print a line for each adjustable setting that changes.

    Raises:
        UsageError: The folder holds a run and `resume` is off, or an adapter alone, or the settings differ from that run's.
        Failure: The output cannot be made a folder.
    """
    check_output(str(output))
    found = checkpoints(output)
    if not found:
        if (output / "adapter" / CONDITION_FILE).is_file():
            raise UsageError(f"output must be a new folder, got {output} which holds a finished adapter and no checkpoint")
        return None
    if not config.resume:
        raise UsageError(f"output must be a new folder, got {output} which holds {found[-1].name}; add --resume to continue it")
    state = _read_state(found[-1])
    check_resumable(state["config"], config)
    if config.steps < state["step"]:
        raise UsageError(f"steps must be at least the {state['step']} of the run to resume, got {config.steps}")
    if "samples_per_step" not in state:
        raise UsageError(
            f"output must hold a run of this version, got {found[-1].name} of an earlier one, which drew other noise"
        )
    samples = samples_per_step(config, processes)
    if state["samples_per_step"] != samples:
        raise UsageError(
            "batch_size * gradient_accumulation_steps * processes must be "
            f"{state['samples_per_step']} as in the run to resume, got {samples}"
        )
    check_digests(found[-1])  # last, since other messages say more
    for change in adjusted(state["config"], config) if tell else []:
        print(f"{change} ({found[-1].name})", flush=True)
    return found[-1]


def data_facts(dataset: PairDataset) -> dict[str, Any]:
    """What a run's order and draws depend on in its data, wherever it is."""
    facts: dict[str, Any] = {"rows": len(dataset.source), "variants": dataset.variants}
    if dataset.source.shares:
        facts["(rows, repeat, task) of data sets"] = dataset.source.shares
    return facts


def check_data(folder: Path, dataset: PairDataset) -> None:
    """UsageError that names the first fact in which the data differs from that of the run to resume."""
    # nothing is known of the data of checkpoints from before it was kept
    for name, old in _read_state(folder).get("data", {}).items():
        new = data_facts(dataset).get(name)
        if new != old:
            raise UsageError(f"data must have {old} {name} as in the run to resume, got {new}")


def check_base(folder: Path, transformer: Any, base: str) -> None:
    """UsageError unless a transformer has the geometry and the weights of the base of the run to resume."""
    info = read_adapter_info(folder)
    check_fits(transformer, info)
    if not trained_on(transformer, info):
        raise UsageError(f"base must have the weights of the run to resume, got {base} with others")


def samples_per_step(config: TrainConfig, processes: int) -> int:
    """Samples of one optimizer step, over all processes and micro-steps."""
    return config.batch_size * config.gradient_accumulation_steps * processes


def snapshot(
    config: TrainConfig,
    step: int,
    processes: int,
    dataset: PairDataset,
    transformer: Any,
    optimizer: Any,
    ema: Any,
    skipped: list[str],
    keep: bool = True,
) -> tuple[AdapterTensors, dict[str, Any]]:
    """Adapter and training state as they go to disk; where parameters are shards, all processes must call it.

    Args:
        config: Of the run.
        step: Steps done.
        processes: That take part in it.
        dataset: Its samples.
        transformer: The model.
        optimizer: Its optimizer.
        ema: Its average, or None.
        skipped: Rows that were.
        keep: False only takes part in the gathering (see `realgeneral.training.processes.fsdp2.whole`).
    """
    state = {
        "step": step,
        "config": asdict(config),
        "samples_per_step": samples_per_step(config, processes),
        "data": data_facts(dataset),
        "optimizer": whole(optimizer.state_dict(), keep),
        "ema": whole(ema.state_dict(), keep) if ema is not None else None,
        "skipped": skipped,
    }
    return adapter_tensors(transformer, partial(whole, keep=keep)), state


def save(output: Path, info: AdapterInfo, adapter: AdapterTensors, state: dict[str, Any]) -> Path:
    """Write `step-NNNNNN`, and once it is on the disk drop the oldest.

    Raises:
        Failure: A weight is not finite, or the files cannot be written; earlier checkpoints stay.
    """
    step, keep = state["step"], state["config"]["keep_checkpoints"]
    final = output / "checkpoints" / f"step-{step:06d}"
    check_training_state(output, step, adapter, state)
    try:
        with replacing(final) as partial:
            write_adapter(adapter, partial, info)
            torch.save(state, partial / STATE_FILE)
            write_json(partial / DIGESTS_FILE, {path.name: file_digest(path) for path in sorted(partial.iterdir())})
            for path in (*partial.iterdir(), partial):
                _flush(path)
        _flush(final.parent)
    except (OSError, RuntimeError) as error:
        raise Failure(
            f"checkpoint of step {step} could not be written to {final.parent} ({error}); earlier ones are intact"
        ) from None
    for old in checkpoints(output)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def check_training_state(output: Path, step: int, adapter: AdapterTensors, state: dict[str, Any]) -> None:
    """Failure, before anything is written, if a weight, its average or an optimizer's state is NaN or infinite."""
    moments = {f"optimizer state {i} {k}": x for i, entry in state["optimizer"]["state"].items() for k, x in entry.items()}
    averages = {f"average {i}": x for i, x in enumerate(state["ema"]["shadow_params"])} if state["ema"] else {}
    floating = {k: x for k, x in {**moments, **averages}.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    try:
        for tensors in (adapter.lora, adapter.branch, floating):
            check_finite(tensors, "the run")
    except Failure as error:
        sane = [folder.name for folder in checkpoints(output)]
        kept = f"the newest checkpoint is {sane[-1]}, whose numbers are finite" if sane else "there is no checkpoint yet"
        raise Failure(f"{error} after step {step}, and nothing was written; {kept}") from None


def load_weights(folder: Path, transformer: Any) -> None:
    """Restore the adapter's weights; before the model is sharded."""
    try:
        branch, stored = read_tensors(folder / CONDITION_FILE), read_tensors(folder / LORA_FILE)
    except Failure as error:
        raise Failure(f"{error}; remove {folder.name} to resume before it") from None
    copy_branch(transformer, branch, folder / CONDITION_FILE)
    lora = {name.removeprefix("transformer."): x for name, x in stored.items()}
    set_peft_model_state_dict(transformer, lora)


def load_state(folder: Path, parameters: Sequence[Any], optimizer: Any, ema: Any) -> list[str]:
    """Restore optimizer and average over `parameters`, whole or sharded; returns the rows skipped so far."""
    state = _read_state(folder)
    for index, entry in state["optimizer"]["state"].items():
        state["optimizer"]["state"][index] = {name: shard_like(x, parameters[index]) for name, x in entry.items()}
    optimizer.load_state_dict(state["optimizer"])
    if ema is not None:
        shadows = zip(state["ema"]["shadow_params"], parameters, strict=True)
        ema.load_state_dict({**state["ema"], "shadow_params": [shard_like(x, p).to(p.device) for x, p in shadows]})
    return list(state.get("skipped", []))  # nothing is known of those of earlier versions


def _flush(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_digests(folder: Path) -> None:
    """Failure if a file of a checkpoint is not as it was written; checkpoints from before 2026-11-28 have none."""
    path = folder / DIGESTS_FILE
    if not path.is_file():
        return
    with _reading(folder, DIGESTS_FILE):
        for name, digest in json.loads(path.read_text(encoding="utf-8")).items():
            with _reading(folder, name):
                if file_digest(folder / name) != digest:
                    raise ValueError("other bits than were written")


def _read_state(folder: Path) -> dict[str, Any]:
    with _reading(folder, STATE_FILE):
        state: dict[str, Any] = torch.load(folder / STATE_FILE, weights_only=True, map_location="cpu")
        if missing := {"step", "config", "optimizer"} - set(state):
            raise ValueError(f"no {sorted(missing)[0]}")
    return state


@contextlib.contextmanager
def _reading(folder: Path, name: str) -> Iterator[None]:
    """Turn whatever is raised for a file of a checkpoint that is gone or damaged into a Failure that names it."""
    try:
        yield
    except Failure:
        raise
    except FileNotFoundError:
        raise Failure(
            f"{folder / name} must stay while it is read, got a file that is gone: does another process write it?"
        ) from None
    except Exception as error:  # of zip files, pickles, JSON
        told = " ".join(str(error).split())[:80] or type(error).__name__
        raise Failure(
            f"{folder / name} must be a complete file, got a damaged one ({told}); remove {folder.name} to resume before it"
        ) from None
