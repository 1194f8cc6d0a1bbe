"""The batch at which a loss or gradient stopped being finite: saved so that it can be looked at and run again.

`bad_batch-STEP/rank-R.safetensors` holds the tensors of that process' micro-batches, `rank-R.json` the rest: sample numbers,
names, prompts, tasks, losses, and the draws (timesteps, dropped prompts and conditions, noise seeds).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from realgeneral.data.samples import Batch
from realgeneral.training.objective import Draws


@dataclass
class MicroBatch:
    """A micro-batch, what was drawn for it, and its losses, [B]."""

    batch: Batch
    draws: Draws
    losses: Tensor


def save_bad_batch(folder: Path, step: int, rank: int, parts: list[MicroBatch]) -> Path:
    """Write the micro-batches of a process at `step`; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    listed = []
    for i, part in enumerate(parts):
        entry: dict[str, Any] = {"losses": part.losses.tolist()}
        for kind, value in (("batch", part.batch), ("draws", part.draws)):
            entry[kind] = {}
            for item in fields(value):
                content = getattr(value, item.name)
                if isinstance(content, Tensor):
                    tensors[f"{i}.{kind}.{item.name}"] = content.detach().cpu().contiguous()
                else:
                    entry[kind][item.name] = content
        entry["timesteps"] = part.draws.timesteps.tolist()
        listed.append(entry)
    save_file(tensors, folder / f"rank-{rank}.safetensors")
    text = json.dumps({"step": step, "rank": rank, "micro_batches": listed}, indent=1)
    (folder / f"rank-{rank}.json").write_text(text, encoding="utf-8")
    return folder


def load_bad_batch(folder: str | os.PathLike[str], rank: int = 0) -> list[tuple[Batch, Draws]]:
    """What `training_loss` needs to run the micro-batches of a process again."""
    folder = Path(folder)
    listed = json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8"))["micro_batches"]
    tensors = load_file(folder / f"rank-{rank}.safetensors")
    made = []
    for i, entry in enumerate(listed):
        kinds = {
            kind: {**entry[kind], **{k.split(".")[2]: x for k, x in tensors.items() if k.startswith(f"{i}.{kind}.")}}
            for kind in ("batch", "draws")
        }
        kinds["draws"]["noise_seeds"] = tuple(kinds["draws"]["noise_seeds"])
        made.append((Batch(**kinds["batch"]), Draws(**kinds["draws"])))
    return made
