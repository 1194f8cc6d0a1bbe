"""Settings of a training run, and which of them may change when it is resumed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from realgeneral.errors import UsageError
from realgeneral.settings.data import DataSettings
from realgeneral.settings.options import check_at_least_one, option, refuse_unused

# the attention's projections, as in diffusers' own LoRA trainers of CogVideoX
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class TrainConfig(DataSettings):
    """LoRA training of a RealGeneral adapter on a frozen CogVideoX, nano or real."""

    task_weights: list[float] = option(
        "relative frequency of each task, for rows that name none; default: equal", many=(), group="data"
    )
    output: str = option("folder for checkpoints, samples, logs and the final adapter", "outputs/train", group="run")
    preset: Literal["paper", "cached", "open"] = option(
        "role of the condition: cached (computed once), paper (as published) or open (nothing blocked)",
        "cached",
        group="method",
    )
    precomputed: str = option(
        "folder of realgeneral precompute: the text encoder is not loaded, the VAE for sample grids alone", "", group="data"
    )
    variants: int = option("number of random draws per row, for tasks such as inpainting; 0: a new one each time", 0)
    rank: int = option("LoRA rank", 64, group="method")
    alpha: float = option("LoRA alpha; 0 = rank", 0.0)
    lora_targets: list[str] = option("linear layers that get a LoRA", many=LORA_TARGETS)
    init_adapter: str = option(
        "start from this adapter instead of a fresh one; it may be of other weights, and lora_targets may name more layers", ""
    )
    ablation: Literal["none", "shared-adaln", "no-embedding"] = option("part of the method that stays untrained", "none")
    steps: int = option("optimizer steps", 1000, group="optimization")
    batch_size: int = option("samples per device and micro-step", 8)
    gradient_accumulation_steps: int = option("micro-steps per optimizer step", 1)
    learning_rate: float = option("peak learning rate of AdamW", 2e-4)
    weight_decay: float = option("AdamW weight decay", 0.01)
    warmup_steps: int = option("linear warm-up", 50)
    lr_schedule: Literal["cosine", "constant"] = option("after the warm-up", "cosine")
    max_grad_norm: float = option("gradient clipping", 1.0)
    ema_decay: float = option("exponential moving average of the trained weights; 0 = off", 0.0)
    text_dropout: float = option("probability of an empty prompt (classifier-free guidance)", 0.1)
    condition_dropout: float = option("probability of an empty condition", 0.1)
    mixed_precision: Literal["no", "bf16"] = option(
        "bf16: base in bfloat16, trained weights in float32, autocast", "no", group="memory and speed"
    )
    gradient_checkpointing: Literal["none", "full", "selective"] = option(
        "recompute activations in the backward pass: full (the flag alone), or selective, which keeps attention's outputs",
        "none",
        nargs="?",
        const="full",
    )
    optimizer: Literal["adamw", "adamw8bit", "paged-adamw8bit"] = option(
        "8-bit states need CUDA and the package bitsandbytes; paged ones move to the CPU when the GPU is full", "adamw"
    )
    engine: Literal["ddp", "fsdp2", "deepspeed"] = option(
        "several processes: a copy of the model in each, one shared out, or a copy in each with DeepSpeed ZeRO-2",
        "ddp",
        group="several processes",
    )
    deepspeed_config: str = option("JSON file with the settings of ZeRO-2, such as examples/deepspeed_zero2.json", "")
    fused_kernels: bool = option("run the model on the Triton kernels of rgkernels", False, group="memory and speed")
    compile: bool = option("torch.compile the transformer (a minute at the start; rounding differs from eager)", False)
    seed: int = option("seed of everything", 0, group="run")
    save_every: int = option("steps between checkpoints", 200)
    keep_checkpoints: int = option("how many of the newest checkpoints stay", 2)
    sample_every: int = option("steps between sample grids; 0 = only at the end", 0, group="progress")
    sample_count: int = option("rows of a sample grid; 0 = none", 4)
    sample_steps: int = option("denoising steps of a sample", 20)
    guidance_scale: float = option("guidance of a sample", 3.0)
    log_every: int = option(
        "steps per point of a tracker's curves and of the progress bar's loss; metrics.jsonl has every step", 10
    )
    resume: bool = option("continue from the newest checkpoint in --output, if there is one", False, group="run")
    strict: bool = option("stop at the first bad row instead of skipping it", False)
    tracker: Literal["none", "tensorboard", "wandb"] = option(
        "tracker of the curves, beside metrics.jsonl", "none", group="progress"
    )
    tensorboard: bool = option("the same as --tracker tensorboard", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.gradient_checkpointing, bool):  # it was a switch once
            object.__setattr__(self, "gradient_checkpointing", "full" if self.gradient_checkpointing else "none")
        if self.tensorboard and self.tracker not in ("none", "tensorboard"):
            raise UsageError(f"tracker must be tensorboard with --tensorboard, got {self.tracker}")
        if self.tensorboard:
            object.__setattr__(self, "tracker", "tensorboard")
        check_at_least_one(
            self, "steps", "batch_size", "gradient_accumulation_steps", "rank", "save_every", "keep_checkpoints", "log_every"
        )
        for name in ("text_dropout", "condition_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        for name in "variants sample_count sample_every warmup_steps weight_decay alpha".split():
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must not be negative, got {getattr(self, name)}")
        check_at_least_one(self, "sample_steps")
        if self.engine != "deepspeed":
            refuse_unused(self, "without --engine deepspeed", "deepspeed_config")
        if not self.sample_count:
            refuse_unused(self, "with --sample-count 0", "sample_every", "sample_steps", "guidance_scale")
        if self.ablation != "none" and self.init_adapter:
            raise UsageError(f"ablation must be 'none' with init_adapter, which brings the part trained, got {self.ablation!r}")
        if not self.max_grad_norm > 0:
            raise UsageError(f"max_grad_norm must be positive, got {self.max_grad_norm}")
        if not self.learning_rate > 0:
            raise UsageError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.learning_rate > 1e10:  # AdamW moves each weight by about the rate, and float32 ends at 3e38
            raise UsageError(f"learning_rate must be at most 1e10, got {self.learning_rate}")
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
    "data allow_outside precomputed variants output resume debug save_every keep_checkpoints sample_every sample_count "
    "sample_steps guidance_scale log_every num_workers strict tensorboard tracker fused_kernels gradient_checkpointing engine "
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
