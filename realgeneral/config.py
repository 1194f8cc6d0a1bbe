"""Settings of the commands, as frozen dataclasses; they are also the command line (`--learning-rate 1e-4`)."""

from __future__ import annotations

import math
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal

from realgeneral.adapter import LORA_TARGETS
from realgeneral.errors import UsageError


def _opt(help: str, default: Any = None, *, many: tuple[str, ...] | None = None, **argparse: Any) -> Any:
    if many is not None:
        return field(default_factory=lambda: list(many), metadata={"help": help})
    return field(default=default, metadata={"help": help, **argparse})


# denoising steps and guidance of nano, one scale on prompt and condition, and that for customization; how they were chosen:
# docs/results.md
NANO_STEPS, NANO_GUIDANCE, NANO_CUSTOMIZATION_GUIDANCE = 10, 1.5, 2.0
# CogVideoX's own, which has no guidance on a condition
STEPS, GUIDANCE, IMAGE_GUIDANCE = 50, 6.0, 1.0
_FITTING = f"if not given {NANO_GUIDANCE}, for customization {NANO_CUSTOMIZATION_GUIDANCE}, which fits nano"
STEPS_HELP = f"denoising steps; if not given {NANO_STEPS} for nano, {STEPS} for other bases"
GUIDANCE_HELP = f"classifier-free guidance; {_FITTING}"
IMAGE_GUIDANCE_HELP = f"guidance on the condition, 1 = none; {_FITTING}"
# NumPy's largest; a seed's products with sample and epoch numbers then fit in PyTorch's 64 bits
MAX_SEED = 2**32 - 1


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


def _check_at_least_one(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise UsageError(f"{name} must be at least 1, got {getattr(config, name)}")


def _given(config: Any, item: Field[Any]) -> bool:
    """Whether a setting is not its default."""
    default = item.default if item.default_factory is MISSING else item.default_factory()
    return bool(getattr(config, item.name) != default)


def _refuse_unused(config: Any, where: str, *names: str) -> None:
    """UsageError if a setting that does nothing `where` it is given is not its default."""
    for item in fields(config):
        if item.name in names and _given(config, item):
            raise UsageError(f"{item.name} has no effect {where}, got {getattr(config, item.name)!r}")


DATA_HELP = (
    'folder, .parquet or .tar (WebDataset), a folder or glob of those, "hf:NAME[:CONFIG][@SPLIT]", '
    'a folder of datasets\' save_to_disk, "nano" (emoji), "avatars", or a .json list of several'
)
COLUMNS_HELP = (
    "FIELD=COLUMN[:CROP] for target, prompt, condition, task, subject; a .json or .yaml file of those; "
    "or subjects200k, multigen-depth, controlnet"
)
BUCKETS_HELP = (
    '"standard" and HEIGHTxWIDTH: batches of one size and number of conditions from mixed pictures; none = one size for all'
)
TRUNCATE_HELP = "cut prompts that are longer than the base's text window (nano: 16 tokens); otherwise they are refused"


@dataclass(frozen=True)
class Settings:
    """What every command checks of its settings: numbers are finite, seeds in range."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, float) and not math.isfinite(number):
                    raise UsageError(f"{item.name} must be finite, got {number}")
        for name, least in (("seed", 0), ("condition_seed", -1)):
            seed = getattr(self, name, least)
            if not least <= seed <= MAX_SEED:
                raise UsageError(f"{name} must be between {least} and {MAX_SEED}, got {seed}")


@dataclass(frozen=True)
class DataSettings(Settings):
    """What `check-data`, `precompute` and `train` are asked of their data in the same words."""

    base: str = _opt('CogVideoX checkpoint (folder or hub id), or "nano"', "nano")
    data: str = _opt(DATA_HELP, "nano")
    columns: list[str] = _opt(COLUMNS_HELP, many=())
    tasks: list[str] = _opt('task specs such as canny or "deblurring:radius=16"; rows that name a task use it', many=())
    height: int = _opt("pixels; 0 = the base's own size", 0)
    width: int = _opt("pixels; 0 = the base's own size", 0)
    buckets: list[str] = _opt(BUCKETS_HELP, many=())
    truncate_prompts: bool = _opt(TRUNCATE_HELP, False)
    num_workers: int = _opt("data-loading processes; 0 = in this one", 0)
    debug: bool = _opt("show the traceback of an error", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_workers < 0:
            raise UsageError(f"num_workers must not be negative, got {self.num_workers}")


@dataclass(frozen=True)
class TrainConfig(DataSettings):
    """LoRA training of a RealGeneral adapter on a frozen CogVideoX, nano or real."""

    task_weights: list[float] = _opt("relative frequency of each task, for rows that name none; default: equal", many=())
    output: str = _opt("folder for checkpoints, samples, logs and the final adapter", "outputs/train")
    preset: Literal["paper", "cached", "open"] = _opt("how condition tokens take part", "cached")
    precomputed: str = _opt(
        "folder of realgeneral precompute: the text encoder is not loaded, the VAE for sample grids alone", ""
    )
    variants: int = _opt("draws per row of what is random (the hole of inpainting); 0 = a new one each time", 0)
    rank: int = _opt("LoRA rank", 64)
    alpha: float = _opt("LoRA alpha; 0 = rank", 0.0)
    lora_targets: list[str] = _opt("linear layers that get a LoRA", many=LORA_TARGETS)
    init_adapter: str = _opt(
        "start from this adapter instead of a fresh one; it may be of other weights, and lora_targets may name more layers", ""
    )
    ablation: Literal["none", "shared-adaln", "no-embedding"] = _opt(
        "leave a part of the method at its start, untrained", "none"
    )
    steps: int = _opt("optimizer steps", 1000)
    batch_size: int = _opt("samples per device and micro-step", 8)
    gradient_accumulation_steps: int = _opt("micro-steps per optimizer step", 1)
    learning_rate: float = _opt("peak learning rate of AdamW", 2e-4)
    weight_decay: float = _opt("AdamW weight decay", 0.01)
    warmup_steps: int = _opt("linear warm-up", 50)
    lr_schedule: Literal["cosine", "constant"] = _opt("after the warm-up", "cosine")
    max_grad_norm: float = _opt("gradient clipping", 1.0)
    ema_decay: float = _opt("exponential moving average of the trained weights; 0 = off", 0.0)
    text_dropout: float = _opt("probability of an empty prompt (classifier-free guidance)", 0.1)
    condition_dropout: float = _opt("probability of an empty condition", 0.1)
    mixed_precision: Literal["no", "bf16"] = _opt("bf16: base in bfloat16, trained weights in float32, autocast", "no")
    gradient_checkpointing: Literal["none", "full", "selective"] = _opt(
        "recompute activations in the backward pass: full (the flag alone), or selective, which keeps attention's outputs",
        "none",
        nargs="?",
        const="full",
    )
    optimizer: Literal["adamw", "adamw8bit", "paged-adamw8bit"] = _opt(
        "8-bit states need CUDA and the package bitsandbytes; paged ones move to the CPU when the GPU is full", "adamw"
    )
    engine: Literal["ddp", "fsdp2", "deepspeed"] = _opt(
        "several processes: a copy of the model in each, one shared out, or a copy in each with DeepSpeed ZeRO-2", "ddp"
    )
    deepspeed_config: str = _opt("JSON file with the settings of ZeRO-2, such as examples/deepspeed_zero2.json", "")
    fused_kernels: bool = _opt("run the model on the Triton kernels of rgkernels", False)
    compile: bool = _opt("torch.compile the transformer (a minute at the start; rounding differs from eager)", False)
    seed: int = _opt("seed of everything", 0)
    save_every: int = _opt("steps between checkpoints", 200)
    keep_checkpoints: int = _opt("how many of the newest checkpoints stay", 2)
    sample_every: int = _opt("steps between sample grids; 0 = only at the end", 0)
    sample_count: int = _opt("rows of a sample grid; 0 = none", 4)
    sample_steps: int = _opt("denoising steps of a sample", 20)
    guidance_scale: float = _opt("guidance of a sample", 3.0)
    log_every: int = _opt(
        "steps per point of a tracker's curves and of the progress bar's loss; metrics.jsonl has every step", 10
    )
    resume: bool = _opt("continue from the newest checkpoint in --output, if there is one", False)
    strict: bool = _opt("stop at the first bad row instead of skipping it", False)
    tracker: Literal["none", "tensorboard", "wandb"] = _opt("where the curves go besides metrics.jsonl", "none")
    tensorboard: bool = _opt("the same as --tracker tensorboard", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.gradient_checkpointing, bool):  # it was a switch once
            object.__setattr__(self, "gradient_checkpointing", "full" if self.gradient_checkpointing else "none")
        if self.tensorboard and self.tracker not in ("none", "tensorboard"):
            raise UsageError(f"tracker must be tensorboard with --tensorboard, got {self.tracker}")
        if self.tensorboard:
            object.__setattr__(self, "tracker", "tensorboard")
        _check_at_least_one(
            self, "steps", "batch_size", "gradient_accumulation_steps", "rank", "save_every", "keep_checkpoints", "log_every"
        )
        for name in ("text_dropout", "condition_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        for name in "variants sample_count sample_every warmup_steps weight_decay alpha".split():
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must not be negative, got {getattr(self, name)}")
        _check_at_least_one(self, "sample_steps")
        if self.engine != "deepspeed":
            _refuse_unused(self, "without --engine deepspeed", "deepspeed_config")
        if not self.sample_count:
            _refuse_unused(self, "with --sample-count 0", "sample_every", "sample_steps", "guidance_scale")
        if self.ablation != "none" and self.init_adapter:
            raise UsageError(f"ablation must be 'none' with init_adapter, which brings the part trained, got {self.ablation!r}")
        if not self.max_grad_norm > 0:
            raise UsageError(f"max_grad_norm must be positive, got {self.max_grad_norm}")
        if not self.learning_rate > 0:
            raise UsageError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.task_weights and len(self.task_weights) != len(self.tasks):
            raise UsageError(f"task_weights must have one entry per task ({len(self.tasks)}), got {len(self.task_weights)}")
        if self.task_weights and (min(self.task_weights) < 0 or not sum(self.task_weights) > 0):
            raise UsageError(f"task_weights must not be negative and not all 0, got {self.task_weights}")
        if self.task_weights and len(self.tasks) == 1:
            raise UsageError(f"task_weights must come with several tasks, got {self.task_weights} for {self.tasks[0]} alone")


# settings that may differ between a run and its continuation without changing what is learned from the next batch; the samples
# per optimizer step must stay the same, over however many processes and micro-steps; so must what `checkpoint.check_data` looks
# at in data and store, wherever they are
RESUMABLE = frozenset(
    "data precomputed variants output resume debug save_every keep_checkpoints sample_every sample_count sample_steps "
    "guidance_scale log_every num_workers strict tensorboard tracker fused_kernels gradient_checkpointing engine "
    "deepspeed_config gradient_accumulation_steps".split()
)
# what may change a run on purpose, to get past a step where it diverged: told when it does
ADJUSTABLE = ("learning_rate", "max_grad_norm")


def check_resumable(old: dict[str, Any], new: TrainConfig) -> None:
    """UsageError that names the first setting by which a continuation would differ from its run."""
    for item in fields(new):
        if item.name in RESUMABLE or item.name in ADJUSTABLE or item.name not in old:
            continue
        if item.name == "steps" and new.lr_schedule == "constant":
            continue
        if old[item.name] != getattr(new, item.name):
            raise UsageError(f"{item.name} must be {old[item.name]!r} as in the run to resume, got {getattr(new, item.name)!r}")


def adjusted(old: dict[str, Any], new: TrainConfig) -> list[str]:
    """The adjustable settings in which a continuation differs from its run, with both values."""
    return [
        f"{name} is {getattr(new, name)!r} from here on, {old[name]!r} before"
        for name in ADJUSTABLE
        if name in old and old[name] != getattr(new, name)
    ]


@dataclass(frozen=True)
class GenerateConfig(Settings):
    """One or more images from a prompt and condition image(s)."""

    prompt: str = _opt("what to make")
    condition: list[str] = _opt("condition picture(s)", many=())
    task: str = _opt("task, such as canny; options as in the adapter unless given")
    picture: str = _opt("instead of --condition: a picture from which the task derives its condition", "")
    mask: str = _opt("inpainting: the part of --picture to fill, white", "")
    subject: str = _opt("words of the prompt that name the subject", "")
    negative_prompt: str = _opt("what to avoid", "")
    truncate_prompts: bool = _opt(TRUNCATE_HELP, False)
    adapter: str = _opt('adapter folder, or "nano"', "nano")
    base: str = _opt('CogVideoX checkpoint (folder or hub id), or "nano"', "nano")
    output: str = _opt("PNG to write; -1, -2, ... are added for more than one image", "outputs/generate.png")
    height: int = _opt("pixels; 0 = the base's own size", 0)
    width: int = _opt("pixels; 0 = the base's own size", 0)
    steps: int | None = _opt(STEPS_HELP)
    guidance_scale: float | None = _opt(f"{GUIDANCE_HELP}; {GUIDANCE} for other bases")
    image_guidance_scale: float | None = _opt(f"{IMAGE_GUIDANCE_HELP}; {IMAGE_GUIDANCE} for other bases")
    num_images: int = _opt("images to make; image i has seed + i", 1)
    seed: int = _opt("random seed", 0)
    condition_seed: int = _opt("seed of a condition with a random part (the hole of inpainting); -1 = --seed", -1)
    dtype: Literal["float32", "bfloat16", "float16"] = _opt("dtype of the models", "float32")
    offload: bool = _opt("keep on the GPU only the model that runs", False)
    fused_kernels: bool = _opt("run the model on the Triton kernels of rgkernels", False)
    debug: bool = _opt("show the traceback of an error", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prompt", "task"):
            if not getattr(self, name):
                raise UsageError(f"--{name} must be given, got none")
        for name, value in zip(("steps", "guidance_scale", "image_guidance_scale"), sampling(self, self.task), strict=True):
            object.__setattr__(self, name, value)
        _check_at_least_one(self, "steps", "num_images", "image_guidance_scale")
        if self.condition and ":" in self.task:
            raise UsageError(f"task options have no effect with --condition, which is taken as it is, got {self.task!r}")
        assert self.guidance_scale is not None
        assert self.image_guidance_scale is not None
        if self.guidance_scale <= 1 and self.image_guidance_scale == 1:
            _refuse_unused(self, "without guidance (both scales of 1 or less)", "negative_prompt")


@dataclass(frozen=True)
class DemoConfig(Settings):
    """What `make demo` runs: generation with the shipped adapter, then a short training, on the CPU."""

    output: str = _opt("folder for pictures and metrics.json", "outputs/demo")
    concepts: int = _opt("held-out concepts per task", 4)
    steps: int = _opt("denoising steps", NANO_STEPS)
    train_steps: int = _opt("optimizer steps of the short training; 0 = none", 120)
    train_task: str = _opt("task of the short training", "colouring")
    guidance_scale: float | None = _opt(GUIDANCE_HELP)
    image_guidance_scale: float | None = _opt(IMAGE_GUIDANCE_HELP)
    seed: int = _opt("random seed", 0)
    fused_kernels: bool = _opt("run the model on the Triton kernels of rgkernels", False)
    debug: bool = _opt("show the traceback of an error", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least_one(self, "concepts", "steps", "image_guidance_scale")
        if self.train_steps < 0:
            raise UsageError(f"train_steps must not be negative, got {self.train_steps}")
        if not self.train_steps:
            _refuse_unused(self, "with --train-steps 0", "train_task")


_SPATIAL = ("canny", "depth")
_FOLDERS = ("customization", *_SPATIAL)
# options of evaluate without effect in other protocols
ONLY_FOR = {
    **dict.fromkeys(("tasks", "concepts", "split"), ("nano",)),
    **dict.fromkeys("data images_per_prompt limit truncate_prompts height width dtype offload".split(), _FOLDERS),
    **dict.fromkeys(("columns", "fid_features"), _SPATIAL),
    **dict.fromkeys(("clip", "dino"), ("customization",)),
    "depth_model": ("depth",),
}


@dataclass(frozen=True)
class EvaluateConfig(Settings):
    """Scores of an adapter: the table of nano, or one of the paper's protocols on a folder (docs/evaluation.md)."""

    protocol: Literal["nano", "customization", "canny", "depth"] = _opt("what to evaluate", "nano")
    adapter: str = _opt('adapter folder, or "nano"', "nano")
    base: str = _opt('CogVideoX checkpoint (folder or hub id), or "nano"', "nano")
    output: str = _opt("folder for tables and pictures; a continued run keeps the pictures of its protocol", "outputs/evaluate")
    tasks: list[str] = _opt("nano: task names; default: all of the adapter's", many=())
    concepts: int = _opt("nano: concepts per task", 150)
    split: Literal["held_out", "train"] = _opt("nano: which concepts; choose settings on train, report held_out", "held_out")
    data: str = _opt("DreamBench-shaped folder (customization), COCO-shaped folder or training data (canny, depth)", "")
    columns: list[str] = _opt(f"canny, depth: as in training, {COLUMNS_HELP}", many=())
    clip: str = _opt("customization: CLIP model (folder or hub id) of CLIP-I and CLIP-T", "")
    dino: str = _opt("customization: image model (folder or hub id) of the DINO score", "")
    depth_model: str = _opt("depth: transformers depth model (folder or hub id) of the condition and of the MSE", "")
    fid_features: str = _opt(
        'canny, depth: "inception", its .pth file, "efficientnet-lite0", an image model (folder or hub id), or "none"',
        "inception",
    )
    images_per_prompt: int = _opt("pictures for each case of a protocol", 1)
    limit: int = _opt("only this many pictures of a protocol, a fixed random choice; 0 = all", 0)
    truncate_prompts: bool = _opt(f"protocols: {TRUNCATE_HELP}", False)
    height: int = _opt("pixels of a protocol's pictures; 0 = the base's own size", 0)
    width: int = _opt("pixels; 0 = the base's own size", 0)
    steps: int | None = _opt(STEPS_HELP)
    guidance_scale: float | None = _opt(f"{GUIDANCE_HELP}; {GUIDANCE} for other bases")
    image_guidance_scale: float | None = _opt(f"{IMAGE_GUIDANCE_HELP}; {IMAGE_GUIDANCE} for other bases")
    batch_size: int = _opt("images at once", 25)
    dtype: Literal["float32", "bfloat16", "float16"] = _opt("dtype of the models of a protocol", "float32")
    offload: bool = _opt("keep on the GPU only the model that runs (protocols)", False)
    seed: int = _opt("random seed", 0)
    debug: bool = _opt("show the traceback of an error", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.adapter:
            raise UsageError(f'adapter must be a folder or "nano", got {self.adapter!r}')
        _check_at_least_one(self, "concepts", "steps", "batch_size", "images_per_prompt", "image_guidance_scale")
        if self.limit < 0:
            raise UsageError(f"limit must not be negative, got {self.limit}")
        for item in fields(self):
            protocols = ONLY_FOR.get(item.name, (self.protocol,))
            if self.protocol not in protocols and _given(self, item):
                option = f"--{item.name.replace('_', '-')}"
                raise UsageError(f"{option} must come with --protocol {' or '.join(protocols)}, got --protocol {self.protocol}")


@dataclass(frozen=True)
class PrecomputeConfig(DataSettings):
    """Encode the pictures and prompts of a data set once, for training with --precomputed."""

    output: str = _opt("folder of the store; entries that are there already are kept", "outputs/precomputed")
    variants: int = _opt("draws per row of what is random (the hole of inpainting)", 4)
    mixed_precision: Literal["no", "bf16"] = _opt("as in training", "no")
    shard: str = _opt('this process\' part, "i/n" from 0; default: RANK and WORLD_SIZE as torchrun sets them', "")
    shard_megabytes: int = _opt("size of a file", 256)
    encode_batch: int = _opt(
        "pictures, and prompts, encoded together; with more than 1, last bits differ from on-the-fly ones", 1
    )
    strict: bool = _opt("stop at the first bad row instead of noting it", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least_one(self, "variants", "shard_megabytes", "encode_batch")


@dataclass(frozen=True)
class CheckDataConfig(DataSettings):
    """Read a whole data set and report what training would meet; exit status 1 if a row is bad or training would stop."""

    batch_size: int = _opt("as in training: rows that fill up the last batch of a bucket are counted, with --buckets", 8)
    headers_only: bool = _opt("do not decode the pictures: much faster, but a truncated one is not found", False)
    report: str = _opt("also write the report as JSON", "")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least_one(self, "batch_size")
