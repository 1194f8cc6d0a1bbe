"""Which row sample n is: batches that are a function of (data, settings, number), shared out over processes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from realgeneral.data import order as order_module
from realgeneral.data.order import Bucketed, RunSampler, epoch_order
from realgeneral.data.rows import Block
from realgeneral.data.samples import Batch, collate
from realgeneral.data.shapes import Shape, read_shapes
from realgeneral.data.sources.open import open_source
from realgeneral.errors import Failure
from tests.realgeneral.helpers.datasets import Rows, dataset, picture, write_folder
from tests.realgeneral.helpers.pictures import encoded, make_photo

SIZES = ((32, 16), (16, 32), (32, 32))
pytestmark = pytest.mark.usefixtures("cache")


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


def test_ranks_share_the_samples() -> None:
    """Two processes see every sample number once, from the start that a resumed run gives."""
    parts = [list(RunSampler(10, 21, rank, 2)) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(10, 21))
    assert [len(RunSampler(10, 21, rank, 2)) for rank in range(2)] == [len(part) for part in parts]


def test_ranks_share_whole_batches() -> None:
    """With buckets a batch belongs to one process: runs of its size, and the same number for each."""
    parts = [list(RunSampler(12, 36, rank, 2, run=3)) for rank in range(2)]
    assert parts[0][:6] == [12, 13, 14, 18, 19, 20]
    assert sorted(parts[0] + parts[1]) == list(range(12, 36))
    assert [len(RunSampler(12, 36, rank, 2, run=3)) for rank in range(2)] == [12, 12]
    assert len(RunSampler(0, 7, 0, 1, run=3)) == len(list(RunSampler(0, 7, 0, 1, run=3))) == 7
    assert len(RunSampler(6, 6, 0, 1, run=3)) == 0
