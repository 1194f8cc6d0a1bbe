"""One or more images from a prompt and condition pictures, with the settings in the PNG's metadata."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from realgeneral.errors import UsageError
from realgeneral.files import check_output
from realgeneral.generation.arguments import check_steps
from realgeneral.generation.bases import check_kernels, load_pipeline, open_base, use_kernels
from realgeneral.generation.pipeline import RealGeneralPipeline
from realgeneral.model.adapter import read_adapter_info
from realgeneral.model.adapter_info import check_fits
from realgeneral.pictures import fit_picture, load_picture, save_picture
from realgeneral.prompts import cut_prompt
from realgeneral.settings.sampling import GenerateConfig
from realgeneral.tasks import get_task, mask_out
from rgkernels import __version__


def generate(config: GenerateConfig) -> list[Path]:
    """Run `realgeneral generate`; returns the files written.

    Raises:
        UsageError: An argument does not fit the model or the adapter.
        Failure: A file cannot be read.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert config.steps is not None  # GenerateConfig has filled them in
    assert config.guidance_scale is not None
    assert config.image_guidance_scale is not None
    (prompt, negative), conditions, (height, width) = prepare(config, device)
    pipe = load_pipeline(config.base, getattr(torch, config.dtype), adapter=config.adapter or None)
    use_kernels(pipe.transformer, config.fused_kernels, device)
    if config.offload:
        pipe.enable_model_cpu_offload()
    else:
        pipe.to(device)
    images = pipe(
        prompt,
        conditions,
        task=get_task(config.task).name,
        subject=config.subject or None,
        negative_prompt=negative or None,
        height=height,
        width=width,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance_scale,
        image_guidance_scale=config.image_guidance_scale,
        num_images_per_prompt=config.num_images,
        generator=[torch.Generator().manual_seed(config.seed + i) for i in range(config.num_images)],
    ).images
    return _write(images, config)


def prepare(config: GenerateConfig, device: torch.device) -> tuple[list[str], list[Image.Image], tuple[int, int]]:
    """Both prompts, condition pictures and (height, width), after all checks that need no weights: loading takes minutes."""
    _check_options(config, device)
    pictures = [load_picture(path) for path in config.condition]
    for picture in (config.picture, config.mask):
        if picture:
            load_picture(picture)
    check_kernels(config.fused_kernels, device)
    name, base = get_task(config.task).name, open_base(config.base)
    if config.adapter:
        base.adapter = read_adapter_info(config.adapter)
        check_fits(base.transformer, base.adapter)
        base.adapter.task_spec(name)
    else:
        base.task_ids(name, 1)
    height, width = base.image_size(config.height or None, config.width or None)
    assert config.steps is not None
    check_steps("steps", config.steps, base.scheduler)
    window = base.transformer.geometry.text_window
    texts = [config.prompt, config.negative_prompt]
    if config.truncate_prompts:
        texts = [cut_prompt(base.tokenizer, text, window) for text in texts]
    base.check_prompts(texts, window, "; --truncate-prompts cuts it")
    base.subject_mask(texts[:1], config.subject or None, window)
    return texts, pictures or [derive_condition(config, base, width, height)], (height, width)


def _check_options(config: GenerateConfig, device: torch.device) -> None:
    """Whether options and files fit each other."""
    try:
        task = get_task(config.task)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if config.picture and task.of_subject:
        raise UsageError(f"--condition must be given for task {task.name!r}, which makes none of a picture, got --picture")
    if bool(config.condition) == bool(config.picture):
        raise UsageError(f"one of --condition and --picture must be given, got {'both' if config.picture else 'neither'}")
    if config.mask and (task.name != "inpainting" or not config.picture):
        raise UsageError(f"--mask must come with --picture and --task inpainting, got --task {config.task}")
    if config.condition_seed >= 0 and not _draws(config):
        raise UsageError(
            f"condition_seed has no effect without --picture and a task that draws (inpainting without --mask), "
            f"got {config.condition_seed}"
        )
    if config.offload and device.type == "cpu":
        raise UsageError("--offload needs a GPU, found none")
    output = Path(config.output)
    if output.suffix.lower() != ".png" or output.is_dir():
        raise UsageError(f"output must be a .png file, got {output}")
    check_output(config.output, file=True)


def _draws(config: GenerateConfig) -> bool:
    """Whether the condition has a random part."""
    return bool(config.picture) and not config.mask and get_task(config.task).seeded


def derive_condition(config: GenerateConfig, pipe: RealGeneralPipeline, width: int, height: int) -> Image.Image:
    """Make the condition from `--picture`, as the adapter's own task options say unless `--task` gives others."""
    picture = load_picture(config.picture)
    if config.mask:
        return mask_out(fit_picture(picture, width, height), fit_picture(load_picture(config.mask), width, height))
    seed = config.seed if config.condition_seed < 0 else config.condition_seed
    return pipe.derive_condition(picture, config.task, seed=seed, height=height, width=width)


def _write(images: list[Image.Image], config: GenerateConfig) -> list[Path]:
    path = Path(config.output)
    paths = [path] if len(images) == 1 else [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(1, len(images) + 1)]
    for i, (image, file) in enumerate(zip(images, paths, strict=True)):
        # the settings that make this very image again, alone
        info = PngInfo()
        condition_seed = config.seed if _draws(config) and config.condition_seed < 0 else config.condition_seed
        again = {"seed": config.seed + i, "condition_seed": condition_seed, "num_images": 1, "output": str(file)}
        settings = {**asdict(config), **again}
        info.add_text("realgeneral", json.dumps({**settings, "version": __version__}))
        save_picture(image, file, pnginfo=info)
    return paths
