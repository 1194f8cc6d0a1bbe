"""Bases: their files, what can be known of them without weights, parts of them, and which ops they run on."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler

from realgeneral.errors import Failure, UsageError
from realgeneral.files import folder_fingerprint
from realgeneral.generation.pipeline import RealGeneralPipeline
from realgeneral.model.cogvideox import RealGeneralTransformer3DModel
from realgeneral.nano.assets import resolve_base
from rgkernels._impl import require_triton

VAE_PARTS, TEXT_PARTS = ("vae",), ("text_encoder", "tokenizer")


def base_folder(base: str, parts: Sequence[str]) -> Path:
    """The folder of a base, downloaded if it is a hub id: the named parts and all configurations."""
    folder = Path(resolve_base(base))
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base, allow_patterns=["*.json", "*.model", *(f"{part}/*" for part in parts)]))
    except (OSError, ValueError) as error:  # its own errors derive from these
        told = " ".join(str(error).split())
        raise Failure(f"base must be a checkpoint folder or a hub id that can be had, got {base}: {told}") from None


def fingerprints(base: str) -> tuple[str, str]:
    """Hashes of the files of the VAE, and of the text encoder with its tokenizer; reads them whole."""
    folder = base_folder(base, (*VAE_PARTS, *TEXT_PARTS))
    return tuple(  # type: ignore[return-value]
        hashlib.sha256("".join(folder_fingerprint(folder / part) for part in parts).encode()).hexdigest()[:32]
        for parts in (VAE_PARTS, TEXT_PARTS)
    )


@contextlib.contextmanager
def reading(base: str) -> Iterator[None]:
    """Turn whatever the libraries raise for damaged files of a base into a Failure that names it."""
    try:
        yield
    except (UsageError, Failure, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise Failure(f"base must be a CogVideoX checkpoint that can be read, got {base}: {told}") from error


def load_for_data(base: str) -> RealGeneralPipeline:
    """Only what data must fit: tokenizer, sizes, text window. Neither weights nor memory of any model."""
    from transformers import AutoTokenizer

    folder = base_folder(base, ("tokenizer",))
    for part in ("tokenizer", "transformer", "vae"):
        if not (folder / part).is_dir():
            raise Failure(f"base must be a CogVideoX checkpoint, got {folder} without {part}")
    with reading(base), torch.device("meta"):
        config = RealGeneralTransformer3DModel.load_config(folder, subfolder="transformer")
        transformer = RealGeneralTransformer3DModel.from_config(config)
        vae = AutoencoderKLCogVideoX.from_config(AutoencoderKLCogVideoX.load_config(folder, subfolder="vae"))
    with reading(base):
        tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
    pipe = RealGeneralPipeline(tokenizer, None, vae, transformer, CogVideoXDDIMScheduler())
    pipe.vae = None
    return pipe


def open_base(base: str) -> RealGeneralPipeline:
    """A base without weights: its tokenizer, sizes, text window and schedule; Failure unless all parts are there."""
    folder = base_folder(base, ("tokenizer",))
    for part in ("model_index.json", "scheduler", "text_encoder"):
        if not (folder / part).exists():
            raise Failure(f"base must be a CogVideoX checkpoint, got {folder} without {part}")
    pipe = load_for_data(base)
    with reading(base):
        pipe.scheduler = CogVideoXDDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    return pipe


def load_pipeline(base: str, dtype: torch.dtype, **parts: Any) -> RealGeneralPipeline:
    """A base, or the rest of it beside given `parts` (None: left out): encoders frozen, the VAE folded to single frames.

    Raises:
        UsageError: The adapter among `parts` is for another base.
        Failure: Files are missing or damaged.
    """
    adapter = parts.pop("adapter", None)
    with reading(base):
        pipe = RealGeneralPipeline.from_pretrained(base, dtype=dtype, **parts)
    if adapter is not None:  # its faults are not the base's
        pipe.load_adapter(adapter)
    pipe.transformer.images.fold(pipe.vae)
    for module in filter(None, (pipe.vae, pipe.text_encoder)):
        module.requires_grad_(False).eval()
    return pipe


def load_encoders(pipe: RealGeneralPipeline, base: str, dtype: torch.dtype, device: Any) -> None:
    """Give a pipeline the VAE and text encoder of its base, frozen, as training has them."""
    loaded = load_pipeline(base, dtype, transformer=pipe.transformer)
    pipe.vae, pipe.text_encoder = loaded.vae.to(device), loaded.text_encoder.to(device)


@contextlib.contextmanager
def lent(module: Any, device: torch.device) -> Iterator[None]:
    """A model on `device` for the moment of use."""
    home = module.device
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


def check_kernels(fused: bool, device: torch.device) -> None:
    """UsageError that says what is missing if kernels are asked for where they cannot run."""
    if fused:
        try:
            require_triton(device)
        except RuntimeError as error:
            raise UsageError(f"--fused-kernels cannot run here: {error}") from None


def use_kernels(transformer: RealGeneralTransformer3DModel, fused: bool, device: torch.device) -> None:
    """Run the model on Triton kernels, or on plain PyTorch; UsageError as `check_kernels`."""
    check_kernels(fused, device)
    transformer.impl = "triton" if fused else "reference"
