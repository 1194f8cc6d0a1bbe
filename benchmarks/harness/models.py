"""Random models of the named shapes, and the providers that run them: ours, and what one would use instead.

All providers run the same module with the same weights. A provider puts its block, its attention or its `impl` in place for the
time of a run (`Provider.applied`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.harness.attention import block_mask_of
from benchmarks.harness.shapes import Shape
from benchmarks.harness.stock_block import stock_block
from realgeneral.model.cogvideox import RealGeneralTransformer3DModel
from realgeneral.model.presets import get_preset, joint_layout, sublayout
from rgkernels import SegmentLayout, cogvideox

_SMALL = {"in_channels": 8, "out_channels": 8, "text_embed_dim": 256, "time_embed_dim": 128}
_LARGE = {"in_channels": 16, "out_channels": 16, "text_embed_dim": 4096, "time_embed_dim": 512}
_ROTARY = {"use_rotary_positional_embeddings": True}
_PAIRS = {"patch_size_t": 2, "patch_bias": False}
# what differs from diffusers' defaults; 2B, 5B and 1.5-5B as in the published checkpoints
CONFIGS: dict[str, dict[str, Any]] = {
    "nano": {**_SMALL, **_ROTARY, "num_layers": 6, "sample_height": 16, "sample_width": 16},
    "mid": {**_SMALL, **_ROTARY, "num_layers": 6, "sample_height": 32, "sample_width": 32},
    "2b": {**_LARGE, "num_layers": 30, "sample_height": 60, "sample_width": 90},
    "5b": {**_LARGE, **_ROTARY, "num_layers": 42, "sample_height": 60, "sample_width": 90},
    "1.5-5b": {**_LARGE, **_ROTARY, "num_layers": 42, "sample_height": 300, "sample_width": 300, **_PAIRS},
}


def config_of(shape: Shape) -> dict[str, Any]:
    """The transformer's config for a shape."""
    name = next(key for key in CONFIGS if shape.name == key or shape.name.startswith(f"{key}-"))
    heads = {"num_attention_heads": shape.heads, "attention_head_dim": shape.head_dim, "max_text_seq_length": shape.text}
    return CONFIGS[name] | heads


def build_model(
    shape: Shape, device: torch.device, dtype: torch.dtype, layers: int | None = None, preset: str = "cached"
) -> RealGeneralTransformer3DModel:
    """A frozen model with random weights, made on the device.

    Args:
        shape: Its heads and geometry.
        device: Where.
        dtype: Of the weights.
        layers: Transformer blocks, None = all of the geometry.
        preset: As in `realgeneral.model.presets`.
    """
    config = config_of(shape) | ({"num_layers": layers} if layers else {})
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = RealGeneralTransformer3DModel(tasks=("canny",), preset=preset, **config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


@dataclass
class Inputs:
    """One call's tensors: noisy target, text features, timestep, clean conditions, task."""

    target: Tensor
    text: Tensor
    timestep: Tensor
    conditions: Tensor
    task_ids: Tensor


def model_inputs(shape: Shape, model: RealGeneralTransformer3DModel, text_batch: int | None = None) -> Inputs:
    """Random inputs of a shape; `text_batch` other than the shape's batch for guidance, which runs two prompts per image."""
    assert shape.grid is not None
    rows, columns = (n * model.geometry.patch_size for n in shape.grid)
    channels, batch, device, dtype = model.config.in_channels, shape.batch, model.device, model.dtype

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device).to(dtype)

    return Inputs(
        normal(batch, model.geometry.frames_per_image, channels, rows, columns),
        normal(text_batch or batch, shape.text, model.config.text_embed_dim),
        torch.full((batch,), 500, device=device),
        normal(batch, shape.conditions, channels, rows, columns),
        torch.zeros(batch, dtype=torch.long, device=device),
    )


@dataclass(frozen=True)
class Provider:
    """One way to run the blocks of a model.

    Args:
        name: In the rows.
        impl: Implementation of the ops.
        block: In the place of `rgkernels.cogvideox.block_forward`.
        attention: In the place of `rgkernels.segment_attention` inside the block.
        caches: Whether it can reuse the condition's keys and values.
    """

    name: str
    impl: str = "reference"
    block: Callable[..., Any] = cogvideox.block_forward
    attention: Callable[..., Any] = cogvideox.segment_attention
    caches: bool = True

    @contextlib.contextmanager
    def applied(self, model: RealGeneralTransformer3DModel | None = None) -> Iterator[Callable[..., Any]]:
        """Run models this way inside the block; backward passes with checkpointing belong inside as well."""
        block = mock.patch.object(RealGeneralTransformer3DModel, "run_block", staticmethod(self.block))
        attention = mock.patch.object(cogvideox, "segment_attention", self.attention)
        impl = mock.patch.object(model, "impl", self.impl) if model is not None else contextlib.nullcontext()
        with block, attention, impl:
            yield self.block


def providers(shape: Shape, device: torch.device, names: list[str], joint: SegmentLayout | None = None) -> list[Provider]:
    """What this kind of machine runs, or those named: stock blocks with a dense mask, split SDPA, and on CUDA the rest.

    Args:
        shape: The workload.
        device: Where.
        names: The providers to keep; empty = all.
        joint: The layout of all keys; None = the model's, in preset "cached".
    """
    found = [Provider("stock", block=stock_block, caches=False), Provider("split-sdpa")]
    if device.type == "cuda" or names:
        block = compiled_block()
        found += [
            Provider("compile", block=block),
            Provider("flex", block=block, attention=flex_attention(shape, joint, device)),
            Provider("triton", impl="triton"),
            Provider("triton-compile", impl="triton", block=block),
        ]
    if unknown := [name for name in names if name not in [p.name for p in found]]:
        raise ValueError(f"--provider must be one of {[p.name for p in found]}, got {unknown[0]}")
    return [p for p in found if not names or p.name in names]


def compiled_block() -> Callable[..., Any]:
    """The block under torch.compile: one graph serves all layers, as in regional compilation of a real model."""
    from torch._dynamo import config as dynamo
    from torch._functorch import config as functorch

    # benchmarks of single ops run a backward twice and turn this off; a training step never does
    functorch.donated_buffer = True
    dynamo.recompile_limit = 64  # first, middle and last block, with and without gradients, for each provider
    return torch.compile(cogvideox.block_forward, dynamic=False, fullgraph=True)


def flex_attention(shape: Shape, joint: SegmentLayout | None, device: torch.device) -> Callable[..., Tensor]:
    """`segment_attention` through FlexAttention, with the block masks of every pass that a model makes, built beforehand."""
    from torch.nn.attention.flex_attention import flex_attention as attention

    joint = joint or joint_layout(get_preset("cached"), shape.text, shape.image, shape.conditions)
    alone = tuple(name for name in joint.names if name not in ("text", "target"))
    passes = [(joint, joint.names), (joint, ("target",)), (joint, ("text", "target")), (sublayout(joint, alone), alone)]
    masks = {(layout.names, queries): block_mask_of(layout, queries, device) for layout, queries in passes}

    def attend(q: Tensor, k: Tensor, v: Tensor, layout: SegmentLayout, *, query_segments: Any, impl: str) -> Tensor:
        o: Tensor = attention(q, k, v, block_mask=masks[layout.names, tuple(query_segments)])
        return o

    return attend


def block_flops(channels: int, joint: SegmentLayout, rows: tuple[str, ...], keep: tuple[str, ...] | None = None) -> int:
    """Floating-point operations of the matrix products of one block's forward, per sample.

        2 C^2 (3 rows + 9 kept rows) for q, k, v and for output and feed-forward, 4 C per visible (query, key) pair

    Args:
        channels: C.
        joint: Layout of all keys.
        rows: Segments of this pass.
        keep: Segments needed after the attention, None = all of `rows`.
    """
    kept = rows if keep is None else keep
    tokens, kept_tokens = (sum(joint.length(name) for name in names) for names in (rows, kept))
    pairs = sum(joint.length(name) * sum(b - a for a, b in joint.key_ranges(name)) for name in kept)
    return 2 * channels**2 * (3 * tokens + 9 * kept_tokens) + 4 * channels * pairs


def model_flops(channels: int, layers: int, joint: SegmentLayout, rows: tuple[str, ...]) -> int:
    """The same for all blocks of a pass; the last one computes only what the target needs."""
    return (layers - 1) * block_flops(channels, joint, rows) + block_flops(channels, joint, rows, ("target",))
