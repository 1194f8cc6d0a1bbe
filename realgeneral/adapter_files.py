"""The two safetensors files of an adapter: layout, writing, reading, and whether they belong together."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from realgeneral.errors import Failure

LORA_FILE = "pytorch_lora_weights.safetensors"
CONDITION_FILE = "realgeneral.safetensors"
# in the metadata of both files: the digest of the LoRA that the condition branch was trained with
PAIR_KEY = "realgeneral_lora"

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
    save_file(tensors, path, metadata)
    # safetensors makes private files; these get the mode of any other new file
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def _digest(tensors: Tensors) -> str:
    """SHA-256 of names and bits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def existing(folder: str | os.PathLike[str], name: str) -> Path:
    """A file of an adapter folder; Failure if there is none."""
    path = Path(folder) / name
    if not path.is_file():
        raise Failure(f"adapter folder {folder} must hold {name}, found none")
    return path


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; Failure if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise Failure(f"{path} must be a complete safetensors file, got: {error}") from None


def read_tensors(path: Path) -> Tensors:
    """All tensors of a safetensors file; Failure if it is damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise Failure(f"{path} must be a complete safetensors file, got: {error}") from None


def check_pair(lora: Path, branch: Path) -> None:
    """Failure if the files are of two trainings; without a mark (earlier versions, files made otherwise) they pass."""
    marks = [read_metadata(path).get(PAIR_KEY) for path in (lora, branch)]
    if None not in marks and marks[0] != marks[1]:
        raise Failure(f"{lora} and {branch.name} must be of one training, got files of two")
