"""Going through a recording window by window: large pieces, read ahead of use where the format allows it."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from gep.events.types import EventFormatError, Events

if TYPE_CHECKING:
    from gep.events.io.source import EventSource

_PIECE = 1 << 20  # events read at once at most, whatever time they take: rates differ by orders of magnitude
_AHEAD = 2  # pieces read ahead besides those that the threads are at: more fall out of the processor's cache
_EDGES = 1 << 16  # windows cut at once: a pause of hours has millions
_Windows: TypeAlias = Generator[tuple[Events, tuple[int, int]], None, Events]


def windows(
    source: EventSource, window_us: int, t0: int | None, t1: int | None
) -> Iterator[tuple[Events, tuple[int, int]]]:
    """What `EventSource.windows` gives; arguments and errors are its."""
    if window_us < 1:
        raise ValueError(f"window_us must be at least 1 µs, got {window_us}")
    first, last = source.span
    begin, end = first if t0 is None else int(t0), last if t1 is None else int(t1)
    if end < begin and t1 is None:
        end = begin
    if end < begin:
        raise ValueError(f"t1 = {t1} µs is before t0 = {begin} µs")
    return _windows(source, int(window_us), begin, end)


def _windows(source: EventSource, window_us: int, begin: int, end: int) -> Iterator[tuple[Events, tuple[int, int]]]:
    first, last = source.span
    low = 0 if begin <= first else source.before(begin)
    high = len(source) if end >= last else source.before(end)
    index, time, held = low, begin, [Events.empty(source.height, source.width)]
    for events in _pieces(source, low, high):
        if events.t[0] < time:
            # Two events that are read together are checked, and the message says where they lie.
            source.by_index(max(index - 1, 0), index + 1)
            raise EventFormatError(f"{source.path}: event {index}: the time steps back from {time} to {events.t[0]} µs")
        index, time = index + len(events), int(events.t[-1])
        if time >= end:
            raise EventFormatError(f"{source.path}: event {index - 1}: t = {time} µs lies before events of {end} µs")
        # Later events are at `time` or after it, so windows that end there are whole.
        if (count := (time - begin) // window_us) > 0:
            events = yield from _cut(held, events, begin, window_us, count)
            begin, held = begin + count * window_us, []
        held.append(events)
    if (count := -(-(end - begin) // window_us)) > 0:
        yield from _cut(held[:-1], held[-1], begin, window_us, count)


def _cut(held: list[Events], events: Events, begin: int, window_us: int, count: int) -> _Windows:
    """Windows whose first one begins with the events held back; returns what follows the last."""
    cut = int(np.searchsorted(events.t, begin + window_us))
    yield _join([*held, events[:cut]]), (begin, begin + window_us)
    for done in range(1, count, _EDGES):
        edges = begin + window_us * np.arange(done, min(done + _EDGES, count) + 1, dtype=np.int64)
        cuts, edges = np.searchsorted(events.t, edges).tolist(), edges.tolist()
        for k in range(len(cuts) - 1):
            yield events[cuts[k] : cuts[k + 1]], (edges[k], edges[k + 1])
        cut = cuts[-1]
    return events[cut:]


def _join(parts: list[Events]) -> Events:
    parts = [part for part in parts if len(part)] or parts[:1]
    if len(parts) == 1:
        return parts[0]
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in "txyp"}
    return Events(**columns, height=parts[0].height, width=parts[0].width)


def _pieces(source: EventSource, low: int, high: int) -> Iterator[Events]:
    """Events low, …, high − 1, a piece at a time; a few pieces are read ahead where the source allows it."""
    threads, piece = source.read_ahead, min(source.piece, _PIECE)
    # Pieces begin at multiples of their length, whole chunks of the file that is, wherever the first window does.
    edges = [low, *range((low // piece + 1) * piece, high, piece), high] if low < high else [low]
    spans = itertools.pairwise(edges)
    if not threads:
        for span in spans:
            yield source.by_index(*span)
        return
    with ThreadPoolExecutor(threads, "windows") as pool:
        pending: deque[tuple[tuple[int, int], Future[Events]]] = deque()
        try:
            while True:
                while len(pending) < threads + _AHEAD and (ahead := next(spans, None)):
                    pending.append((ahead, pool.submit(source.by_index, *ahead)))
                if not pending:
                    return
                # This thread does not wait for the first piece, but reads the next that none has begun.
                for k, (span, future) in enumerate(pending):
                    if pending[0][1].done():
                        break
                    if future.cancel():
                        pending[k] = span, _read(source, span)
                yield pending.popleft()[1].result()
        finally:
            for _, future in pending:
                future.cancel()


def _read(source: EventSource, span: tuple[int, int]) -> Future[Events]:
    """A piece read at once; a fault is raised when it is its turn."""
    future: Future[Events] = Future()
    try:
        future.set_result(source.by_index(*span))
    except Exception as error:
        future.set_exception(error)
    return future
