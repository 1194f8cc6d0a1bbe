"""One or more images from a prompt and condition pictures, with the settings in the PNG's metadata."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from realgeneral.config import GenerateConfig
from realgeneral.errors import UsageError
from realgeneral.kernels import use_kernels
from realgeneral.pictures import fit_picture, load_picture, save_picture
from realgeneral.pipeline import RealGeneralPipeline
from realgeneral.tasks import get_task, mask_out
from rgkernels import __version__


def generate(config: GenerateConfig) -> list[Path]:
    """Run `realgeneral generate`; returns the files written.

    Raises:
        UsageError: An argument does not fit the model or the adapter.
        Failure: A file cannot be read.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pictures = [load_picture(path) for path in config.condition]
    dtype = getattr(torch, config.dtype)
    pipe = RealGeneralPipeline.from_pretrained(config.base, adapter=config.adapter, dtype=dtype)
    use_kernels(pipe.transformer, config.fused_kernels, device)
    if config.offload:
        pipe.enable_model_cpu_offload()
    else:
        pipe.to(device)
    height, width = pipe._size(config.height or None, config.width or None)
    conditions = pictures or [derive_condition(config, pipe, width, height)]
    try:
        task = get_task(config.task).name
    except ValueError as error:
        raise UsageError(str(error)) from None
    images = pipe(
        config.prompt,
        conditions,
        task=task,
        subject=config.subject or None,
        negative_prompt=config.negative_prompt or None,
        height=height,
        width=width,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance_scale,
        num_images_per_prompt=config.num_images,
        generator=torch.Generator().manual_seed(config.seed),
    ).images
    return _write(images, config)


def derive_condition(config: GenerateConfig, pipe: RealGeneralPipeline, width: int, height: int) -> Image.Image:
    """Make the condition from `--picture`, as the adapter's own task options say unless `--task` gives others."""
    if not config.picture:
        raise UsageError("--condition or --picture must be given, got neither")
    picture = fit_picture(load_picture(config.picture), width, height)
    if config.mask:
        return mask_out(picture, fit_picture(load_picture(config.mask), width, height))
    try:
        name = get_task(config.task).name
        spec = config.task if ":" in config.task or pipe.adapter is None else pipe.adapter.task_spec(name)
        return get_task(spec).condition(picture, config.seed)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _write(images: list[Image.Image], config: GenerateConfig) -> list[Path]:
    info = PngInfo()
    info.add_text("realgeneral", json.dumps({**asdict(config), "version": __version__}))
    path = Path(config.output)
    paths = [path] if len(images) == 1 else [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(1, len(images) + 1)]
    for image, file in zip(images, paths, strict=True):
        save_picture(image, file, pnginfo=info)
    return paths
