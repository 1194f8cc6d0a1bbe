"""Record kernel launches instead of running them: what the static report compiles and what the byte counter adds up.

The recorder replaces Triton's `kernel[grid]`, so the code under study runs unchanged up to the launch, on any machine: the
arguments are the ones a GPU would have received.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.runtime.jit import KernelInterface

OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")


@dataclass
class Launch:
    """One recorded launch.

    Args:
        name: The kernel's function name.
        kernel: The Triton kernel itself (a JITFunction, or the interpreter's stand-in).
        grid: Number of programs per axis.
        arguments: Kernel arguments by name.
        options: Compiler options such as num_warps.
    """

    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)


@contextlib.contextmanager
def record_launches(sms: int | None = None, architecture: str | None = None) -> Iterator[list[Launch]]:
    """Collect every kernel launch inside the block; nothing is launched, so outputs stay uninitialised.

    Args:
        sms: Number of multiprocessors to assume (132 for an H100); None leaves the interpreter's small number.
        architecture: Whose launches to take, such as "sm_90"; None leaves the interpreter's.
    """
    launches: list[Launch] = []

    def getitem(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            assert not args, "kernels are launched with keywords"
            arguments = {name: value for name, value in kwargs.items() if name not in OPTIONS}
            options = {name: value for name, value in kwargs.items() if name in OPTIONS}
            dims = grid(arguments) if callable(grid) else grid
            launches.append(Launch(kernel.fn.__name__, kernel, tuple(dims), arguments, options))

        return launch

    original = KernelInterface.__getitem__
    device = _assumed("INTERPRETER_SMS", sms), _assumed("INTERPRETER_ARCHITECTURE", architecture)
    # CPU tensors are as good as any where nothing runs
    with device[0], device[1], _assumed("require_triton", lambda device: None):
        KernelInterface.__getitem__ = getitem
        try:
            yield launches
        finally:
            KernelInterface.__getitem__ = original


@contextlib.contextmanager
def _assumed(name: str, value: Any) -> Iterator[None]:
    """Set what the kernels assume of a device where there is none."""
    from rgkernels._triton import common

    kept = getattr(common, name)
    setattr(common, name, kept if value is None else value)
    common.num_sms.cache_clear(), common.architecture.cache_clear()
    try:
        yield
    finally:
        setattr(common, name, kept)
        common.num_sms.cache_clear(), common.architecture.cache_clear()


def tensors(launch: Launch) -> dict[str, torch.Tensor]:
    """The tensor arguments of a launch by parameter name."""
    return {name: value for name, value in launch.arguments.items() if isinstance(value, torch.Tensor)}
