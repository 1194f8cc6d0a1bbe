"""Presets: who sees whom, and layouts made of them."""

from __future__ import annotations

import pytest

from realgeneral.model.presets import PRESETS, condition_names, get_preset, joint_layout, sublayout


def test_unknown_preset_names_the_known_ones() -> None:
    """A wrong preset is a ValueError that lists the right ones."""
    with pytest.raises(ValueError, match=r"preset must be one of \('paper', 'cached', 'open'\), got 'fast'"):
        get_preset("fast")


def test_only_cached_is_cacheable() -> None:
    """Keys and values are independent of the step only with time zero and isolated conditions."""
    assert [name for name, preset in PRESETS.items() if preset.cacheable] == ["cached"]


@pytest.mark.parametrize("conditions", [1, 2, 3])
@pytest.mark.parametrize("name", ["paper", "cached", "open"])
def test_visibility(name: str, conditions: int) -> None:
    """Text sees text and target, the target all, a condition itself (in `paper` the target too); `open` blocks nothing."""
    layout = joint_layout(get_preset(name), 5, 4, conditions)
    names = condition_names(conditions)
    assert layout.names == ("text", "target", *names)
    assert layout.lengths == (5, 4, *[4] * conditions)
    sees = {query: {key for key in layout.names if layout.visible(query, key)} for query in layout.names}
    everything = set(layout.names)
    assert sees["target"] == everything
    assert sees["text"] == (everything if name == "open" else {"text", "target"})
    for condition in names:
        expected = {"paper": {condition, "target"}, "cached": {condition}, "open": everything}[name]
        assert sees[condition] == expected


def test_every_key_set_is_contiguous_for_one_condition() -> None:
    """The order [text | target | condition] leaves one contiguous key range per segment: no mask is needed."""
    for preset in PRESETS.values():
        layout = joint_layout(preset, 12, 9, 1)
        assert all(len(layout.key_ranges(name)) == 1 for name in layout.names)


def test_sublayout_keeps_blocked_pairs_among_its_segments() -> None:
    """Taking segments out keeps lengths and the pairs blocked among them."""
    layout = joint_layout(get_preset("paper"), 5, 4, 2)
    part = sublayout(layout, ("condition_0", "condition_1"))
    assert part.lengths == (4, 4)
    assert part.blocked == {("condition_0", "condition_1"), ("condition_1", "condition_0")}
