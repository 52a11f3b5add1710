"""Cutting a recording into windows: by duration, by count, into equal parts, by given bounds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gep.events.types import Events

_MAX_WINDOWS = 1 << 24  # far beyond any use: a unit mistake, not a request


class Windows(NamedTuple):
    """Windows of one recording and the time each covers."""

    events: list[Events]
    """T windows, views on the recording's arrays; a window may be empty."""
    bounds: np.ndarray
    """(T, 2) int64 µs: window k holds the events with bounds[k, 0] <= t < bounds[k, 1]."""


def by_bounds(events: Events, bounds: np.ndarray) -> Windows:
    """The windows that lie in given bounds, which may overlap, leave gaps and reach beyond the recording.

    Args:
        events: N events in time order.
        bounds: (T, 2) integer µs [t0, t1), t0 <= t1.

    Raises:
        ValueError: bounds of another shape or dtype, or an end before its begin.
    """
    bounds = np.asarray(bounds)
    if bounds.ndim != 2 or bounds.shape[1] != 2 or bounds.dtype.kind not in "iu":
        raise ValueError(f"bounds must be integer µs of shape (T, 2), got {bounds.dtype} {bounds.shape}")
    bounds = bounds.astype(np.int64)
    if (bounds[:, 1] < bounds[:, 0]).any():
        index = int(np.argmax(bounds[:, 1] < bounds[:, 0]))
        raise ValueError(f"bounds[{index}] = {bounds[index].tolist()} ends before it begins")
    edges = np.searchsorted(events.t, bounds, side="left")
    return Windows([events[int(begin) : int(end)] for begin, end in edges], bounds)


def by_duration(
    events: Events, window_us: int, *, t0: int | None = None, t1: int | None = None, partial: bool = True
) -> Windows:
    """Adjoining windows of equal duration.

    Args:
        events: N events in time order.
        window_us: duration of each window in µs.
        t0: begin of the first window in µs; None takes the first event's time.
        t1: end of the time covered in µs, exclusive; None takes the last event's time + 1.
        partial: whether the rest at the end, if any, becomes a window too. Its bounds have the full
            duration, and so reach beyond t1; its events do not.

    Returns:
        ceil or floor((t1 - t0) / window_us) windows; none for an empty recording without t0 and t1.

    Raises:
        ValueError: window_us < 1, t1 < t0, or more than 2**24 windows.
    """
    if window_us < 1:
        raise ValueError(f"window_us must be at least 1 µs, got {window_us}")
    t0, t1 = _span(events, t0, t1, empty=(0, 0))
    num = -(-(t1 - t0) // int(window_us)) if partial else (t1 - t0) // int(window_us)
    if num > _MAX_WINDOWS:
        raise ValueError(f"{num} windows of {window_us} µs between {t0} and {t1} µs; window_us is in µs")
    edges = t0 + np.arange(num + 1, dtype=np.int64) * int(window_us)
    bounds = np.stack([edges[:-1], edges[1:]], axis=1)
    return Windows(by_bounds(events, np.minimum(bounds, t1)).events, bounds)


def by_count(events: Events, count: int, *, partial: bool = True) -> Windows:
    """Adjoining windows of an equal number of events; bounds run from a window's first time to its last + 1.

    Args:
        events: N events in time order.
        count: events a window.
        partial: whether the rest at the end, if any, becomes a (smaller) window too.

    Returns:
        ceil or floor(N / count) windows; equal times may be split between two of them, so that bounds
        can overlap by 1 µs.

    Raises:
        ValueError: count < 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1 event, got {count}")
    stop = len(events) if partial else len(events) // count * count
    windows = [events[begin : min(begin + count, stop)] for begin in range(0, stop, count)]
    bounds = np.array([(window.t[0], window.t[-1] + 1) for window in windows], np.int64).reshape(-1, 2)
    return Windows(windows, bounds)


def into_windows(events: Events, num: int, *, t0: int | None = None, t1: int | None = None) -> Windows:
    """A fixed number of adjoining windows of (to a µs) equal duration.

    Args:
        events: N events in time order.
        num: number of windows.
        t0: begin of the first window in µs; None takes the first event's time.
        t1: end of the last window in µs, exclusive; None takes the last event's time + 1.

    Returns:
        num windows; edge k lies at t0 + floor(k (t1 - t0) / num). An empty recording without t0 and t1
        gives windows of 1 µs from 0.

    Raises:
        ValueError: num < 1 or t1 < t0.
    """
    if not 1 <= num <= _MAX_WINDOWS:
        raise ValueError(f"num must be in 1..2**24 windows, got {num}")
    t0, t1 = _span(events, t0, t1, empty=(0, num))
    edges = np.array([t0 + k * (t1 - t0) // num for k in range(num + 1)], np.int64)
    return by_bounds(events, np.stack([edges[:-1], edges[1:]], axis=1))


def cut_windows(events: Events, num: int, window_us: int, shift_us: int = 0) -> Windows:
    """`num` windows from the first event on: of `window_us` each, or equal parts of the recording for 0.

    Args:
        events: one recording.
        num: windows T, >= 1.
        window_us: length in µs; 0 = equal parts.
        shift_us: moves the first window's begin (with window_us only).
    """
    if window_us == 0:
        return into_windows(events, num)
    start = (int(events.t[0]) if len(events) else 0) + shift_us
    edges = start + window_us * np.arange(num + 1, dtype=np.int64)
    return by_bounds(events, np.stack([edges[:-1], edges[1:]], axis=1))


def _span(events: Events, t0: int | None, t1: int | None, empty: tuple[int, int]) -> tuple[int, int]:
    first, end = (int(events.t[0]), int(events.t[-1]) + 1) if len(events) else empty
    t0 = first if t0 is None else int(t0)
    t1 = max(end, t0) if t1 is None else int(t1)
    if t1 < t0:
        raise ValueError(f"t1 = {t1} µs is before t0 = {t0} µs")
    return t0, t1
