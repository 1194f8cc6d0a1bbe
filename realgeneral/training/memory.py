"""The memory that a training run needs, told before it starts: counted from its tensors, and from its step run on fake ones.

Weights, gradients and optimizer states follow from the model's own tensors. What a step holds besides depends on sizes, preset,
dtype, gradient checkpointing and kernels: so the model's step runs once on fake tensors, which have shapes but no data, and the
bytes alive at its peak are counted.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from realgeneral.data.shapes import Shape
from realgeneral.generation.pipeline import RealGeneralPipeline
from realgeneral.model.presets import get_preset
from realgeneral.settings.train import TrainConfig
from realgeneral.training.features import encode_pictures
from realgeneral.training.objective import v_loss
from realgeneral.training.processes.zero2 import bucket_bytes

GIB = 2**30
# bytes per trained weight: two moments in float32, or in 8 bits with a float32 scale per block of 256
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw8bit": 2.0 + 2 * 4 / 256, "paged-adamw8bit": 2.0 + 2 * 4 / 256}


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes on one device.

    Args:
        base: Frozen weights of the transformer.
        encoders: VAE and text encoder, if they stay on the device.
        trained: Trained weights, and their average if there is one.
        optimizer: States of the optimizer.
        step: Peak of a step: gradients, activations, inputs; of a sample grid if that is more.
    """

    base: int
    encoders: int
    trained: int
    optimizer: int
    step: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(getattr(self, item.name) for item in fields(self))

    def __str__(self) -> str:
        parts = (
            ("base", self.base),
            ("encoders", self.encoders),
            ("trained weights", self.trained),
            ("optimizer", self.optimizer),
            ("gradients and activations", self.step),
        )
        return f"about {self.total / GIB:.3g} GiB: " + ", ".join(f"{name} {value / GIB:.3g}" for name, value in parts)


@dataclass(frozen=True)
class StepShape:
    """Sizes of a micro-batch: B samples of K condition images, `height` x `width` in pixels."""

    batch: int
    conditions: int
    height: int
    width: int

    def __str__(self) -> str:
        conditions = f"{self.conditions} condition{'s' if self.conditions > 1 else ''} each"
        return f"{self.batch} samples per micro-step, {conditions}, {self.width} x {self.height} pixels"


def memory_budget(
    pipe: RealGeneralPipeline,
    config: TrainConfig,
    shape: StepShape,
    processes: int = 1,
    encode: bool = True,
    device: torch.device | None = None,
) -> MemoryBudget:
    """What a run needs on each device.

    Args:
        pipe: Its models, before they are sharded; never changed.
        config: Its settings.
        shape: Of a micro-batch.
        processes: That take part in it.
        encode: Whether VAE and text encoder run in it (not with precomputed inputs).
        device: Of the run; default: where the models are.

    Note:
        Not counted: what CUDA and its libraries hold for themselves, the allocator's fragmentation, temporaries of a kernel.
        With fsdp2 two blocks are counted as gathered at a time, and micro-steps add up whole gradients, which are
        shared out in the last one; with deepspeed its bucket of gradients, and this
        process' part of them twice (as reduced, and as its step flattens them).
    """
    frozen = nbytes(p for p in pipe.transformer.parameters() if not p.requires_grad)
    trained = nbytes(p for p in pipe.transformer.parameters() if p.requires_grad)
    encoders = nbytes(p for m in (pipe.vae, pipe.text_encoder) if encode and m is not None for p in m.parameters())
    optimizer = int(trained / 4 * OPTIMIZER_BYTES[config.optimizer])
    # with several processes, or over micro-steps, all gradients live through the forward pass
    kept = processes > 1 or config.gradient_accumulation_steps > 1
    step = step_bytes(pipe, config, shape, keep_gradients=kept, encode=encode, device=device)
    averaged = trained if config.ema_decay else 0
    gathered = 2 * nbytes(pipe.transformer.stream_blocks[0].parameters()) if config.engine == "fsdp2" else 0
    step += gathered
    if config.engine == "fsdp2":
        if config.gradient_accumulation_steps == 1:
            step += trained // processes - trained
        frozen, trained, averaged, optimizer = (n // processes for n in (frozen, trained, averaged, optimizer))
    if config.engine == "deepspeed":
        step += bucket_bytes(config) - trained + 2 * trained // processes
        # its own copy of the weights that this process updates
        trained, optimizer = trained + trained // processes, optimizer // processes
    if config.sample_count:
        step = max(step, sample_bytes(pipe, config, shape.conditions, encode, device) + gathered)
    return MemoryBudget(frozen, encoders, trained + averaged, optimizer, step)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


def largest(shapes: Sequence[Shape]) -> set[Shape]:
    """Those of which one needs the most memory: the most pixels of a sample (transformer), the most of a picture (VAE)."""
    return {
        max(shapes, key=lambda s: (s.width * s.height * (1 + s.conditions), s)),
        max(shapes, key=lambda s: (s.width * s.height, s.conditions, s)),
    }


def step_bytes(
    pipe: RealGeneralPipeline,
    config: TrainConfig,
    shape: StepShape,
    keep_gradients: bool = False,
    encode: bool = True,
    device: torch.device | None = None,
) -> int:
    """Peak of the bytes that a micro-step allocates beyond the models: encoding, forward, backward, gradients.

    Args:
        pipe: Models, or on "meta" to ask about models that are not there.
        config: Settings.
        shape: Of the micro-batch.
        keep_gradients: Whether the gradients of an earlier micro-step are there already.
        encode: Whether the images go through the VAE.
        device: Of the run; default: where the models are.
    """
    peak, trained = _run(_Step(pipe, encode), pipe, config, shape, keep_gradients, device)
    return peak + (trained if keep_gradients else 0)


def sample_bytes(
    pipe: RealGeneralPipeline, config: TrainConfig, conditions: int, encode: bool = True, device: torch.device | None = None
) -> int:
    """Peak of the bytes that a picture of a sample grid allocates beyond the models of a step.

    Args:
        pipe: As in `step_bytes`.
        config: Settings.
        conditions: Number of condition images.
        encode: Whether the VAE is on the device; else it is counted here.
        device: As in `step_bytes`.
    """
    shape = StepShape(1, conditions, *pipe.image_size(config.height or None, config.width or None))
    peak, _ = _run(_Picture(pipe, config.guidance_scale > 1), pipe, config, shape, False, device)
    return peak + (0 if encode else nbytes(pipe.vae.parameters()))


def _run(
    model: nn.Module,
    pipe: RealGeneralPipeline,
    config: TrainConfig,
    shape: StepShape,
    keep_gradients: bool,
    device: torch.device | None,
) -> tuple[int, int]:
    """Call a model on fake weights; returns the peak of the bytes allocated in it, and the bytes of its trained weights."""
    device = device or next(pipe.transformer.parameters()).device
    # as tensors name it: "cpu:0" is "cpu", "cuda" is "cuda:0"
    device = torch.empty(0, device="cpu" if device.type == "meta" else device).device
    with FakeTensorMode(allow_non_fake_inputs=True), torch.compiler.set_stance("force_eager"):
        # weights of its own: no gradient reaches the model's, and no view of one counts as new
        tensors = itertools.chain(model.named_parameters(), model.named_buffers())
        own = {n: torch.empty_like(x, device=device).requires_grad_(x.requires_grad) for n, x in tensors}
        trained = [p for p in own.values() if p.requires_grad]
        if keep_gradients:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        with PeakBytes() as counter, torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            functional_call(model, own, (shape, device))
        return counter.peak, nbytes(trained)


class _Step(nn.Module):
    """Encoding, forward and backward in one call, so that what is recomputed in the backward pass meets the same weights."""

    def __init__(self, pipe: RealGeneralPipeline, encode: bool) -> None:
        super().__init__()
        self.transformer, self.vae = pipe.transformer, pipe.vae if encode else None
        self.factor = pipe.vae_scale_factor_spatial

    def forward(self, shape: StepShape, device: torch.device) -> None:
        transformer, geometry = self.transformer, self.transformer.geometry
        batch, images, dtype = shape.batch, shape.conditions + 1, transformer.base_dtype
        if self.vae is not None:
            pixels = torch.empty(batch * images, 3, shape.height, shape.width, device=device)
            with torch.no_grad():
                latents = encode_pictures(transformer.images, self.vae, pixels).unflatten(0, (batch, images)).float()
        else:
            size = (shape.height // self.factor, shape.width // self.factor)
            latents = torch.empty(batch, images, geometry.channels, *size, device=device)
        prediction = transformer(
            latents[:, :1].repeat(1, geometry.frames_per_image, 1, 1, 1).to(dtype),
            torch.empty(batch, geometry.text_window, geometry.text_dim, device=device, dtype=dtype),
            torch.zeros(batch, dtype=torch.int64, device=device),
            condition_latents=latents[:, 1:].to(dtype),
            task_ids=torch.zeros(batch, dtype=torch.int64, device=device),
            subject_embeds=torch.empty(batch, geometry.text_dim, device=device),
            return_dict=False,
        )[0]
        v_loss(prediction, torch.empty_like(prediction, dtype=torch.float32)).mean().backward()


class _Picture(nn.Module):
    """Encoding of the conditions, a denoising step and decoding, as the pipeline does them for one picture."""

    def __init__(self, pipe: RealGeneralPipeline, guided: bool) -> None:
        super().__init__()
        self.transformer, self.vae = pipe.transformer, pipe.vae
        self.factor, self.rows = pipe.vae_scale_factor_spatial, 2 if guided else 1

    @torch.no_grad()
    def forward(self, shape: StepShape, device: torch.device) -> None:
        transformer, geometry = self.transformer, self.transformer.geometry
        dtype = transformer.base_dtype
        latents = transformer.images.encode(
            self.vae, torch.empty(shape.conditions, 3, shape.height, shape.width, device=device)
        )
        inputs = {
            "condition_latents": latents[None].to(dtype),
            "task_ids": torch.zeros(1, dtype=torch.int64, device=device),
            "subject_embeds": torch.empty(1, geometry.text_dim, device=device),
        }
        cache = transformer.encode_condition(**inputs) if get_preset(transformer.config.preset).cacheable else None
        text = torch.empty(self.rows, geometry.text_window, geometry.text_dim, device=device, dtype=dtype)
        prediction = transformer(
            latents[None, :1].repeat(self.rows, geometry.frames_per_image, 1, 1, 1).to(dtype),
            transformer.embed(text, **({} if cache else inputs)),
            torch.zeros(self.rows, dtype=torch.int64, device=device),
            condition_cache=cache,
            return_dict=False,
        )[0]
        del cache, inputs, text  # the pipeline holds them no longer when it decodes
        transformer.images.decode(self.vae, prediction[:1, -1])


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of tensor storages that operations create inside the block, and their peak.

    Every storage counts once, however many views it has, from the operation that made it until nothing refers to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count what it made."""
        out = func(*args, **(kwargs or {}))
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in given and storage not in self._known:
                    self._known.add(storage)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _free(self, count: int) -> None:
        self.live -= count


def used_bytes(device: torch.device) -> int:
    """Peak of allocated memory on a GPU so far; resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
