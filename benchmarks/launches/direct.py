"""Call an op's launchers themselves, without autograd around them: what the prediction records and the tuner times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.shapes import Shape
from rgkernels._triton import adaln_bwd, adaln_fwd, attention_bwd, attention_fwd, qk_norm_rope_bwd, qk_norm_rope_fwd
from rgkernels._triton.attention_schedule import Problem

Call = Callable[[], Any]
# tensor(*size, dtype=None): a tensor of the tokens' dtype unless told otherwise
Factory = Callable[..., Tensor]


def attention_problem(shape: Shape) -> Problem:
    """The shape's layout as the kernels take it, all rows queried."""
    layout = shape.layout
    blocked = [index for pair in sorted(layout.blocked) for index in map(layout.index, pair)]
    return Problem(layout.lengths, tuple(blocked), tuple(range(layout.num_segments)))


def prepare(op: str, mode: str, shape: Shape, tensor: Factory, gradients: str = "qkv") -> Call:
    """Make an op's inputs; the result launches its kernels and returns their outputs.

    Args:
        op: Name of the public op.
        mode: "forward" or "backward"; a backward of attention runs its forward first, here.
        shape: Sizes.
        tensor: Makes the inputs.
        gradients: Which of attention's gradients the backward makes: "q", "kv" or both.
    """
    if op == "segment_attention":
        return _attention(mode, shape, tensor, gradients)
    if op == "qk_norm_rope":
        return _qk_norm_rope(mode, shape, tensor)
    return _norm_site(op, mode, shape, tensor)


def _heads(shape: Shape, tensor: Factory, count: int) -> tuple[Tensor, ...]:
    """[B, H, S, D] views of one [B, S, count, H, D] projection."""
    size = (shape.batch, shape.seq_len, count, shape.heads, shape.head_dim)
    return tensor(*size).transpose(1, 3).unbind(2)


def _attention(mode: str, shape: Shape, tensor: Factory, gradients: str) -> Call:
    q, k, v, do = _heads(shape, tensor, 4)
    problem, scale = attention_problem(shape), shape.head_dim**-0.5
    if mode == "forward":
        return lambda: attention_fwd.launch_fwd(q, k, v, problem, scale)
    o, lse = attention_fwd.launch_fwd(q, k, v, problem, scale)
    wanted = "q" in gradients, "kv" in gradients
    return lambda: attention_bwd.launch_bwd(do, None, q, k, v, o, lse, problem, scale, *wanted)


def _qk_norm_rope(mode: str, shape: Shape, tensor: Factory) -> Call:
    q, k, dq, dk = _heads(shape, tensor, 4)
    norms = [tensor(shape.head_dim) for _ in range(4)]
    tables = [tensor(shape.seq_len - shape.text, shape.head_dim, dtype=torch.float32) for _ in range(2)]
    arguments = (q, k, *norms, *tables, shape.text, 1e-6)
    if mode == "forward":
        return lambda: qk_norm_rope_fwd.launch_fwd(*arguments)
    # norm parameters are frozen, as in LoRA training
    needs = (True, True, False, False, False, False)
    return lambda: qk_norm_rope_bwd.launch_bwd(dq, dk, *arguments, needs)


def _norm_site(op: str, mode: str, shape: Shape, tensor: Factory) -> Call:
    gated, normed = "gate" in op, "adaln" in op
    x, branch = (tensor(shape.batch, shape.seq_len, shape.channels) for _ in range(2))
    gate, shift, scale = tensor(shape.batch, shape.layout.num_segments, 3 * shape.channels).chunk(3, -1)
    affine = tuple(tensor(shape.channels) if normed else None for _ in range(2))
    lengths = shape.layout.lengths
    site = (branch, gate) if gated else (None, None)
    if mode == "forward":
        modulation = (shift, scale) if normed else (None, None)
        return lambda: adaln_fwd.launch_fwd(x, *site, *modulation, *affine, lengths, 1e-5)
    dres, dnormed = (tensor(*x.shape) if wanted else None for wanted in (gated, normed))
    statistics = tuple(tensor(*x.shape[:2], dtype=torch.float32) if normed else None for _ in range(2))
    saved = (x if normed else None, *site, scale if normed else None, *affine, *statistics)
    needs = (normed, gated, gated, normed, normed, False, False)
    return lambda: adaln_bwd.launch_bwd(dres, dnormed, *saved, lengths, needs)
