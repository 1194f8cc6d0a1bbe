"""The layouts of evaluation sets: published ones read as they are, and what is said of folders that are not of that shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from realgeneral.errors import Failure, UsageError
from realgeneral.evaluation.cases import Case, captioned_cases, chosen, readable, repeated, subject_cases
from tests.realgeneral.helpers.datasets import write_parquet
from tests.realgeneral.helpers.pictures import encoded, make_photo

# the shape of DreamBench's file, with prompts of our own
DREAMBENCH = """Classes

subject_name,class
clay_pot,pot
old_dog,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} on the table'.format(unique_token, class_token),
'a blue {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} with an icon'.format(unique_token, class_token)
]
"""


@pytest.fixture
def subjects(tmp_path: Path) -> Path:
    for name in ("clay_pot", "old_dog"):
        (tmp_path / name).mkdir()
        for i in (1, 0):
            make_photo(40, 30, i).save(tmp_path / name / f"{i:02d}.jpg")
    (tmp_path / "notes").mkdir()  # a folder without pictures is no subject
    return tmp_path


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    for i in (7, 9):
        make_photo(40, 30, i).save(tmp_path / "val2017" / f"{i:012d}.jpg")
    record = {
        "images": [{"id": 9, "file_name": f"{9:012d}.jpg"}, {"id": 7, "file_name": f"{7:012d}.jpg"}],
        "annotations": [
            {"id": 31, "image_id": 7, "caption": "second\n"},
            {"id": 30, "image_id": 7, "caption": " a red pot\n"},
            {"id": 12, "image_id": 9, "caption": "a fox"},
        ],
    }
    (tmp_path / "annotations" / "captions_val2017.json").write_text(json.dumps(record))
    return tmp_path


def test_dreambench_as_published(subjects: Path) -> None:
    """Class by subject, the list of its kind, no unique token; the first picture is the condition, all are references."""
    (subjects / "prompts_and_classes.txt").write_text(DREAMBENCH)
    cases = subject_cases(subjects)
    assert [(c.name, c.prompt, c.subject) for c in cases] == [
        ("clay_pot/00", "a pot on the table", "pot"),
        ("clay_pot/01", "a blue pot", "pot"),
        ("old_dog/00", "a dog with an icon", "dog"),
    ]
    assert [p.name for p in cases[0].references] == ["00.jpg", "01.jpg"]
    assert cases[0].picture().tobytes() != cases[0].references[1].read_bytes()
    assert cases[0].group == cases[1].group != cases[2].group


def test_own_prompts(subjects: Path) -> None:
    """prompts.txt with {} for the class; classes.txt where the folder's name is not the class."""
    (subjects / "prompts.txt").write_text("a red {}\n\n  {} in jungle\n")
    assert [c.prompt for c in subject_cases(subjects)][:2] == ["a red clay pot", "clay pot in jungle"]
    (subjects / "classes.txt").write_text("subject_name,class\nclay_pot,pot\n")
    assert [c.prompt for c in subject_cases(subjects)][1:3] == ["pot in jungle", "a red old dog"]


def test_coco_as_published(coco: Path) -> None:
    """The first caption by id; in the order of image ids; val2017 before train2017."""
    (coco / "train2017").mkdir()
    (coco / "annotations" / "captions_train2017.json").write_text("{}")
    cases, bad = captioned_cases(str(coco))
    assert bad == []
    assert [(c.name, c.prompt) for c in cases] == [(f"{7:012d}", "a red pot"), (f"{9:012d}", "a fox")]
    assert cases[0].picture().size == (40, 30)
    assert cases[0].group != cases[1].group


def test_training_data_is_a_set_too(tmp_path: Path) -> None:
    """Any captioned data that `train` reads, by the same column map; bad rows are told, and those to come keep their names."""
    rows = [{"image": encoded(make_photo(40, 30)), "text": text} for text in ("a red pot", None, "a fox", "a cat")]
    rows[2]["image"] = rows[2]["image"][:-40]  # type: ignore[index]
    path = write_parquet(tmp_path / "d", rows)
    columns = ["target=image", "prompt=text"]
    cases, bad = captioned_cases(path, columns)
    assert bad == ["data.parquet row 1 must have a prompt string, got None"]
    assert [(c.name, c.prompt) for c in cases] == [("000000", "a red pot"), ("000002", "a fox"), ("000003", "a cat")]
    good, unreadable = readable(repeated(cases, 2))
    assert [c.name for c in good] == ["000000-0", "000000-1", "000003-0", "000003-1"]
    assert good[0].picture().size == (40, 30)
    assert len(unreadable) == 1
    assert unreadable[0].startswith("data.parquet row 2: picture of ")


def test_columns_for_coco(coco: Path) -> None:
    """Its annotations have no columns."""
    with pytest.raises(UsageError, match=r"columns must not be given for a COCO-shaped folder, got \['prompt=text'\]"):
        captioned_cases(str(coco), ["prompt=text"])


def test_repeats_and_choice() -> None:
    """Repeats have names of their own and stay in their group; a choice is the same each time and keeps the order."""
    cases = [Case(str(i), "", make_photo, str(i)) for i in range(20)]
    assert repeated(cases, 1) == cases == chosen(cases, 0) == chosen(cases, 99)
    twice = repeated(cases, 2)
    assert [c.name for c in twice[:3]] == ["0-0", "0-1", "1-0"]
    assert len({c.name for c in twice}) == 40
    some = chosen(cases, 7)
    assert some == chosen(cases, 7)
    assert [int(c.name) for c in some] == sorted(int(c.name) for c in some)
    assert len(some) == 7


def test_bad_subject_folders(subjects: Path, tmp_path: Path) -> None:
    """What is missing, in one line."""
    with pytest.raises(Failure, match="data must be an existing folder"):
        subject_cases(tmp_path / "nothing")
    with pytest.raises(UsageError, match="data must be a folder of subject folders, got the file"):
        subject_cases(subjects / "clay_pot" / "00.jpg")
    with pytest.raises(Failure, match="data must hold a folder of pictures per subject, got none"):
        subject_cases(subjects / "notes")
    with pytest.raises(Failure, match=r"data must hold prompts_and_classes.txt or prompts.txt, got neither"):
        subject_cases(subjects)
    (subjects / "prompts.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(Failure, match=r"prompts.txt must be UTF-8 text"):
        subject_cases(subjects)
    (subjects / "prompts.txt").write_text("\n \n")
    with pytest.raises(Failure, match=r"prompts.txt must hold a prompt a line, got none"):
        subject_cases(subjects)
    (subjects / "prompts.txt").write_text("a red {}\na cat\n")
    with pytest.raises(Failure, match=r"prompts.txt must have {} for the class in each line, got 'a cat'"):
        subject_cases(subjects)
    (subjects / "prompts_and_classes.txt").write_text(DREAMBENCH.partition("Live")[0])
    with pytest.raises(Failure, match="must hold a list of Live Subject Prompts, got none"):
        subject_cases(subjects)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"images": [{"id": 1}], "annotations": []}',
        '{"images": 3, "annotations": 4}',
        "[" * 100_000,
        '{"images": [{"id": 1e999}], "annotations": []}',
    ],
)
def test_bad_coco(coco: Path, text: str) -> None:
    """Damaged annotations are one line that names the file."""
    (coco / "annotations" / "captions_val2017.json").write_text(text)
    with pytest.raises(Failure, match=r"captions_val2017.json must be COCO's JSON with images and annotations, got: "):
        captioned_cases(str(coco))


def test_coco_without_pictures_or_captions(coco: Path) -> None:
    """Captions without pictures, and pictures without captions."""
    (coco / "annotations" / "captions_val2017.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(Failure, match="must hold captions of its images, got none"):
        captioned_cases(str(coco))
    (coco / "val2017").rename(coco / "elsewhere")
    with pytest.raises(Failure, match=r"data must hold the pictures of \['captions_val2017.json'\]"):
        captioned_cases(str(coco))


def test_coco_pictures_outside_their_folder(coco: Path) -> None:
    """A stranger's listing reads a private file only if it may."""
    listing = coco / "annotations" / "captions_val2017.json"
    record = json.loads(listing.read_text())
    record["images"][0]["file_name"] = "../../private.png"
    listing.write_text(json.dumps(record))
    with pytest.raises(Failure, match=r"must name pictures inside .*val2017, got '../../private.png'; --allow-outside"):
        captioned_cases(str(coco))
    assert captioned_cases(str(coco), (), True)[0]
