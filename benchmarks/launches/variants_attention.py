"""Attention launches for the static report, and the budgets that their binaries must keep.

Targets are assumed, not present: the launch table is asked for the target's row, and the launches are recorded.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.launches.binaries import TARGETS, Figures, compile_launch, figures
from benchmarks.launches.record import Launch, record_launches
from rgkernels._triton import attention_tiles
from rgkernels._triton.attention_bwd import launch_bwd
from rgkernels._triton.attention_fwd import launch_fwd
from rgkernels._triton.attention_schedule import Problem

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# the preset "paper"; lengths and visibility are run-time values: any will do
PROBLEM = Problem(lengths=(226, 337, 337), blocked=(0, 2, 2, 0), rows=(0, 1, 2))


class Budget(NamedTuple):
    """What a kernel's sm_90 binary may use at head size 64 in half precision, loading by descriptors.

    Args:
        registers: Per thread; 128 lets two programs of 8 warps share a multiprocessor.
        shared: Bytes; half of the 227 KiB where two programs are to fit.
        wgmma: Matrix instructions at least.
        tma: Descriptor loads at least: one per tensor and stage of the pipeline.
        serialized: Complaints of ptxas at most that it had to serialise warp-group instructions.
    """

    registers: int
    shared: int
    wgmma: int
    tma: int
    serialized: int = 0


BUDGETS = {
    # serialised for want of registers, and yet the fastest that was measured on an H100: two programs fill each other's gaps
    "_attn_fwd_kernel": Budget(128, 113 * 1024, 8, 6, serialized=1),
    "_attn_bwd_dq_kernel": Budget(128, 82 * 1024, 12, 6),
    "_attn_bwd_dkdv_kernel": Budget(128, 58 * 1024, 16, 6),
}
# what one program may have on the smallest GPU that uses a target's row (12.x uses those of sm_89)
MAX_SHARED = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}


def attention_launches(target: str, head_dim: int, dtype: torch.dtype, *, tma: bool = True, tf32: bool = False) -> list[Launch]:
    """One forward and backward pass on `target`, on views of [B, S, H, D] memory.

    Args:
        target: A key of `TARGETS`.
        head_dim: D.
        dtype: Of q, k, v.
        tma: False takes the pointer variant that tensors with unsuitable strides get; no difference where there is no TMA.
        tf32: Allow TF32 in float32 products.
    """
    q, k, v, do, o = torch.zeros((2, sum(PROBLEM.lengths), 5, 3, head_dim), dtype=dtype).transpose(1, 3).unbind(2)
    lse = torch.zeros(q.shape[:3])
    answers: dict[str, Any] = {"precision": functools.partial(_precision, target=target, tf32=tf32)}
    if not tma:
        answers["_describable"] = lambda x: False
    with record_launches(architecture=target) as launches, _assume(**answers):
        launch_fwd(q, k, v, PROBLEM, 0.125)
        launch_bwd(do, None, q, k, v, o, lse, PROBLEM, 0.125, True, True)
    return launches


def _precision(x: torch.Tensor, target: str, tf32: bool) -> str:
    """What `attention_tiles.precision` would say on the target."""
    if x.dtype != torch.float32 or not target.startswith("sm"):
        return "ieee"
    return "tf32" if tf32 else "tf32x3"


@contextlib.contextmanager
def _assume(**answers: Any) -> Iterator[None]:
    """Answer the kernels' questions about settings and strides otherwise than this machine would."""
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(attention_tiles, name, answer))
        yield


def variants() -> Iterator[tuple[str, str, list[Launch]]]:
    """(name, target, launches) of every attention kernel that ships."""
    for dtype in DTYPES:
        for head_dim in attention_tiles.HEAD_DIMS:
            name = f"attention-D{head_dim}-{str(dtype)[6:]}"
            for target in TARGETS:
                yield name, target, attention_launches(target, head_dim, dtype)
                if dtype != torch.float32 and target in attention_tiles.TMA_ARCHITECTURES:
                    # the delta kernel has no descriptors
                    pointers = attention_launches(target, head_dim, dtype, tma=False)
                    yield f"{name}-pointers", target, [launch for launch in pointers if "delta" not in launch.name]
                if dtype == torch.float32 and target.startswith("sm"):
                    yield f"{name}-tf32", target, attention_launches(target, head_dim, dtype, tf32=True)


def attention_figures(target: str, head_dim: int, dtype: torch.dtype, **variant: bool) -> dict[str, Figures]:
    """Figures by kernel name; for sm_90 also "serialized", the number of ptxas' complaints about warp-group instructions."""
    found = {}
    for launch in attention_launches(target, head_dim, dtype, **variant):
        compiled = compile_launch(launch, target)
        found[launch.name] = figures(compiled, target)
        if target == "sm_90":
            found[launch.name]["serialized"] = len(serialized_wgmma(compiled))
    return found


def serialized_wgmma(compiled: Any) -> list[str]:
    """ptxas' complaints about warp-group matrix instructions that it had to serialise (C7510 to C7519), for sm_90."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(compiled.asm["ptx"])
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(source), "-o", str(source.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return re.findall(r"^.*C751\d.*$", done.stdout + done.stderr, re.MULTILINE)
