"""Recordings made of blocks whose counts and times are known: slices decode only the blocks that they touch."""

from __future__ import annotations

import abc
from pathlib import Path

import numpy as np

from gep.events.io.source import EventSource
from gep.events.types import Events


class Blocks(EventSource):
    """A recording in B blocks (packets, or runs of records), each decodable without the others."""

    def __init__(
        self, path: Path, height: int, width: int, *, counts: np.ndarray, t_first: np.ndarray, t_last: np.ndarray
    ):
        """Takes the index of the blocks; every block holds at least one event.

        Args:
            path: the file.
            height: sensor rows.
            width: sensor columns.
            counts: (B,) int64 events of each block.
            t_first: (B,) int64 µs, ascending, time of each block's first event.
            t_last: (B,) int64 µs, time of each block's last event.
        """
        self.path, self.height, self.width = path, height, width
        self._begin = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._t_first, self._t_last = t_first, t_last

    @abc.abstractmethod
    def decode(self, begin: int, end: int) -> Events:
        """Validated events of the blocks begin, …, end − 1 (end > begin)."""

    def __len__(self) -> int:
        return int(self._begin[-1])

    def by_index(self, start: int, stop: int) -> Events:
        start, stop, _ = slice(start, stop).indices(len(self))
        if stop <= start:
            return Events.empty(self.height, self.width)
        begin = int(np.searchsorted(self._begin, start, side="right")) - 1
        end = int(np.searchsorted(self._begin, stop, side="left"))
        first = int(self._begin[begin])
        return self.decode(begin, end)[start - first : stop - first]

    def by_time(self, t0: int, t1: int) -> Events:
        begin = int(np.searchsorted(self._t_last, t0, side="left"))
        end = int(np.searchsorted(self._t_first, t1, side="left"))
        if end <= begin:
            return Events.empty(self.height, self.width)
        events = self.decode(begin, end)
        first, last = np.searchsorted(events.t, [t0, t1])
        return events[int(first) : int(last)]

    @property
    def span(self) -> tuple[int, int]:
        if not len(self):
            return 0, 0
        return int(self._t_first[0]), int(self._t_last[-1]) + 1
