"""The packaged avatars: faces, splits, captions, and pairs of the same character in another state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageOps

from realgeneral import RealGeneralPipeline
from realgeneral.data.sources.open import open_source
from realgeneral.data.sources.packaged import AvatarSource
from realgeneral.evaluation.nano_table import FACE_CHANGE, STYLE_CHANGE, avatar_pairs, measures, table_pairs
from realgeneral.nano import avatars as module
from realgeneral.nano.avatars import AVATARS_PARQUET, BACKGROUNDS, EYES, FACES, MOUTHS, load_avatars, pack_faces

TEXT_WINDOW = 16


def test_avatars_and_split() -> None:
    """Distinct characters with six faces each, no two of which share eyes or mouth; a small file; no shape on both sides."""
    train, held_out = load_avatars("train"), load_avatars("held_out")
    assert len(train) + len(held_out) == len(load_avatars()) == 900
    assert len(held_out) == 200
    assert AVATARS_PARQUET.stat().st_size < 2.2e6
    assert not {a.shape for a in train} & {a.shape for a in held_out}
    for avatar in train[::60] + held_out[::20]:
        assert set(avatar.eyes) == set(EYES)
        assert set(avatar.mouths) == set(MOUTHS)
        faces = [avatar.image(face).tobytes() for face in range(FACES)]
        assert len(set(faces)) == FACES
    looks = {a.image(list(a.eyes).index("round")).tobytes() for a in held_out}
    assert len(looks) == len(held_out)
    with pytest.raises(ValueError, match=r"split must be one of .* or None, got 'test'"):
        load_avatars("test")


def test_an_avatar_on_a_background() -> None:
    """The face is composited on the named colour, which shows in the corner."""
    avatar = load_avatars("train")[0]
    for name, colour in BACKGROUNDS.items():
        picture = avatar.image(0, name)
        assert (picture.size, picture.mode) == ((64, 64), "RGB")
        assert picture.getpixel((0, 0)) == ImageColor.getrgb(colour)
    assert avatar.caption(0, "blue") == f"{avatar.kind}, {avatar.eyes[0]} eyes, {avatar.mouths[0]} mouth, blue background"
    assert avatar.caption(0, None) == f"{avatar.kind}, {avatar.eyes[0]} eyes, {avatar.mouths[0]} mouth"
    with pytest.raises(ValueError, match=r"face must be in 0..5, got 6"):
        avatar.image(6)
    with pytest.raises(ValueError, match=r"background must be one of .*, got 'plaid'"):
        avatar.image(0, "plaid")


def test_faces_are_packed_without_loss() -> None:
    """What is drawn is what comes out, transparency included."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (FACES, 64, 64, 4), dtype=np.uint8)
    pixels[..., 3] = np.where(pixels[..., 3] < 128, 0, 255)  # WebP does not keep the colour of what cannot be seen
    avatar = module.Avatar(
        "a", "face", "round", "train", EYES, MOUTHS[:FACES], pack_faces([Image.fromarray(p) for p in pixels])
    )
    for face in range(FACES):
        shown = Image.new("RGBA", (64, 64), "white")
        shown.alpha_composite(Image.fromarray(pixels[face]))
        assert avatar.image(face).tobytes() == shown.convert("RGB").tobytes()


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


def test_captions_fit_and_are_known() -> None:
    """Every caption fits nano's text window, and its words are whole tokens."""
    tokenizer = RealGeneralPipeline.from_pretrained("nano").tokenizer
    for avatar in load_avatars()[::100]:
        for face, background in zip(range(FACES), [*BACKGROUNDS][:FACES], strict=True):
            tokens = tokenizer.convert_ids_to_tokens(tokenizer(avatar.caption(face, background)).input_ids)
            assert len(tokens) <= TEXT_WINDOW
            assert all(token.startswith("▁") for token in tokens if token not in (",", "</s>"))


def test_customization_is_measured_on_subject_and_state() -> None:
    """The truth is found in the state that was asked for; the condition, other faces and other avatars are not."""
    pairs = avatar_pairs(12, (64, 64), 0)
    scores = measures("customization", pairs)
    asked, same = scores["concept in asked state R@1"], scores["same concept R@1"]
    assert asked(pairs.truth).min() == same(pairs.truth).min() == 1.0
    assert asked(pairs.conditions).max() == 0.0
    assert same(pairs.truth.roll(1, 0)).max() == 0.0
    other = torch.stack([torch.from_numpy(np.array(s[i - 1])) for s, i in zip(pairs.states, pairs.asked, strict=True)])
    other = other.permute(0, 3, 1, 2) / 255
    assert asked(other).max() == 0.0
    assert same(other).mean() > 0.8


def test_the_table_has_three_kinds_of_customization() -> None:
    """Avatars under the task's name, avatars on one background and emoji in another style beside them; other tasks on emoji."""
    parts = dict(table_pairs(["customization", "colouring"], 2, (64, 64), 0))
    assert list(parts) == ["customization", FACE_CHANGE, STYLE_CHANGE, "colouring"]
    for name in ("customization", FACE_CHANGE):
        assert {s.subject for s in parts[name].samples} <= {"monster", "face"}
    assert torch.equal(parts[FACE_CHANGE].truth, parts["customization"].truth)
    corners = [pairs[..., 0, 0] for pairs in (parts[FACE_CHANGE].truth, parts[FACE_CHANGE].conditions)]
    assert torch.equal(*corners)
    assert parts[STYLE_CHANGE].names == parts["colouring"].names
    assert {s.task for s in parts[STYLE_CHANGE].samples} == {"customization"}
