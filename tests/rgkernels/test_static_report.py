"""Evidence that needs no GPU: figures read from compiled kernels, and the bytes that launches move."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rgkernels
from rgkernels import SegmentLayout

triton = pytest.importorskip("triton")

from benchmarks import static_report  # noqa: E402  (needs triton)
from benchmarks.launches.bytes_moved import Bytes, bytes_moved, distinct_bytes  # noqa: E402
from benchmarks.launches.record import Launch, record_launches  # noqa: E402
from benchmarks.launches.variants import BUDGETS, QK_BACKWARD_FROZEN_REGISTERS  # noqa: E402

ROOT = Path(__file__).parents[2]

# ---- figures from binaries


def run_without_interpreter(*args: str) -> str:
    """Run Python where Triton compiles: the test process itself interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *args], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compiled(path: Path, *matches: tuple[str, ...]) -> static_report.Report:
    """The report of all variants whose names hold all the words of one of these tuples."""
    code = (
        "import json, pathlib, sys\n"
        "from benchmarks.static_report import collect\n"
        "report = {k: v for words in json.loads(sys.argv[2]) for k, v in collect(tuple(words)).items()}\n"
        "pathlib.Path(sys.argv[1]).write_text(json.dumps(report))\n"
    )
    run_without_interpreter("-c", code, str(path), json.dumps(matches))
    report: static_report.Report = json.loads(path.read_text())
    assert report
    return report


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> static_report.Report:
    """What an H100 would run at the tuned sizes in bfloat16: the fused sites, and query and key heads."""
    path = tmp_path_factory.mktemp("static") / "report.json"
    sites = [("sm_90/gate-residual-adaln", f"C{channels}-bfloat16") for channels in (1920, 3072)]
    return compiled(path, *sites, ("sm_90/qk-D64-bfloat16",))


def check_budgets(report: static_report.Report) -> None:
    for name, row in report.items():
        budget = BUDGETS[name.split("/")[-1]]
        registers = budget.registers_float32 if "float32" in name else budget.registers
        if "frozen" in name and "bwd" in name:
            registers = QK_BACKWARD_FROZEN_REGISTERS
        assert row["spills"] == row["stack"] == 0, f"{name} spills: {row}"
        assert row["registers"] <= registers, f"{name}: {row['registers']} registers, budget {registers}"
        assert row["narrow_loads"] <= budget.narrow_loads, f"{name}: {row['narrow_loads']} loads below 16 bytes: {row}"


def test_kernels_keep_their_budgets(report: static_report.Report) -> None:
    """No spill, no stack, registers within budget, and every row of tokens is loaded 16 bytes at a time."""
    check_budgets(report)
    assert {name.split("/")[-1] for name in report} == BUDGETS.keys()


def test_row_loops_are_pipelined(report: static_report.Report) -> None:
    """The backward row loops prefetch through asynchronous copies, two programs and more per multiprocessor."""
    loops = {name: row for name, row in report.items() if name.endswith(("_adaln_bwd_kernel", "rope_bwd_kernel"))}
    assert loops
    assert all(row["async_loads"] and row["programs_per_sm"] >= 2 for row in loops.values()), loops


def test_figures_keep_the_baseline(report: static_report.Report) -> None:
    """No figure moved the wrong way against the committed baseline of this version of Triton."""
    baseline = static_report.read_baseline(triton.__version__)
    if baseline is None:
        pytest.skip(f"the baseline has no figures for Triton {triton.__version__}")
    assert report.keys() <= baseline.keys()
    assert static_report.compare(report, baseline, whole=False) == []


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942"])
def test_every_variant(target: str, tmp_path: Path) -> None:
    """All dtypes and targets: budgets on sm_90, no spills elsewhere, and the baseline."""
    report = compiled(tmp_path / "report.json", (f"{target}/",))
    ours = {name: row for name, row in report.items() if name.split("/")[-1] in BUDGETS}
    if target == "sm_90":
        check_budgets(ours)
    assert not any(row["spills"] or row["stack"] for row in ours.values())
    baseline = static_report.read_baseline(triton.__version__)
    if baseline is not None:
        assert static_report.compare(report, baseline, whole=False) == []


def test_lengths_are_not_part_of_the_kernel() -> None:
    """Triton's own specialisation of a launch is the same for all segment lengths, token counts and rope_starts."""
    code = (
        "import torch\n"
        "from rgkernels import SegmentLayout\n"
        "from benchmarks.launches import variants as v\n"
        "from benchmarks.launches.binaries import specialise\n"
        "def keys(*lengths):\n"
        "    v.LAYOUT = SegmentLayout(('a', 'b', 'c'), lengths)\n"
        "    found = v.norm_site_launches(64, torch.float16, True)\n"
        "    return [str(specialise(launch, 'sm_90')) for launches in found.values() for launch in launches]\n"
        "first = keys(226, 1350, 1350)\n"
        "assert len(first) > 8\n"
        "for lengths in ((1, 0, 16), (15, 17, 5), (1, 1, 1), (2048, 4096, 33)):\n"
        "    assert keys(*lengths) == first, lengths\n"
        "print('same')\n"
    )
    assert run_without_interpreter("-c", code).strip() == "same"


def test_regressions_say_which_figure_moved() -> None:
    """Growth of what must not grow and loss of what must not fall are named; improvements pass."""
    was = {"registers": 80, "spills": 0, "stack": 0, "shared": 512, "narrow_loads": 0, "narrow_stores": 2, "programs_per_sm": 6}
    compare = static_report.compare
    assert compare({"k": was}, {"k": was}) == []
    assert compare({"k": was | {"registers": 72, "programs_per_sm": 7}}, {"k": was}) == []
    assert compare({"k": was | {"spills": 1}}, {"k": was}) == ["k: spills grew from 0 to 1"]
    assert compare({"k": was | {"narrow_loads": 16}}, {"k": was}) == ["k: narrow_loads grew from 0 to 16"]
    moved = was | {"registers": 96, "programs_per_sm": 5}
    assert compare({"k": moved}, {"k": was}) == ["k: registers grew from 80 to 96", "k: programs_per_sm fell from 6 to 5"]
    assert compare({"new": was}, {"k": was}) == [
        "k: in the baseline, but not compiled any more",
        "new: new, not in the baseline (run with --write)",
    ]
    assert compare({}, {"k": was}, whole=False) == []


def test_baseline_is_kept_per_version(tmp_path: Path) -> None:
    """Writing one version's figures leaves the others', and an unknown version has none."""
    path = tmp_path / "baseline.json"
    static_report.write_baseline({"a": {"registers": 1}}, "3.6.0", path)
    static_report.write_baseline({"a": {"registers": 2}, "b": {"registers": 3}}, "3.7.1", path)
    assert static_report.read_baseline("3.6.0", path) == {"a": {"registers": 1}}
    assert static_report.read_baseline("3.7.1", path) == {"a": {"registers": 2}, "b": {"registers": 3}}
    assert static_report.read_baseline("3.9.0", path) is None
    assert static_report.read_baseline("3.9.0", tmp_path / "none.json") is None


@pytest.mark.parametrize(
    ("registers", "shared", "num_warps", "expected"),
    [(48, 0, 4, 10), (80, 0, 8, 3), (128, 65624, 8, 2), (128, 131160, 8, 1), (32, 0, 1, 32), (255, 0, 8, 1)],
)
def test_programs_per_multiprocessor(registers: int, shared: int, num_warps: int, expected: int) -> None:
    """Occupancy by registers, warps, programs and shared memory."""
    assert static_report.programs_per_sm("sm_90", {"registers": registers, "shared": shared}, num_warps) == expected


# ---- launch decisions


@pytest.mark.parametrize("lengths", [(226, 1350, 1350), (226, 4096, 4096), (1, 0, 5), (17576,), (3,) * 50, (0, 0)])
@pytest.mark.parametrize("batch", [1, 4])
def test_rows_are_split_among_resident_programs(lengths: tuple[int, ...], batch: int) -> None:
    """The backward's programs are resident at once on an H100 unless segments alone are too many, and none owns no row."""
    from rgkernels._triton.adaln_bwd import MIN_ROWS_SHARED, rows_per_program

    rows = rows_per_program(lengths, batch, 132, 1, 2)
    programs = batch * sum(-(-n // rows) for n in lengths)
    assert rows >= 1
    assert programs <= 2 * 132 or rows >= max(lengths)
    if programs > 132:
        assert rows >= MIN_ROWS_SHARED or rows >= max(lengths)
    assert rows_per_program(lengths, batch, 132, 16, 2) >= 16
    alone = rows_per_program(lengths, batch, 132, 1, 1)
    assert batch * sum(-(-n // alone) for n in lengths) <= 132 or alone >= max(lengths)


def test_pipeline_fits_shared_memory() -> None:
    """Rows in flight take at most 64 KiB per program, whatever their width; very wide ones are not pipelined."""
    from rgkernels._triton.adaln_bwd import BUFFER_BYTES, num_stages

    assert [num_stages(3, 4, tile) for tile in (2048 * 2, 4096 * 2, 4096 * 4, 16384 * 2)] == [3, 3, 2, 1]
    for row_tensors in range(1, 5):
        for tile in (256, 4096, 8192, 16384, 65536, 131072):
            assert (num_stages(3, row_tensors, tile) - 1) * row_tensors * tile <= BUFFER_BYTES


def test_encoded_lengths_are_odd_and_not_one() -> None:
    """Nothing that Triton could specialise a kernel on."""
    from rgkernels._triton.common import encode_lengths

    codes = encode_lengths(range(100))
    assert all(code % 2 and code > 1 for code in codes)
    assert [(code - 3) // 2 for code in codes] == list(range(100))


# ---- bytes


class ComputeLog(TorchDispatchMode):
    """Notes every aten op that is neither an allocation nor a view and yields as much as one row tensor."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.ops = numel, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        heavy = isinstance(out, Tensor) and out.numel() >= self.numel and not func.is_view
        if heavy and func.namespace == "aten" and not func._opname.startswith(("empty", "new_empty", "fill")):
            self.ops.append(str(func))
        return out


def realgeneral_block(
    channels: int, batch: int, lengths: tuple[int, int, int], trained: bool
) -> tuple[Bytes, Bytes, list[str], Tensor]:
    """Forward and backward bytes of one block's norm sites and query-key norm, and what PyTorch computed beside them."""
    layout = SegmentLayout(("text", "target", "condition"), lengths)
    rows = (batch, layout.seq_len, channels)
    dtype = torch.float16
    hidden, attention, mlp = (torch.zeros(rows, dtype=dtype, requires_grad=True) for _ in range(3))
    modulation = torch.zeros((batch, 3, 6 * channels), dtype=dtype, requires_grad=True)
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
    affine = [torch.zeros(channels, dtype=dtype, requires_grad=trained) for _ in range(4)]
    heads = (channels // 64, 64)
    projection = torch.zeros((batch, layout.seq_len, 3, *heads), dtype=dtype, requires_grad=True)
    q, k = (x.transpose(1, 2).detach().requires_grad_() for x in projection.unbind(2)[:2])
    norms = [torch.zeros(64, dtype=dtype, requires_grad=trained) for _ in range(4)]
    tables = [torch.zeros(layout.seq_len - lengths[0], 64) for _ in range(2)]
    upstream, upstream_qk = torch.zeros(rows, dtype=dtype), torch.zeros_like(q)
    with record_launches(sms=132) as launches, ComputeLog(hidden.numel()) as log:
        # the gate of the sublayer before joins the norm of the sublayer after: two sites per block
        sites = [
            rgkernels.segment_gate_residual_adaln(
                hidden, branch, gate, shift, scale, layout, weight=weight, bias=bias, impl="triton"
            )
            for branch, gate, shift, scale, weight, bias in (
                (mlp, gate2, shift1, scale1, *affine[:2]),
                (attention, gate1, shift2, scale2, *affine[2:]),
            )
        ]
        qk = rgkernels.qk_norm_rope(
            q, k, q_weight=norms[0], q_bias=norms[1], k_weight=norms[2], k_bias=norms[3], cos=tables[0], sin=tables[1],
            rope_start=lengths[0], impl="triton",
        )  # fmt: skip
        forward = bytes_moved(launches)
        launches.clear()
        for res, normed in sites:
            torch.autograd.grad((res, normed), (hidden, attention, mlp, modulation), (upstream, upstream), allow_unused=True)
        torch.autograd.grad(qk, (q, k), (upstream_qk, upstream_qk))
        backward = bytes_moved(launches)
    return forward, backward, log.ops, hidden


@pytest.mark.parametrize(
    ("channels", "batch", "lengths"),
    [(1920, 1, (226, 1350, 1350)), (3072, 1, (226, 1350, 1350)), (1920, 4, (226, 1350, 1350)), (3072, 1, (226, 4096, 4096))],
    ids=["2B-S2926", "5B-S2926", "2B-B4-S2926", "5B-S8418"],
)
def test_block_moves_12_and_18_vectors(channels: int, batch: int, lengths: tuple[int, int, int]) -> None:
    """One block moves 12 vectors per token forward and 18 backward, and everything else together stays small."""
    forward, backward, computed, like = realgeneral_block(channels, batch, lengths, trained=False)
    assert (forward.vectors(like), backward.vectors(like)) == (12, 18)
    assert computed == []
    # statistics, tables, modulation and norm parameters
    assert forward.total - forward.tokens < 0.06 * forward.tokens
    assert backward.total - backward.tokens - backward.scratch < 0.05 * backward.tokens
    # float32 partial sums are written once and read once
    assert forward.scratch == 0
    assert backward.scratch < 0.1 * backward.tokens


def test_frozen_parameters_cost_nothing() -> None:
    """Training the norm parameters adds scratch and parameter bytes only, freezing them saves all of those."""
    frozen, trained = (realgeneral_block(128, 1, (64, 1350, 1350), trained)[1] for trained in (False, True))
    assert frozen.tokens == trained.tokens
    assert frozen.scratch < trained.scratch
    assert frozen.parameters < trained.parameters


def test_one_launch_for_q_and_k() -> None:
    """The forward of one block is three kernels, its backward two per site and one for q and k."""
    layout = SegmentLayout.of(a=3, b=4)
    q = torch.zeros(1, 2, 7, 64, requires_grad=True)
    with record_launches() as launches:
        outputs = rgkernels.qk_norm_rope(q, q.detach(), impl="triton")
        torch.autograd.grad(outputs, q, [torch.zeros_like(q)] * 2)
    assert [launch.name for launch in launches] == ["_qk_norm_rope_fwd_kernel", "_qk_norm_rope_bwd_kernel"]
    x, m = torch.zeros(1, 7, 64, requires_grad=True), torch.zeros(1, 2, 64, requires_grad=True)
    with record_launches() as launches:
        torch.autograd.grad(rgkernels.segment_gate_residual_adaln(x, x, m, m, m, layout, impl="triton"), x, [x, x])
    assert [launch.name for launch in launches] == [
        "_adaln_fwd_kernel",
        "_adaln_bwd_kernel",
        "_adaln_bwd_reduce_kernel",
    ]


def test_distinct_bytes() -> None:
    """Expanded dims count once, strides do not count, empty tensors weigh nothing."""
    x = torch.zeros(2, 3, 8, dtype=torch.float16)
    assert distinct_bytes(x) == 96
    assert distinct_bytes(x[:1].expand(5, -1, -1)) == 48
    assert distinct_bytes(x[:, :, ::2]) == 48
    assert distinct_bytes(x[:0]) == 0


def test_unknown_arguments_are_refused() -> None:
    """A kernel with a tensor argument that the counter does not know cannot pass unnoticed."""
    with pytest.raises(ValueError, match="argument extra_ptr must be listed"):
        bytes_moved([Launch("_new_kernel", None, (1,), {"extra_ptr": torch.zeros(2)})])
