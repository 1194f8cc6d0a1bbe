"""segment_attention under the dispatcher, torch.compile and checkpointing, and the schedules behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from rgkernels import SegmentLayout, segment_attention
from rgkernels.testing import randn

of = SegmentLayout.of
BOTH = [("text", "condition"), ("condition", "text")]
LAYOUT = of(text=5, target=40, condition=34, blocked=BOTH)


@pytest.fixture(autouse=True)
def _only_where_kernels_run(device: str) -> None:
    """Every test here takes `device`: conftest skips those that cannot run."""


def make_qkv(layout: SegmentLayout, device: str, requires_grad: bool = False, head_dim: int = 32) -> list[Tensor]:
    shape = (1, layout.seq_len, 2, head_dim)
    qkv = [randn(*shape, dtype=torch.float32, device=device, seed=seed).transpose(1, 2) for seed in range(3)]
    return [x.requires_grad_(requires_grad) for x in qkv]


def op_arguments(layout: SegmentLayout, device: str) -> tuple[Any, ...]:
    blocked = [layout.index(name) for pair in sorted(layout.blocked) for name in pair]
    return (*make_qkv(layout, device), list(layout.lengths), blocked, list(range(layout.num_segments)), 0.25)


class _Recorder(TorchDispatchMode):
    """Names of the ops that reach the dispatcher, and whether one made an S x S tensor."""

    def __init__(self, seq_len: int) -> None:
        super().__init__()
        self.names: list[str] = []
        self.seq_len, self.square = seq_len, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(func.name())
        for x in out if isinstance(out, (tuple, list)) else [out]:
            self.square |= isinstance(x, Tensor) and x.shape[-2:] == (self.seq_len, self.seq_len)
        return out


def test_ops_are_visible_to_the_dispatcher(device: str) -> None:
    """One op forward and one backward, which selective checkpointing can name; never an S x S tensor."""
    q, k, v = make_qkv(LAYOUT, device, requires_grad=True)
    with _Recorder(LAYOUT.seq_len) as recorder:
        segment_attention(q, k, v, LAYOUT, impl="triton").sum().backward()
    own = [name for name in recorder.names if name.startswith("rgkernels")]
    assert own == ["rgkernels::segment_attention", "rgkernels::segment_attention_backward"]
    assert not recorder.square


@pytest.mark.parametrize(
    "layout", [LAYOUT, of(a=0), of(a=3, b=2, blocked=[("a", "a"), ("a", "b")])], ids=["paper", "none", "unseen"]
)
def test_opcheck(layout: SegmentLayout, device: str) -> None:
    """Schema, fake implementation and dispatch of both ops."""
    import rgkernels._triton.attention  # noqa: F401

    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    args = op_arguments(layout, device)
    torch.library.opcheck(torch.ops.rgkernels.segment_attention.default, args, test_utils=checks)
    o, lse = torch.ops.rgkernels.segment_attention(*args)
    for dlse, needs in ((None, (True, True)), (torch.ones_like(lse), (False, True)), (None, (True, False))):
        backward = (torch.ones_like(o), dlse, *args[:3], o, lse, *args[3:], *needs)
        torch.library.opcheck(torch.ops.rgkernels.segment_attention_backward.default, backward, test_utils=checks)


@pytest.mark.parametrize("tokens_first", [True, False])
def test_fake_tensors_need_no_schedule(tokens_first: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing knows shapes, dtypes and memory order of outputs and gradients, and builds and launches nothing."""
    from rgkernels._triton import attention_schedule

    real = make_qkv(LAYOUT, device, requires_grad=True)
    if not tokens_first:
        real = [x.detach().contiguous().requires_grad_() for x in real]
    out = segment_attention(*real, LAYOUT, return_lse=True, impl="triton")
    expected = [*out, *torch.autograd.grad(out[0].sum(), real)]
    monkeypatch.setattr(attention_schedule, "_build", None)
    monkeypatch.setattr(attention_schedule, "_cache", None)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in real]
        out = segment_attention(*fake, LAYOUT, return_lse=True, impl="triton")
        actual = [*out, *torch.autograd.grad(out[0].sum(), fake)]
    for got, want in zip(actual, expected, strict=True):
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


# Dynamo instantiates autograd functions while tracing them, which PyTorch deprecates
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_to_one_graph_and_stops_recompiling(device: str) -> None:
    """fullgraph, forward and backward, eager's bits; once lengths are known to vary, new ones compile nothing new."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(segment_attention, fullgraph=True, backend=counter)
    graphs = []
    for lengths in ((5, 40, 34), (3, 21, 35), (4, 9, 12), (2, 33, 7)):
        layout = SegmentLayout(LAYOUT.names, lengths, LAYOUT.blocked)
        inputs = make_qkv(layout, device, requires_grad=True)
        weight = randn(*inputs[0].shape, dtype=torch.float32, device=device, seed=9)
        values = []
        for fn in (compiled, segment_attention):
            o, lse = fn(*inputs, layout, return_lse=True, impl="triton")
            values.append((o, lse, *torch.autograd.grad((o * weight).sum() + lse.sum(), inputs)))
        for actual, expected in zip(*values, strict=True):
            assert torch.equal(actual, expected)
        graphs.append(counter.frame_count)
    assert graphs[1:] == [graphs[1]] * 3


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool, device: str) -> None:
    """Recomputation gives the same bits."""

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = segment_attention(q, k, v, LAYOUT, impl="triton")
        assert isinstance(o, Tensor)
        return o

    inputs = make_qkv(LAYOUT, device, requires_grad=True)
    plain = torch.autograd.grad(block(*inputs).square().sum(), inputs)
    leaves = [x.detach().requires_grad_() for x in inputs]
    checkpoint(block, *leaves, use_reentrant=use_reentrant).square().sum().backward()
    for leaf, want in zip(leaves, plain, strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, want)


def test_second_derivative_is_refused(device: str) -> None:
    """It would be silently wrong otherwise."""
    q, k, v = make_qkv(LAYOUT, device, requires_grad=True)
    (grad,) = torch.autograd.grad(segment_attention(q, k, v, LAYOUT, impl="triton").square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_inference_mode(device: str) -> None:
    """No graph, the same bits, and the schedule made there serves training afterwards."""
    layout = of(text=6, target=41, condition=35, blocked=BOTH)
    with torch.inference_mode():
        o = segment_attention(*make_qkv(layout, device), layout, impl="triton")
    q, k, v = make_qkv(layout, device, requires_grad=True)
    trained = segment_attention(q, k, v, layout, impl="triton")
    trained.sum().backward()
    assert torch.equal(o, trained.detach())


def test_tiles_cover_what_is_visible_once(device: str) -> None:
    """Schedules of both axes, spelled out on the mask: every visible score once, no blocked one, no tile past its segment."""
    from rgkernels._triton.attention_schedule import Problem, tile_table

    layout = of(a=7, b=0, c=5, d=9, blocked=[("a", "c"), ("c", "a"), ("d", "d"), ("d", "a"), ("d", "c"), ("d", "b")])
    blocked = tuple(layout.index(name) for pair in layout.blocked for name in pair)
    for names in (("a", "b", "c", "d"), ("d", "a"), ("c",)):
        problem = Problem(layout.lengths, blocked, tuple(layout.index(name) for name in names))
        expected = torch.cat([layout.mask()[layout.slice(name)] for name in names]).int()
        for by_key, mask in ((False, expected), (True, expected.T)):
            tiles, ranges = tile_table(problem, 4, by_key=by_key)
            counted, rows = torch.zeros_like(mask), torch.zeros(mask.shape[0])
            for row, stop, first, last in tiles:
                rows[row : min(row + 4, stop)] += 1
                for lo, hi in ranges[first:last]:
                    counted[row : min(row + 4, stop), lo:hi] += 1
            assert torch.equal(counted, mask)
            assert (rows == 1).all()
            work = [sum(hi - lo for lo, hi in ranges[first:last]) for _, _, first, last in tiles]
            assert work == sorted(work, reverse=True)


def test_schedules_are_cached_and_bounded(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One upload per layout and tile size, and no more than the cache's capacity of them."""
    from rgkernels._triton import attention_schedule
    from rgkernels._triton.schedule_cache import ScheduleCache

    built = []
    build = attention_schedule._build
    monkeypatch.setattr(attention_schedule, "_build", lambda *args: built.append(args) or build(*args))
    monkeypatch.setattr(attention_schedule, "_cache", ScheduleCache(3, attention_schedule._wait))
    problems = [attention_schedule.Problem((n, 3), (), (0, 1)) for n in range(5)]
    where = torch.device(device)
    for _ in range(2):
        first = attention_schedule.schedule(problems[0], 16, where)
    assert len(built) == 1
    for problem in problems:
        attention_schedule.schedule(problem, 16, where)
        assert len(attention_schedule._cache) <= 3
    again = attention_schedule.schedule(problems[0], 16, where)
    assert torch.equal(again.tiles, first.tiles)


def test_what_a_graph_captured_is_kept_and_found_again(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood of new layouts drops the others; two captures of one layout see one address, the second without a warm-up."""
    from rgkernels._triton import attention_schedule
    from rgkernels._triton.schedule_cache import ScheduleCache

    capturing = True
    monkeypatch.setattr(attention_schedule, "_is_capturing", lambda device: capturing)
    monkeypatch.setattr(attention_schedule, "_cache", ScheduleCache(3, attention_schedule._wait))
    where = torch.device(device)
    problems = [attention_schedule.Problem((n, 3), (), (0, 1)) for n in range(1, 9)]
    with pytest.raises(RuntimeError, match=r"before a CUDA graph captures it.*got a new layout with lengths \(1, 3\)"):
        attention_schedule.schedule(problems[0], 16, where)
    capturing = False
    warm = attention_schedule.schedule(problems[0], 16, where)
    capturing = True
    first = attention_schedule.schedule(problems[0], 16, where)
    capturing = False
    for problem in problems[1:]:
        attention_schedule.schedule(problem, 16, where)
    capturing = True
    second = attention_schedule.schedule(problems[0], 16, where)
    assert warm is first is second
    capturing = False
    assert attention_schedule.schedule(problems[0], 16, where) is first


def test_dropped_schedules_are_waited_for_before_they_are_freed() -> None:
    """Queued kernels may still read them: its owner is asked to wait, and only for keys that no graph holds."""
    from rgkernels._triton.schedule_cache import ScheduleCache

    settled: list[list[int]] = []
    cache: ScheduleCache[int, str] = ScheduleCache(2, settled.append)
    for key in (1, 2):
        cache.get(key, lambda: "x", capturing=False)
    cache.get(2, lambda: "x", capturing=True)
    for key in (3, 4):
        cache.get(key, lambda: "x", capturing=False)
    assert settled == [[1, 3]]
    assert len(cache) == 2


def test_one_upload_stream_per_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stream has a pool of memory of its own: a stream for every upload would reserve one after the other."""
    from rgkernels._triton import attention_schedule

    made: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or object())
    attention_schedule._upload_stream.cache_clear()
    devices = [torch.device("cuda", index) for index in (0, 1, 0, 1)]
    streams = [attention_schedule._upload_stream(where) for where in devices]
    attention_schedule._upload_stream.cache_clear()
    assert made == devices[:2]
    assert streams[:2] == streams[2:]


@pytest.mark.gpu
def test_cuda_graph() -> None:
    """Capture after one warm-up call, replay on new values; a layout that was never seen is refused by name."""
    from rgkernels._triton import attention_schedule

    inputs = make_qkv(LAYOUT, "cuda")
    segment_attention(*inputs, LAYOUT, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = segment_attention(*inputs, LAYOUT, impl="triton")
    for x in inputs:
        x.mul_(0.5)
    # as many layouts as the cache holds, and a second capture: the first graph's schedule stays where it was
    for n in range(attention_schedule.MAX_CACHED + 1):
        attention_schedule.schedule(attention_schedule.Problem((n,), (), (0,)), 16, inputs[0].device)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        segment_attention(*inputs, LAYOUT, impl="triton")
    graph.replay()
    assert torch.equal(o, segment_attention(*inputs, LAYOUT, impl="triton"))
    new = make_qkv(of(a=11), "cuda")
    with pytest.raises(RuntimeError, match="must run once with a layout before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        segment_attention(*new, of(a=11), impl="triton")


@pytest.mark.gpu
def test_new_lengths_compile_nothing_new() -> None:
    """One binary per kernel serves all lengths, segment counts and blocked pairs."""
    from rgkernels._triton.attention_fwd import _attn_fwd_kernel

    def binaries() -> int:
        return sum(len(entry[0]) for entry in _attn_fwd_kernel.device_caches.values())

    layouts = (LAYOUT, of(a=16), of(a=1), of(a=48, b=33), of(a=3, b=2, c=1, d=70, blocked=[("a", "d"), ("b", "a")]))
    counts = set()
    for layout in layouts:
        segment_attention(*make_qkv(layout, "cuda"), layout, impl="triton")
        counts.add(binaries())
    assert len(counts) == 1
