"""Training data as users have it: folders, parquet, tar, every bad row, and the order of samples."""

from __future__ import annotations

import io
import json
import tarfile
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
from realgeneral.data.samples import PairDataset, TextCheck, collate
from realgeneral.data.sources.open import open_source
from realgeneral.data.sources.packaged import NANO_TASKS, TARGET_STYLES, NanoSource
from realgeneral.data.workers import from_workers
from realgeneral.errors import Failure, UsageError
from realgeneral.tasks import depth_revision, get_task
from tests.realgeneral.helpers.checkpoints import TEXT_WINDOW, tiny_tokenizer
from tests.realgeneral.helpers.datasets import (
    BAD,
    WRITERS,
    Rows,
    Writer,
    dataset,
    good_rows,
    picture,
    write_folder,
    write_parquet,
    write_tar,
)
from tests.realgeneral.helpers.pictures import encoded, make_photo

# --- good data -----------------------------------------------------------------------------------------------------------


def test_rows_of_every_kind_of_source(write: Writer, tmp_path: Path) -> None:
    """Folder, parquet and tar give the same rows: target, prompt, several conditions, task and subject."""
    rows: Rows = [
        {"target": picture(0), "prompt": "a red pot", "condition": [picture(5), picture(6)], "task": "canny", "subject": "pot"},
        {"target": picture(1), "prompt": "blue cat", "condition": [picture(7), picture(8)], "task": None, "subject": None},
    ]
    source = open_source(write(tmp_path / "d", rows))
    assert len(source) == 2
    row = source.row(0, 0)
    assert (row.prompt, row.task, row.subject, len(row.conditions)) == ("a red pot", "canny", "pot", 2)
    assert row.target.tobytes() == make_photo(40, 24, 0).tobytes()
    assert [c.tobytes() for c in row.conditions] == [make_photo(40, 24, i).tobytes() for i in (5, 6)]
    assert source.row(1, 0).task is None


def test_folder_with_captions(tmp_path: Path) -> None:
    """Pictures with a .txt of the same name beside them, any letter case of the ending, other files ignored."""
    (tmp_path / "a.PNG").write_bytes(picture(0))
    (tmp_path / "a.txt").write_text(" a red pot \n")
    (tmp_path / "b.jpg").write_bytes(encoded(make_photo(), "JPEG"))
    (tmp_path / "b.txt").write_text("Früchte", encoding="utf-8")
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "sub.png").mkdir()
    source = open_source(str(tmp_path))
    assert [source.row(i, 0).prompt for i in range(2)] == ["a red pot", "Früchte"]


def test_one_condition_as_a_string(tmp_path: Path) -> None:
    """`condition` may be one picture instead of a list."""
    source = open_source(write_folder(tmp_path / "d", [{"target": picture(0), "prompt": "a", "condition": picture(1)}]))
    assert len(source.row(0, 0).conditions) == 1


def test_huggingface_parquet(tmp_path: Path) -> None:
    """Pictures as datasets writes them, {"bytes": ..., "path": ...}."""
    rows = [{"target": {"bytes": picture(0), "path": None}, "prompt": "a", "condition": [{"bytes": picture(1), "path": "x"}]}]
    row = open_source(write_parquet(tmp_path / "d", rows)).row(0, 0)
    assert len(row.conditions) == 1


def test_webdataset_names(tmp_path: Path) -> None:
    """KEY.png with KEY.txt in folders, and names with dots only after the key, as webdataset groups them."""
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        for name, data in (
            ("x/1.jpg", encoded(make_photo(), "JPEG")),
            ("x/1.txt", b"a pot"),
            ("y/1.png", picture(0)),
            ("y/1.txt", b"b"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    source = open_source(str(tmp_path / "d.tar"))
    assert [source.row(i, 0).prompt for i in range(2)] == ["a pot", "b"]
    assert source.row_name(0) == "d.tar x/1"


def test_webdataset_conditions_are_numbered(tmp_path: Path) -> None:
    """KEY.condition.0.png, ... are in the order of their numbers, not of their names: the place is the frame position."""
    numbers = [3, 11, 0, 7, 2, 10, 1, 9, 5, 4, 8, 6]
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        members = [("0.target.png", picture(0)), ("0.txt", b"a pot")]
        for name, data in members + [(f"0.condition.{i}.png", encoded(Image.new("RGB", (32, 16), (i, 0, 0)))) for i in numbers]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (conditions,) = [open_source(str(tmp_path / "d.tar")).row(0, 0).conditions]
    assert [image.getpixel((0, 0))[0] for image in conditions] == sorted(numbers)


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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2 must be JSON"),
        ("5", "line 2 must be a JSON object, got int"),
        ('["a"]', "line 2 must be a JSON object, got list"),
        ('{"target": "nothing.png", "prompt": "a"}', "nothing.png must be a picture file, got no such file"),
        ('{"prompt": "a"}', "must have a target picture, got None"),
        ('{"target": "t.png"}', "must have a prompt string, got None"),
        ('{"target": "t.png", "prompt": 5}', "must have a prompt string, got 5"),
        ('{"target": 7, "prompt": "a"}', "must be a picture file"),
        ('{"target": ["t.png"], "prompt": "a"}', "must be a picture file"),
        ('{"target": ".", "prompt": "a"}', "got a folder"),
        ('{"target": "t.png", "prompt": "a", "task": ["canny"]}', "must have a string as task"),
        ('{"target": "t.png", "prompt": "a", "task": 3}', "must have a string as task, got 3"),
        ('{"target": "t.png", "prompt": "a", "subject": 3}', "must have a string as subject, got 3"),
        ('{"target": "t.png", "prompt": "a", "condition": 3, "task": "canny"}', "must be a picture file"),
        ('{"target": "t.png", "prompt": "a", "condition": {"x": 1}, "task": "canny"}', "must be a picture file"),
        ('{"target": "t\\u0000.png", "prompt": "a"}', "must be a"),
        ("[" * 200_000, "line 2 must be JSON"),
        ('{"n": ' + "1" * 5000 + "}", "line 2 must be JSON"),
        ('{"target": "t.png", "prompt": "fox \\ud83e"}', r"line 2: prompt must be whole characters, got '.ud83e' at 4"),
        ('{"target": "t\\ud83e.png", "prompt": "a"}', r"line 2: path must be whole characters, got '.ud83e' at 1"),
    ],
)
def test_bad_lines_of_metadata(tmp_path: Path, line: str, message: str) -> None:
    """Whatever a line of metadata.jsonl holds, it is a Failure that names the line, or a good row."""
    (tmp_path / "t.png").write_bytes(picture(0))
    good = '{"target": "t.png", "prompt": "a"}'
    (tmp_path / "metadata.jsonl").write_text(f"{good}\n{line}\n\n{good}\n")
    data = dataset(str(tmp_path))
    assert len(data.source) == 3
    skipped = {name for n in range(6) for name in data[n].skipped}
    assert len(skipped) == 1
    strict = dataset(str(tmp_path), strict=True)
    with pytest.raises(Failure, match=message) as caught:
        list(map(strict.__getitem__, range(3)))
    assert "line 2" in str(caught.value)


def test_missing_and_broken_captions(tmp_path: Path) -> None:
    """A picture without caption, or with one that is no UTF-8, is a bad row."""
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(picture(0))
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00bad")
    data = dataset(str(tmp_path))
    skipped = sorted({name for n in range(6) for name in data[n].skipped})
    assert len(skipped) == 2
    assert "b.txt must be UTF-8 text" in skipped[0]
    assert "c.png must have a caption c.txt beside it, got none" in skipped[1]


@pytest.mark.parametrize(
    ("member", "data"),
    [
        ("00001.json", b"{broken"),
        ("00001.json", b"5"),
        ("00001.json", b'["a", "b"]'),
        ("00001.json", b"\xff\xfe"),
        ("00001.txt", b"\xff\xfe"),
    ],
)
def test_bad_members_of_a_tar(tmp_path: Path, member: str, data: bytes) -> None:
    """A broken json or txt member makes its sample a bad row and no crash."""
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        for name, content in (("00000.png", picture(0)), ("00000.txt", b"a"), ("00001.png", picture(1)), (member, data)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    rows = dataset(str(tmp_path / "d.tar"))
    assert {name.split(" must")[0] for n in range(4) for name in rows[n].skipped} == {"d.tar 00001"}


def test_a_tar_whose_json_names_files(tmp_path: Path) -> None:
    """File names in a json member are not pictures: only members are."""
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        described = json.dumps({"prompt": "a", "target": "x.png", "condition": "y.png"}).encode()
        for name, content in (("0.target.png", picture(0)), ("0.json", described)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert dataset(str(tmp_path / "d.tar"), strict=True)[0].prompt == "a"


def test_wrong_types_in_parquet(tmp_path: Path) -> None:
    """Numbers or strings where pictures belong are bad rows."""
    path = write_parquet(tmp_path / "d", [{"target": "file.png", "prompt": "a"}])
    with pytest.raises(Failure, match=r"pictures in data.parquet must be bytes, got str"):
        dataset(path, strict=True)[0]
    path = write_parquet(tmp_path / "e", [{"target": {"path": "x"}, "prompt": "a"}])
    with pytest.raises(Failure, match=r"pictures in data.parquet must be bytes, got NoneType"):
        dataset(path, strict=True)[0]


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


# --- bad data ------------------------------------------------------------------------------------------------------------


def test_missing_and_unknown_data(tmp_path: Path) -> None:
    """A missing path is a failure, an unknown kind of file a usage error."""
    with pytest.raises(Failure, match="data must be an existing folder or file, got /nowhere"):
        open_source("/nowhere")
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(UsageError, match=r"data must be a folder, a .parquet or a .tar file, got .*rows.csv"):
        open_source(str(tmp_path / "rows.csv"))


def test_empty_data(tmp_path: Path) -> None:
    """Nothing to train on is said at once, for every kind."""
    (tmp_path / "empty").mkdir()
    blank = tmp_path / "blank"
    blank.mkdir()
    (blank / "metadata.jsonl").write_text("\n\n")
    with tarfile.open(tmp_path / "d.tar", "w"):
        pass
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"target": pa.array([], pa.binary()), "prompt": pa.array([], pa.string())}), tmp_path / "d.parquet")
    for path in ("empty", "blank", "d.tar", "d.parquet"):
        with pytest.raises(Failure, match="data must hold at least one row, got none in"):
            open_source(str(tmp_path / path))


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize("defect", ["header", "data", "text", "empty"])
def test_broken_containers(tmp_path: Path, kind: str, defect: str) -> None:
    """A truncated or fake parquet or tar is one line that names it."""
    path = Path(WRITERS[kind](tmp_path / "d", good_rows(3)))
    data = path.read_bytes()
    header, member = (5220, 4700) if kind == "tar" else (-6, len(data) // 2)
    path.write_bytes({"header": data[:header], "data": data[:member], "text": b"hello\n" * 300, "empty": b""}[defect])
    with pytest.raises(Failure, match=rf"must be a complete.* {kind} file, got"):
        open_source(str(path))


def test_compressed_tar_is_refused(tmp_path: Path) -> None:
    """A gzip-compressed file named .tar cannot be read in place: it is named, not read as garbage rows."""
    import gzip

    path = Path(write_tar(tmp_path / "d", good_rows(2)))
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(Failure, match="uncompressed tar"):
        open_source(str(path))


def test_parquet_without_the_columns(tmp_path: Path) -> None:
    """The columns that are needed and those that are there."""
    path = write_parquet(tmp_path / "d", [{"image": picture(0), "prompt": "a"}])
    with pytest.raises(Failure, match=r"must have a column 'target', got \['image', 'prompt'\]"):
        open_source(path)


def test_metadata_that_is_no_text(tmp_path: Path) -> None:
    """A metadata.jsonl in another encoding is one line, not a UnicodeDecodeError."""
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(Failure, match=r"metadata.jsonl must be UTF-8 text"):
        open_source(str(tmp_path))


def test_metadata_with_a_byte_order_mark(tmp_path: Path) -> None:
    """Windows editors put one in front of the first line."""
    (tmp_path / "t.png").write_bytes(picture(0))
    (tmp_path / "metadata.jsonl").write_bytes(b'\xef\xbb\xbf{"target": "t.png", "prompt": "a"}\r\n')
    assert dataset(str(tmp_path), strict=True)[0].prompt == "a"


def test_batches_need_equally_many_conditions(tmp_path: Path) -> None:
    """Rows with one and with two conditions cannot share a batch; the error says so."""
    rows = good_rows(2)
    rows[0]["condition"], rows[1]["condition"] = [picture(5)], [picture(5), picture(6)]
    data = dataset(write_folder(tmp_path / "d", rows), ("canny",))
    with pytest.raises(Failure, match=r"same number of conditions, got \[1, 2\]; --buckets groups such rows"):
        collate([data[0], data[1]])


# --- the packaged data ---------------------------------------------------------------------------------------------------


def test_nano_splits_share_no_concept() -> None:
    """Train and held-out concepts are disjoint, and each has three target styles."""
    train, held_out = NanoSource("train"), NanoSource("held_out", augment=False)
    names = [{concept.codepoint for concept in source.concepts} for source in (train, held_out)]
    assert not names[0] & names[1]
    assert len(names[1]) >= 150
    assert len(train) == len(names[0]) * len(TARGET_STYLES)


def test_nano_rows() -> None:
    """A row's reference is the same concept in another style; half of the captions name it; held-out rows are fixed."""
    source = open_source("nano")
    row = source.row(5, 1)
    assert row.reference is not None
    assert row.reference.size == row.target.size == (64, 64)
    assert row.subject is not None
    assert row.subject in row.prompt
    name, _, style = source.row_name(5).partition(", ")
    rows = [source.row(5, seed) for seed in range(100)]
    assert {(r.subject, r.prompt.partition(", ")[0]) for r in rows} == {(name, name), ("emoji", "emoji")}
    assert {r.prompt.rpartition(", ")[2] for r in rows} == {style}
    assert {source.row_name(5), f"emoji, {style}"} < {r.prompt for r in rows}
    assert 30 < sum(r.subject == "emoji" for r in rows) < 70
    held_out = NanoSource("held_out", augment=False)
    assert held_out.row(3, 1).target.tobytes() == held_out.row(3, 2).target.tobytes()
    data = PairDataset(source, NANO_TASKS, [], (64, 64), 0, strict=True)
    assert {data[n].task for n in range(80)} == {spec.partition(":")[0] for spec in NANO_TASKS}


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
