"""The packaged emoji: concepts and their split."""

from __future__ import annotations

import random

import pytest

from realgeneral.nano.emoji import STYLES, load_emoji


def test_concepts_and_split() -> None:
    """About 1,500 concepts, 64 x 64 in each style, and no concept on both sides of the split."""
    train, test = load_emoji("train"), load_emoji("held_out")
    assert len(train) + len(test) == len(load_emoji()) >= 1500
    assert len(test) >= 150
    assert not {c.codepoint for c in train} & {c.codepoint for c in test}
    assert not {c.name for c in train} & {c.name for c in test}
    for concept in random.Random(0).sample(load_emoji(), 20):
        assert all(concept.image(style).size == (64, 64) for style in STYLES)
    with pytest.raises(ValueError, match="style must be one of"):
        train[0].image("oil")
    with pytest.raises(ValueError, match="split must be one of"):
        load_emoji("test")
