"""Predicted training memory of the real bases, as the Markdown table of docs/training.md: no weights, no GPU.

python -m benchmarks.memory_table
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler
from diffusers.utils import logging
from transformers import T5Config, T5EncoderModel

from realgeneral.generation.pipeline import RealGeneralPipeline
from realgeneral.model.cogvideox import RealGeneralTransformer3DModel
from realgeneral.model.lora import add_lora
from realgeneral.model.vae import fold_single_frame
from realgeneral.settings.train import TrainConfig
from realgeneral.tasks import get_task
from realgeneral.training.memory import GIB, StepShape, memory_budget
from realgeneral.training.models import checkpointing
from realgeneral.training.plan import run_tasks

# as in the config.json of the checkpoints; sizes in latent pixels
SHARED = {"attention_head_dim": 64, "in_channels": 16, "out_channels": 16, "time_embed_dim": 512, "text_embed_dim": 4096}
# fmt: off
BASES: dict[str, dict[str, Any]] = {
    "2B": {"num_attention_heads": 30, "num_layers": 30, "sample_width": 90, "sample_height": 60},
    "5B": {"num_attention_heads": 48, "num_layers": 42, "sample_width": 90, "sample_height": 60, "rotary": True},
    "1.5-5B": {"num_attention_heads": 48, "num_layers": 42, "sample_width": 300, "sample_height": 300, "rotary": True,
               "patch_size_t": 2},
}
# fmt: on
T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
VAE = {
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    "block_out_channels": (128, 256, 256, 512),
    "latent_channels": 16,
    "layers_per_block": 3,
    "scaling_factor": 0.7,
}
# base, (width, height), rank, batch, checkpointing, optimizer, inputs precomputed, processes
ROWS: list[tuple[str, tuple[int, int], int, int, str, str, bool, int]] = [
    ("2B", (512, 512), 64, 1, "selective", "adamw", True, 1),
    ("5B", (512, 512), 64, 1, "full", "adamw", True, 1),
    ("5B", (720, 480), 64, 1, "selective", "adamw", True, 1),
    ("5B", (720, 480), 64, 1, "selective", "adamw8bit", True, 1),
    ("5B", (720, 480), 64, 1, "full", "adamw8bit", True, 1),
    ("5B", (720, 480), 64, 1, "none", "adamw8bit", True, 1),
    ("5B", (720, 480), 64, 1, "selective", "adamw", False, 1),
    ("5B", (720, 480), 128, 4, "selective", "adamw", True, 1),
    ("5B", (720, 480), 128, 4, "selective", "adamw", True, 8),
    ("1.5-5B", (1360, 768), 64, 1, "selective", "adamw8bit", True, 1),
]


def empty_pipeline(base: str, config: TrainConfig) -> RealGeneralPipeline:
    """A pipeline without weights in the geometry of a real base, set up as the trainer does."""
    changes = dict(BASES[base])
    rotary = changes.pop("rotary", False)
    names = [get_task(spec).name for spec in run_tasks(config)]
    with torch.device("meta"):
        transformer = RealGeneralTransformer3DModel(
            tasks=names, preset=config.preset, use_rotary_positional_embeddings=rotary, **SHARED, **changes
        )
        encoder, vae = T5EncoderModel(T5Config(**T5_XXL, feed_forward_proj="gated-gelu")), AutoencoderKLCogVideoX(**VAE)
        pipe = RealGeneralPipeline(None, encoder, vae, transformer, CogVideoXDDIMScheduler())
        for module in (encoder, vae, transformer):
            module.to(torch.bfloat16).requires_grad_(False)
        fold_single_frame(vae)
        add_lora(transformer, config.rank, None, config.lora_targets)
    if config.gradient_checkpointing != "none":
        transformer.enable_gradient_checkpointing(checkpointing(config.gradient_checkpointing))
    return pipe


def main(argv: list[str] | None = None) -> None:
    """Print the table; there is nothing to choose."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    logging.set_verbosity_error()
    columns = ["base", "height x width", "rank", "batch", "checkpointing", "optimizer", "inputs", "GPUs"]
    columns += ["frozen", "trained", "states", "step", "total GiB"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for base, (width, height), rank, batch, kind, optimizer, precomputed, processes in ROWS:
        config = TrainConfig(
            data="pictures", rank=rank, batch_size=batch, gradient_checkpointing=kind, optimizer=optimizer,
            mixed_precision="bf16", engine="fsdp2" if processes > 1 else "ddp", height=height, width=width,
        )  # fmt: skip
        b = memory_budget(empty_pipeline(base, config), config, StepShape(batch, 1, height, width), processes, not precomputed)
        parts = [b.base + b.encoders, b.trained, b.optimizer, b.step, b.total]
        row = [base, f"{height}x{width}", rank, batch, kind, optimizer, "precomputed" if precomputed else "on the fly"]
        row += [f"{processes}, fsdp2" if processes > 1 else "1", *(f"{part / GIB:.1f}" for part in parts)]
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
