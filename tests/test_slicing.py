"""Windows against loops over single events."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gep.events.slicing import by_bounds, by_count, by_duration, into_windows
from gep.events.types import Events

_UNIX_US = 1_700_000_000_000_000


def _at(times) -> Events:
    n = len(times)
    x = np.arange(n, dtype=np.uint16)
    return Events(np.asarray(times, np.int64), x, np.zeros(n, np.uint16), np.zeros(n, np.uint8), 1, max(n, 1))


def _inside(events: Events, bounds: np.ndarray) -> list[list[int]]:
    return [[t for t in events.t.tolist() if begin <= t < end] for begin, end in bounds.tolist()]


_TIMES = st.lists(st.integers(0, 50), max_size=30).map(sorted)


@settings(deadline=None, max_examples=80)
@given(_TIMES, st.integers(1, 20), st.sampled_from([0, _UNIX_US, -7]))
def test_windows_hold_exactly_the_events_in_their_bounds(times, size, base):
    events = _at([base + t for t in times])
    for windows in (into_windows(events, size), by_duration(events, size)):
        assert windows.bounds.dtype == np.int64 and windows.bounds.shape == (len(windows.events), 2)
        assert [w.t.tolist() for w in windows.events] == _inside(events, windows.bounds)
        assert (windows.bounds[1:, 0] == windows.bounds[:-1, 1]).all()
        assert sum(map(len, windows.events)) == len(events)
    assert len(into_windows(events, size).events) == size
    assert (np.diff(by_duration(events, size).bounds) == size).all()
    counted = by_count(events, size)
    assert [len(w) for w in counted.events[:-1]] == [size] * (len(counted.events) - 1)
    assert sum(map(len, counted.events)) == len(events)
    for window, (begin, end) in zip(counted.events, counted.bounds, strict=True):
        assert (begin, end) == (window.t[0], window.t[-1] + 1)


def test_into_windows_by_hand():
    windows = into_windows(_at([0, 3, 4, 9]), 2, t0=0, t1=10)
    assert windows.bounds.tolist() == [[0, 5], [5, 10]]
    assert [w.x.tolist() for w in windows.events] == [[0, 1, 2], [3]]
    assert into_windows(_at([]), 2).bounds.tolist() == [[0, 1], [1, 2]]
    # More windows than µs: some have no duration, and no event is in two of them.
    tight = into_windows(_at([5, 5]), 3)
    assert tight.bounds.tolist() == [[5, 5], [5, 5], [5, 6]] and [len(w) for w in tight.events] == [0, 0, 2]


def test_the_rest_at_the_end():
    events = _at([0, 1, 2, 3, 10])
    kept = by_duration(events, 4)
    assert kept.bounds.tolist() == [[0, 4], [4, 8], [8, 12]] and [len(w) for w in kept.events] == [4, 0, 1]
    assert by_duration(events, 4, partial=False).bounds.tolist() == [[0, 4], [4, 8]]
    assert [len(w) for w in by_duration(events, 4, t1=10).events] == [4, 0, 0]
    assert [len(w) for w in by_count(events, 2).events] == [2, 2, 1]
    assert [len(w) for w in by_count(events, 2, partial=False).events] == [2, 2]
    assert by_count(_at([]), 3).bounds.shape == (0, 2) and by_duration(_at([]), 3).events == []


def test_bounds_may_overlap_and_windows_are_views():
    events = _at([1, 2, 3, 4])
    windows = by_bounds(events, np.array([[0, 3], [2, 9], [9, 9]]))
    assert [w.t.tolist() for w in windows.events] == [[1, 2], [2, 3, 4], []]
    assert all(np.shares_memory(w.t, events.t) for w in windows.events[:2])


def test_what_is_refused():
    events = _at([1, 2])
    for call, message in (
        (lambda: by_duration(events, 0), "window_us"),
        (lambda: by_duration(events, 1, t0=-_UNIX_US), "window_us is in µs"),
        (lambda: by_duration(events, 1, t0=5, t1=4), "before t0"),
        (lambda: by_count(events, 0), "count"),
        (lambda: into_windows(events, 0), "num"),
        (lambda: by_bounds(events, np.array([[3, 2]])), r"bounds\[0\] = \[3, 2\] ends before"),
        (lambda: by_bounds(events, np.array([0.0, 1.0])), r"shape \(T, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
