"""The packaged avatars: faces, splits and captions."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageColor

from realgeneral import RealGeneralPipeline
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


def test_captions_fit_and_are_known() -> None:
    """Every caption fits nano's text window, and its words are whole tokens."""
    tokenizer = RealGeneralPipeline.from_pretrained("nano").tokenizer
    for avatar in load_avatars()[::100]:
        for face, background in zip(range(FACES), [*BACKGROUNDS][:FACES], strict=True):
            tokens = tokenizer.convert_ids_to_tokens(tokenizer(avatar.caption(face, background)).input_ids)
            assert len(tokens) <= TEXT_WINDOW
            assert all(token.startswith("▁") for token in tokens if token not in (",", "</s>"))
