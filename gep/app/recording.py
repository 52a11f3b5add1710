"""What the page plays: a recording in memory, cut into windows of one length, and the recordings that are kept."""

from __future__ import annotations

import re
import secrets
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from gep.events.io import open_events
from gep.events.io.source import InMemory
from gep.events.types import EventFormatError, Events

MOST_EVENTS = 20_000_000
"""Events that are kept of a recording, about 260 MB."""
MOST_UNPACKED = 1_000_000_000
"""Bytes that an archive may unpack to."""
MOST_PIXELS = 1 << 24
"""Pixels of a sensor that is drawn; a window of the largest that gep reads would take 13 GB."""
BINS = 120
"""Parts of the time that rates are counted in."""
WINDOWS_MS = (1, 2, 5, 10, 20, 40, 50, 100, 200, 500, 1000)
"""Lengths of a window that the page offers [ms]."""
_MOST_KEPT = 8
_FEW = 25  # windows that a recording should have, where nothing else says how long they are


@dataclass(frozen=True, eq=False)
class Recording:
    """Events and what people call them; never changed, so that visitors may share it."""

    name: str
    events: Events
    note: str = ""
    """What a person should know of it, such as that only a part was read."""

    @property
    def source(self) -> InMemory:
        """As what models read from."""
        return InMemory(Path(self.name), self.events)

    @property
    def span(self) -> tuple[int, int]:
        """(first time, last time + 1) [µs]."""
        return int(self.events.t[0]), int(self.events.t[-1]) + 1

    @cached_property
    def rates(self) -> np.ndarray:
        """(2, BINS) int64: OFF and ON events in equal parts of the time."""
        begin, end = self.span
        place = (self.events.t - begin) * BINS // (end - begin)
        return np.bincount(place + BINS * self.events.p.astype(np.int64), minlength=2 * BINS).reshape(2, BINS)

    @cached_property
    def counts(self) -> np.ndarray:
        """(H, W) int64 events of each pixel."""
        height, width = self.events.height, self.events.width
        place = self.events.y.astype(np.int64) * width + self.events.x
        return np.bincount(place, minlength=height * width).reshape(height, width)

    def count(self, window_us: int) -> int:
        """Number of windows of a length, the last of which may reach beyond the end."""
        begin, end = self.span
        return max(1, -(-(end - begin) // window_us))

    def bounds(self, index: int, window_us: int) -> tuple[int, int]:
        """[t0, t1) of a window [µs]."""
        begin = self.span[0] + index * window_us
        return begin, begin + window_us

    def between(self, t0: int, t1: int) -> Events:
        """Events with t0 <= t < t1 [µs]."""
        first, stop = np.searchsorted(self.events.t, [t0, t1])
        return self.events[int(first) : int(stop)]

    def window_ms(self) -> int:
        """The offered length that gives about 25 windows [ms]."""
        each = (self.span[1] - self.span[0]) / 1000 / _FEW
        return min(WINDOWS_MS, key=lambda offered: abs(np.log(offered / max(each, 1e-3))))


@dataclass(frozen=True)
class Shown:
    """One window of a recording, and what was asked of it."""

    recording: Recording
    t0: int
    """Begin, inclusive [µs]."""
    t1: int
    """End, exclusive [µs]."""
    words: str = ""
    """What the person typed, comma-separated."""

    @property
    def window_us(self) -> int:
        """Its length [µs]."""
        return self.t1 - self.t0

    @property
    def events(self) -> Events:
        """Of the window."""
        return self.recording.between(self.t0, self.t1)

    def past(self, count: int, window_us: int = 0) -> np.ndarray:
        """(T, 2) int64 bounds [µs] of adjoining windows up to this one's end, at most `count`, as far as there are any.

        Args:
            count: windows wanted.
            window_us: their length; 0 = this one's.
        """
        length = window_us or self.window_us
        there = max(1, -(-(self.t1 - self.recording.span[0]) // length))
        ends = self.t1 - length * np.arange(min(count, there) - 1, -1, -1, dtype=np.int64)
        return np.stack([ends - length, ends], axis=1)


def read_recording(path: Path, *, height: int | None = None, width: int | None = None) -> Recording:
    """A file that a person dropped, its first `MOST_EVENTS` events.

    Args:
        path: any format that gep reads.
        height, width: of the sensor, where the file does not say.
    Raises:
        ValueError: what is wrong and how to mend it; the file goes by its name, not by its place on this machine.
    """
    try:
        _check_unpacked(path)
        with open_events(path, height=height, width=width) as source:
            if source.height * source.width > MOST_PIXELS:
                raise EventFormatError(f"{path}: a sensor of {source.width} × {source.height} pixels is not drawn")
            total = len(source)
            events = source.by_index(0, min(total, MOST_EVENTS))
            # Columns of a mapped file would keep it.
            columns = {name: np.array(getattr(events, name)) for name in "txyp"}
            events = Events(**columns, height=events.height, width=events.width)
    except (ValueError, OSError, MemoryError, ImportError, ArithmeticError) as error:
        raise EventFormatError(_without_place(str(error) or type(error).__name__, path)) from error
    if not len(events):
        raise EventFormatError(f"{path.name} holds no events: choose a recording with some")
    note = f"The first {len(events):,} of {total:,} events are shown." if total > len(events) else ""
    return Recording(path.name, events, note)


def _check_unpacked(path: Path) -> None:
    """Refuses an archive whose members unpack to more than any recording that is shown: it is read as a whole."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # What is read of a member ends at the size that it states.
            size = sum(member.file_size for member in archive.infolist())
        if size > MOST_UNPACKED:
            raise EventFormatError(
                f"{path}: unpacks to {size / 1e9:.1f} GB, more than {MOST_UNPACKED / 1e9:.1f}: gep convert makes an "
                ".arrow file of it, which is read in parts"
            )


def sensor_size(text: str) -> tuple[int, int] | tuple[None, None]:
    """(rows, columns) of "columns × rows", the order that sensors are sold by; empty = (None, None), as the file says.

    Raises:
        ValueError: anything else.
    """
    found = re.fullmatch(r"\s*(?:(\d{1,5})\s*[x×*,; ]\s*(\d{1,5}))?\s*", text, re.IGNORECASE)
    if found is None:
        raise ValueError(f"sensor size {text!r}: give columns × rows, such as 640 × 480")
    return (int(found[2]), int(found[1])) if found[1] else (None, None)


def _without_place(text: str, path: Path) -> str:
    return text.replace(str(path), path.name).replace(str(path.parent), "")


class Library:
    """Built-in recordings by name, and the last few that people dropped by a key that cannot be guessed.

    Args:
        built_in: name -> makes it; made once, when it is first asked for.
    """

    def __init__(self, built_in: dict[str, Callable[[], Recording]]):
        self._makers, self._made = dict(built_in), dict[str, Recording]()
        self._dropped: OrderedDict[str, Recording] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """Of the built-in recordings."""
        return list(self._makers)

    def add(self, recording: Recording) -> str:
        """Keeps a recording, and lets go of the one that was not looked at for longest."""
        key = secrets.token_urlsafe(16)
        with self._lock:
            self._dropped[key] = recording
            while len(self._dropped) > _MOST_KEPT:
                self._dropped.popitem(last=False)
        return key

    def drop(self, key: str) -> None:
        """Lets go of a recording that was added; built-in ones stay."""
        with self._lock:
            self._dropped.pop(key, None)

    def get(self, key: str) -> Recording:
        """The recording of a key or name.

        Raises:
            KeyError: it is no longer kept.
        """
        with self._lock:
            if key in self._dropped:
                self._dropped.move_to_end(key)
                return self._dropped[key]
            if key not in self._made:
                self._made[key] = self._makers[key]()
            return self._made[key]
