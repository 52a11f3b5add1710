"""Going through a recording window by window: large pieces, read ahead of use where the format allows it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from gep.events.types import Events

if TYPE_CHECKING:
    from gep.events.io.source import EventSource

_PIECE = 1 << 20  # events read at once, about
Piece = tuple[Events, np.ndarray]
"""Events of adjoining windows, and the windows' edges in µs."""


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
    density = len(source) / max(last - first, 1)
    return _cut(_Pieces(source, int(window_us), begin, end, density))


def _cut(pieces: _Pieces) -> Iterator[tuple[Events, tuple[int, int]]]:
    for events, edges in pieces.ahead() if pieces.source.read_ahead else pieces:
        pieces.learn(len(events), len(edges) - 1)
        cuts = np.searchsorted(events.t, edges).tolist()
        # The last edge may lie beyond the time covered, of which there are no events in the piece.
        for k, (begin, end) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist())):
            yield events[cuts[k] : cuts[k + 1]], (begin, end)


class _Pieces:
    """Stretches of a recording that hold about `_PIECE` events each, as far as the last ones tell."""

    def __init__(self, source: EventSource, window_us: int, begin: int, end: int, density: float):
        self.source, self._window_us, self._at, self._end = source, window_us, begin, end
        self._count = max(1, int(_PIECE / max(density * window_us, 1e-6)))

    def learn(self, events: int, count: int) -> None:
        """Adapts the windows a piece has, given what was in one: rates change, memory has to stay bounded."""
        self._count = max(1, min(2 * self._count, count * _PIECE // max(events, 1)))

    def __iter__(self) -> Iterator[Piece]:
        while (read := self._next()) is not None:
            yield read()

    def ahead(self) -> Iterator[Piece]:
        """The same, a few of them read ahead by threads."""
        threads = self.source.read_ahead
        with ThreadPoolExecutor(threads, "windows") as pool:
            pending: deque[Future[Piece]] = deque()
            try:
                while True:
                    while len(pending) <= threads and (read := self._next()) is not None:
                        pending.append(pool.submit(read))
                    if not pending:
                        return
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def _next(self) -> Callable[[], Piece] | None:
        left = -(-(self._end - self._at) // self._window_us)
        if left <= 0:
            return None
        edges = self._at + self._window_us * np.arange(min(self._count, left) + 1, dtype=np.int64)
        begin, self._at = self._at, int(edges[-1])
        stop = min(self._at, self._end)
        return lambda: (self.source.by_time(begin, stop), edges)
