"""Settings of sampling: denoising steps and guidance that fit a base, and the commands `generate` and `demo`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from realgeneral.errors import UsageError
from realgeneral.settings.options import MAX_SEED, TRUNCATE_HELP, Settings, check_at_least_one, option, refuse_unused

# denoising steps and guidance of nano, one scale on prompt and condition, and that for customization; how they were chosen:
# docs/results.md
NANO_STEPS, NANO_GUIDANCE, NANO_CUSTOMIZATION_GUIDANCE = 10, 1.5, 2.0
# CogVideoX's own, which has no guidance on a condition
STEPS, GUIDANCE, IMAGE_GUIDANCE = 50, 6.0, 1.0
_FITTING = f"if not given {NANO_GUIDANCE}, for customization {NANO_CUSTOMIZATION_GUIDANCE}, which fits nano"
STEPS_HELP = f"denoising steps; if not given {NANO_STEPS} for nano, {STEPS} for other bases"
GUIDANCE_HELP = f"classifier-free guidance; {_FITTING}"
IMAGE_GUIDANCE_HELP = f"guidance on the condition, 1 = none; {_FITTING}"


def nano_guidance(task: str) -> tuple[float, float]:
    """The scales of guidance on prompt and condition that fit nano."""
    scale = NANO_CUSTOMIZATION_GUIDANCE if task.partition(":")[0] == "customization" else NANO_GUIDANCE
    return scale, scale


def sampling(config: Any, task: str) -> tuple[int, float, float]:
    """Denoising steps, and the scales on prompt and condition, for a task: those that are given, else what fits the base."""
    nano = "nano" in (getattr(config, "base", "nano"), getattr(config, "protocol", ""))
    fitting = (NANO_STEPS, *nano_guidance(task)) if nano else (STEPS, GUIDANCE, IMAGE_GUIDANCE)
    given = config.steps, config.guidance_scale, config.image_guidance_scale
    steps, text, image = (default if own is None else own for own, default in zip(given, fitting, strict=True))
    return int(steps), text, image


@dataclass(frozen=True)
class GenerateConfig(Settings):
    """One or more images from a prompt and condition image(s)."""

    prompt: str = option("description of the picture to make", group="picture")
    condition: list[str] = option("condition picture(s)", many=())
    task: str = option("task, such as canny; options as in the adapter unless given")
    picture: str = option("picture to derive the condition from, instead of --condition", "")
    mask: str = option("inpainting: picture that is white where --picture is to be filled", "")
    subject: str = option("words of the prompt that name the subject", "")
    negative_prompt: str = option("description of what to avoid", "")
    truncate_prompts: bool = option(TRUNCATE_HELP, False)
    adapter: str = option('adapter folder, or "nano"', "nano", group="model")
    base: str = option('CogVideoX checkpoint (folder or hub id), or "nano"', "nano")
    output: str = option("PNG to write; -1, -2, ... are added for more than one image", "outputs/generate.png", group="picture")
    height: int = option("height in pixels; 0: the base's own", 0)
    width: int = option("width in pixels; 0: the base's own", 0)
    steps: int | None = option(STEPS_HELP, group="sampling")
    guidance_scale: float | None = option(f"{GUIDANCE_HELP}; {GUIDANCE} for other bases")
    image_guidance_scale: float | None = option(f"{IMAGE_GUIDANCE_HELP}; {IMAGE_GUIDANCE} for other bases")
    num_images: int = option("number of images; image i has the seed --seed + i", 1)
    batch_size: int = option("number of images per batch", 4)
    seed: int = option("random seed", 0)
    condition_seed: int = option("seed of a condition with a random part (the hole of inpainting); -1 = --seed", -1)
    dtype: Literal["float32", "bfloat16", "float16"] = option("dtype of the models", "float32", group="memory and speed")
    offload: bool = option("keep on the GPU only the model that runs", False)
    fused_kernels: bool = option("run the model on the Triton kernels of rgkernels", False)
    debug: bool = option("show the traceback of an error", False, group="run")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prompt", "task"):
            if not getattr(self, name):
                raise UsageError(f"--{name} must be given, got none")
        for name, value in zip(("steps", "guidance_scale", "image_guidance_scale"), sampling(self, self.task), strict=True):
            object.__setattr__(self, name, value)
        check_at_least_one(self, "steps", "num_images", "batch_size", "image_guidance_scale")
        if self.seed + self.num_images - 1 > MAX_SEED:
            raise UsageError(
                f"seed of the last image must be at most {MAX_SEED}, got {self.seed} for the first of {self.num_images}"
            )
        if self.condition and ":" in self.task:
            raise UsageError(f"task options have no effect with --condition, which is taken as it is, got {self.task!r}")
        assert self.guidance_scale is not None
        assert self.image_guidance_scale is not None
        if self.guidance_scale <= 1 and self.image_guidance_scale == 1:
            refuse_unused(self, "without guidance (both scales of 1 or less)", "negative_prompt")


@dataclass(frozen=True)
class DemoConfig(Settings):
    """What `make demo` runs: generation with the shipped adapter, then a short training, on the CPU."""

    output: str = option("folder for pictures and metrics.json", "outputs/demo", group="demo")
    concepts: int = option("held-out concepts per task", 4)
    steps: int = option("denoising steps", NANO_STEPS)
    train_steps: int = option("optimizer steps of the short training; 0 = none", 120)
    train_task: str = option("task of the short training", "colouring")
    guidance_scale: float | None = option(GUIDANCE_HELP)
    image_guidance_scale: float | None = option(IMAGE_GUIDANCE_HELP)
    seed: int = option("random seed", 0)
    fused_kernels: bool = option("run the model on the Triton kernels of rgkernels", False)
    debug: bool = option("show the traceback of an error", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "concepts", "steps", "image_guidance_scale")
        if self.train_steps < 0:
            raise UsageError(f"train_steps must not be negative, got {self.train_steps}")
        if not self.train_steps:
            refuse_unused(self, "with --train-steps 0", "train_task")
