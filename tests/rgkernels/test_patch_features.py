"""`rgkernels.patch` among the features of diffusers: stock's numbers or a refusal by name, never a silent no-op."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("diffusers")
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

import rgkernels
from rgkernels import SegmentLayout, _patch
from rgkernels.cogvideox import Modulation, Rotary, block_forward
from rgkernels.testing import assert_within_reference_error
from tests.realgeneral.helpers.checkpoints import tiny_transformer
from tests.rgkernels.helpers.clips import clip_inputs
from tests.rgkernels.helpers.patch_cases import (
    ALL,
    CASES,
    DOC,
    NORMS,
    TIMESTEPS,
    Case,
    Clock,
    OwnProcessor,
    document,
    double_output,
)

LAYERS = 4

# diffusers' FasterCache calls it in the old way
pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid")


def make_model(wide: bool = False) -> CogVideoXTransformer3DModel:
    model = tiny_transformer("5b", num_layers=LAYERS)
    return model.double() if wide else model


def as_dtype(inputs: dict[str, Any], model: CogVideoXTransformer3DModel) -> dict[str, Any]:
    """Floating tensors in the model's dtype, as its norms have it: layers may be stored in another."""
    dtype = model.norm_final.weight.dtype
    moved = {k: v.to(dtype) for k, v in inputs.items() if torch.is_tensor(v) and v.is_floating_point()}
    return inputs | moved | {"image_rotary_emb": tuple(table.to(dtype) for table in inputs["image_rotary_emb"])}


def sample(model: CogVideoXTransformer3DModel) -> Tensor:
    """The outputs of a short run, with the clock and the context that a pipeline sets."""
    outputs = []
    for step, now in enumerate(TIMESTEPS):
        Clock.now = now
        inputs = as_dtype(clip_inputs(model, seed=step // 2), model) | {"timestep": torch.full((2,), now)}
        context = model.cache_context("run") if model.is_cache_enabled else contextlib.nullcontext()
        with torch.no_grad(), context:
            outputs.append(model(**inputs)[0])
    return torch.stack(outputs)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each part of a block ran on the ops."""
    calls: Counter[str] = Counter()

    def count(name: str) -> None:
        original = getattr(_patch, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(_patch, name, counted)

    for name in ("norm_site", "project_qkv", "segment_attention"):
        count(name)
    return calls


def apply(case: Case, model: Any, patched: str = "") -> Any:
    """Do what the case does; `patched` says when the model is patched, if at all."""
    with warnings.catch_warnings():
        # diffusers and PEFT warn of what is experimental
        warnings.simplefilter("ignore")
        if patched == "after":
            rgkernels.patch(model, impl="reference")
        case.apply(model)
        if patched == "before":
            rgkernels.patch(model, impl="reference")
    return model


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CASES)
def test_stock_numbers_or_a_refusal(name: str, when: str, ran: Counter[str]) -> None:
    """Set before or after `patch`, a feature changes the model as it changes stock, while the named parts run on the ops."""
    case = CASES[name]
    if case.refused:
        with pytest.raises((NotImplementedError, ValueError), match=case.refused):
            sample(apply(case, make_model(), when))
        return
    plain, stock, truth = (sample(make_model()), sample(apply(case, make_model())), sample(apply(case, make_model(wide=True))))
    assert torch.allclose(plain, stock) == case.exact
    ran.clear()
    patched = sample(apply(case, make_model(), when))
    assert_within_reference_error({"out": patched}, {"out": stock}, {"out": truth})
    assert ran["norm_site"] > 0
    # in the cases without all ops some blocks may still have them
    assert case.ops == NORMS or ran["project_qkv"] == ran["segment_attention"] == ran["norm_site"] / 2
    assert case.ops == ALL or ran["project_qkv"] < ran["norm_site"] / 2


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.refused])
def test_unpatch_leaves_the_feature(name: str, when: str) -> None:
    """Bit for bit what the feature makes of a stock model, also where a hook has kept the patched forward."""
    case = CASES[name]
    stock = sample(apply(case, make_model()))
    model = rgkernels.unpatch(apply(case, make_model(), when))
    assert not any(isinstance(block, _patch.FusedCogVideoXBlock) for block in model.transformer_blocks)
    assert torch.equal(sample(model), stock)


@pytest.mark.parametrize("name", ["pab", "first-block-cache", "mag-cache", "taylorseer"])
def test_caches_that_come_and_go(name: str, ran: Counter[str]) -> None:
    """A cache that was on before `patch` and one that is on while patched are both taken off, and nothing of them stays."""
    model = apply(CASES[name], make_model(), "before")
    model.disable_cache()
    expected = sample(rgkernels.patch(make_model(), impl="reference"))
    ran.clear()
    assert torch.equal(sample(model), expected)
    assert ran["segment_attention"] == LAYERS * len(TIMESTEPS)
    apply(CASES[name], model)
    model.disable_cache()
    assert torch.equal(sample(model), expected)
    assert torch.equal(sample(rgkernels.unpatch(model)), sample(make_model()))
    assert torch.equal(sample(rgkernels.patch(model, impl="reference")), expected)


def test_neighbours_that_nothing_watches_share_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a hook sees are diffusers' two streams; elsewhere no stream is cut out and joined again."""
    model = rgkernels.patch(make_model(), impl="reference")
    finished = []
    original = _patch.finish
    monkeypatch.setattr(_patch, "finish", lambda *args: finished.append(1) or original(*args))
    sample(model)
    assert len(finished) == len(TIMESTEPS)
    seen = []
    handle = model.transformer_blocks[1].register_forward_hook(lambda module, args, output: seen.append(output))
    finished.clear()
    sample(model)
    assert len(finished) == 3 * len(TIMESTEPS)
    assert all(torch.is_tensor(part) for output in seen for part in output)
    assert [part.shape[1] for part in seen[0]] == [96, 12]
    handle.remove()
    finished.clear()
    sample(model)
    assert len(finished) == len(TIMESTEPS)


def test_a_block_by_itself_returns_two_streams() -> None:
    """Outside of a pass of its model a patched block means what a stock block means, after a pass that failed too."""
    model = rgkernels.patch(make_model(), impl="reference")
    handle = model.norm_final.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(model)
    handle.remove()
    arguments = torch.randn(1, 5, 64), torch.randn(1, 3, 64), torch.randn(1, 16)
    video, text = model.transformer_blocks[0](*arguments)
    rgkernels.unpatch(model)
    for actual, expected in zip((video, text), model.transformer_blocks[0](*arguments), strict=True):
        torch.testing.assert_close(actual, expected)


def gradients(model: CogVideoXTransformer3DModel) -> dict[str, Tensor]:
    """The gradient of every parameter; of the input too, as the reentrant kind of checkpointing needs."""
    inputs = as_dtype(clip_inputs(model), model)
    inputs["hidden_states"].requires_grad_()
    out = model(**inputs)[0]
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(upstream.to(out.dtype))
    # one vector per block: of a tensor of 64 elements, the largest rounding error is a matter of luck
    found = [(name, p.grad) for name, p in model.named_parameters()]
    assert all(grad is not None for _, grad in found)
    groups = {".".join(name.split(".")[:2]) for name, _ in found}
    return {g: torch.cat([grad.flatten() for name, grad in found if name.startswith(g)]) for g in sorted(groups)}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_checkpointing_gives_stock_gradients(use_reentrant: bool, impl: str) -> None:
    """All parameters: the reentrant kind sees only the tensors that go between blocks by themselves."""

    def run(wide: bool, impl: str = "") -> dict[str, Tensor]:
        model = make_model(wide).train()
        model.enable_gradient_checkpointing(lambda block, *args: checkpoint(block, *args, use_reentrant=use_reentrant))
        return gradients(rgkernels.patch(model, impl=impl) if impl else model)

    assert_within_reference_error(run(False, impl), run(False), run(True))


@pytest.mark.parametrize("geometry", ["2b", "5b"])
def test_autocast_has_stock_numbers(geometry: str) -> None:
    """Linear layers in half precision beside float32 tokens (2B adds float32 positions) and float32 norms."""
    model = tiny_transformer(geometry)
    inputs = clip_inputs(model)
    with torch.no_grad():
        truth = model(**inputs)[0]
        with torch.autocast("cpu", torch.bfloat16):
            stock = model(**inputs)[0]
            patched = rgkernels.patch(model, impl="reference")(**inputs)[0]
    assert_within_reference_error({"out": patched}, {"out": stock}, {"out": truth})


@pytest.mark.parametrize("name", ["offload-leaves", "sequential-offload", "offload-blocks"])
def test_kernels_get_the_parameters_that_hooks_bring(name: str) -> None:
    """Triton reads norm weights by their address, which exists while the hooks of the norm run."""
    model = apply(CASES[name], rgkernels.patch(make_model(), impl="triton"))
    plain = rgkernels.patch(make_model(), impl="triton")
    inputs = clip_inputs(plain)
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], plain(**inputs)[0])


def test_wrapped_blocks_are_refused_by_unpatch() -> None:
    """FSDP2 gives a block a class of its own, which a swap of the class would undo."""
    model = rgkernels.patch(make_model())
    block = model.transformer_blocks[1]
    block.__class__ = type("FSDPBlock", (_patch.FusedCogVideoXBlock,), {})
    with pytest.raises(TypeError, match=r"transformer_blocks\[1\] must be unpatched before it is wrapped, got FSDPBlock"):
        rgkernels.unpatch(model)
    assert isinstance(model.transformer_blocks[0], _patch.FusedCogVideoXBlock)


def test_a_replaced_forward_is_refused() -> None:
    """A forward of unknown origin would run instead of ours, with hooks around it too."""
    model = make_model()
    block = model.transformer_blocks[0]
    block.forward = lambda *args, **kwargs: CogVideoXBlock.forward(block, *args, **kwargs)
    for hooks_around in (False, True):
        if hooks_around:
            apply(CASES["first-block-cache"], model)
        with pytest.raises(ValueError, match=r"transformer_blocks\[0\] must not have a forward replaced by other than"):
            rgkernels.patch(model)
    assert type(model.transformer_blocks[1]) is CogVideoXBlock


def test_copies_of_a_patched_model(ran: Counter[str]) -> None:
    """A deep copy is patched by itself: it computes the same and is unpatched alone."""
    model = rgkernels.patch(make_model(), impl="reference")
    twin = copy.deepcopy(model)
    assert torch.equal(sample(twin), sample(model))
    rgkernels.unpatch(twin)
    ran.clear()
    assert torch.equal(sample(twin), sample(make_model()))
    assert not ran
    sample(model)
    assert ran["norm_site"] == 2 * LAYERS * len(TIMESTEPS)


def test_block_forward_names_what_it_would_go_past() -> None:
    """RealGeneral's blocks run through it: segments and blocked pairs leave no call of `attn1` as stock makes it."""
    block = make_model().transformer_blocks[0]
    layout = SegmentLayout.of(text=3, target=5)
    part = torch.zeros(1, 2, 64)
    arguments = torch.zeros(1, 8, 64), None, None, *[Modulation(part, part, part)] * 2, layout, layout, Rotary()
    block_forward(block, *arguments)
    block.attn1.register_forward_hook(double_output)
    with pytest.raises(NotImplementedError, match=r"attn1 must have .* no hooks here, got \['double_output'\]"):
        block_forward(block, *arguments)
    block.attn1.set_processor(OwnProcessor())
    with pytest.raises(NotImplementedError, match=r"attn1 must have diffusers' own processor .*'OwnProcessor'"):
        block_forward(block, *arguments)


def test_the_table_of_the_docs_is_that_of_the_cases() -> None:
    """`python -m tests.rgkernels.helpers.patch_cases` writes it."""
    assert document(DOC.read_text()) == DOC.read_text()
