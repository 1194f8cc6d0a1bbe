"""Buckets: lists, assignment, and batches that are a function of (data, settings, number)."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from realgeneral.data import order as order_module
from realgeneral.data import shapes as shapes_module
from realgeneral.data.order import Bucketed, RunSampler, epoch_order
from realgeneral.data.rows import Block
from realgeneral.data.samples import Batch, PairDataset, collate
from realgeneral.data.shapes import Shape, bucket_sizes, nearest, read_shapes, standard_sizes
from realgeneral.data.sources.open import open_source
from realgeneral.errors import Failure, UsageError
from tests.realgeneral.helpers.datasets import Rows, dataset, good_rows, picture, write_folder
from tests.realgeneral.helpers.pictures import encoded, make_photo

SIZES = ((32, 16), (16, 32), (32, 32))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def mixed_rows() -> Rows:
    """Wide, tall and square pictures; none, one or two conditions; one row alone in its bucket."""
    shapes = [(40, 24)] * 7 + [(24, 40)] * 4 + [(30, 30)]
    rows: Rows = [{"target": encoded(make_photo(*shape, i)), "prompt": f"a red pot {i}"} for i, shape in enumerate(shapes)]
    for i in (0, 3, 7):
        rows[i] |= {"condition": [picture(50), picture(51)], "task": "canny"}
    rows[1] |= {"condition": [picture(52)], "task": "canny"}
    return rows


def bucketed(path: str, batch_size: int = 2, seed: int = 0, **kwargs: Any) -> Any:
    source = open_source(path)
    order = Bucketed(read_shapes(source), SIZES, source.blocks, batch_size, seed)
    return dataset(path, order=order, seed=seed, **kwargs)


# --- lists ---------------------------------------------------------------------------------------------------------------


def test_standard_lists() -> None:
    """480x720 of CogVideoX 1.0 and 768x1360 of 1.5: multiples of 16, about equal areas, sides within the trained range."""
    older, newer = standard_sizes(720, 480, 16), standard_sizes(1360, 768, 16, (768, 1360))
    assert {(720, 480), (480, 720), (592, 592)} <= set(older)
    assert {(1360, 768), (768, 1360), (1024, 1024)} <= set(newer)
    for sizes, area in ((older, 480 * 720), (newer, 768 * 1360)):
        assert all(w % 16 == h % 16 == 0 and abs(w * h / area - 1) < 0.06 for w, h in sizes)
        assert {(h, w) for w, h in sizes} == set(sizes)
    assert all(768 <= side <= 1360 for size in newer for side in size)
    assert len(older) == 9
    assert len(newer) == 7
    assert (64, 64) in standard_sizes(64, 64, 8)


def test_given_lists() -> None:
    """HEIGHTxWIDTH, mixed with the standard list."""
    assert bucket_sizes(["480x720"], (64, 64), 16, None) == ((720, 480),)
    assert set(bucket_sizes(["standard", "256x256"], (720, 480), 16, None)) == {*standard_sizes(720, 480, 16), (256, 256)}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wide", "buckets must be standard or HEIGHTxWIDTH such as 480x720, got 'wide'"),
        ("480x", "buckets must be standard or"),
        ("480x721", "sides of buckets must be positive multiples of 16 of at most 1360, got 480x721"),
        ("0x480", "positive multiples of 16"),
        ("480x1376", "of at most 1360, got 480x1376"),
    ],
)
def test_wrong_lists(spec: str, message: str) -> None:
    """Each is one line that names it."""
    with pytest.raises(UsageError, match=message):
        bucket_sizes([spec], (720, 480), 16, 1360)


def test_nearest_ratio() -> None:
    """Twice as wide is as far from square as twice as high; ties go to the larger size."""
    assert nearest((1000, 500), SIZES) == (32, 16)
    assert nearest((10, 30), SIZES) == (16, 32)
    assert nearest((110, 100), SIZES) == (32, 32)
    assert nearest((5, 5), ((16, 16), (64, 64), (32, 32))) == (64, 64)


# --- batches -------------------------------------------------------------------------------------------------------------


def batches(path: str, start: int, stop: int, rank: int = 0, world: int = 1, workers: int = 0) -> list[Batch]:
    data = bucketed(path)
    sampler = RunSampler(2 * start, 2 * stop, rank, world, data.order.run)
    return list(DataLoader(data, 2, sampler=sampler, num_workers=workers, collate_fn=collate))


def test_batches_of_one_shape(tmp_path: Path) -> None:
    """Each batch has one size and one number of conditions; every row comes in each epoch, few of them twice."""
    path = write_folder(tmp_path / "d", mixed_rows())
    data = bucketed(path)
    per_epoch = data.order.batches_per_epoch
    assert data.order.counts == {((32, 16), 1): 5, ((32, 16), 2): 2, ((16, 32), 1): 3, ((16, 32), 2): 1, ((32, 32), 1): 1}
    assert per_epoch == 3 + 1 + 2 + 1 + 1
    epochs = []
    for epoch in range(3):
        made = batches(path, epoch * per_epoch, (epoch + 1) * per_epoch)
        seen = Counter(name for batch in made for name in batch.names)
        assert set(seen) == {f"metadata.jsonl line {i}" for i in range(1, 13)}
        assert max(seen.values()) == 2
        assert {(tuple(b.target.shape[2:]), b.conditions.shape[1]) for b in made} == {
            ((16, 32), 1), ((16, 32), 2), ((32, 16), 1), ((32, 16), 2), ((32, 32), 1),
        }  # fmt: skip
        epochs.append([batch.names for batch in made])
    assert epochs[0] != epochs[1] != epochs[2]


def test_batches_depend_on_their_number_alone(tmp_path: Path) -> None:
    """Resumed in the middle of an epoch, on two ranks, with workers, or read backwards: batch b is batch b."""
    path = write_folder(tmp_path / "d", mixed_rows())
    whole = batches(path, 0, 20)

    def same(one: list[Batch], two: list[Batch]) -> bool:
        return len(one) == len(two) and all(
            (a.names, a.tasks) == (b.names, b.tasks)
            and torch.equal(a.target, b.target)
            and torch.equal(a.conditions, b.conditions)
            for a, b in zip(one, two, strict=True)
        )

    assert same(batches(path, 6, 20), whole[6:])
    ranks = [batches(path, 4, 20, rank, 2) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == 8
    assert same([batch for pair in zip(*ranks, strict=True) for batch in pair], whole[4:])
    assert same(batches(path, 0, 20, workers=2), whole)
    data = bucketed(path)
    assert [data[n].name for n in reversed(range(40))][::-1] == [name for batch in whole for name in batch.names]
    assert [data[n].name for n in range(40)] != [bucketed(path, seed=1)[n].name for n in range(40)]


def test_bad_rows_are_replaced_within_their_bucket(tmp_path: Path) -> None:
    """A truncated picture keeps its header, hence its bucket; one without is met in the fullest bucket. Both are named."""
    rows = mixed_rows()
    rows[8]["target"] = rows[8]["target"][:-40]
    rows[2]["target"] = b"no header"
    path = write_folder(tmp_path / "d", rows)
    assert read_shapes(open_source(path))[2] is None
    made = batches(path, 0, 16)
    skipped = {name.split(":")[0] for batch in made for name in batch.skipped}
    assert skipped == {"metadata.jsonl line 3", "metadata.jsonl line 9"}
    data = bucketed(path, strict=True)
    with pytest.raises(Failure, match=r"metadata.jsonl line (3|9)"):
        list(map(data.__getitem__, range(32)))


def test_a_bucket_of_bad_rows_only(tmp_path: Path) -> None:
    """Nothing can stand in: the run ends with the reason instead of a batch of another size."""
    rows = mixed_rows()
    rows[11]["target"] = rows[11]["target"][:-40]
    data = bucketed(write_folder(tmp_path / "d", rows))
    with pytest.raises(Failure, match=r"data must hold good rows, got 1 bad ones in a row; the first: metadata.jsonl line 12"):
        list(map(data.__getitem__, range(32)))


def test_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a storage block stay within a window of blocks; each epoch is a permutation, also with ragged blocks."""
    monkeypatch.setattr(order_module, "WINDOW_BYTES", 25)
    blocks = [Block(4, 10), Block(3, 10), Block(5, 10), Block(1, 100), Block(2, 10)]
    orders = [epoch_order(blocks, 0, epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(15)) for order in orders)
    assert orders[0] == epoch_order(blocks, 0, 0)
    assert len({tuple(order) for order in orders}) == 3
    owner = [i for i, block in enumerate(blocks) for _ in range(block.rows)]
    for order in orders:
        places = {i: [k for k, row in enumerate(order) if owner[row] == i] for i in range(5)}
        # a window holds at most two of the small blocks, nine rows
        assert all(max(k) - min(k) < 9 for k in places.values())
    shapes: list[Shape | None] = [Shape(10, 10, 1)] * 15
    order = Bucketed(shapes, SIZES, blocks, 2, 0)
    assert {order.place(n, 0)[0] for n in range(order.batches_per_epoch * 2)} == set(range(15))


# --- sizes on disk -------------------------------------------------------------------------------------------------------


def test_shapes_are_kept_until_files_change(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second reading opens no picture; a changed file or a damaged cache is read anew."""
    path = write_folder(tmp_path / "d", good_rows(3))
    first = read_shapes(open_source(path))
    assert first == [Shape(40, 24, 1)] * 3
    (kept,) = (cache / "realgeneral" / "shapes").iterdir()
    original, calls = shapes_module._shape, [0]

    def counting(*args: Any) -> Any:
        calls[0] += 1
        return original(*args)

    monkeypatch.setattr(shapes_module, "_shape", counting)
    assert read_shapes(open_source(path)) == first
    assert calls == [0]
    kept.write_bytes(kept.read_bytes()[:90])
    assert read_shapes(open_source(path)) == first
    assert calls == [3]
    (Path(path) / "target-0-0.png").write_bytes(encoded(make_photo(20, 60)))
    assert read_shapes(open_source(path))[0] == Shape(20, 60, 1)


def test_shapes_of_files_elsewhere_are_not_kept(tmp_path: Path, cache: Path) -> None:
    """Only files of the folder are watched: sizes of others are read each time."""
    (tmp_path / "d").mkdir()
    for size in ((40, 24), (24, 40)):
        make_photo(*size).save(tmp_path / "outside.png")
        for name in ("../outside.png", str(tmp_path / "outside.png")):
            (tmp_path / "d" / "metadata.jsonl").write_text(json.dumps({"target": name, "prompt": "a"}))
            assert read_shapes(open_source(str(tmp_path / "d"))) == [Shape(*size, 1)]


@pytest.mark.parametrize("name", ["link.png", os.fsdecode(b"caf\xe9.png")])
def test_odd_names_are_one_bad_row(tmp_path: Path, cache: Path, name: str) -> None:
    """A link to nothing, and a name that is no UTF-8: skipped by name with buckets and variants too."""
    folder = tmp_path / "d"
    folder.mkdir()
    for i in range(3):
        make_photo(40, 24, i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a pot")
    if name == "link.png":
        (folder / name).symlink_to("/nowhere.png")
    else:
        make_photo(40, 24).save(folder / name, format="PNG")
    (folder / name).with_suffix(".txt").write_text("a pot")
    source = open_source(str(folder))
    shapes = read_shapes(source)
    assert [shape is None for shape in shapes].count(True) == 1
    rows = PairDataset(source, ["canny"], [], (32, 16), 0, strict=False, variants=2)
    assert len({reason for n in range(12) for reason in rows[n].skipped}) == 1


def test_a_cache_that_cannot_be_written(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes are read all the same, and it is said."""
    cache.write_text("a file where the folder should be")
    assert len(read_shapes(open_source(write_folder(tmp_path / "d", good_rows(2))))) == 2
    assert "picture sizes are not kept" in capsys.readouterr().out
