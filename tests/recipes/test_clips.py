"""What the nano base is trained on: pools, copies, clips and their captions."""

from __future__ import annotations

import numpy as np
import pytest

from realgeneral.nano.emoji import STYLE_WORDS, STYLES, load_emoji
from recipes.clips import COLOURLESS, KIND_WORDS, ClipSource
from recipes.icons import SAME, distinct
from recipes.latents import COLOUR_STYLES, COPIES, EMOJI, ICONS, Entries, Pool, alter, load_things, render_entries

CONCEPTS = 3


def pool(entries: Entries, copy: int, words: dict[str, str], concepts: list[str]) -> Pool:
    """Every latent tells its copy, row and entry."""
    rows = len(concepts)
    latents = np.empty((rows, entries.count, 3, 1, 1), np.float32)
    latents[:, :, 0, 0, 0] = copy
    latents[:, :, 1, 0, 0] = np.arange(rows)[:, None]
    latents[:, :, 2, 0, 0] = np.arange(entries.count)
    motions = np.zeros((rows, len(entries.styles), entries.motions), int)
    colours = [dict.fromkeys(entries.coloured, "red blue")] * rows
    return Pool(latents, motions, [f"thing {i}" for i in range(rows)], [words] * rows, concepts, colours)


@pytest.fixture
def source() -> ClipSource:
    keys = [c.codepoint for c in load_emoji("train")[:CONCEPTS]]
    emoji = {copy: pool(EMOJI, i, STYLE_WORDS, keys) for i, copy in enumerate(COPIES)}
    # the first icon shows the last concept
    icons = {copy: pool(ICONS, 10 + i, {"icon": "logo"}, [keys[-1], "", ""]) for i, copy in enumerate(COPIES) if i != 1}
    return ClipSource(emoji, icons)


@pytest.mark.parametrize("frames", [2, 4])
def test_clips_stay_with_one_thing(source: ClipSource, frames: int) -> None:
    """Frames of a clip are of one row of one copy, unless an icon of a concept becomes that concept's drawing."""
    places, captions = source.draw(600, frames, np.random.default_rng(0))
    latents = source.latents(places)
    assert latents.shape == (600, frames, 3, 1, 1)
    redrawn = 0
    for clip, caption in zip(latents[..., 0, 0].numpy(), captions, strict=True):
        copies, rows = set(clip[:, 0]), set(clip[:, 1])
        if copies == {0, 10}:
            redrawn += 1
            assert rows <= {0, CONCEPTS - 1}
            assert caption.startswith((f"thing {CONCEPTS - 1}, ", "emoji, "))
        else:
            assert len(copies) == len(rows) == 1
            assert caption.startswith((f"thing {int(clip[0, 1])}, ", "emoji, ", "icon, "))
            if "red blue" in caption:
                assert not any(words in caption for words in (" from ", "black line icon", *KIND_WORDS.values()))
    assert redrawn > 30
    assert 100 < sum("red blue" in caption for caption in captions) < 300
    assert 100 < sum(caption.startswith(("emoji", "icon")) for caption in captions) < 300
    assert set(latents[:, 0, 0].flatten().tolist()) == {0, 1, 2, 10, 12}


def test_what_has_no_colours_is_not_recoloured(source: ClipSource) -> None:
    """No clip of the recoloured copies starts from edges, a grey picture or a black icon, but for motions of black icons."""
    entries = {EMOJI.derived(s, k) for s in COLOUR_STYLES for k in KIND_WORDS if k in COLOURLESS}
    contrast = EMOJI.still("high_contrast")
    icon = {ICONS.derived("icon", kind) for kind in KIND_WORDS if kind in COLOURLESS}
    places, captions = source.draw(2000, 2, np.random.default_rng(1))
    latents = source.latents(places)
    seen = 0
    for (first, last), caption in zip(latents[..., 0, 0].numpy(), captions, strict=True):
        if first[0] == 2:
            seen += 1
            assert first[2] not in entries
            assert first[2] != contrast or STYLE_WORDS["high_contrast"] in caption
        if first[0] == 12:
            assert first[2] not in icon
        assert last[0] in (0, 1, 2, 10, 12)
    assert seen > 100


def test_recolouring_keeps_white_and_black() -> None:
    """Channels are reordered, the same in all styles, nothing else."""
    (thing,) = load_things("train", None)[:1]
    before = thing.pictures()
    after = alter(before, "recoloured", np.random.default_rng(0))
    for style in STYLES:
        assert after[style].sum() == before[style].sum()
        assert (np.ptp(after[style], axis=-1) == 0).sum() == (np.ptp(before[style], axis=-1) == 0).sum() > 0
    assert all(after[style].sum((0, 1)).tolist() != before[style].sum((0, 1)).tolist() for style in COLOUR_STYLES)
    assert all(np.array_equal(alter(before, "mirrored", np.random.default_rng(0))[s], before[s][:, ::-1]) for s in STYLES)
    assert all(np.array_equal(alter(before, "plain", np.random.default_rng(0))[s], before[s]) for s in STYLES)


@pytest.mark.parametrize(("entries", "split"), [(EMOJI, "held_out"), (ICONS, "icons")])
def test_entries_are_where_they_are_looked_up(entries: Entries, split: str) -> None:
    """Stills are the pictures, derived versions differ from them, and every entry is written."""
    stills = load_things("held_out", None)[5].pictures()
    stills = stills if split == "held_out" else {"icon": stills["3d"]}
    pictures, motions = render_entries(stills, entries, np.random.default_rng(0))
    assert pictures.shape == (entries.count, 64, 64, 3)
    assert motions.shape == (len(entries.styles), entries.motions)
    for style in entries.styles:
        assert np.array_equal(pictures[entries.still(style)], stills[style])
    for style in entries.coloured:
        grey = pictures[entries.derived(style, "grey")]
        assert (np.ptp(grey, axis=-1) == 0).all()
        edges = pictures[entries.derived(style, "canny")]
        assert set(np.unique(edges)) == {0, 255}


def test_distinct_keeps_the_first_of_look_alikes() -> None:
    """Pictures close to a known one, or to an earlier one, fall out."""
    rng = np.random.default_rng(0)
    known, first, other = (rng.random(768, np.float32) for _ in range(3))
    close = SAME / 2
    thumbs = np.stack([known + close, first, first - close, other])
    assert distinct(thumbs, known[None]).tolist() == [False, True, False, True]
