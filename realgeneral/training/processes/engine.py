"""Processes of a training run: one, several with a copy of the model each (DDP; DeepSpeed), or that share it out (FSDP2).

Whatever one process meets, all processes leave the loop at the same place: errors and signals are agreed on before the next
collective operation, so that no process waits for one that is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from realgeneral.errors import Failure, UsageError
from realgeneral.model.cogvideox import RealGeneralTransformer3DModel
from realgeneral.settings.train import TrainConfig
from realgeneral.training.processes.fsdp2 import shard
from realgeneral.training.processes.zero2 import ZeroOptimizer, zero_settings

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
# set by accelerate's launcher, which on a CPU would train with DDP all the same
FOREIGN = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM")


class Engine:
    """The processes of this run, started by `torchrun` or `accelerate launch`, and what they do together.

    Args:
        config: `engine` and what it depends on are used.

    Raises:
        UsageError: The launcher asks for an engine of its own, or `engine` does not fit the run.
    """

    def __init__(self, config: TrainConfig) -> None:
        foreign = [name for name in FOREIGN if os.environ.get(name, "false").lower() == "true"]
        if foreign:
            raise UsageError(
                f"the launcher must start plain processes (accelerate launch --multi_gpu, torchrun) and --engine choose the "
                f"engine, got an accelerate configuration that sets {foreign[0]}"
            )
        # gradients live in the buckets that are reduced, not beside them
        ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision, cpu=not torch.cuda.is_available(), kwargs_handlers=[ddp]
        )
        self.device: torch.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.sharded, self.deepspeed = config.engine == "fsdp2", config.engine == "deepspeed"
        if self.accelerator.distributed_type not in SUPPORTED:
            raise UsageError(
                f"the launcher must start processes on CPUs or CUDA devices, got {self.accelerator.distributed_type.value}"
            )
        if config.engine != "ddp" and self.world == 1:
            raise UsageError(f"engine {config.engine} needs several processes (torchrun or accelerate launch), got 1")
        if config.engine != "ddp" and (config.compile or config.optimizer != "adamw"):
            raise UsageError(
                f"engine {config.engine} must run without --compile and with --optimizer adamw, got compile {config.compile} "
                f"and optimizer {config.optimizer}"
            )
        self.zero_settings = zero_settings(config) if self.deepspeed else {}
        self.zero: ZeroOptimizer | None = None
        self.replica: DistributedDataParallel | None = None

    def prepare(self, transformer: RealGeneralTransformer3DModel) -> nn.Module:
        """The module to call in training; with fsdp2 the parameters of `transformer` become shards, in place."""
        if self.sharded:
            return shard(transformer, self.device)
        # DeepSpeed wraps it itself, with the optimizer
        model: nn.Module = self.accelerator.prepare_model(transformer, evaluation_mode=self.deepspeed)
        self.replica = model if isinstance(model, DistributedDataParallel) else None
        return model

    def prepare_optimizer(
        self, model: nn.Module, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, Any]:
        """The module to call from now on, and the optimizer of `parameters`; with deepspeed both are DeepSpeed's."""
        if not self.deepspeed:
            return model, optimizer
        self.zero = ZeroOptimizer(self.zero_settings, model, parameters, optimizer)
        return self.zero.engine, self.zero

    @contextlib.contextmanager
    def micro_step(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Forward and backward of a micro-step; gradients are exchanged in the `last` one of an optimizer step."""
        if self.zero is not None:
            self.zero.engine.set_gradient_accumulation_boundary(last)
            yield  # no autocast: DeepSpeed would switch it off, and the model has its own
            return
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
            last = True
        with contextlib.nullcontext() if last else self.accelerator.no_sync(model), self.accelerator.autocast():
            yield

    def backward(self, loss: Tensor) -> None:
        """Add a micro-step's gradients."""
        if self.zero is not None:
            self.zero.backward(loss)
        else:
            self.accelerator.backward(loss)

    def clip_gradients(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """Scale the gradients to a global norm of at most `max_norm`, DeepSpeed in its step; returns the norm before that."""
        if self.zero is not None:
            return self.zero.norm()
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, joined along the first dimension in the order of ranks."""
        return self.accelerator.gather(tensor)  # type: ignore[no-any-return]

    def gather_objects(self, items: list[Any]) -> list[Any]:
        """The items of all processes, in the order of ranks."""
        return gather_object(items) if self.world > 1 else items  # type: ignore[no-any-return]

    def largest(self, value: int) -> int:
        """The largest of the processes' values."""
        if self.world == 1:
            return value
        shared = torch.tensor(value, device=self.device)
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
        return int(shared.item())

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Raise in every process what any process raises in this block, which must have no collective operation in it."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        if self.world == 1 or not self.largest(error is not None):
            if error is not None:
                raise error
            return
        texts = self.gather_objects([None if error is None else str(error)])
        if error is not None:
            raise error
        rank, text = next((rank, text) for rank, text in enumerate(texts) if text is not None)
        raise Failure(f"{text} (in process {rank})")

    def close(self) -> None:
        """Wait for the others and end the process group; the prepared module cannot be called any more."""
        self.accelerator.wait_for_everyone()
        if self.replica is not None:
            # who lets go of the group last waits for its threads, and those may need the GIL to free a tensor: the reducer
            # would hold it meanwhile (a deadlock in one of some forty runs with gloo), the group's own destructor does not
            del self.replica.reducer, self.replica.logger
        self.accelerator.end_training()


class Stop:
    """SIGTERM and SIGINT ask the loop to save and stop after the step that runs."""

    def __init__(self) -> None:
        self.asked = 0

    @contextlib.contextmanager
    def catching(self) -> Iterator[None]:
        """Install the handlers, and put back what was there."""
        before = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not in the main thread: someone else handles signals
                before[number] = signal.signal(number, self._ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = number
