"""The model's properties: equal to stock CogVideoX at step 0, and blind exactly where it must be."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import Tensor

from realgeneral import RealGeneralPipeline, RealGeneralTransformer3DModel
from realgeneral.model.condition import ConditionCache
from realgeneral.tasks import DEFAULT_TASKS
from rgkernels import cogvideox
from rgkernels.cogvideox import KeyValue
from tests.realgeneral.helpers.checkpoints import GEOMETRIES, tiny_transformer
from tests.realgeneral.helpers.models import (
    ROUNDING,
    SIZES,
    TASKS,
    fresh_model,
    make_inputs,
    run,
    run_stock,
    stock_model,
    trained_model,
)


@pytest.fixture
def _exact_rotary(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers rounds the rotation to float32 even for float64 models; here it does not, so that equality can be told."""

    def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = (table.to(x.dtype) for table in tables)
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * cos + torch.stack((-odd, even), dim=-1).flatten(-2) * sin

    monkeypatch.setattr("diffusers.models.embeddings.apply_rotary_emb", rotate)


def assert_equal_to_rounding(actual: Tensor, wanted: Tensor) -> None:
    assert actual.dtype == wanted.dtype == torch.float64
    error, bound = (actual - wanted).abs().max().item(), ROUNDING * wanted.abs().max().item()
    assert error <= bound, f"error {error:.2e}, bound {bound:.2e}"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tokens that enter the feed-forward of each block, as the model runs."""
    tokens: list[Tensor] = []
    original = cogvideox.norm_site

    def spy(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        tokens.append(result[1])
        return result

    monkeypatch.setattr(cogvideox, "norm_site", spy)
    return tokens


# --- step 0 --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_exact_rotary")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("conditions", [1, 2])
def test_step_0_equals_stock_on_the_clip(base: Path, size: tuple[int, int], conditions: int) -> None:
    """Nothing blocked, fresh branch, zero embeddings, fresh LoRA: the target's prediction is stock's for the clip [c..., y]."""
    stock, ours = stock_model(base), fresh_model(base, "open")
    x = make_inputs(stock, size, conditions)
    with torch.no_grad():
        assert_equal_to_rounding(run(ours, x), run_stock(stock, base, x))


@pytest.mark.usefixtures("_exact_rotary")
@pytest.mark.parametrize("change", ["lora", "task", "subject", "adaln", "preset", "order"])
def test_step_0_test_would_notice(base: Path, change: str) -> None:
    """Each ingredient that the parity relies on changes the output when it is not at its start: the test above can fail."""
    stock, ours = stock_model(base), fresh_model(base, "open")
    x = make_inputs(stock, (6, 6), 2)
    with torch.no_grad():
        if change == "lora":
            weight = next(p for n, p in ours.named_parameters() if "to_v.lora_B" in n)
            weight.add_(torch.randn_like(weight))
        elif change == "task":
            ours.condition_embedding.task.weight.add_(torch.randn_like(ours.condition_embedding.task.weight))
        elif change == "subject":
            ours.condition_embedding.subject.weight.add_(torch.randn_like(ours.condition_embedding.subject.weight))
        elif change == "adaln":
            ours.condition_adaln[0].norm1.weight.add_(0.1)
        elif change == "preset":
            ours = fresh_model(base, "paper")
        else:
            x_ours = make_inputs(stock, (6, 6), 2)
            x_ours.conditions = x.conditions.flip(1)
        got = run(ours, x_ours if change == "order" else x)
        wanted = run_stock(stock, base, x)
    assert (got - wanted).abs().max() > 1e3 * ROUNDING * wanted.abs().max()


def test_condition_branch_starts_as_the_video_rows(base: Path) -> None:
    """Condition AdaLN is a copy of rows 0:3d of the stock linears, not a view of them; embeddings are zero."""
    model = fresh_model(base, "paper", lora=False)
    d = model.geometry.dim
    for own, block in zip(model.condition_adaln, model.transformer_blocks, strict=True):
        for mine, stock in ((own.norm1, block.norm1.linear), (own.norm2, block.norm2.linear)):
            assert torch.equal(mine.weight, stock.weight[: 3 * d])
            assert torch.equal(mine.bias, stock.bias[: 3 * d])
            assert mine.weight.data_ptr() != stock.weight.data_ptr()
    assert not any(p.any() for p in model.condition_embedding.parameters())


# --- stock behaviour -----------------------------------------------------------------------------------------------------


def test_state_dict_keeps_all_stock_keys(base: Path) -> None:
    """Stock weights keep their names and values; what is new starts with condition_."""
    stock = CogVideoXTransformer3DModel.from_pretrained(base, subfolder="transformer")
    ours = RealGeneralTransformer3DModel.from_pretrained(base, subfolder="transformer")
    theirs, own = stock.state_dict(), ours.state_dict()
    assert theirs.keys() <= own.keys()
    assert all(torch.equal(own[name], value) for name, value in theirs.items())
    new = own.keys() - theirs.keys()
    assert new
    assert all(name.startswith(("condition_embedding.", "condition_adaln.")) for name in new)
    assert new == ours.condition_parameters().keys()


@pytest.mark.parametrize("preset", ["paper", "cached", "open"])
def test_without_condition_it_is_the_stock_model(base: Path, preset: str) -> None:
    """A call without a condition is stock CogVideoX bit for bit, for any number of frames, whatever the adapter trained."""
    stock, ours = stock_model(base), trained_model(base, preset)
    ours.disable_adapters()
    x = make_inputs(stock, (8, 12), 2)
    rotary = None
    if stock.config.use_rotary_positional_embeddings:
        pipe = CogVideoXPipeline.from_pretrained(base)
        rotary = pipe._prepare_rotary_positional_embeddings(64, 96, x.clip.shape[1], torch.device("cpu"))
    with torch.no_grad():
        kwargs = {"image_rotary_emb": rotary, "return_dict": False}
        wanted = stock(x.clip, x.text, x.timestep, **kwargs)[0]
        got = ours(x.clip, x.text, x.timestep, **kwargs)[0]
    assert torch.equal(got, wanted)


def test_stock_pipeline_runs_on_it(base: Path) -> None:
    """CogVideoXPipeline makes the same short clip with either transformer, bit for bit."""
    stock = CogVideoXPipeline.from_pretrained(base)
    ours = CogVideoXPipeline.from_pretrained(base)
    ours.transformer = RealGeneralTransformer3DModel.from_cogvideox(ours.transformer)
    clips = []
    for pipe in (stock, ours):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        clips.append(
            pipe(
                "a red pot", height=64, width=96, num_frames=5, num_inference_steps=2, max_sequence_length=12,
                generator=generator, output_type="pt",
            ).frames
        )  # fmt: skip
    assert torch.equal(clips[0], clips[1])


def test_save_and_load_keeps_everything(base: Path, tmp_path: Path) -> None:
    """save_pretrained then from_pretrained keeps tasks, preset, config and every weight, and the output bit for bit."""
    model = trained_model(base, "cached").float()
    model.unload_lora()
    model.save_pretrained(tmp_path)
    loaded = RealGeneralTransformer3DModel.from_pretrained(tmp_path)
    assert tuple(loaded.config.tasks) == TASKS
    assert loaded.config.preset == "cached"
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    x = make_inputs(model, (8, 12))
    with torch.no_grad():
        assert torch.equal(run(model.double(), x), run(loaded.double(), x))


def test_saving_under_a_lora_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    """With a LoRA the stock weights have other names: a saved folder would load with random attention. Fused, it saves."""
    model = trained_model(bases["5b"], "cached").float()
    x = make_inputs(model, (4, 6))
    with pytest.raises(ValueError, match="transformer must have no LoRA to be saved"):
        model.save_pretrained(tmp_path)
    pipe = RealGeneralPipeline.from_pretrained(bases["5b"], transformer=model)
    with pytest.raises(ValueError, match=r"or realgeneral.save_adapter\(\) for the adapter alone"):
        pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model.fuse_lora()
    model.unload_lora()
    model.save_pretrained(tmp_path)
    loaded = RealGeneralTransformer3DModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(run(loaded.double(), x), run(model.double(), x))


@pytest.mark.parametrize("kwargs", [{}, {"tasks": ("a", "b", "c"), "preset": "cached"}])
def test_tasks_and_preset_of_a_stock_checkpoint(bases: dict[str, Path], kwargs: dict[str, Any]) -> None:
    """from_pretrained of a stock folder takes tasks and preset; the default is the seven tasks in preset paper."""
    model = RealGeneralTransformer3DModel.from_pretrained(bases["5b"], subfolder="transformer", **kwargs)
    assert tuple(model.config.tasks) == tuple(kwargs.get("tasks", DEFAULT_TASKS))
    assert model.config.preset == kwargs.get("preset", "paper")
    assert model.condition_embedding.task.weight.shape[0] == len(model.config.tasks)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"in_channels": 8}, "in_channels 8, out_channels 4"),
        ({"ofs_embed_dim": 16}, "ofs_embed_dim 16"),
        ({"use_learned_positional_embeddings": True}, "use_learned_positional_embeddings True"),
    ],
)
def test_image_to_video_bases_are_refused(changes: dict[str, Any], named: str) -> None:
    """5B-I2V and 1.5-I2V configs are named as what they are, with what would be right."""
    stock = tiny_transformer("5b", **changes)
    with pytest.raises(ValueError, match=r"base must be a text-to-video CogVideoX .*" + named):
        RealGeneralTransformer3DModel.from_cogvideox(stock)


def test_a_stock_model_with_a_lora_is_refused(bases: dict[str, Path]) -> None:
    """Weights under a LoRA have other names: say so instead of dropping them."""
    from peft import LoraConfig

    stock = CogVideoXTransformer3DModel.from_pretrained(bases["5b"], subfolder="transformer")
    stock.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="stock must have no LoRA loaded yet"):
        RealGeneralTransformer3DModel.from_cogvideox(stock)


# --- who sees whom -------------------------------------------------------------------------------------------------------


def qkv_gradient(
    model: RealGeneralTransformer3DModel, conditions: int, query: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> float:
    """Largest |d attention output of segment `query` / d (k, v of segment `key`)|, over all blocks."""
    x = make_inputs(model, (4, 6), conditions)
    original, worst = cogvideox.segment_attention, [0.0]

    def probe(q: Tensor, k: Tensor, v: Tensor, layout: Any, *, query_segments: Any = None, **kwargs: Any) -> Any:
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        out = original(q, k, v, layout, query_segments=query_segments, **kwargs)
        names = query_segments or layout.names
        if query in names:
            start = sum(layout.length(n) for n in names[: names.index(query)])
            rows = out[:, :, start : start + layout.length(query)]
            grads = torch.autograd.grad(rows.square().sum(), (k, v))
            worst[0] = max(worst[0], *(g[:, :, layout.slice(key)].abs().max().item() for g in grads))
        return out

    with monkeypatch.context() as patch:
        patch.setattr(cogvideox, "segment_attention", probe)
        run(model, x)
    return worst[0]


@pytest.mark.parametrize("preset", ["paper", "cached", "open"])
@pytest.mark.parametrize("conditions", [1, 2])
def test_blocked_pairs_have_exactly_zero_gradient(
    bases: dict[str, Path], preset: str, conditions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A blocked query's output has gradient 0.0, not small, in keys and values; every visible pair has some."""
    from realgeneral.model.presets import get_preset, joint_layout

    model = trained_model(bases["5b"], preset)
    layout = joint_layout(get_preset(preset), 12, 6, conditions)
    for query in layout.names:
        for key in layout.names:
            gradient = qkv_gradient(model, conditions, query, key, monkeypatch)
            assert (gradient > 0) == layout.visible(query, key), (query, key, gradient)


def segment_outputs(model: RealGeneralTransformer3DModel, x: Any, seen: list[Tensor], **changes: Any) -> list[Tensor]:
    seen.clear()
    with torch.no_grad():
        output = run(model, x, **changes)
    return [*seen, output]


@pytest.mark.parametrize("preset", ["paper", "cached"])
def test_condition_tokens_do_not_see_the_prompt(base: Path, preset: str, seen: list[Tensor]) -> None:
    """In block 1 the condition rows are bit-equal for another prompt; in `cached` in every block, for another target too."""
    model = trained_model(base, preset)
    x, other = make_inputs(model, (4, 6)), make_inputs(model, (4, 6), seed=7)
    text, n = x.text.shape[1], 6
    before = segment_outputs(model, x, seen)
    after = segment_outputs(model, x, seen, encoder_hidden_states=other.text)
    # sites: block 1 norm1, norm2, block 2 norm1 (its norm2 keeps the target alone)
    for i, (a, b) in enumerate(zip(before[:3], after[:3], strict=True)):
        same = torch.equal(a[:, text + n :], b[:, text + n :])
        assert same or (preset == "paper" and i == 2), i  # in paper the prompt comes in by the target, one block later
        assert not torch.equal(a[:, :text], b[:, :text])
    if preset == "cached":
        after = segment_outputs(model, x, seen, hidden_states=other.target)
        assert all(torch.equal(a[:, text + n :], b[:, text + n :]) for a, b in zip(before[:3], after[:3], strict=True))


@pytest.mark.parametrize("preset", ["paper", "cached"])
def test_text_tokens_do_not_see_the_condition(base: Path, preset: str, seen: list[Tensor]) -> None:
    """After block 1's attention text rows are bit-equal for another condition, and target rows are not."""
    model = trained_model(base, preset)
    x, other = make_inputs(model, (4, 6)), make_inputs(model, (4, 6), seed=7)
    before = segment_outputs(model, x, seen)
    after = segment_outputs(model, x, seen, condition_latents=other.conditions)
    text = x.text.shape[1]
    assert torch.equal(before[1][:, :text], after[1][:, :text])
    assert not torch.equal(before[1][:, text : text + 6], after[1][:, text : text + 6])
    assert not torch.equal(before[-1], after[-1])


@pytest.mark.parametrize("preset", ["paper", "cached"])
def test_conditions_do_not_see_each_other(base: Path, preset: str, seen: list[Tensor]) -> None:
    """Another second condition leaves the first condition's rows bit-equal (in `paper` until the target carries it)."""
    model = trained_model(base, preset)
    x, other = make_inputs(model, (4, 6), 2), make_inputs(model, (4, 6), 2, seed=7)
    changed = torch.stack([x.conditions[:, 0], other.conditions[:, 1]], dim=1)
    before, after = (segment_outputs(model, x, seen, condition_latents=c) for c in (x.conditions, changed))
    first = slice(x.text.shape[1] + 6, x.text.shape[1] + 12)
    for i in range(3 if preset == "cached" else 2):
        assert torch.equal(before[i][:, first], after[i][:, first]), i


@pytest.mark.parametrize("branch", ["text", "target", "condition"])
def test_each_modulation_branch_moves_only_its_segment(base: Path, branch: str, seen: list[Tensor]) -> None:
    """Rows 3d:6d of the stock linear modulate text, rows 0:3d the target, the own linear the condition, and nothing else."""
    model = trained_model(base, "paper")
    x = make_inputs(model, (4, 6))
    before = segment_outputs(model, x, seen)
    d = model.geometry.dim
    with torch.no_grad():
        if branch == "condition":
            model.condition_adaln[0].norm1.bias[: 2 * d].add_(0.5)
        else:
            start = 3 * d if branch == "text" else 0
            model.transformer_blocks[0].norm1.linear.bias[start : start + 2 * d].add_(0.5)
    after = segment_outputs(model, x, seen)
    parts = {"text": slice(0, 12), "target": slice(12, 18), "condition": slice(18, 24)}
    moved = {name for name, rows in parts.items() if not torch.equal(before[0][:, rows], after[0][:, rows])}
    assert moved == {branch}


@pytest.mark.parametrize("branch", ["text", "target", "condition"])
def test_each_gate_moves_only_its_segment(base: Path, branch: str, seen: list[Tensor]) -> None:
    """The third chunk of each branch is the gate of its own segment's attention output."""
    model = trained_model(base, "paper")
    x = make_inputs(model, (4, 6))
    before = segment_outputs(model, x, seen)
    d = model.geometry.dim
    with torch.no_grad():
        if branch == "condition":
            model.condition_adaln[0].norm1.bias[2 * d :].add_(0.5)
        else:
            start = 5 * d if branch == "text" else 2 * d
            model.transformer_blocks[0].norm1.linear.bias[start : start + d].add_(0.5)
    after = segment_outputs(model, x, seen)
    assert torch.equal(before[0], after[0])
    parts = {"text": slice(0, 12), "target": slice(12, 18), "condition": slice(18, 24)}
    moved = {name for name, rows in parts.items() if not torch.equal(before[1][:, rows], after[1][:, rows])}
    assert moved == {branch}


def test_condition_time(base: Path, seen: list[Tensor]) -> None:
    """The condition branch follows the target's timestep in `paper` and is constant in `cached`."""
    for preset in ("paper", "cached"):
        model = trained_model(base, preset)
        x = make_inputs(model, (4, 6))
        before = segment_outputs(model, x, seen)
        after = segment_outputs(model, x, seen, timestep=x.timestep + 100)
        assert torch.equal(before[0][:, 18:], after[0][:, 18:]) == (preset == "cached")
        assert not torch.equal(before[0][:, :18], after[0][:, :18])


def test_task_and_subject_reach_the_condition_alone(base: Path, seen: list[Tensor]) -> None:
    """Another task or subject changes the condition's tokens and no other token of block 1's first norm."""
    model = trained_model(base, "paper")
    x = make_inputs(model, (4, 6))
    before = segment_outputs(model, x, seen)
    for change in ({"task_ids": 1 - x.task_ids}, {"subject_embeds": None}):
        after = segment_outputs(model, x, seen, **change)
        assert torch.equal(before[0][:, :18], after[0][:, :18])
        assert not torch.equal(before[0][:, 18:], after[0][:, 18:])


# --- the cache -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def keys_and_values(monkeypatch: pytest.MonkeyPatch) -> list[KeyValue]:
    """Keys and values of each block as the model runs without a cache."""
    found: list[KeyValue] = []
    original = cogvideox.project_qkv

    def spy(*args: Any) -> Any:
        q, k, v = original(*args)
        found.append(KeyValue(k, v))
        return q, k, v

    monkeypatch.setattr(cogvideox, "project_qkv", spy)
    return found


@pytest.mark.parametrize("conditions", [1, 2])
def test_condition_keys_and_values_are_constant_in_cached(base: Path, conditions: int, keys_and_values: list[KeyValue]) -> None:
    """In `cached` the condition's K and V of every block are bit-equal for other steps, prompts and targets."""
    model = trained_model(base, "cached")
    x, other = make_inputs(model, (4, 6), conditions), make_inputs(model, (4, 6), conditions, seed=7)
    found = []
    for change in (
        {},
        {"timestep": other.timestep + 50},
        {"encoder_hidden_states": other.text},
        {"hidden_states": other.target},
    ):
        keys_and_values.clear()
        with torch.no_grad():
            run(model, x, **change)
        found.append([t[:, :, 18:] for pair in keys_and_values for t in pair])
    assert len(found[0]) == 2 * len(model.transformer_blocks)
    for changed in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], changed, strict=True))


@pytest.mark.parametrize("conditions", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_cached_run_equals_uncached_run(base: Path, size: tuple[int, int], conditions: int) -> None:
    """With the cache the prediction is that of the whole joint sequence, to rounding."""
    model = trained_model(base, "cached")
    x = make_inputs(model, size, conditions)
    with torch.no_grad():
        cache = model.encode_condition(x.conditions, x.task_ids, x.subject)
        cached = run(model, x, condition_latents=None, task_ids=None, subject_embeds=None, condition_cache=cache)
        assert_equal_to_rounding(cached, run(model, x))


def test_a_cache_of_one_serves_any_batch(base: Path) -> None:
    """A batch-1 cache equals the same condition repeated for each sample."""
    model = trained_model(base, "cached")
    x = make_inputs(model, (4, 6), batch=3)
    one = x.conditions[:1]
    with torch.no_grad():
        cache = model.encode_condition(one, x.task_ids[:1], x.subject[:1])
        kwargs = {"condition_latents": None, "task_ids": None, "subject_embeds": None, "condition_cache": cache}
        cached = run(model, x, **kwargs)
        wanted = run(
            model, x, condition_latents=one.expand(3, -1, -1, -1, -1), task_ids=x.task_ids[:1].expand(3),
            subject_embeds=x.subject[:1].expand(3, -1),
        )  # fmt: skip
    assert_equal_to_rounding(cached, wanted)


def test_joined_caches_equal_one_cache(base: Path) -> None:
    """Images cached each on its own, at positions 0 and 1, are bit-equal to caching both at once."""
    model = trained_model(base, "cached")
    x = make_inputs(model, (4, 6), 2)
    with torch.no_grad():
        both = model.encode_condition(x.conditions, x.task_ids, x.subject)
        parts = [model.encode_condition(x.conditions[:, i : i + 1], x.task_ids, x.subject, position=i) for i in range(2)]
    joined = ConditionCache.join(parts)
    assert joined.conditions == 2
    assert joined.nbytes == both.nbytes == sum(part.nbytes for part in parts)
    for a, b in zip(joined.blocks, both.blocks, strict=True):
        for mine, theirs in zip(a, b, strict=True):
            assert_equal_to_rounding(mine, theirs)
    with pytest.raises(ValueError, match=r"positions 0, 1, \.\.\. in order"):
        ConditionCache.join(parts[::-1])


def test_cache_is_refused_where_it_would_be_wrong(bases: dict[str, Path]) -> None:
    """Presets whose condition depends on the step refuse a cache, and a cache of another size is named."""
    cached, paper = trained_model(bases["5b"], "cached"), trained_model(bases["5b"], "paper")
    x = make_inputs(cached, (4, 6))
    with torch.no_grad():
        cache = cached.encode_condition(x.conditions, x.task_ids)
        none = {"condition_latents": None, "task_ids": None, "subject_embeds": None}
        with pytest.raises(ValueError, match="preset must be 'cached' to cache the condition, got 'paper'"):
            paper.encode_condition(x.conditions, x.task_ids)
        with pytest.raises(ValueError, match="needs preset 'cached', got 'paper'"):
            run(paper, x, **none, condition_cache=cache)
        with pytest.raises(ValueError, match=r"of a \(4, 6\) token grid, got \(2, 3\)"):
            run(cached, make_inputs(cached, (8, 12)), **none, condition_cache=cache)
        with pytest.raises(ValueError, match="condition_cache must be given, got 2"):
            run(cached, x, condition_cache=cache)


def test_cache_batch_must_divide(bases: dict[str, Path]) -> None:
    """A cache of 2 for a batch of 3 is a named error, not a wrong pairing or a crash inside a block."""
    model = trained_model(bases["5b"], "cached")
    x = make_inputs(model, (4, 6), batch=3)
    with torch.no_grad():
        cache = model.encode_condition(x.conditions[:2], x.task_ids[:2])
        with pytest.raises(ValueError, match="condition_cache must have batch"):
            run(model, x, condition_latents=None, task_ids=None, subject_embeds=None, condition_cache=cache)


def test_cache_tells_its_size(bases: dict[str, Path]) -> None:
    """`repr` names count, grid, batch, blocks, memory and device."""
    model = trained_model(bases["5b"], "cached")
    x = make_inputs(model, (4, 6), 2)
    with torch.no_grad():
        cache = model.encode_condition(x.conditions, x.task_ids)
    size = cache.nbytes / 2**20
    blocks = len(model.transformer_blocks)
    assert repr(cache) == f"ConditionCache(2 of 2 x 3 tokens, batch 2, {blocks} blocks, {size:.1f} MiB on cpu)"


# --- embedded inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["paper", "open"])
@pytest.mark.parametrize("conditions", [1, 2])
def test_embedded_inputs_give_the_same_bits(base: Path, preset: str, conditions: int) -> None:
    """`embed` once and step many times is the direct call; a condition of batch 1 serves every sample."""
    model = trained_model(base, preset)
    x = make_inputs(model, (4, 6), conditions)
    with torch.no_grad():
        embedded = model.embed(x.text, x.conditions, x.task_ids, x.subject)
        none = {"condition_latents": None, "task_ids": None, "subject_embeds": None}
        assert torch.equal(run(model, x, encoder_hidden_states=embedded, **none), run(model, x))

        shared = model.embed(x.text, x.conditions[:1], x.task_ids[:1], x.subject[:1])
        x.conditions, x.task_ids, x.subject = (t[:1].expand(2, *t.shape[1:]) for t in (x.conditions, x.task_ids, x.subject))
        assert_equal_to_rounding(run(model, x, encoder_hidden_states=shared, **none), run(model, x))


def test_embedded_inputs_are_checked(bases: dict[str, Path]) -> None:
    """A condition given twice or not at all, or of another batch or size, is named."""
    model = trained_model(bases["5b"], "cached")
    x = make_inputs(model, (4, 6), batch=3)
    none = {"condition_latents": None, "task_ids": None, "subject_embeds": None}
    with torch.no_grad():
        with pytest.raises(ValueError, match="embedded condition, condition_cache must be given, got 2"):
            run(model, x, encoder_hidden_states=model.embed(x.text, x.conditions, x.task_ids))
        with pytest.raises(ValueError, match="must be given, got 0"):
            run(model, x, encoder_hidden_states=model.embed(x.text), **none)
        with pytest.raises(ValueError, match="task_ids must be given with condition_latents, got None"):
            model.embed(x.text, x.conditions)
        two = model.embed(x.text, x.conditions[:2], x.task_ids[:2])
        with pytest.raises(ValueError, match="condition_latents must have batch 1 or a divisor of 3, got 2"):
            run(model, x, encoder_hidden_states=two, **none)
        other = model.embed(x.text, make_inputs(model, (8, 12), batch=3).conditions, x.task_ids)
        with pytest.raises(ValueError, match=r"condition_latents must be of a \(2, 3\) token grid, got \(4, 6\)"):
            run(model, x, encoder_hidden_states=other, **none)


# --- torch.compile -------------------------------------------------------------------------------------------------------


# PyTorch's own compiler instantiates autograd functions while tracing them, which PyTorch deprecates
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", ["latents", "embedded", "cache"])
def test_compiles_to_one_graph(base: Path, way: str) -> None:
    """fullgraph, with the condition given in each way: eager's output to rounding, and gradients in training."""
    model = trained_model(base, "cached")
    x = make_inputs(model, (4, 6))
    inputs = {"hidden_states": x.target, "encoder_hidden_states": x.text, "timestep": x.timestep, "return_dict": False}
    if way == "latents":
        inputs |= {"condition_latents": x.conditions, "task_ids": x.task_ids, "subject_embeds": x.subject}
    with torch.no_grad():
        if way == "embedded":
            inputs["encoder_hidden_states"] = model.embed(x.text, x.conditions, x.task_ids, x.subject)
        elif way == "cache":
            inputs["condition_cache"] = model.encode_condition(x.conditions, x.task_ids, x.subject)
    torch._dynamo.reset()  # graphs of other models count towards the limit of recompilations
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    trained = [p for n, p in model.named_parameters() if "lora_" in n]
    found = []
    for run_ in (model, compiled):
        output = run_(**inputs)[0]
        found.append((output, *torch.autograd.grad(output.square().sum(), trained, retain_graph=True)))
    for actual, wanted in zip(found[1], found[0], strict=True):
        assert_equal_to_rounding(actual, wanted)


# --- training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["paper", "cached", "open"])
@pytest.mark.parametrize("conditions", [1, 2])
def test_gradient_checkpointing_changes_nothing(base: Path, preset: str, conditions: int) -> None:
    """Recomputed activations give the same output and gradients, bit for bit."""
    results = []
    for checkpointing in (False, True):
        model = trained_model(base, preset).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        output = run(model, make_inputs(model, (4, 6), conditions))
        output.square().mean().backward()
        results.append([output, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_every_trainable_weight_gets_a_gradient(base: Path) -> None:
    """LoRA, every condition AdaLN site that can matter, and both embeddings learn; nothing of the base does."""
    for preset in ("paper", "cached"):
        model = trained_model(base, preset)
        run(model, make_inputs(model, (4, 6))).square().mean().backward()
        last = f"condition_adaln.{len(model.transformer_blocks) - 1}"
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                assert parameter.grad is None, name
            elif not name.startswith(f"{last}.norm2"):  # nothing reads the condition after the last block's keys and values
                assert parameter.grad is not None, name
                assert parameter.grad.any(), name


def test_lora_scale_reaches_the_condition_branch(base: Path) -> None:
    """attention_kwargs={"scale": 0} turns the LoRA off in the joint pass and in the cache alike."""
    model = trained_model(base, "cached")
    x = make_inputs(model, (4, 6))
    off = {"attention_kwargs": {"scale": 0.0}}
    with torch.no_grad():
        on, scaled = run(model, x), run(model, x, **off)
        cache = model.encode_condition(x.conditions, x.task_ids, x.subject, **off)
        none = {"condition_latents": None, "task_ids": None, "subject_embeds": None}
        cached = run(model, x, **none, condition_cache=cache, **off)
        assert_equal_to_rounding(run(model, x), on)  # and the scale was put back
        model.disable_adapters()
        wanted = run(model, x)
    assert not torch.equal(on, scaled)
    assert_equal_to_rounding(scaled, wanted)
    assert_equal_to_rounding(cached, wanted)


def test_fused_qkv_gives_the_same(base: Path) -> None:
    """fuse_qkv_projections, a stock switch, changes nothing but rounding."""
    model = fresh_model(base, "paper", lora=False)
    x = make_inputs(model, (4, 6))
    with torch.no_grad():
        wanted = run(model, x)
        model.fuse_qkv_projections()
        assert_equal_to_rounding(run(model, x), wanted)


@pytest.mark.parametrize("preset", ["paper", "cached"])
def test_kernels_give_the_reference(base: Path, preset: str) -> None:
    """On Triton kernels (here in the interpreter) output and gradients are the reference's to float32 rounding."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("CPU kernels need TRITON_INTERPRET=1")
    model = trained_model(base, preset).float()
    x = make_inputs(model, (4, 6))
    single = {
        "hidden_states": x.target.float(),
        "encoder_hidden_states": x.text.float(),
        "condition_latents": x.conditions.float(),
        "subject_embeds": x.subject.float(),
    }
    results = []
    for impl in ("reference", "triton"):
        model.impl = impl
        model.zero_grad()
        output = run(model, x, **single)
        output.square().mean().backward()
        results.append([output.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    eps = torch.finfo(torch.float32).eps
    for wanted, got in zip(*results, strict=True):
        assert (got - wanted).abs().max() <= 100 * eps * max(wanted.abs().max(), results[0][1].abs().max())


# --- bad input -----------------------------------------------------------------------------------------------------------


def test_shapes_are_checked(bases: dict[str, Path]) -> None:
    """Wrong shapes name the argument, what it must be and what came."""
    model = fresh_model(bases["5b"], "paper", lora=False)
    x = make_inputs(model, (4, 6))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"hidden_states": x.clip}, r"hidden_states must have shape \[B, 1, 4, h, w\], got \[2, 2, 4, 4, 6\]"),
        ({"hidden_states": x.target[..., :3, :]}, "multiples of patch_size 2, got 3 x 6"),
        ({"encoder_hidden_states": x.text[:1]}, "encoder_hidden_states must have batch 2, got 1"),
        ({"condition_latents": x.conditions[..., :4]}, r"condition_latents must have shape .* got \[2, 1, 4, 4, 4\]"),
        ({"condition_latents": x.conditions[:, 0]}, "condition_latents must have shape"),
        ({"condition_latents": x.conditions[:, :0]}, r"K >= 1, 4, 4, 6\], got \[2, 0, 4, 4, 6\]"),
        ({"task_ids": None}, "task_ids must be given with condition_latents, got None"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            run(model, x, **change)


def test_1_5_needs_two_copies_of_the_target(bases: dict[str, Path]) -> None:
    """One latent frame, as in 1.0, is named as wrong for 1.5."""
    model = fresh_model(bases["1.5"], "paper", lora=False)
    x = make_inputs(model, (4, 6))
    with pytest.raises(ValueError, match=r"hidden_states must have shape \[B, 2, 4, h, w\], got \[2, 1, 4, 4, 6\]"):
        run(model, x, hidden_states=x.target[:, :1])


def test_1_5_copies_keep_their_own_noise(bases: dict[str, Path]) -> None:
    """The two frames of 1.5's target are two inputs and two predictions, not one repeated."""
    model = fresh_model(bases["1.5"], "paper", lora=False)
    x = make_inputs(model, (4, 6))
    with torch.no_grad():
        output = run(model, x)
        assert not torch.equal(output[:, 0], output[:, 1])
        assert not torch.equal(run(model, x, hidden_states=x.target.flip(1)), output)


def test_unknown_task(bases: dict[str, Path]) -> None:
    """The error lists the model's own tasks."""
    model = fresh_model(bases["5b"], "paper", lora=False)
    assert model.task_ids(["colouring", "canny"]).tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"task must be one of \['canny', 'colouring'\], got 'depth'"):
        model.task_ids(["depth"])


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(bases: dict[str, Path], dtype: torch.dtype, geometry: str) -> None:
    """A half-precision pipeline predicts in its own dtype, close to float32 as far as that dtype goes."""
    wanted_model = RealGeneralPipeline.from_pretrained(bases[geometry]).transformer
    model = RealGeneralPipeline.from_pretrained(bases[geometry], dtype=dtype).transformer
    assert {p.dtype for p in model.parameters()} == {dtype}
    x = make_inputs(model, (4, 6))
    single, half = (
        {k: v.to(t) for k, v in (("c", x.conditions), ("y", x.target), ("e", x.text))} for t in (torch.float32, dtype)
    )
    outputs = []
    for net, values in ((wanted_model, single), (model, half)):
        with torch.no_grad():
            change: Callable[..., Tensor] = run
            outputs.append(
                change(
                    net, x, hidden_states=values["y"], encoder_hidden_states=values["e"], condition_latents=values["c"],
                    subject_embeds=None,
                )
            )  # fmt: skip
    assert outputs[1].dtype == dtype
    assert torch.isfinite(outputs[1]).all()
    relative = (outputs[1].float() - outputs[0]).norm() / outputs[0].norm()
    assert relative < 8 * torch.finfo(dtype).eps
