"""Rows to samples and batches: tasks and their conditions, epochs, and every bad row."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from realgeneral.data import samples as data_module
from realgeneral.data.order import RunSampler
from realgeneral.data.samples import TextCheck, collate
from realgeneral.data.workers import from_workers
from realgeneral.errors import Failure, UsageError
from realgeneral.tasks import depth_revision, get_task
from tests.realgeneral.helpers.checkpoints import TEXT_WINDOW, tiny_tokenizer
from tests.realgeneral.helpers.datasets import BAD, Writer, dataset, good_rows, picture, write_folder, write_parquet, write_tar
from tests.realgeneral.helpers.pictures import encoded, make_photo

# --- samples -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16", "1"])
def test_pictures_of_every_mode(write: Writer, tmp_path: Path, mode: str) -> None:
    """Grey, transparent, palette, CMYK and 16-bit pictures are rows like others."""
    if mode == "I;16":
        data = encoded(Image.fromarray(np.full((24, 40), 1000, np.uint16)))
    else:
        data = encoded(make_photo(40, 24).convert(mode), "TIFF" if mode == "CMYK" else "PNG")
    sample = dataset(write(tmp_path / "d", [{"target": data, "prompt": "a"}]))[0]
    assert sample.target.shape == (3, 16, 32)
    assert sample.conditions.shape == (1, 3, 16, 32)


def test_conditions_are_those_of_the_task(tmp_path: Path) -> None:
    """A derived condition is made from the target at its final size; the target of an analysis task is its map."""
    path = write_folder(tmp_path / "d", good_rows(1))
    sample = dataset(path, ("colouring",))[0]
    assert (sample.conditions[0] == sample.conditions[0, :1]).all()
    sketch = dataset(path, ("image-to-sketch",))[0]
    assert set(sketch.target.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(sketch.conditions[0], sample.target)


def test_task_options_of_the_run_reach_the_rows(tmp_path: Path) -> None:
    """A row that names a task gets it with the run's options."""
    rows = [{**row, "task": "deblurring"} for row in good_rows(1)]
    path = write_folder(tmp_path / "d", rows)
    a, b = (dataset(path, ("canny", f"deblurring:radius={r}"))[0] for r in (10, 200))
    assert a.task == b.task == "deblurring"
    assert not torch.equal(a.conditions, b.conditions)


# --- order ---------------------------------------------------------------------------------------------------------------


def test_every_row_once_per_epoch_in_a_new_order(tmp_path: Path) -> None:
    """Each epoch is a permutation of the rows, and another one each time."""
    data = dataset(write_folder(tmp_path / "d", good_rows(7)))
    epochs = [[data[n].name for n in range(e * 7, e * 7 + 7)] for e in range(4)]
    assert all(len(set(names)) == 7 for names in epochs)
    assert len({tuple(names) for names in epochs}) == 4
    assert [data[n].name for n in range(7)] == epochs[0]  # going back works


def test_samples_depend_on_the_seed_alone(tmp_path: Path) -> None:
    """Sample n is the same in any order of access, and differs with the seed."""
    path = write_folder(tmp_path / "d", good_rows(5))
    one, two, other = dataset(path), dataset(path), dataset(path, seed=1)
    forward = [one[n] for n in range(15)]
    backward = [two[n] for n in reversed(range(15))][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert (a.name, a.task) == (b.name, b.task)
        assert torch.equal(a.conditions, b.conditions)
    assert [s.name for s in forward] != [other[n].name for n in range(15)]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(tmp_path: Path, workers: int) -> None:
    """The batches are the same with and without worker processes, bad rows included."""
    rows = good_rows(5)
    rows[2]["target"] = b"not a picture"
    for writer in (write_folder, write_parquet, write_tar):
        path = writer(tmp_path / writer.__name__, rows)

        def batches(count: int, path: str = path) -> list[Any]:
            sampler = RunSampler(4, 24, 0, 1)
            return list(DataLoader(dataset(path), 4, sampler=sampler, num_workers=count, collate_fn=collate))

        for a, b in zip(batches(0), batches(workers), strict=True):
            assert (a.names, a.tasks, a.skipped) == (b.names, b.tasks, b.skipped)
            assert torch.equal(a.target, b.target)
            assert torch.equal(a.conditions, b.conditions)


def test_variants_are_few_and_of_the_row(tmp_path: Path) -> None:
    """With variants, a row has so many holes whatever the seed, each row its own; without, a new one each time."""
    path = write_folder(tmp_path / "d", [{"target": picture(0), "prompt": f"a {i}"} for i in range(2)])

    def holes(seed: int, variants: int) -> dict[str, set[bytes]]:
        data, found = dataset(path, ("inpainting",), seed=seed, variants=variants), defaultdict(set)
        for n in range(40):
            found[data[n].name].add(data[n].conditions.numpy().tobytes())
        return found

    few = holes(0, 3)
    assert [len(found) for found in few.values()] == [3, 3]
    assert few == holes(1, 3)
    first, second = few.values()
    assert not first & second
    assert all(len(found) > 10 for found in holes(0, 0).values())


def test_task_weights(tmp_path: Path) -> None:
    """Weights set how often each task is drawn; weight 0 is never."""
    path = write_folder(tmp_path / "d", good_rows(2))
    data = dataset(path, ("canny", "colouring", "inpainting"), weights=[3.0, 1.0, 0.0])
    drawn = [data[n].task for n in range(200)]
    assert 0.6 < drawn.count("canny") / 200 < 0.9
    assert "inpainting" not in drawn


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_with_their_own_condition_name_their_task(write: Writer, tmp_path: Path, workers: int) -> None:
    """With several tasks a guess would train the wrong one: one line says so, from a worker too; one task needs no name."""
    rows = good_rows(2)
    rows[0] |= {"condition": [picture(5)], "task": "customization"}
    path = write(tmp_path / "named", rows)
    data = dataset(path, ("canny", "customization"), weights=[1.0, 0.0], strict=True)
    assert {data.sample(0, n).task for n in range(9)} == {"customization"}
    assert {data.sample(1, n).task for n in range(9)} == {"canny"}
    del rows[0]["task"]
    path = write(tmp_path / "unnamed", rows)
    loader = DataLoader(dataset(path, ("canny", "customization")), None, sampler=range(2), num_workers=workers)
    told = r"^\S+ (line 1|row 0|00000) must name its task \(column task\), since .* \['canny', 'customization'\], got none$"
    with pytest.raises(UsageError, match=told), from_workers():
        list(loader)
    assert dataset(path, ("customization",)).sample(0, 0).task == "customization"


def test_tasks_that_need_a_condition_are_drawn_only_for_rows_that_have_one(tmp_path: Path) -> None:
    """Plain pictures under the default seven tasks: only the tasks that derive their condition are drawn, no row is bad."""
    path = write_folder(tmp_path / "d", good_rows(3))
    data = dataset(path, ("customization", "canny", "depth", "image-to-depth", "colouring"), strict=True)
    assert {data[n].task for n in range(60)} == {"canny", "colouring"}
    alone = dataset(write_folder(tmp_path / "e", good_rows(1)), ("customization",), strict=True)
    with pytest.raises(Failure, match=r"must have a condition, since none of \['customization'\] derives one"):
        alone[0]


# --- bad rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("defect", sorted(BAD))
def test_bad_rows_are_named_and_skipped(write: Writer, tmp_path: Path, defect: str) -> None:
    """A bad row is passed over with its name and what is wrong; the good rows still come, each once per epoch or more."""
    change, message = BAD[defect]
    rows = good_rows(4)
    rows[1].update(change)
    path = write(tmp_path / "d", rows)
    data = dataset(path)
    samples = [data[n] for n in range(8)]
    skipped = {name for sample in samples for name in sample.skipped}
    assert len(skipped) == 1
    (told,) = skipped
    assert {"folder": "metadata.jsonl line 2", "parquet": "data.parquet row 1", "tar": "data.tar 00001"}[
        "tar" if path.endswith(".tar") else "parquet" if path.endswith("parquet") else "folder"
    ] in told
    assert "\n" not in told
    strict = dataset(path, strict=True)
    with pytest.raises(Failure, match=message):
        list(map(strict.__getitem__, range(4)))


def test_long_prompts_and_lost_subjects_are_bad_rows(tmp_path: Path) -> None:
    """A caption past the text window or without its subject is skipped like any bad row, not found in the middle of a run."""
    rows = [
        *good_rows(2),
        {"target": picture(0), "prompt": "a cat " * 30},
        {"target": picture(0), "prompt": "a cat", "subject": "dog"},
    ]
    path = write_folder(tmp_path / "d", rows)
    data = dataset(path, check=TextCheck(tiny_tokenizer(), TEXT_WINDOW))
    skipped = sorted({name for n in range(8) for name in data[n].skipped})
    assert len(skipped) == 2
    assert f"metadata.jsonl line 3 must have a prompt of at most {TEXT_WINDOW} tokens, got " in skipped[0]
    assert "metadata.jsonl line 4: subject must occur in the prompt 'a cat', got 'dog'" in skipped[1]


def test_only_bad_rows(write: Writer, tmp_path: Path) -> None:
    """Data without a good row ends in one line with the first reason, not in an endless search."""
    path = write(tmp_path / "d", [{"target": b"x", "prompt": "a"}] * 3)
    with pytest.raises(Failure, match=r"data must hold good rows, got 3 bad ones in a row; the first: .*not an image"):
        dataset(path)[0]


def test_batches_need_equally_many_conditions(tmp_path: Path) -> None:
    """Rows with one and with two conditions cannot share a batch; the error says so."""
    rows = good_rows(2)
    rows[0]["condition"], rows[1]["condition"] = [picture(5)], [picture(5), picture(6)]
    data = dataset(write_folder(tmp_path / "d", rows), ("canny",))
    with pytest.raises(Failure, match=r"same number of conditions, got \[1, 2\]; --buckets groups such rows"):
        collate([data[0], data[1]])


# --- fingerprints of depth models ----------------------------------------------------------------------------------------


def test_a_depth_models_files_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for every sample, but again when they change."""
    read = []
    monkeypatch.setattr(data_module, "folder_fingerprint", lambda folder: read.append(folder) or f"hash {len(read)}")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    task = get_task(f"depth:model={tmp_path}")
    assert len({data_module.task_fingerprint(task) for _ in range(3)}) == len(read) == 1
    (tmp_path / "model.safetensors").write_bytes(b"xy")
    assert data_module.task_fingerprint(task).endswith("hash 2")


def test_a_depth_model_of_the_hub_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new commit is another fingerprint; without network and cache there is none, which no row is blamed for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    task, found = get_task("depth:model=owner/depth"), []
    folder = tmp_path / "models--owner--depth"
    for commit in ("a" * 40, "b" * 40):
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "config.json").write_text("{}")
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
        depth_revision.cache_clear()
        found.append(data_module.task_fingerprint(task))
        assert found[-1].endswith(f" {commit}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    depth_revision.cache_clear()
    path = write_folder(tmp_path / "d", good_rows(1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="depth model must be a folder or a hub id that can be had, got owner/depth: "):
        dataset(path, ("depth:model=owner/depth",))
    with pytest.raises(UsageError, match=r"depth model must be the folder of a model, got .*empty: "):
        dataset(path, (f"depth:model={tmp_path / 'empty'}",))
