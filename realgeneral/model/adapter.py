"""Adapters on disk: LoRA and condition branch in two safetensors files, written, checked and loaded.

`pytorch_lora_weights.safetensors` loads in a plain diffusers `CogVideoXPipeline`; `realgeneral.safetensors` holds the condition
AdaLN and embeddings, and in its metadata everything that must agree when it is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from realgeneral.errors import Failure, UsageError
from realgeneral.files import replacing
from realgeneral.model.adapter_info import AdapterInfo, check_fits, trained_on
from realgeneral.model.cogvideox import RealGeneralTransformer3DModel
from realgeneral.model.lora import lora_layers, mark_trainable, target_layers
from realgeneral.nano.assets import resolve_adapter

LORA_FILE = "pytorch_lora_weights.safetensors"
CONDITION_FILE = "realgeneral.safetensors"
# in the metadata of both files: the digest of the LoRA that the condition branch was trained with
PAIR_KEY = "realgeneral_lora"
# in the metadata of each file: the digest of its tensors and of its other metadata
DIGEST_KEY = "realgeneral_digest"
# settings of PEFT that are ours, and those that say nothing of what the layers compute
LORA_SETTINGS = ("r", "lora_alpha", "target_modules")
LORA_NOTES = ("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode")
Tensors = dict[str, torch.Tensor]


def write_files(
    lora_path: Path, branch_path: Path, lora: Tensors, lora_config: dict[str, Any], branch: Tensors, metadata: dict[str, str]
) -> None:
    """Write both files; the LoRA as diffusers' `save_lora_weights` does.

    Args:
        lora_path: File of the LoRA.
        branch_path: File of the condition branch.
        lora: CPU tensors, names as in PEFT.
        lora_config: PEFT's settings.
        branch: The condition branch, CPU tensors.
        metadata: Of the condition branch.
    """
    pair = {PAIR_KEY: _digest(lora)}
    config = json.dumps({f"transformer.{name}": value for name, value in lora_config.items()}, sort_keys=True)
    named = {f"transformer.{name}": tensor for name, tensor in lora.items()}
    _write(named, lora_path, {"format": "pt", LORA_ADAPTER_METADATA_KEY: config, **pair})
    _write(branch, branch_path, {**metadata, **pair})


def _write(tensors: Tensors, path: Path, metadata: dict[str, str]) -> None:
    save_file(tensors, path, {**metadata, DIGEST_KEY: _digest(tensors, metadata)})
    # safetensors makes private files; these get the mode of any other new file
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def _digest(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> str:
    """SHA-256 of names and bits; with metadata also of that, and of dtypes and shapes."""
    digest = hashlib.sha256()
    if metadata is not None:
        kinds = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
        digest.update(json.dumps([dict(metadata), kinds], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def existing(folder: str | os.PathLike[str], name: str) -> Path:
    """A file of an adapter folder; Failure if there is none, which names a stopped run's newest checkpoint."""
    path = Path(folder) / name
    if not path.is_file():
        steps = [
            p.parent for run in (Path(folder), Path(folder).parent) for p in sorted(run.glob(f"checkpoints/step-*/{name}"))
        ]
        hint = f"; the run there was stopped, and {steps[-1]} holds an adapter too" if steps else ""
        raise Failure(f"adapter folder {folder} must hold {name}, found none{hint}")
    return path


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever is raised for a file that is gone or damaged into a Failure that names it."""
    try:
        yield
    except Failure:
        raise
    except FileNotFoundError:
        raise Failure(f"{path} must stay while it is read, got a file that is gone: does another process write it?") from None
    except Exception as error:  # a flipped bit of a header reaches json, torch and NumPy
        told = " ".join(str(error).split()) or type(error).__name__
        raise Failure(f"{path} must be a complete safetensors file, got: {told}") from None


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; Failure if it is damaged."""
    with _reading(path), safe_open(path, "pt") as file:
        return file.metadata() or {}


def read_tensors(path: Path) -> Tensors:
    """All tensors of a safetensors file, as they were written; Failure as `check_written`."""
    tensors = _unchecked(path)
    check_written(path, tensors)
    return tensors


def _unchecked(path: Path) -> Tensors:
    with _reading(path):
        return load_file(path)


def check_written(path: Path, tensors: Tensors) -> None:
    """Failure if a file's tensors or metadata are not those that were written (by its digest, if it has one) or not finite."""
    metadata = read_metadata(path)
    written = metadata.pop(DIGEST_KEY, None)
    if written is not None and written != _digest(tensors, metadata):
        raise Failure(f"{path} must hold what was written, got other bits: the file is damaged, or was changed since")
    check_finite(tensors, str(path))


def check_finite(tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Failure that names the first tensor with a number that is NaN or infinite; `what` holds it."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            bad = tensor[~torch.isfinite(tensor)].flatten()[0].item()
            raise Failure(f"{what} must hold finite numbers, got {bad} in {name}")


def check_pair(lora_path: Path, branch_path: Path, lora: Tensors) -> None:
    """Failure if the files are of two trainings; without a mark (earlier versions, files made otherwise) they pass.

    Args:
        lora_path: File of the LoRA.
        branch_path: File of the condition branch.
        lora: Tensors of the LoRA, whose digest is the mark.
    """
    marks = [read_metadata(path).get(PAIR_KEY) for path in (lora_path, branch_path)]
    if None not in marks and marks[0] != marks[1]:
        raise Failure(f"{lora_path} and {branch_path.name} must be of one training, got files of two")
    if marks[0] is not None and marks[0] != _digest({name.removeprefix("transformer."): x for name, x in lora.items()}):
        raise Failure(f"{lora_path} must hold what was written, got other bits: the file is damaged, or was changed since")


class AdapterTensors(NamedTuple):
    """An adapter as it goes to disk: LoRA (names as in PEFT), PEFT's settings, and condition branch; CPU tensors."""

    lora: dict[str, torch.Tensor]
    lora_config: dict[str, Any]
    branch: dict[str, torch.Tensor]


def on_the_cpu(tensors: Tensors) -> Tensors:
    """Copies on the CPU, apart from their graph."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def adapter_tensors(
    transformer: RealGeneralTransformer3DModel, gather: Callable[[Tensors], Tensors] = on_the_cpu
) -> AdapterTensors:
    """Read the adapter out of a model.

    Args:
        transformer: Model with a LoRA named "default".
        gather: Makes whole CPU tensors of the model's; another one where these are shards of several processes.
    """
    lora = gather(get_peft_model_state_dict(transformer))
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in transformer.peft_config["default"].to_dict().items()}
    return AdapterTensors(lora, config, gather(dict(transformer.condition_parameters())))


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

    Raises:
        UsageError: `info` is that of another model: what is written would not load.
        Failure: A number is not finite, or the folder cannot be written.
    """
    _check_info(transformer, info)
    lora, config, branch = adapter_tensors(transformer)
    lora, branch = ({name: x.to(dtype or x.dtype) for name, x in part.items()} for part in (lora, branch))
    write_adapter(AdapterTensors(lora, config, branch), folder, info)


def _check_info(transformer: RealGeneralTransformer3DModel, info: AdapterInfo) -> None:
    lora = transformer.peft_config["default"]
    own = {
        "tasks": list(transformer.config.tasks),
        "preset": transformer.config.preset,
        "rank": lora.r,
        "alpha": float(lora.lora_alpha),
    }
    given = {"tasks": list(info.task_names), "preset": info.preset, "rank": info.rank, "alpha": float(info.alpha)}
    for name, value in own.items():
        if given[name] != value:
            raise UsageError(f"info must have the {name} of the transformer, {value!r}, got {given[name]!r}")


def write_adapter(tensors: AdapterTensors, folder: str | os.PathLike[str], info: AdapterInfo) -> None:
    """Write what `adapter_tensors` returned, as `save_adapter` does; one process is enough.

    Raises:
        Failure: A number is not finite, or the folder cannot be written.
    """
    folder = Path(folder)
    check_finite(tensors.lora, "adapter")
    check_finite(tensors.branch, "adapter")
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
    lora, branch = _unchecked(lora_path), _unchecked(branch_path)
    # everything is checked before the model is touched
    check_fits(transformer, info, preset)
    if not other_weights and not trained_on(transformer, info):
        raise UsageError(f"adapter must be for this base, got one trained on {info.base!r}, whose weights are others")
    if lora_layers(transformer):
        raise UsageError("transformer must have no LoRA before an adapter is loaded, got one: call unload_lora_weights() first")
    _check_lora(transformer, lora, info, lora_path)
    check_pair(lora_path, branch_path, lora)
    shapes = {name: p.shape for name, p in transformer.condition_parameters().items()}
    shapes["condition_embedding.task.weight"] = torch.Size((len(info.tasks), transformer.geometry.dim))
    check_branch(shapes, branch, branch_path)
    # last, since other messages say more
    check_written(lora_path, lora)
    check_written(branch_path, branch)

    transformer.configure_condition(info.task_names, info.preset)
    copy_branch(transformer, branch, branch_path)
    transformer.load_lora_adapter(str(folder), prefix="transformer", weight_name=LORA_FILE, adapter_name="default")
    for parameter in mark_trainable(transformer):
        # inference runs in the base's dtype; a trainer that goes on marks and fills them again
        parameter.data = parameter.data.to(transformer.base_dtype)
        parameter.requires_grad_(False)
    return info


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
    stored = _lora_settings(path)
    alpha = stored.get("lora_alpha")
    if alpha != info.alpha:
        raise Failure(f"{path} must have alpha {info.alpha} like {CONDITION_FILE}, got {alpha}")
    layers = {name for target in stored.get("target_modules") or () for name in target_layers(transformer, target)}
    wanted_names = {f"transformer.{layer}.lora_{part}.weight" for layer in layers for part in "AB"}
    if odd := sorted(wanted_names ^ lora.keys()):
        raise Failure(
            f"{path} must hold the {len(wanted_names)} tensors of {len(layers)} layers, got {len(lora)}; first odd: {odd[0]}"
        )


def _lora_settings(path: Path) -> dict[str, Any]:
    """PEFT's settings in a LoRA file; Failure unless those that change what a layer computes are at their defaults."""
    text = read_metadata(path).get(LORA_ADAPTER_METADATA_KEY, "{}")
    try:
        stored = {name.removeprefix("transformer."): value for name, value in json.loads(text).items()}
        targets = stored.get("target_modules") or []
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise ValueError(f"target_modules {targets!r}")
    except (ValueError, AttributeError, RecursionError) as error:
        raise Failure(f"{path} must hold PEFT's settings in its metadata, got {text[:60]!r}: {error}") from None
    defaults = LoraConfig().to_dict()
    for name, value in stored.items():
        if name in (*LORA_SETTINGS, *LORA_NOTES) or value == defaults.get(name) or (name not in defaults and not value):
            continue
        raise Failure(f"{path} must have the LoRA setting {name} at its default {defaults.get(name)!r}, got {value!r}")
    return stored


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
