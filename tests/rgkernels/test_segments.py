"""SegmentLayout: the value that describes a joint sequence."""

from __future__ import annotations

import pickle

import pytest
import torch

from rgkernels import SegmentLayout

PAPER = [("text", "condition"), ("condition", "text")]


@pytest.fixture
def layout() -> SegmentLayout:
    return SegmentLayout.of(text=3, target=5, condition=4, blocked=PAPER)


def test_layout_is_a_value(layout: SegmentLayout) -> None:
    """Equal facts give equal, hashable, picklable layouts, whatever containers they came in."""
    same = SegmentLayout(("text", "target", "condition"), [3, 5, 4], [list(pair) for pair in reversed(PAPER)])  # type: ignore[arg-type]
    assert same == layout
    assert hash(same) == hash(layout)
    assert pickle.loads(pickle.dumps(layout)) == layout
    assert layout != SegmentLayout.of(text=3, target=5, condition=4)
    with pytest.raises(AttributeError):
        layout.lengths = (1, 2, 3)  # type: ignore[misc]


def test_sizes_and_places(layout: SegmentLayout) -> None:
    """Offsets are running sums of lengths."""
    assert (layout.num_segments, layout.seq_len) == (3, 12)
    assert [layout.index(name) for name in layout.names] == [0, 1, 2]
    assert [layout.offset(name) for name in layout.names] == [0, 3, 8]
    assert [layout.length(name) for name in layout.names] == [3, 5, 4]
    assert layout.slice("target") == slice(3, 8)


def test_ranges_are_merged(layout: SegmentLayout) -> None:
    """Neighbouring visible segments form one range; a blocked one splits it."""
    assert layout.key_ranges("text") == [(0, 8)]
    assert layout.key_ranges("target") == [(0, 12)]
    assert layout.key_ranges("condition") == [(3, 12)]
    split = SegmentLayout.of(a=2, b=3, c=4, blocked=[("a", "b")])
    assert split.key_ranges("a") == [(0, 2), (5, 9)]


def test_query_ranges_transpose_key_ranges() -> None:
    """A key range of a query is a query range of the key, also for a mask that is not symmetric."""
    layout = SegmentLayout.of(text=3, target=5, condition=4, blocked=[("condition", "text"), ("condition", "target")])
    mask = layout.mask()
    for name in layout.names:
        for ranges, rows in (
            (layout.key_ranges(name), mask[layout.slice(name)]),
            (layout.query_ranges(name), mask[:, layout.slice(name)].T),
        ):
            expected = torch.zeros(layout.seq_len, dtype=torch.bool)
            for start, stop in ranges:
                expected[start:stop] = True
            assert (rows == expected).all()


def test_empty_segments_leave_no_range() -> None:
    """An empty segment between two visible ones does not split their range, and has none of its own."""
    layout = SegmentLayout.of(a=2, b=0, c=4)
    assert layout.key_ranges("a") == [(0, 6)]
    assert layout.offset("c") == 2
    assert SegmentLayout.of(a=0).key_ranges("a") == []
    assert SegmentLayout.of(a=2, b=3, blocked=[("a", "a"), ("a", "b")]).key_ranges("a") == []


def test_visible_fraction_counts_the_mask(layout: SegmentLayout) -> None:
    """The fraction is the mean of the dense mask; nothing hidden is 1, also for an empty sequence."""
    assert layout.visible_fraction == pytest.approx(layout.mask().float().mean().item())
    assert SegmentLayout.of(a=3, b=4).visible_fraction == 1.0
    assert SegmentLayout.of(a=0).visible_fraction == 1.0
    assert not layout.visible("text", "condition")
    assert layout.visible("condition", "condition")


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: SegmentLayout((), ()), ValueError, "at least one segment"),
        (lambda: SegmentLayout(("a", "a"), (1, 2)), ValueError, "unique"),
        (lambda: SegmentLayout(("a", "b"), (1,)), ValueError, "one entry per name, 2, got 1"),
        (lambda: SegmentLayout((1,), (1,)), TypeError, "names must be strings, got 1"),  # type: ignore[arg-type]
        (lambda: SegmentLayout.of(a=-1), ValueError, "length of segment 'a' must be >= 0, got -1"),
        (lambda: SegmentLayout.of(a=1.5), TypeError, "lengths must be integers, got 1.5"),  # type: ignore[arg-type]
        (lambda: SegmentLayout.of(a=True), TypeError, "lengths must be integers, got True"),
        (lambda: SegmentLayout.of(a=1, blocked=[("a", "b")]), ValueError, "got 'b'"),
        (lambda: SegmentLayout.of(a=1, blocked=["aa"]), ValueError, "pairs"),
        (lambda: SegmentLayout.of(a=1).offset("b"), ValueError, "segment must be one of"),
        (lambda: SegmentLayout.of(a=1).visible("a", "b"), ValueError, "segment must be one of"),
    ],
)
def test_errors_name_the_value(build, error, message) -> None:
    """A wrong layout is refused with the offending value."""
    with pytest.raises(error, match=message):
        build()
