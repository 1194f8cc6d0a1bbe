"""What ships as training data: emoji and avatars as rows."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageOps

from realgeneral.data.samples import PairDataset
from realgeneral.data.sources.open import open_source
from realgeneral.data.sources.packaged import NANO_TASKS, TARGET_STYLES, AvatarSource, NanoSource
from realgeneral.nano.avatars import BACKGROUNDS, FACES
from realgeneral.nano.colours import colour_words
from realgeneral.nano.emoji import Concept, caption, load_emoji
from realgeneral.tasks import get_task


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


def test_source_is_deterministic_and_paired() -> None:
    """A row is a function of (index, seed), and its reference shows the same concept in another style."""
    source = NanoSource("train")
    first, again, other = source.row(5, 1), source.row(5, 1), source.row(5, 2)
    assert np.array_equal(np.asarray(first.target), np.asarray(again.target))
    assert not np.array_equal(np.asarray(first.target), np.asarray(other.target))
    assert first.subject in first.prompt
    plain = NanoSource("held_out", augment=False).row(0, 0)
    concept = load_emoji("held_out")[0]
    assert plain.prompt == caption(concept, TARGET_STYLES[0], colour_words(concept.image(TARGET_STYLES[0])))
    references = [np.asarray(concept.image(style)) for style in TARGET_STYLES[1:]]
    assert any(np.array_equal(np.asarray(plain.reference), r) for r in references)
    dataset = PairDataset(source, NANO_TASKS, [], (64, 64), seed=0, strict=True)
    assert {dataset[n].task for n in range(60)} == {get_task(spec).name for spec in NANO_TASKS}


def test_target_and_reference_are_augmented_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference that is the target's own picture stays its equal: mirrored, rotated, moved and recoloured the same way."""
    monkeypatch.setattr(Concept, "image", lambda self, style, image=Concept.image: image(self, "flat"))
    source, plain = NanoSource("train"), NanoSource("train", augment=False)
    changed = []
    for seed in range(40):
        row = source.row(6, seed)
        assert row.reference is not None
        assert np.array_equal(np.asarray(row.target), np.asarray(row.reference))
        changed.append(not np.array_equal(np.asarray(row.target), np.asarray(plain.row(6, seed).target)))
    assert 20 < sum(changed) < 40


def test_rows_are_of_one_avatar() -> None:
    """A function of row and seed; the reference is the same avatar; held-out pairs differ in face and background."""
    source = open_source("avatars")
    assert len(source) == 700 * FACES
    assert source.row(9, 3) == source.row(9, 3)
    held_out = AvatarSource("held_out", augment=False)
    for index, seed in ((3, 0), (100, 1), (1199, 2)):
        row, avatar = held_out.row(index, seed), held_out.avatars[index // FACES]
        background = row.prompt.rpartition(", ")[2].removesuffix(" background")
        assert row.target.tobytes() == avatar.image(index % FACES, background).tobytes()
        assert row.prompt == avatar.caption(index % FACES, background)
        assert row.subject == avatar.kind
        assert row.reference is not None
        others = {
            avatar.image(f, b).tobytes() for f in range(FACES) for b in BACKGROUNDS if f != index % FACES and b != background
        }
        assert row.reference.tobytes() in others
        assert held_out.states(index, seed)[index % FACES].tobytes() == row.target.tobytes()


def test_training_rows_are_varied() -> None:
    """Half are mirrored, target and reference alike; a background that stays may be left unsaid, one that changes is told."""
    source = AvatarSource("train")
    avatar = source.avatars[1]
    plain = {(avatar.image(f, b).tobytes()): (f, b) for f in range(FACES) for b in BACKGROUNDS}
    mirrored, unsaid = [], []
    for seed in range(200):
        row = source.row(FACES + 2, seed)
        assert row.reference is not None
        flipped = row.target.tobytes() not in plain
        target, reference = (plain[(ImageOps.mirror(p) if flipped else p).tobytes()] for p in (row.target, row.reference))
        assert target[0] == 2
        mirrored.append(flipped)
        if "background" not in row.prompt:
            assert target[1] == reference[1]
            unsaid.append(seed)
        else:
            assert row.prompt.endswith(f", {target[1]} background")
    assert 70 < sum(mirrored) < 130
    assert 10 < len(unsaid) < 70
