"""Adapter files: what is saved is what is loaded, plain diffusers reads the LoRA, and mix-ups are told."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from realgeneral import RealGeneralPipeline, RealGeneralTransformer3DModel
from realgeneral.errors import Failure, UsageError
from realgeneral.model import adapter as adapter_files
from realgeneral.model.adapter import (
    CONDITION_FILE,
    DIGEST_KEY,
    LORA_FILE,
    PAIR_KEY,
    load_adapter,
    read_adapter_info,
    save_adapter,
)
from realgeneral.model.adapter_info import AdapterInfo, adapter_info
from realgeneral.model.lora import add_lora, mark_trainable, merge_lora, unmerge_lora
from realgeneral.settings.train import LORA_TARGETS
from tests.realgeneral.helpers.checkpoints import save_checkpoint, tiny_transformer
from tests.realgeneral.helpers.models import make_inputs, run, trained_model

RANK, ALPHA = 3, 6.0
SPECS = ("canny", "colouring")


def trained(base: Path, preset: str = "cached") -> RealGeneralTransformer3DModel:
    return trained_model(base, preset).float()


def save(base: Path, folder: Path, preset: str = "cached", specs: tuple[str, ...] = SPECS) -> RealGeneralTransformer3DModel:
    model = trained(base, preset)
    save_adapter(model, folder, adapter_info(model, specs, str(base)))
    return model


def fresh(base: Path) -> RealGeneralTransformer3DModel:
    return RealGeneralPipeline.from_pretrained(base).transformer


def rewrite(path: Path, metadata: dict[str, str | None], **tensors: torch.Tensor) -> None:
    """Change metadata (None removes a key) and tensors of a safetensors file."""
    with safe_open(path, "pt") as file:
        old = dict(file.metadata() or {})
    new = {k: v for k, v in {**old, **metadata}.items() if v is not None}
    save_file({**load_file(path), **tensors}, path, new)


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unharmed(model: RealGeneralTransformer3DModel, before: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert (tuple(model.config.tasks), model.config.preset) == (config["tasks"], config["preset"])
    assert not getattr(model, "peft_config", None)


def test_round_trip_is_bit_equal(base: Path, tmp_path: Path) -> None:
    """A fresh model with the adapter has every weight of the trained one, its preset, its tasks, and its output."""
    before = save(base, tmp_path / "a").eval()
    after = fresh(base)
    info = load_adapter(after, tmp_path / "a")
    one, two = before.state_dict(), after.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (info.rank, info.alpha, info.preset, info.tasks) == (RANK, ALPHA, "cached", SPECS)
    assert (tuple(after.config.tasks), after.config.preset) == (SPECS, "cached")
    assert info.base == base.name
    assert not any(p.requires_grad for p in after.parameters())
    x = make_inputs(before, (4, 6))
    with torch.no_grad():
        assert torch.equal(run(before.double(), x), run(after.double(), x))


def test_lora_loads_in_plain_diffusers(base: Path, tmp_path: Path) -> None:
    """CogVideoXPipeline.load_lora_weights reads the LoRA file with the trained alpha, and gives the trained clip model."""
    ours = save(base, tmp_path / "a").double()
    pipe = CogVideoXPipeline.from_pretrained(base)
    pipe.load_lora_weights(tmp_path / "a", weight_name=LORA_FILE)
    config = next(iter(pipe.transformer.peft_config.values()))
    assert (config.r, config.lora_alpha) == (RANK, ALPHA)
    layer = pipe.transformer.transformer_blocks[0].attn1.to_q
    assert next(iter(layer.scaling.values())) == ALPHA / RANK
    x = make_inputs(ours, (8, 12), 2)
    rotary = None
    if ours.config.use_rotary_positional_embeddings:
        rotary = pipe._prepare_rotary_positional_embeddings(64, 96, x.clip.shape[1], torch.device("cpu"))
    with torch.no_grad():
        theirs = pipe.transformer.double()(x.clip, x.text, x.timestep, image_rotary_emb=rotary, return_dict=False)[0]
        assert torch.equal(theirs, ours(x.clip, x.text, x.timestep, image_rotary_emb=rotary, return_dict=False)[0])


def test_the_lora_file_needs_no_weight_name(bases: dict[str, Path], tmp_path: Path) -> None:
    """`load_lora_weights(folder)` finds the file beside realgeneral.safetensors by itself."""
    save(bases["5b"], tmp_path / "a")
    pipe = CogVideoXPipeline.from_pretrained(bases["5b"])
    pipe.load_lora_weights(tmp_path / "a")
    assert pipe.transformer.peft_config


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_disk(bases: dict[str, Path], tmp_path: Path, dtype: torch.dtype) -> None:
    """An adapter stored in half precision loads into a float32 model with the rounded weights."""
    model = trained(bases["5b"])
    save_adapter(model, tmp_path / "a", adapter_info(model, SPECS, "x"), dtype)
    for name in (LORA_FILE, CONDITION_FILE):
        assert {t.dtype for t in load_file(tmp_path / "a" / name).values()} == {dtype}
    other = fresh(bases["5b"])
    load_adapter(other, tmp_path / "a")
    for name, parameter in other.condition_parameters().items():
        assert torch.equal(parameter, model.state_dict()[name].to(dtype).float())


def test_half_precision_base_keeps_its_dtype(bases: dict[str, Path], tmp_path: Path) -> None:
    """A bfloat16 pipeline stays bfloat16 with an adapter, and a trainer's weights become float32."""
    save(bases["5b"], tmp_path / "a")
    pipe = RealGeneralPipeline.from_pretrained(bases["5b"], dtype=torch.bfloat16, adapter=tmp_path / "a")
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.bfloat16}
    trainable = mark_trainable(pipe.transformer)
    assert {p.dtype for p in trainable} == {torch.float32}
    assert {p.dtype for p in pipe.transformer.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_only_lora_and_condition_branch_train(base: Path) -> None:
    """add_lora leaves exactly LoRA, condition AdaLN and embeddings trainable."""
    model = fresh(base)
    add_lora(model, 2, 4.0, ["to_q", "to_v"])
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names
    assert all("lora_" in name or name.startswith("condition_") for name in names)
    assert names >= model.condition_parameters().keys()
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names if "lora_" in name} == {"to_q", "to_v"}


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_is_checked(bases: dict[str, Path], rank: int) -> None:
    """A rank below 1 is a usage error."""
    with pytest.raises(UsageError, match=f"rank must be at least 1, got {rank}"):
        add_lora(fresh(bases["5b"]), rank, None, LORA_TARGETS)


def test_unknown_lora_target(bases: dict[str, Path]) -> None:
    """A LoRA target that the model does not have is a usage error that names it."""
    with pytest.raises(UsageError, match="nonsense"):
        add_lora(fresh(bases["5b"]), 2, None, ["nonsense"])
    with pytest.raises(UsageError, match=r"LoRA target must name linear layers .*, got 'norm1'"):
        add_lora(fresh(bases["5b"]), 2, None, ["to_q", "norm1"])


def test_metadata_round_trip(bases: dict[str, Path], tmp_path: Path) -> None:
    """Everything that must agree travels in the file; options of tasks too."""
    model, specs = trained(bases["5b"]), ("deblurring:radius=16", "canny:low=50,high=90")
    model.register_to_config(tasks=("deblurring", "canny"))
    save_adapter(model, tmp_path / "a", adapter_info(model, specs, str(bases["5b"])))
    info = read_adapter_info(tmp_path / "a")
    assert info.tasks == ("deblurring:radius=16.0", "canny:low=50,high=90")
    assert info.task_names == ("deblurring", "canny")
    assert info.task_spec("canny") == "canny:low=50,high=90"
    assert {"diffusers", "torch", "rgkernels"} <= info.versions.keys()
    assert AdapterInfo.from_metadata(info.to_metadata(), tmp_path) == info
    with pytest.raises(UsageError, match=r"task must be one that the adapter was trained for, .*got 'depth'"):
        info.task_spec("depth")


# --- mix-ups -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(bases: dict[str, Path], tmp_path: Path) -> Path:
    save(bases["5b"], tmp_path / "a")
    return tmp_path / "a"


Damage = Callable[[Path, dict[str, Path], Path], None]


def _other_rank(folder: Path, bases: dict[str, Path], tmp: Path) -> None:
    model = fresh(bases["5b"])
    model.configure_condition(SPECS, "cached")
    add_lora(model, RANK + 2, ALPHA, LORA_TARGETS)
    save_adapter(model, tmp / "other", adapter_info(model, SPECS, "x"))
    shutil.copy(tmp / "other" / LORA_FILE, folder / LORA_FILE)


def _other_alpha(folder: Path, bases: dict[str, Path], tmp: Path) -> None:
    model = fresh(bases["5b"])
    model.configure_condition(SPECS, "cached")
    add_lora(model, RANK, ALPHA * 2, LORA_TARGETS)
    save_adapter(model, tmp / "other", adapter_info(model, SPECS, "x"))
    shutil.copy(tmp / "other" / LORA_FILE, folder / LORA_FILE)


def _other_training(folder: Path, bases: dict[str, Path], tmp: Path) -> None:
    model = trained(bases["5b"])
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if ".lora_B" in name).add_(1)
    save_adapter(model, tmp / "other", adapter_info(model, SPECS, "x"))
    shutil.copy(tmp / "other" / LORA_FILE, folder / LORA_FILE)


def _some_layers(names: str) -> Damage:
    """Only the LoRA tensors with a name of that beginning are left."""

    def damage(folder: Path, bases: dict[str, Path], tmp: Path) -> None:
        with safe_open(folder / LORA_FILE, "pt") as file:
            metadata = file.metadata()
        left = {name: x for name, x in load_file(folder / LORA_FILE).items() if name.startswith(names)}
        save_file(left, folder / LORA_FILE, metadata)

    damage.__name__ = f"only {names}"
    return damage


def _other_width(folder: Path, bases: dict[str, Path], tmp: Path) -> None:
    wide = {name: torch.zeros(x.shape[0] + 1, x.shape[1]) for name, x in load_file(folder / LORA_FILE).items()}
    rewrite(folder / LORA_FILE, {}, **wide)


def _not_a_lora(folder: Path, bases: dict[str, Path], tmp: Path) -> None:
    save_file({"hello": torch.zeros(3)}, folder / LORA_FILE)


def _truncate(name: str) -> Damage:
    def damage(folder: Path, bases: dict[str, Path], tmp: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return damage


def _remove(name: str) -> Damage:
    return lambda folder, bases, tmp: os.remove(folder / name)


def _metadata(**changes: str | None) -> Damage:
    return lambda folder, bases, tmp: rewrite(folder / CONDITION_FILE, changes)


def _missing_tensor(folder: Path, bases: dict[str, Path], tmp: Path) -> None:
    with safe_open(folder / CONDITION_FILE, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / CONDITION_FILE)
    tensors.popitem()
    save_file(tensors, folder / CONDITION_FILE, metadata)


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (_remove(LORA_FILE), Failure, f"must hold {LORA_FILE}, found none"),
        (_remove(CONDITION_FILE), Failure, f"must hold {CONDITION_FILE}, found none"),
        (_truncate(LORA_FILE), Failure, "complete safetensors file"),
        (_truncate(CONDITION_FILE), Failure, "complete safetensors file"),
        (_metadata(preset=None), Failure, "metadata"),
        (_metadata(rank="many"), Failure, "metadata"),
        (_metadata(tasks="5"), Failure, "metadata"),
        (_metadata(geometry="[1"), Failure, "metadata"),
        (_metadata(geometry="null"), Failure, "without a valid geometry"),
        (_metadata(tasks="[1, 2]"), Failure, "without a valid tasks"),
        (_metadata(signature='["a"]'), Failure, "without a valid signature"),
        (_metadata(versions="[]"), Failure, "without a valid versions"),
        (_metadata(preset="fast"), Failure, "preset"),
        (_metadata(tasks='["canny", "own-task"]'), UsageError, "own-task"),
        (_missing_tensor, Failure, "must hold the"),
        (_other_rank, Failure, f"must have rank {RANK} .* got {RANK + 2}"),
        (_other_alpha, Failure, "alpha"),
        (_other_training, Failure, f"{LORA_FILE} and {CONDITION_FILE} must be of one training, got files of two"),
        (_some_layers("nothing"), Failure, r"must hold the \d+ tensors of \d+ layers, got 0; first odd: "),
        (_some_layers("transformer.transformer_blocks.0"), Failure, "first odd: transformer.transformer_blocks.1"),
        (_other_width, Failure, LORA_FILE),
        (_not_a_lora, Failure, LORA_FILE),
    ],
    ids=lambda value: getattr(value, "__name__", None) if callable(value) and not isinstance(value, type) else None,
)
def test_damaged_adapters_are_told_and_leave_the_model_alone(
    bases: dict[str, Path], saved: Path, tmp_path: Path, damage: Damage, kind: type[Exception], message: str
) -> None:
    """Each defect is a one-line error of the right kind, and the model is as it was."""
    damage(saved, bases, tmp_path)
    model = fresh(bases["5b"])
    before, config = snapshot(model), {"tasks": tuple(model.config.tasks), "preset": model.config.preset}
    with pytest.raises(kind, match=message) as caught:
        load_adapter(model, saved)
    assert "\n" not in str(caught.value)
    assert_unharmed(model, before, config)


def test_adapter_of_another_base(bases: dict[str, Path], saved: Path) -> None:
    """Another geometry is a usage error that says which entries differ, and whose adapter it is."""
    for other, named in (("2b", "use_rotary_positional_embeddings = True (this base: False)"), ("1.5", "patch_size_t = None")):
        model = fresh(bases[other])
        before, config = snapshot(model), {"tasks": tuple(model.config.tasks), "preset": model.config.preset}
        with pytest.raises(UsageError) as caught:
            load_adapter(model, saved)
        assert named in str(caught.value)
        assert "'5b'" in str(caught.value)
        assert_unharmed(model, before, config)


def test_adapter_of_another_preset(bases: dict[str, Path], saved: Path) -> None:
    """A preset that was asked for and differs is a usage error."""
    model = fresh(bases["5b"])
    with pytest.raises(UsageError, match="adapter must be of preset 'paper', got one trained in preset 'cached'"):
        load_adapter(model, saved, preset="paper")
    assert load_adapter(model, saved, preset="cached").preset == "cached"


def test_a_second_adapter_needs_the_first_unloaded(bases: dict[str, Path], saved: Path, tmp_path: Path) -> None:
    """Loading over a loaded adapter is a clear error that harms nothing; after unloading, the new one is exact."""
    save(bases["5b"], tmp_path / "b", preset="paper")
    pipe = RealGeneralPipeline.from_pretrained(bases["5b"], adapter=saved)
    before = snapshot(pipe.transformer)
    with pytest.raises(UsageError, match="LoRA"):
        pipe.load_adapter(tmp_path / "b")
    assert all(torch.equal(value, before[name]) for name, value in pipe.transformer.state_dict().items())
    assert pipe.adapter is not None
    assert pipe.adapter.preset == "cached"
    pipe.unload_lora_weights()
    pipe.load_adapter(tmp_path / "b")
    wanted = RealGeneralPipeline.from_pretrained(bases["5b"], adapter=tmp_path / "b").transformer.state_dict()
    got = pipe.transformer.state_dict()
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_after_delete_adapters(bases: dict[str, Path], saved: Path) -> None:
    """It leaves PEFT's layers without a LoRA in place: told as a LoRA that is there, and unloading helps."""
    pipe = RealGeneralPipeline.from_pretrained(bases["5b"], adapter=saved)
    pipe.delete_adapters("default")
    with pytest.raises(UsageError, match=r"must have no LoRA before an adapter is loaded, got one: call unload_lora_weights"):
        pipe.load_adapter(saved)
    pipe.unload_lora_weights()
    pipe.load_adapter(saved)


def test_files_can_be_read_by_whom_the_umask_lets(bases: dict[str, Path], tmp_path: Path) -> None:
    """On a shared disk an adapter is as readable as any other new file."""
    before = os.umask(0o027)
    try:
        save(bases["5b"], tmp_path / "a")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()} == {0o640}


def test_two_writings_are_equal(bases: dict[str, Path], tmp_path: Path) -> None:
    """The same weights and settings are the same bytes each time, so that files can be compared by a hash."""
    for name in "abcd":
        save(bases["5b"], tmp_path / name)
    for name in (LORA_FILE, CONDITION_FILE):
        assert len({(tmp_path / folder / name).read_bytes() for folder in "abcd"}) == 1


def test_files_of_earlier_versions(bases: dict[str, Path], saved: Path) -> None:
    """Without the mark of their pair they load as before."""
    for name in (LORA_FILE, CONDITION_FILE):
        rewrite(saved / name, {PAIR_KEY: None, DIGEST_KEY: None})
        load_adapter(fresh(bases["5b"]), saved)


def test_interrupted_save_leaves_the_old_adapter(bases: dict[str, Path], saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that dies at any file leaves both old files as they were, and the next save works."""
    before = {name: (saved / name).read_bytes() for name in (LORA_FILE, CONDITION_FILE)}
    model = trained(bases["5b"], "paper")
    info = adapter_info(model, SPECS, "x")
    with monkeypatch.context() as patch:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(adapter_files, "save_file", full)
        with pytest.raises(Failure, match=r"could not be written to .* No space left"):
            save_adapter(model, saved, info)
    assert {name: (saved / name).read_bytes() for name in before} == before
    assert sorted(os.listdir(saved.parent)) == ["a"]
    save_adapter(model, saved, info)
    assert read_adapter_info(saved).preset == "paper"
    assert sorted(os.listdir(saved.parent)) == ["a"]
    assert sorted(os.listdir(saved)) == sorted(before)


def test_merged_lora(bases: dict[str, Path], saved: Path) -> None:
    """Merged, the model gives the same to rounding; unmerged, every weight is what it was, bit for bit."""
    model = fresh(bases["5b"])
    load_adapter(model, saved)
    x = make_inputs(model, (4, 6))
    model.double()
    before = snapshot(model)
    with torch.no_grad():
        wanted = run(model, x)
        merge_lora(model)
        merge_lora(model)
        weight = model.transformer_blocks[0].attn1.to_q.base_layer.weight
        assert not torch.equal(weight, before["transformer_blocks.0.attn1.to_q.base_layer.weight"])
        torch.testing.assert_close(run(model, x), wanted)
        unmerge_lora(model)
        unmerge_lora(model)
        assert torch.equal(run(model, x), wanted)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_base_name(bases: dict[str, Path], tmp_path: Path) -> None:
    """A folder is named by its last part (no private path in a shared file), a hub id as it is."""
    model = trained(bases["5b"])
    assert adapter_info(model, SPECS, f"{bases['5b']}/").base == "5b"
    assert adapter_info(model, SPECS, "THUDM/CogVideoX-5b").base == "THUDM/CogVideoX-5b"


def test_geometry_entries_are_json(bases: dict[str, Path], saved: Path) -> None:
    """The metadata is readable without this package."""
    with safe_open(saved / CONDITION_FILE, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["geometry"])["num_layers"] == 2
    assert (metadata["rank"], metadata["alpha"], metadata["preset"]) == ("3", "6.0", "cached")


def test_adapter_on_a_base_saved_elsewhere(bases: dict[str, Path], saved: Path, tmp_path: Path) -> None:
    """The base's folder name is for people: the same geometry in another folder loads."""
    copy = save_checkpoint(tmp_path / "renamed", "5b")
    assert load_adapter(fresh(copy), saved).base == "5b"


def test_another_base_of_the_same_geometry_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    """Same shapes, other weights: refused and named; a slightly fine-tuned or bfloat16 base still fits."""
    save(bases["5b"], tmp_path / "a")
    other = RealGeneralTransformer3DModel.from_cogvideox(tiny_transformer("5b", seed=7))
    with pytest.raises(UsageError, match="must be for this base, got one trained on '5b', whose weights are others"):
        load_adapter(other, tmp_path / "a")
    tuned = fresh(bases["5b"])
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.001)
    load_adapter(tuned, tmp_path / "a")
    load_adapter(fresh(bases["5b"]).to(torch.bfloat16), tmp_path / "a")


# --- damage that only bits show ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [LORA_FILE, CONDITION_FILE])
def test_flipped_bits_are_noticed(bases: dict[str, Path], saved: Path, name: str) -> None:
    """Wherever a bit of a file is flipped, loading is refused in one line that names a file, or gives the very same."""
    content, model = (saved / name).read_bytes(), fresh(bases["5b"])
    header = 8 + int.from_bytes(content[:8], "little")
    rng = random.Random(0)
    places = [rng.randrange(header * 8) for _ in range(20)] + [rng.randrange(header * 8, len(content) * 8) for _ in range(20)]
    before, config = snapshot(model), {"tasks": tuple(model.config.tasks), "preset": model.config.preset}
    intact = fresh(bases["5b"])
    load_adapter(intact, saved)
    for place in places:
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        (saved / name).write_bytes(damaged)
        told = None
        try:
            load_adapter(model, saved)
        except (Failure, UsageError) as error:
            told = str(error)
        if told is not None:
            assert "\n" not in told
            assert_unharmed(model, before, config)
        else:  # the name of a digest was hit, say: everything else is as it was written
            assert dict(model.config) == dict(intact.config)
            assert all(torch.equal(x, y) for x, y in zip(snapshot(model).values(), snapshot(intact).values(), strict=True))
            model = fresh(bases["5b"])
    (saved / name).write_bytes(content)
    load_adapter(model, saved)


def test_files_without_digests_have_the_mark_of_their_pair(bases: dict[str, Path], saved: Path) -> None:
    """The mark of version 0.1 is not only compared: the LoRA's bits must be those that it was made of."""
    path = saved / LORA_FILE
    name, tensor = next(iter(load_file(path).items()))
    changed = tensor.clone()
    changed[0, 0] += 1
    rewrite(path, {DIGEST_KEY: None}, **{name: changed})
    with pytest.raises(Failure, match=f"{LORA_FILE} must hold what was written, got other bits"):
        load_adapter(fresh(bases["5b"]), saved)


@pytest.mark.parametrize(("name", "value"), [(LORA_FILE, math.nan), (CONDITION_FILE, math.inf)])
def test_numbers_that_are_not_finite(bases: dict[str, Path], saved: Path, name: str, value: float) -> None:
    """Neither read nor written: the first tensor is named, and what was there stays."""
    key, tensor = next(iter(load_file(saved / name).items()))
    poisoned = tensor.clone()
    poisoned.view(-1)[3] = value
    content = (saved / name).read_bytes()
    rewrite(saved / name, {DIGEST_KEY: None, PAIR_KEY: None}, **{key: poisoned})
    with pytest.raises(Failure, match=f"{name} must hold finite numbers, got {value} in {key}"):
        load_adapter(fresh(bases["5b"]), saved)
    (saved / name).write_bytes(content)
    model = trained(bases["5b"])
    info = adapter_info(model, SPECS, "x")
    with torch.no_grad():
        own = dict(model.named_parameters())
        own["condition_embedding.subject.weight"][0, 0] = value
    with pytest.raises(Failure, match=f"adapter must hold finite numbers, got {value} in condition_embedding.subject.weight"):
        save_adapter(model, saved, info)
    assert (saved / name).read_bytes() == content


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("use_rslora", True, "use_rslora at its default False, got True"),
        ("use_dora", True, "use_dora at its default False, got True"),
        ("alpha_pattern", {"to_q": 1}, r"alpha_pattern at its default {}, got {'to_q': 1}"),
        ("rank_pattern", {"to_q": 1}, r"rank_pattern at its default {}, got"),
        ("of_a_newer_peft", 3, "of_a_newer_peft at its default None, got 3"),
        ("target_modules", "all-linear", "must hold PEFT's settings in its metadata"),
    ],
)
def test_foreign_settings_of_a_lora(bases: dict[str, Path], saved: Path, setting: str, value: Any, message: str) -> None:
    """What changes a layer's numbers is refused by name, not left out or applied without a word."""
    with safe_open(saved / LORA_FILE, "pt") as file:
        settings = json.loads(file.metadata()[LORA_ADAPTER_METADATA_KEY])
    settings[f"transformer.{setting}"] = value
    rewrite(saved / LORA_FILE, {LORA_ADAPTER_METADATA_KEY: json.dumps(settings), DIGEST_KEY: None})
    with pytest.raises(Failure, match=message):
        load_adapter(fresh(bases["5b"]), saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("depth", "colouring")}, r"info must have the tasks of the transformer, \['canny', 'colouring'\], got"),
        ({"preset": "paper"}, "info must have the preset of the transformer, 'cached', got 'paper'"),
        ({"rank": 9}, f"info must have the rank of the transformer, {RANK}, got 9"),
    ],
)
def test_info_of_another_model(bases: dict[str, Path], saved: Path, changes: dict[str, Any], message: str) -> None:
    """What nothing could load is not written."""
    model, content = trained(bases["5b"]), (saved / LORA_FILE).read_bytes()
    info = dataclasses.replace(adapter_info(model, SPECS, "x"), **changes)
    with pytest.raises(UsageError, match=message):
        save_adapter(model, saved, info)
    assert (saved / LORA_FILE).read_bytes() == content


# --- merging, whatever else is done to the LoRA --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged")
@pytest.mark.parametrize("between", ["disable", "unfuse", "another", "twice"])
def test_unmerge_restores_after_anything(bases: dict[str, Path], saved: Path, between: str) -> None:
    """PEFT may have unmerged in between, with rounding: every base weight is what it was, bit for bit."""
    model = fresh(bases["5b"])
    load_adapter(model, saved)
    before = {name: tensor for name, tensor in snapshot(model).items() if "lora" not in name}
    merge_lora(model)
    if between == "disable":
        model.disable_lora()
    elif between == "unfuse":
        model.unfuse_lora()
    elif between == "another":
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="other")
        model.set_adapter("other")
    else:
        model.disable_lora()
        model.enable_lora()
        merge_lora(model)
    unmerge_lora(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_what_merging_takes_away_is_refused(bases: dict[str, Path], saved: Path) -> None:
    """A LoRA that is fused otherwise; weights, choice and scale of a merged one."""
    model = fresh(bases["5b"])
    load_adapter(model, saved)
    model.fuse_lora()
    with pytest.raises(UsageError, match="must have been merged by merge_lora"):
        unmerge_lora(model)
    model.unfuse_lora()
    merge_lora(model)
    with pytest.raises(ValueError, match="must have no merged LoRA to choose adapters"):
        model.set_adapters("default", 0.5)
    x, model = make_inputs(model, (4, 6)), model.double()
    arguments = {"condition_latents": x.conditions, "task_ids": x.task_ids}
    with pytest.raises(ValueError, match=r"LoRA scale must be 1 once the LoRA is merged, got 0\.5"):
        model(x.target, x.text, x.timestep, **arguments, attention_kwargs={"scale": 0.5})


@pytest.mark.parametrize("scale", [math.nan, math.inf, "1", True])
def test_wrong_scales_leave_the_model_alone(bases: dict[str, Path], saved: Path, scale: Any) -> None:
    """A scale that cannot be taken back is refused before it reaches a layer."""
    model = fresh(bases["5b"])
    load_adapter(model, saved)
    x, model = make_inputs(model, (4, 6)), model.double()
    arguments = {"condition_latents": x.conditions, "task_ids": x.task_ids}
    with torch.no_grad():
        wanted = model(x.target, x.text, x.timestep, **arguments).sample
        with pytest.raises(ValueError, match="LoRA scale must be a finite number"):
            model(x.target, x.text, x.timestep, **arguments, attention_kwargs={"scale": scale})
        with pytest.raises(ValueError, match="attention_kwargs must be"):
            model(x.target, x.text, x.timestep, **arguments, attention_kwargs={"skale": 1})
        assert torch.equal(model(x.target, x.text, x.timestep, **arguments).sample, wanted)
