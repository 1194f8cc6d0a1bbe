"""Adapters: LoRA on the attention projections, and the condition branch, in two safetensors files.

`pytorch_lora_weights.safetensors` loads in a plain diffusers `CogVideoXPipeline`; `realgeneral.safetensors` holds the condition
AdaLN and embeddings, and in its metadata everything that must agree when it is loaded.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn

import rgkernels
from realgeneral.adapter_files import CONDITION_FILE, LORA_FILE, check_pair, existing, read_metadata, read_tensors, write_files
from realgeneral.errors import Failure, UsageError
from realgeneral.files import replacing
from realgeneral.layout import PRESETS
from realgeneral.nano.assets import resolve_adapter
from realgeneral.shards import whole
from realgeneral.tasks import get_task
from realgeneral.transformer import RealGeneralTransformer3DModel

# rounding to bfloat16 moves a mean magnitude by 1e-5, fine-tuning by less than this; another training by percents
SIGNATURE_TOLERANCE = 5e-3
GEOMETRY_KEYS = (
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "text_embed_dim",
    "time_embed_dim",
    "patch_size",
    "patch_size_t",
    "use_rotary_positional_embeddings",
)


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
            right = {
                "tasks": all(isinstance(task, str) for task in info.tasks),
                "geometry": isinstance(info.geometry, dict),
                "signature": all(isinstance(mean, int | float) for mean in info.signature),
                "versions": isinstance(info.versions, dict),
            }
            if wrong := [name for name, good in right.items() if not good]:
                raise ValueError(", ".join(wrong))
            return info
        except (KeyError, TypeError, ValueError) as error:
            raise Failure(f"{path} must carry RealGeneral's metadata, got a file without a valid {error}") from None


def geometry_of(transformer: Any) -> dict[str, Any]:
    """The config entries by which two bases are told apart."""
    return {key: transformer.config[key] for key in GEOMETRY_KEYS}


@torch.no_grad()
def signature_of(transformer: Any) -> tuple[float, ...]:
    """Mean |w| of weights that a LoRA usually leaves alone, rounded to 6 digits."""
    first, last = transformer.transformer_blocks[0], transformer.transformer_blocks[-1]
    linears = (
        transformer.patch_embed.proj,
        transformer.patch_embed.text_proj,
        first.ff.net[2],
        last.ff.net[2],
        transformer.proj_out,
    )
    weights = (getattr(linear, "base_layer", linear).weight for linear in linears)
    return tuple(float(f"{weight.float().abs().mean().item():.6g}") for weight in weights)


def library_versions() -> dict[str, str]:
    """Versions for an adapter's metadata."""
    return {"rgkernels": rgkernels.__version__, "diffusers": diffusers.__version__, "torch": torch.__version__}


def add_lora(transformer: RealGeneralTransformer3DModel, rank: int, alpha: float | None, targets: Sequence[str]) -> None:
    """Add a fresh LoRA (B = 0, so nothing changes yet) and leave only it and the condition branch trainable.

    Args:
        transformer: The model; changed in place.
        rank: LoRA rank r.
        alpha: LoRA alpha, None = r.
        targets: Names of the linear layers, as PEFT matches them.
    """
    if rank < 1:
        raise UsageError(f"rank must be at least 1, got {rank}")
    check_targets(transformer, targets)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=list(targets)))
    mark_trainable(transformer)


def target_layers(transformer: nn.Module, target: str) -> dict[str, nn.Module]:
    """The modules that a LoRA target names, by name, as PEFT matches it."""
    modules = transformer.named_modules()
    return {name: module for name, module in modules if name == target or name.endswith(f".{target}")}


def check_targets(transformer: nn.Module, targets: Sequence[str]) -> None:
    """UsageError unless each LoRA target names linear layers and nothing else; no weights are read."""
    for target in targets:
        layers = target_layers(transformer, target).values()
        if not layers or not all(isinstance(layer, nn.Linear) for layer in layers):
            raise UsageError(f"LoRA target must name linear layers of the base, got {target!r}")


def mark_trainable(transformer: RealGeneralTransformer3DModel) -> list[nn.Parameter]:
    """Freeze everything but LoRA and the condition branch, keep those in float32, and return them."""
    trainable = []
    for name, parameter in transformer.named_parameters():
        wanted = ".lora_" in name or name.startswith(("condition_embedding.", "condition_adaln."))
        parameter.requires_grad_(wanted)
        if wanted:
            parameter.data = parameter.data.float()
            trainable.append(parameter)
    return trainable


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


class AdapterTensors(NamedTuple):
    """An adapter as it goes to disk: LoRA (names as in PEFT), PEFT's settings, and condition branch; CPU tensors."""

    lora: dict[str, torch.Tensor]
    lora_config: dict[str, Any]
    branch: dict[str, torch.Tensor]


def adapter_tensors(transformer: RealGeneralTransformer3DModel, keep: bool = True) -> AdapterTensors:
    """Read the adapter out of a model; where its parameters are shards, all processes must call it.

    Args:
        transformer: Model with a LoRA named "default".
        keep: False only takes part in the gathering (see `realgeneral.shards.whole`).
    """
    lora = whole(get_peft_model_state_dict(transformer), keep)
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in transformer.peft_config["default"].to_dict().items()}
    return AdapterTensors(lora, config, whole(transformer.condition_parameters(), keep))


def save_adapter(
    transformer: RealGeneralTransformer3DModel,
    folder: str | os.PathLike[str],
    info: AdapterInfo,
    dtype: torch.dtype | None = None,
) -> None:
    """Write both files; an existing adapter in `folder` stays intact until the new one is complete.

    Args:
        transformer: Model with a LoRA named "default".
        folder: Created if missing.
        info: From `adapter_info`.
        dtype: Dtype on disk, None = as trained.
    """
    lora, config, branch = adapter_tensors(transformer)
    lora, branch = ({name: x.to(dtype or x.dtype) for name, x in part.items()} for part in (lora, branch))
    write_adapter(AdapterTensors(lora, config, branch), folder, info)


def write_adapter(tensors: AdapterTensors, folder: str | os.PathLike[str], info: AdapterInfo) -> None:
    """Write what `adapter_tensors` returned, as `save_adapter` does; one process is enough."""
    folder = Path(folder)
    try:
        # both are complete before one takes its place
        with replacing(folder / LORA_FILE) as lora, replacing(folder / CONDITION_FILE) as branch:
            write_files(lora, branch, tensors.lora, tensors.lora_config, tensors.branch, info.to_metadata())
    except (OSError, SafetensorError) as error:
        raise Failure(f"adapter could not be written to {folder}: {error}") from None


def read_adapter_info(folder: str | os.PathLike[str]) -> AdapterInfo:
    """Read the metadata of an adapter (folder, or "nano") without its weights; Failure if a file is missing or unreadable."""
    path = existing(resolve_adapter(folder), CONDITION_FILE)
    return AdapterInfo.from_metadata(read_metadata(path), path)


def load_adapter(
    transformer: RealGeneralTransformer3DModel,
    folder: str | os.PathLike[str],
    *,
    preset: str | None = None,
    other_weights: bool = False,
) -> AdapterInfo:
    """Load an adapter into a model of its base; tasks and preset of the model become the adapter's.

    Args:
        transformer: A model without a LoRA; changed in place.
        folder: Folder with the two files, or "nano".
        preset: If given, the preset that the adapter must have been trained in.
        other_weights: Accept one that was trained on other weights of this geometry, to train it on; it is no use as it is.

    Returns:
        The adapter's description.

    Raises:
        UsageError: It was trained on another base or in another preset.
        Failure: A file is missing, truncated, or the two do not belong together.
    """
    folder = resolve_adapter(folder)
    info = read_adapter_info(folder)
    lora_path, branch_path = existing(folder, LORA_FILE), existing(folder, CONDITION_FILE)
    lora, branch = read_tensors(lora_path), read_tensors(branch_path)
    # everything is checked before the model is touched
    check_fits(transformer, info, preset)
    if not other_weights and not trained_on(transformer, info):
        raise UsageError(f"adapter must be for this base, got one trained on {info.base!r}, whose weights are others")
    if _lora_layers(transformer):
        raise UsageError("transformer must have no LoRA before an adapter is loaded, got one: call unload_lora_weights() first")
    _check_lora(transformer, lora, info, lora_path)
    check_pair(lora_path, branch_path)
    shapes = {name: p.shape for name, p in transformer.condition_parameters().items()}
    shapes["condition_embedding.task.weight"] = torch.Size((len(info.tasks), transformer.geometry.dim))
    check_branch(shapes, branch, branch_path)

    transformer.configure_condition(info.task_names, info.preset)
    copy_branch(transformer, branch, branch_path)
    transformer.load_lora_adapter(str(folder), prefix="transformer", weight_name=LORA_FILE, adapter_name="default")
    for parameter in mark_trainable(transformer):
        # inference runs in the base's dtype; a trainer that goes on marks and fills them again
        parameter.data = parameter.data.to(transformer.proj_out.weight.dtype)
        parameter.requires_grad_(False)
    return info


def check_fits(transformer: RealGeneralTransformer3DModel, info: AdapterInfo, preset: str | None = None) -> None:
    """As `load_adapter` checks it, but for what only weights can tell: the base's may be on "meta"."""
    own = geometry_of(transformer)
    different = {k: (info.geometry.get(k), own[k]) for k in GEOMETRY_KEYS if info.geometry.get(k) != own[k]}
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


def _check_lora(
    transformer: RealGeneralTransformer3DModel, lora: dict[str, torch.Tensor], info: AdapterInfo, path: Path
) -> None:
    for name, tensor in lora.items():
        module, _, part = name.removeprefix("transformer.").partition(".lora_")
        try:
            linear: Any = transformer.get_submodule(module)
        except AttributeError:
            linear = None
        if part not in ("A.weight", "B.weight") or not isinstance(linear, nn.Linear):
            raise Failure(f"{path} must hold LoRA weights of this base, got {name}")
        rank = tensor.shape[0] if part == "A.weight" else tensor.shape[-1]
        if rank != info.rank:
            raise Failure(f"{path} must have rank {info.rank} like {CONDITION_FILE}, got {rank}")
        wanted = [rank, linear.in_features] if part == "A.weight" else [linear.out_features, rank]
        if list(tensor.shape) != wanted:
            raise Failure(f"{name} in {path} must have shape {wanted}, got {list(tensor.shape)}")
    stored = json.loads(read_metadata(path).get(LORA_ADAPTER_METADATA_KEY, "{}"))
    alpha = stored.get("transformer.lora_alpha")
    if alpha != info.alpha:
        raise Failure(f"{path} must have alpha {info.alpha} like {CONDITION_FILE}, got {alpha}")
    layers = {name for target in stored.get("transformer.target_modules", ()) for name in target_layers(transformer, target)}
    wanted_names = {f"transformer.{layer}.lora_{part}.weight" for layer in layers for part in "AB"}
    if odd := sorted(wanted_names ^ lora.keys()):
        raise Failure(
            f"{path} must hold the {len(wanted_names)} tensors of {len(layers)} layers, got {len(lora)}; first odd: {odd[0]}"
        )


@torch.no_grad()
def merge_lora(transformer: RealGeneralTransformer3DModel) -> None:
    """Add the LoRA into the base weights, so that it costs nothing at inference; the originals are kept on the CPU."""
    for layer in _lora_layers(transformer):
        if not layer.merged:
            layer.unmerged_weight = layer.get_base_layer().weight.detach().to("cpu", copy=True)
            layer.merge()


@torch.no_grad()
def unmerge_lora(transformer: RealGeneralTransformer3DModel) -> None:
    """Undo `merge_lora` bit for bit (PEFT's own unmerge subtracts, which rounds)."""
    for layer in _lora_layers(transformer):
        if layer.merged:
            layer.get_base_layer().weight.copy_(layer.unmerged_weight)
            layer.merged_adapters.clear()
            del layer.unmerged_weight


def _lora_layers(transformer: RealGeneralTransformer3DModel) -> list[Any]:
    return [module for module in transformer.modules() if isinstance(module, LoraLayer)]


def check_branch(shapes: Mapping[str, torch.Size], branch: dict[str, torch.Tensor], path: Path) -> None:
    """Failure if the names or shapes of a condition branch's tensors differ from those wanted."""
    if shapes.keys() != branch.keys():
        odd = sorted(shapes.keys() ^ branch.keys())[0]
        raise Failure(
            f"{path} must hold the {len(shapes)} tensors of this base's condition branch, got {len(branch)}; first odd: {odd}"
        )
    for name, shape in shapes.items():
        if shape != branch[name].shape:
            raise Failure(f"{name} in {path} must have shape {list(shape)}, got {list(branch[name].shape)}")


@torch.no_grad()
def copy_branch(transformer: RealGeneralTransformer3DModel, branch: dict[str, torch.Tensor], path: Path) -> None:
    """Copy the tensors of a condition branch into a model; Failure if names or shapes differ."""
    own = transformer.condition_parameters()
    check_branch({name: parameter.shape for name, parameter in own.items()}, branch, path)
    for name, parameter in own.items():
        parameter.copy_(branch[name])
