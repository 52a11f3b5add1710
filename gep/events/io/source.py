"""A recording that is open and read in parts: what every reader hands out."""

from __future__ import annotations

import abc
import bisect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gep.events.io.windows import windows
from gep.events.types import EventFormatError, Events


class EventSource(abc.ABC):
    """An open recording. Slices by index or time read no more than they need, where the format allows it.

    A source belongs to the process that opened it (HDF5 handles do not survive a fork); `gep.events.io.opened`
    keeps one a process.
    """

    path: Path
    height: int
    """Sensor rows."""
    width: int
    """Sensor columns."""
    read_ahead: int = 0
    """Threads by which `windows` reads ahead; above 0 only where `by_index` may be called from several at once."""
    piece: int = 1 << 20
    """Events that `windows` reads at once."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Events in the recording (the first call may scan the file)."""

    @abc.abstractmethod
    def by_index(self, start: int, stop: int) -> Events:
        """Validated events start, …, stop − 1, as `range(len)[start:stop]` would have them."""

    @abc.abstractmethod
    def by_time(self, t0: int, t1: int) -> Events:
        """Validated events with t0 <= t < t1, µs as the file has them."""

    def before(self, t: int) -> int:
        """Number of events with a time below t µs: where they end, by index."""
        return bisect.bisect_left(range(len(self)), t, key=lambda index: int(self.by_index(index, index + 1).t[0]))

    @property
    @abc.abstractmethod
    def span(self) -> tuple[int, int]:
        """(first time, last time + 1) in µs; (0, 0) when there are no events."""

    def read(self) -> Events:
        """All events, validated."""
        return self.by_index(0, len(self))

    def chunks(self, count: int = 1 << 20) -> Iterator[Events]:
        """The recording in order, `count` events at a time; a chunk is valid until the next one is asked for."""
        for start in range(0, len(self), count):
            yield self.by_index(start, min(start + count, len(self)))

    def windows(
        self, window_us: int, *, t0: int | None = None, t1: int | None = None
    ) -> Iterator[tuple[Events, tuple[int, int]]]:
        """Adjoining windows of equal duration in order: the way to go through a recording once.

        Up to a million events are read at a time whatever time they take, in some formats ahead of use in threads of
        their own, which is several times as fast as a call of `by_time` a window. A few such pieces are held at once
        and what of a longer window has been read; windows are views on the pieces and stay valid.

        Args:
            window_us: duration of each window in µs.
            t0: begin of the first window in µs; None takes the first event's time.
            t1: end of the time covered in µs, exclusive; None takes the last event's time + 1.

        Yields:
            (validated events of [begin, end), (begin, end) in µs). What is left at the end becomes a window too; its
            end may lie beyond t1, its events do not.

        Raises:
            ValueError: window_us < 1 or t1 < t0.
            EventFormatError: as `by_index`, at the first window that ends in the damaged piece.
        """
        return windows(self, window_us, t0, t1)

    def close(self) -> None:  # noqa: B027 - not every source holds anything
        """Gives up file handles; the source is not to be used after."""

    def __enter__(self) -> EventSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class InMemory(EventSource):
    """A recording that was read whole, for formats that cannot be read otherwise."""

    def __init__(self, path: Path, events: Events):
        self.path, self.events = path, events
        self.height, self.width = events.height, events.width

    def __len__(self) -> int:
        return len(self.events)

    def by_index(self, start: int, stop: int) -> Events:
        return self.events[start:stop]

    def by_time(self, t0: int, t1: int) -> Events:
        begin, end = np.searchsorted(self.events.t, [t0, t1])
        return self.events[int(begin) : int(end)]

    def before(self, t: int) -> int:
        return int(np.searchsorted(self.events.t, t))

    @property
    def span(self) -> tuple[int, int]:
        t = self.events.t
        return (int(t[0]), int(t[-1]) + 1) if len(t) else (0, 0)


@dataclass(frozen=True)
class Format:
    """One file format: how it is recognised, opened and written."""

    name: str
    """Short name, e.g. "EVT3"."""
    suffixes: tuple[str, ...]
    """File suffixes it comes with, lower case."""
    what: str
    """Cameras or data sets that use it, for messages."""
    sniff: Callable[[bytes, Path], bool]
    """(first 4096 bytes, path) -> whether the content is of this format; False where the content cannot tell."""
    open: Callable[..., EventSource]
    """(path, *, height, width, recover) -> source."""
    write: Callable[..., None] | None = None
    """(path, events or source) -> None; complete or not there at all."""


def damaged(path: Path, byte: int, cause: str, *, recover: bool, kept: int = 0, lost: str = "") -> None:
    """Raises, or with `recover` warns, that a recording is damaged from a byte on.

    Args:
        path: the file.
        byte: offset of the fault.
        cause: what is wrong there.
        recover: whether the sound prefix is to be used.
        kept: events before the fault.
        lost: how much is lost, for people ("1,234 of 5,678 bytes").
    """
    if not recover:
        raise EventFormatError(
            f"{path}: byte {byte}: {cause}; recover=True (gep convert --recover) reads the {kept:,} events before it"
        )
    warnings.warn(f"{path}: byte {byte}: {cause}; kept the {kept:,} events before it, lost {lost}", stacklevel=3)
