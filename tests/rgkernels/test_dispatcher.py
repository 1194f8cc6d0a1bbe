"""The Triton norm-site and qk_norm_rope ops inside PyTorch: schemas, fake tensors, compilation, checkpointing, graphs, devices.

Registration happens at the first use of `impl="triton"`; these tests name the registered ops, as a checkpoint policy would.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import rgkernels
from rgkernels import SegmentLayout

pytest.importorskip("triton")
CHANNELS = 64


def registered() -> Any:
    from rgkernels._triton import adaln, qk_norm_rope  # noqa: F401  (importing registers)

    return torch.ops.rgkernels


def op_cases(device: str) -> dict[str, tuple[Any, ...]]:
    """Arguments for each registered op: tokens, chunks of one projection, optional arguments present and absent."""

    def rows(*shape: int) -> Tensor:
        return torch.randn(*(shape or (2, 5, CHANNELS)), device=device)

    shift, scale, gate = rows(2, 2, 3 * CHANNELS).chunk(3, dim=-1)
    weight, bias, stats = rows(CHANNELS), rows(CHANNELS), rows(2, 5)
    q, k = rows(2, 5, 3, 3, CHANNELS).unbind(2)[:2]
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    tables = rows(3, CHANNELS), rows(3, CHANNELS), 2, 1e-6
    return {
        "segment_adaln": (rows(), shift, scale, weight, bias, [2, 3], 1e-5),
        "segment_gate_residual": (rows(), rows(), gate, [2, 3]),
        "segment_gate_residual_adaln": (rows(), rows(), gate, shift, scale, None, None, [2, 3], 1e-5),
        "adaln_backward": (*(rows() for _ in range(4)), gate, scale, weight, bias, stats, stats.abs(), [2, 3], [True] * 7),
        "qk_norm_rope": (q, k, weight, bias, None, None, *tables),
        "qk_norm_rope_backward": (q, k, k, q, weight, bias, None, None, *tables, [True] * 4 + [False] * 2),
    }


@pytest.mark.parametrize("name", op_cases("cpu"))
def test_opcheck(name: str, device: str) -> None:
    """Schemas tell the truth (nothing aliased or mutated), fakes agree with kernels, and tracing works with dynamic shapes."""
    torch.library.opcheck(getattr(registered(), name).default, op_cases(device)[name])


def block(x, branch, modulation, weight, bias, q, k, cos, sin, layout):
    """Two norm sites, a gated residual and the query-key norm, as a transformer block uses them."""
    shift, scale, gate = modulation.chunk(3, dim=-1)
    args = {"weight": weight, "bias": bias, "impl": "triton"}
    res, normed = rgkernels.segment_gate_residual_adaln(x, branch, gate, shift, scale, layout, **args)
    y = rgkernels.segment_adaln(normed, shift, scale, layout, **args)
    z = rgkernels.segment_gate_residual(res, y, gate, layout, impl="triton")
    q, k = rgkernels.qk_norm_rope(q, k, q_weight=weight, k_bias=bias, cos=cos, sin=sin, rope_start=1, impl="triton")
    return z, q, k


def block_inputs(lengths: tuple[int, int], device: str) -> tuple[list[Tensor], list[Tensor], SegmentLayout]:
    seq_len = sum(lengths)
    shapes = [(2, seq_len, CHANNELS)] * 2 + [(2, 2, 3 * CHANNELS), (CHANNELS,), (CHANNELS,)] + [(2, 3, seq_len, CHANNELS)] * 2
    leaves = [torch.randn(*shape, device=device, requires_grad=True) for shape in shapes]
    tables = [torch.randn(seq_len - 1, CHANNELS, device=device) for _ in range(2)]
    return leaves, tables, SegmentLayout(("text", "target"), lengths)


def value_and_grads(fn: Any, leaves: list[Tensor], tables: list[Tensor], layout: SegmentLayout) -> list[Tensor]:
    outputs = fn(*leaves, *tables, layout)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(out.shape, generator=generator).to(out.device) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


# PyTorch's own compiler instantiates autograd functions while tracing them, which PyTorch deprecates
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_to_one_graph_and_stops_recompiling(device: str) -> None:
    """One graph, same bits as eager; once sizes are known to vary, new segment lengths compile nothing new."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    graphs = []
    for lengths in ((2, 5), (3, 6), (4, 9), (1, 11)):
        inputs = block_inputs(lengths, device)
        for actual, expected in zip(value_and_grads(compiled, *inputs), value_and_grads(block, *inputs), strict=True):
            assert torch.equal(actual, expected)
        graphs.append(counter.frame_count)
    assert graphs[1:] == [graphs[1]] * 3


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_inductor_compiles_one_graph() -> None:
    """The default backend takes the ops as they are."""
    inputs = block_inputs((2, 5), "cuda")
    actual = value_and_grads(torch.compile(block, fullgraph=True), *inputs)
    for value, expected in zip(actual, value_and_grads(block, *inputs), strict=True):
        torch.testing.assert_close(value, expected)


def test_fake_tensors_carry_shapes_and_strides() -> None:
    """A fake run allocates nothing and agrees with a real one in shape, stride and dtype, also for gradients."""
    leaves, tables, layout = block_inputs((2, 5), "cpu")
    real = value_and_grads(block, leaves, tables, layout)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (*leaves, *tables)]
        outputs = block(*fakes, layout)
        grads = torch.autograd.grad(outputs, fakes[: len(leaves)], [torch.empty_like(out) for out in outputs])
    for fake, value in zip((*outputs, *grads), real, strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (value.shape, value.stride(), value.dtype)


def test_meta_tensors_run(device: str) -> None:
    """Meta tensors pass through the fake implementations: models can be sized without memory."""
    leaves, tables, layout = block_inputs((2, 5), device)
    outputs = block(*(x.to("meta") for x in (*leaves, *tables)), layout)
    assert [out.shape for out in outputs] == [(2, 7, CHANNELS), (2, 3, 7, CHANNELS), (2, 3, 7, CHANNELS)]
    assert all(out.is_meta for out in outputs)


class CountOps(TorchDispatchMode):
    """Counts calls of rgkernels ops by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "rgkernels":
            self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE])
def test_selective_checkpointing(policy: CheckpointPolicy, device: str) -> None:
    """A policy that names the op is honoured: saved outputs are not recomputed, and gradients do not change."""
    saved = {registered().segment_gate_residual_adaln.default, registered().qk_norm_rope.default}

    def choose(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return policy if op in saved else CheckpointPolicy.PREFER_RECOMPUTE

    def checkpointed(*args: Any) -> Any:
        context_fn = lambda: create_selective_checkpoint_contexts(choose)  # noqa: E731
        return checkpoint(block, *args, use_reentrant=False, context_fn=context_fn)

    inputs = block_inputs((2, 5), device)
    with CountOps() as count:
        actual = value_and_grads(checkpointed, *inputs)
    runs = 1 if policy == CheckpointPolicy.MUST_SAVE else 2
    assert count.calls["segment_gate_residual_adaln"] == count.calls["qk_norm_rope"] == runs
    assert count.calls["segment_adaln"] == 2
    for value, expected in zip(actual, value_and_grads(block, *inputs), strict=True):
        assert torch.equal(value, expected)


def test_triton_is_imported_lazily() -> None:
    """Importing rgkernels and running the reference imports no Triton."""
    code = (
        "import sys, torch, rgkernels\n"
        "x = torch.randn(1, 3, 8); m = torch.randn(1, 1, 8)\n"
        "before = 'triton' in sys.modules\n"
        "rgkernels.segment_adaln(x, m, m, rgkernels.SegmentLayout.of(a=3))\n"
        "assert 'rgkernels._triton.adaln' not in sys.modules\n"
        "assert before or 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
def test_cuda_graph_replays() -> None:
    """Forward and backward are captured into a CUDA graph, and a replay on new values gives their results."""
    leaves, tables, layout = block_inputs((5, 11), "cuda")
    value_and_grads(block, leaves, tables, layout)  # compile before capture
    upstream = [torch.randn_like(out) for out in block(*leaves, *tables, layout)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.autograd.grad(block(*leaves, *tables, layout), leaves, upstream)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = block(*leaves, *tables, layout)
        captured = [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    outputs = block(*leaves, *tables, layout)
    for value, expected in zip(captured, [*outputs, *torch.autograd.grad(outputs, leaves, upstream)], strict=True):
        assert torch.equal(value, expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_launches_on_the_tensors_device() -> None:
    """Tensors on the second device are computed there while the first is current."""
    inputs = block_inputs((2, 5), "cuda:1")
    with torch.cuda.device(0):
        actual = value_and_grads(block, *inputs)
    with torch.cuda.device(1):
        for value, expected in zip(actual, value_and_grads(block, *inputs), strict=True):
            assert value.device == expected.device
            assert torch.equal(value, expected)


@pytest.mark.gpu
def test_new_lengths_compile_no_new_kernel() -> None:
    """Segment lengths, token counts and rope_start are run-time values: one binary per kernel serves them all."""
    from rgkernels._triton import adaln_bwd, adaln_fwd, adaln_sums, qk_norm_rope_bwd, qk_norm_rope_fwd

    modules = (adaln_fwd, adaln_bwd, adaln_sums, qk_norm_rope_fwd, qk_norm_rope_bwd)
    kernels = [fn for module in modules for name, fn in vars(module).items() if name.endswith("_kernel")]

    def compiled() -> int:
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    value_and_grads(block, *block_inputs((16, 48), "cuda"))
    before = compiled()
    for lengths in ((1, 5), (0, 17), (226, 1350)):
        value_and_grads(block, *block_inputs(lengths, "cuda"))
    assert compiled() == before
