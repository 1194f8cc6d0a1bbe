"""What an adapter says of itself, and whether it fits a base."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch

import rgkernels
from realgeneral.errors import Failure, UsageError
from realgeneral.model.cogvideox import RealGeneralTransformer3DModel
from realgeneral.model.presets import PRESETS
from realgeneral.tasks import get_task

# rounding to bfloat16 moves a mean magnitude by 1e-5, fine-tuning by less than this; another training by percents
SIGNATURE_TOLERANCE = 5e-3


@dataclass(frozen=True)
class AdapterInfo:
    """What travels with an adapter and is checked on load.

    Args:
        preset: Preset that it was trained in.
        tasks: Task specs, such as "deblurring:radius=16.0"; their order is the order of the task embedding's rows.
        base: Name of the base checkpoint (hub id or folder name), for people.
        rank: LoRA rank.
        alpha: LoRA alpha; the scale is alpha / rank.
        geometry: The base's config entries that fix shapes and positions.
        signature: Mean magnitudes of some base weights: they tell two bases of one geometry apart, whatever their dtype. A
            fine-tuned base still fits. Empty = not known.
        versions: Library versions that wrote it.
    """

    preset: str
    tasks: tuple[str, ...]
    base: str
    rank: int
    alpha: float
    geometry: dict[str, Any] = field(default_factory=dict)
    signature: tuple[float, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks without their options."""
        return tuple(get_task(spec).name for spec in self.tasks)

    def task_spec(self, name: str) -> str:
        """The spec that this adapter was trained with for a task; UsageError if it was not trained for it."""
        if name not in self.task_names:
            raise UsageError(f"task must be one that the adapter was trained for, {list(self.task_names)}, got {name!r}")
        return self.tasks[self.task_names.index(name)]

    def to_metadata(self) -> dict[str, str]:
        """Safetensors metadata: strings, with JSON for everything that is not one."""
        return {
            "format": "pt",
            "preset": self.preset,
            "tasks": json.dumps(list(self.tasks)),
            "base": self.base,
            "rank": str(self.rank),
            "alpha": str(self.alpha),
            "geometry": json.dumps(self.geometry, sort_keys=True),
            "signature": json.dumps(list(self.signature)),
            "versions": json.dumps(self.versions, sort_keys=True),
        }

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], path: Path) -> AdapterInfo:
        """Read what `to_metadata` wrote; Failure that names the file if an entry is missing."""
        try:
            info = cls(
                preset=metadata["preset"],
                tasks=tuple(json.loads(metadata["tasks"])),
                base=metadata["base"],
                rank=int(metadata["rank"]),
                alpha=float(metadata["alpha"]),
                geometry=json.loads(metadata["geometry"]),
                signature=tuple(json.loads(metadata.get("signature", "[]"))),
                versions=json.loads(metadata["versions"]),
            )
            if info.rank < 1 or not 0 < info.alpha < math.inf:
                raise ValueError(f"rank and alpha: {info.rank} and {info.alpha}")
            right = {
                "tasks": all(isinstance(task, str) for task in info.tasks),
                "geometry": isinstance(info.geometry, dict),
                "signature": all(isinstance(mean, int | float) for mean in info.signature),
                "versions": isinstance(info.versions, dict),
            }
            if wrong := [name for name, good in right.items() if not good]:
                raise ValueError(", ".join(wrong))
            return info
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise Failure(f"{path} must carry RealGeneral's metadata, got a file without a valid {error}") from None


def geometry_of(transformer: Any) -> dict[str, Any]:
    """The config entries by which two bases are told apart."""
    return {key: transformer.config[key] for key in transformer.geometry_keys}


@torch.no_grad()
def signature_of(transformer: Any) -> tuple[float, ...]:
    """Mean |w| of weights that a LoRA usually leaves alone, rounded to 6 digits."""
    return tuple(float(f"{weight.float().abs().mean().item():.6g}") for weight in transformer.signature_weights())


def library_versions() -> dict[str, str]:
    """Versions for an adapter's metadata."""
    return {"rgkernels": rgkernels.__version__, "diffusers": diffusers.__version__, "torch": torch.__version__}


def adapter_info(transformer: RealGeneralTransformer3DModel, tasks: Sequence[str], base: str) -> AdapterInfo:
    """Describe a transformer that carries a LoRA."""
    config = transformer.peft_config["default"]
    return AdapterInfo(
        preset=transformer.config.preset,
        tasks=tuple(get_task(spec).spec for spec in tasks),
        base=os.path.basename(os.path.normpath(base)) if os.path.isdir(base) else base,
        rank=config.r,
        alpha=float(config.lora_alpha),
        geometry=geometry_of(transformer),
        signature=signature_of(transformer),
        versions=library_versions(),
    )


def check_fits(transformer: RealGeneralTransformer3DModel, info: AdapterInfo, preset: str | None = None) -> None:
    """As `load_adapter` checks it, but for what only weights can tell: the base's may be on "meta"."""
    own = geometry_of(transformer)
    different = {k: (info.geometry.get(k), own[k]) for k in transformer.geometry_keys if info.geometry.get(k) != own[k]}
    if different:
        listed = ", ".join(f"{k} = {theirs} (this base: {ours})" for k, (theirs, ours) in different.items())
        raise UsageError(f"adapter must be for this base, got one trained on {info.base!r} with {listed}")
    if info.preset not in PRESETS:
        raise Failure(f"adapter must have a preset of {tuple(PRESETS)}, got {info.preset!r}")
    if preset is not None and preset != info.preset:
        raise UsageError(f"adapter must be of preset {preset!r}, got one trained in preset {info.preset!r}")
    try:
        _ = info.task_names
    except ValueError as error:
        raise UsageError(f"adapter must be of registered tasks: {error}") from None


def trained_on(transformer: RealGeneralTransformer3DModel, info: AdapterInfo) -> bool:
    """Whether an adapter's base had these weights, but for rounding or a little fine-tuning."""
    pairs = zip(info.signature, signature_of(transformer), strict=False)
    return all(math.isclose(a, b, rel_tol=SIGNATURE_TOLERANCE) for a, b in pairs)
