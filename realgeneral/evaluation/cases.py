"""The layouts of evaluation sets: what is to be generated, from which picture, with which prompt.

Pictures and prompts of a benchmark belong to its authors, so a folder brings both. DreamBench (google/dreambooth, `dataset/`)
and COCO (val2017 with its annotations) are read as they are published.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image

from realgeneral.data.rows import Source
from realgeneral.data.sources.folder import PICTURES
from realgeneral.data.sources.open import open_source
from realgeneral.errors import Failure, UsageError, escaped
from realgeneral.files import inside
from realgeneral.pictures import load_picture

DREAMBENCH_FILE = "prompts_and_classes.txt"
# DreamBench has two prompt lists and does not say which subject takes which; its nine live subjects are these classes
LIVE_CLASSES = ("cat", "dog")


@dataclass(frozen=True)
class Case:
    """One picture to generate.

    Args:
        name: Names the result's file, without ".png"; unique in a set.
        prompt: What to make.
        picture: Reads the picture that the condition is made from: the true one, or a reference of the subject.
        group: Cases of one group are not independent (pictures of one subject).
        subject: Words of the prompt that name the subject.
        row: What messages call it, as every command does; its name unless given.
        references: All real pictures of the subject, files; empty for spatial tasks.
    """

    name: str
    prompt: str
    picture: Callable[[], Image.Image]
    group: str
    subject: str | None = None
    references: tuple[Path, ...] = ()
    row: str = ""


def repeated(cases: list[Case], times: int) -> list[Case]:
    """Several pictures for each prompt; they differ in their noise."""
    if times == 1:
        return cases
    return [replace(case, name=f"{case.name}-{i}") for case in cases for i in range(times)]


def chosen(cases: list[Case], limit: int) -> list[Case]:
    """`limit` cases of a fixed random choice, in their order; 0 = all."""
    if not limit or limit >= len(cases):
        return cases
    return [cases[i] for i in sorted(random.Random(0).sample(range(len(cases)), limit))]


def subject_cases(folder: Path) -> list[Case]:
    """Every prompt for every subject of a DreamBench-shaped folder.

    `SUBJECT/*.jpg` are pictures of one subject each; the first by name is the condition, all are references. Prompts come from
    `prompts_and_classes.txt` as DreamBench has it, or from `prompts.txt` (one template a line, "{}" for the class) with, if a
    class is not the subject folder's name, `classes.txt` ("subject_name,class" a line).

    Raises:
        Failure: The folder is not of that shape; the message says what is missing.
    """
    _check_folder(folder)
    subjects = {p.name: _pictures(p) for p in sorted(folder.iterdir()) if p.is_dir()}
    subjects = {name: pictures for name, pictures in subjects.items() if pictures}
    if not subjects:
        raise Failure(f"data must hold a folder of pictures per subject, got none in {folder}")
    classes, templates = _prompts(folder)
    cases = []
    for name, pictures in subjects.items():
        subject = classes.get(name, name.replace("_", " "))
        for i, template in enumerate(templates(subject)):
            prompt, read = template.replace("{}", subject), partial(load_picture, pictures[0])
            cases.append(Case(f"{name}/{i:02d}", prompt, read, name, subject, tuple(pictures)))
    return cases


def captioned_cases(data: str, columns: Sequence[str] = (), allow_outside: bool = False) -> tuple[list[Case], list[str]]:
    """One case per captioned picture of a COCO-shaped folder, or of any training data (`open_source`); no picture is decoded.

    COCO's shape is `annotations/captions_SPLIT.json` beside the folder `SPLIT` of pictures; val2017 is taken if there are
    several. A picture's first caption, by id, is its prompt.

    Returns:
        Cases, and what is wrong with the rows that make none.

    Raises:
        Failure: Nothing of that shape, or a damaged file.
        UsageError: Columns for a COCO-shaped folder, or wrong ones.
    """
    path = Path(data)
    listings = sorted((path / "annotations").glob("captions_*.json")) if path.is_dir() else []
    if listings:
        if columns:
            raise UsageError(f"columns must not be given for a COCO-shaped folder, got {list(columns)} for {data}")
        return _coco_cases(path, listings, allow_outside), []
    source = open_source(data, columns, repeats=False, allow_outside=allow_outside)
    cases, bad = [], []
    for i in range(len(source)):
        try:
            prompt, row = source.record(i, 0).prompt, source.row_name(i)
            cases.append(Case(f"{i:06d}", prompt, partial(_target, source, i), str(i), row=row))
        except Failure as error:
            bad.append(str(error))
    return cases, bad


def readable(cases: Sequence[Case]) -> tuple[list[Case], list[str]]:
    """The cases whose picture can be decoded, each picture tried once, and what is wrong with the others' pictures."""
    problems: dict[str, str] = {}
    for case in {case.group: case for case in cases}.values():
        try:
            case.picture()
        except Failure as error:
            problems[case.group] = str(error)
    return [case for case in cases if case.group not in problems], list(problems.values())


def _target(source: Source, index: int) -> Image.Image:
    record = source.record(index, 0)
    try:
        return record.target.load()
    except Failure as error:
        raise Failure(f"{record.name}: {error}") from None


def _coco_cases(folder: Path, listings: list[Path], allow_outside: bool) -> list[Case]:
    usable = [p for p in listings if (folder / p.stem.removeprefix("captions_")).is_dir()]
    if not usable:
        wanted = [str(folder / p.stem.removeprefix("captions_")) for p in listings]
        raise Failure(f"data must hold the pictures of {[p.name for p in listings]} in {wanted}, got no such folder")
    listing = next((p for p in usable if "val" in p.stem), usable[0])
    pictures = folder / listing.stem.removeprefix("captions_")
    try:
        record = json.loads(listing.read_text(encoding="utf-8-sig"))
        files = {int(image["id"]): str(image["file_name"]) for image in record["images"]}
        captions: dict[int, tuple[int, str]] = {}
        for note in record["annotations"]:
            entry = (int(note["id"]), str(note["caption"]).strip())
            captions[int(note["image_id"])] = min(entry, captions.get(int(note["image_id"]), entry))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Failure(f"{listing} must be COCO's JSON with images and annotations, got: {error!r}") from None
    for file in () if allow_outside else files.values():
        if not inside(pictures / file, pictures):
            raise Failure(
                f"{listing} must name pictures inside {pictures}, got {file!r}; --allow-outside reads it all the same"
            )
    cases = [
        Case(Path(file).stem, captions[key][1], partial(load_picture, pictures / file), str(key), row=escaped(file))
        for key, file in sorted(files.items())
        if key in captions
    ]
    if not cases:
        raise Failure(f"{listing} must hold captions of its images, got none")
    return cases


def _prompts(folder: Path) -> tuple[dict[str, str], Callable[[str], list[str]]]:
    """Class by subject, and the templates of a class."""
    listing, plain, named = folder / DREAMBENCH_FILE, folder / "prompts.txt", folder / "classes.txt"
    if listing.is_file():
        return _dreambench_prompts(listing)
    if not plain.is_file():
        raise Failure(f"data must hold {DREAMBENCH_FILE} or prompts.txt, got neither in {folder}")
    lines = [line.strip() for line in _read(plain).splitlines() if line.strip()]
    if not lines:
        raise Failure(f"{plain} must hold a prompt a line, got none")
    for line in lines:
        if "{}" not in line:
            raise Failure(f"{plain} must have {{}} for the class in each line, got {line!r}")
    return _classes(_read(named).splitlines() if named.is_file() else []), lambda subject: lines


def _dreambench_prompts(listing: Path) -> tuple[dict[str, str], Callable[[str], list[str]]]:
    """DreamBench's own file; the unique token of DreamBooth, {0}, is left out, since nothing is trained for a subject."""
    text = _read(listing)
    found = {}
    for kind in ("Object", "Live Subject"):
        block = re.search(rf"^{kind} Prompts\s*$(.*?)^\]", text, re.MULTILINE | re.DOTALL)
        quoted = re.findall(r"^\s*'(.+?)'\s*\.format", block[1], re.MULTILINE) if block else []
        if not quoted:
            raise Failure(f"{listing} must hold a list of {kind} Prompts, got none")
        found[kind] = [" ".join(template.replace("{0}", "").split()).replace("{1}", "{}") for template in quoted]
    classes = _classes(text.partition("Prompts")[0].splitlines())
    return classes, lambda subject: found["Live Subject" if subject in LIVE_CLASSES else "Object"]


def _classes(lines: list[str]) -> dict[str, str]:
    pairs = (line.strip().split(",", 1) for line in lines if "," in line)
    return {name.strip(): kind.strip() for name, kind in pairs if name.strip() != "subject_name"}


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise Failure(f"data must be an existing folder, got {folder}")
    if not folder.is_dir():
        raise UsageError(f"data must be a folder of subject folders, got the file {folder}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise Failure(f"{path} must be UTF-8 text, got: {error}") from None
