"""Events and EventBatch: what is accepted, converted and refused, and that nothing given is changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gep.events.types import EventBatch, EventFormatError, Events


def _events(t, x=None, y=None, p=None, height=4, width=5) -> Events:
    n = len(t)
    zeros = np.zeros(n, np.uint16)
    return Events(
        np.asarray(t, np.int64),
        zeros if x is None else np.asarray(x, np.uint16),
        zeros if y is None else np.asarray(y, np.uint16),
        np.zeros(n, np.uint8) if p is None else np.asarray(p, np.uint8),
        height,
        width,
    )


def test_slices_are_views_and_keep_the_sensor():
    events = _events([1, 5, 5, 9])
    part = events[1:3]
    assert len(part) == 2 and part.t.base is events.t and (part.height, part.width) == (4, 5)
    assert events.duration_us == 8 and events[:1].duration_us == 0 and events[:0].duration_us == 0
    for index in (0, slice(None, None, -1), [0, 1]):
        with pytest.raises(TypeError, match="forward slices"):
            events[index]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"x": [0, 5, 0]}, r"a\.bin: event 1: x = 5 is outside the sensor's 5 columns"),
        ({"y": [0, 0, 4]}, r"a\.bin: event 2: y = 4 is outside the sensor's 4 rows"),
        ({"p": [2, 0, 0]}, r"a\.bin: event 0: p = 2 is not a polarity"),
        ({"t": [3, 3, 2]}, r"a\.bin: event 2: t = 2 µs is before the previous event's 3 µs"),
        ({"height": 0}, r"a\.bin: sensor size 0x5"),
    ],
)
def test_validate_names_source_index_and_fault(fault, message):
    given = {"t": [1, 2, 3], **fault}
    with pytest.raises(EventFormatError, match=message):
        _events(**given).validate("a.bin")


def test_validate_refuses_other_dtypes_and_lengths():
    good = _events([1, 2])
    assert good.validate() is good
    with pytest.raises(EventFormatError, match="t must be a 1-D int64 array, got float64"):
        Events(good.t.astype(float), good.x, good.y, good.p, 4, 5).validate()
    with pytest.raises(EventFormatError, match="p has 1 entries where t has 2"):
        Events(good.t, good.x, good.y, good.p[:1], 4, 5).validate()


def test_from_arrays_converts_without_touching_the_callers_arrays():
    p = np.array([-1, 1, -1], np.int8)
    x = np.array([0.0, 4.0, 2.0], np.float32)
    p_before, x_before = p.copy(), x.copy()
    events = Events.from_arrays(np.array([1, 2, 3], np.uint32), x, np.array([3, 0, 1], np.int64), p, height=4, width=5)
    assert [a.dtype for a in (events.t, events.x, events.y, events.p)] == [
        np.int64,
        np.uint16,
        np.uint16,
        np.uint8,
    ]
    assert events.p.tolist() == [0, 1, 0] and events.x.tolist() == [0, 4, 2]
    assert (p == p_before).all() and (x == x_before).all() and p.dtype == np.int8
    as_bool = Events.from_arrays([1, 2], [0, 0], [0, 0], np.array([True, False]), height=1, width=1)
    assert as_bool.p.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("t", [1.5, 2.0], "event 0: t = 1.5 is no whole number"),
        ("t", [1.0, np.nan], "event 1: t = nan"),
        ("t", np.array([1, 2**63], np.uint64), "event 1: t = 9223372036854775808"),
        ("x", [0, -1], "event 1: x = -1"),
        ("x", [0, 70000], "event 1: x = 70000"),
        ("p", [-1, 0], r"event 1: p = 0 where polarities are \{-1, 1\}"),
        ("p", [1, 3], "event 1: p = 3 is not a polarity"),
        ("y", ["a", "b"], "y holds"),
    ],
)
def test_from_arrays_refuses_what_would_not_fit(name, values, message):
    arrays = {"t": [1, 2], "x": [0, 0], "y": [0, 0], "p": [0, 1], name: values}
    with pytest.raises(EventFormatError, match=message):
        Events.from_arrays(**arrays, height=4, width=5)


def test_batch_concatenates_windows_with_their_bounds():
    windows = [_events([10, 20], x=[1, 4]), Events.empty(4, 5), _events([7], y=[3], p=[1])]
    batch = EventBatch.from_windows(windows)
    assert len(batch) == 3 and batch.num_events == 3 and batch.checked
    assert batch.offsets.tolist() == [0, 2, 2, 3]
    assert batch.t0.tolist() == [10, 0, 7] and batch.t1.tolist() == [21, 1, 8]
    assert (batch.t.dtype, batch.x.dtype, batch.p.dtype) == (torch.int64, torch.int16, torch.uint8)
    assert batch.x.tolist() == [1, 4, 0] and batch.y.tolist() == [0, 0, 3] and batch.p.tolist() == [0, 0, 1]
    batch.t.zero_()
    assert windows[0].t.tolist() == [10, 20]
    given = EventBatch.from_windows(windows, np.array([[0, 50], [50, 50], [0, 50]]))
    assert given.t1.tolist() == [50, 50, 50] and given.to("cpu").t1.tolist() == [50, 50, 50]


def test_batch_refuses_windows_that_do_not_fit():
    window = _events([10, 20])
    with pytest.raises(ValueError, match="at least one"):
        EventBatch.from_windows([])
    with pytest.raises(ValueError, match="window 1 is 4x6, window 0 4x5"):
        EventBatch.from_windows([window, Events.empty(4, 6)])
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
        EventBatch.from_windows([window], np.array([[0.0, 30.0]]))
    for bounds in ([[11, 30]], [[10, 20]]):
        with pytest.raises(EventFormatError, match="window 0: its events lie outside its bounds"):
            EventBatch.from_windows([window], np.array(bounds))
    with pytest.raises(EventFormatError, match=r"x spans 0\.\.9, the sensor 0\.\.4"):
        EventBatch.from_windows([_events([1, 2], x=[0, 9])])


def test_batch_validate_finds_hand_made_faults():
    batch = EventBatch.from_windows([_events([10, 20])])
    with pytest.raises(EventFormatError, match="x spans -1"):
        batch.with_coordinates(torch.tensor([0, -1], dtype=torch.int16), batch.y).validate()
    with pytest.raises(EventFormatError, match=r"x is torch\.float32 and y is torch\.int16"):
        batch.with_coordinates(batch.x.float(), batch.y).validate()
    with pytest.raises(EventFormatError, match="finite"):
        batch.with_coordinates(torch.tensor([0.0, torch.nan]), batch.y.float()).validate()
    with pytest.raises(EventFormatError, match=r"x is torch\.int64"):
        batch.with_coordinates(batch.x.long(), batch.y.long()).validate()


@pytest.mark.parametrize("count", [1, 2])
def test_writing_to_a_batch_changes_nothing_of_its_windows(count, recwarn):
    windows = [_events([10, 20], x=[1, 2], y=[3, 1], p=[1, 0]) for _ in range(count)]
    bounds = np.array([[10, 30]] * count)
    batch = EventBatch.from_windows(windows, bounds)
    for name in ("t", "x", "y", "p", "t0", "t1"):
        getattr(batch, name).fill_(77)
    for window in windows:
        assert [getattr(window, name).tolist() for name in "txyp"] == [[10, 20], [1, 2], [3, 1], [1, 0]]
    assert bounds.tolist() == [[10, 30]] * count
    # Read-only memory, such as a mapped file's, makes writable batches too, without a warning of torch.
    for array in (bounds, *(getattr(window, name) for window in windows for name in "txyp")):
        array.flags.writeable = False
    EventBatch.from_windows(windows, bounds).t.zero_()
    assert windows[0].t.tolist() == [10, 20] and not recwarn.list
