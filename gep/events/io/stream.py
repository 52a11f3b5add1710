"""Recordings that a compiled kernel decodes, chunk after chunk of the file, into reused buffers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gep.events.io.source import EventSource, damaged
from gep.events.types import EventFormatError, Events

LAST, FAULT, FAULT_X, FAULT_Y, FAULT_T, OWN = 0, 1, 2, 3, 4, 5
"""Places in a decoder's int64 state: time of its last event (-1: none yet), then what was wrong and with which
values; a format's own places begin at OWN."""
OUTSIDE, BACKWARDS, RESERVED, POLARITY, CLOCK = 1, 2, 3, 4, 5
"""Faults."""
SLACK = 16
"""Entries past the last event that a kernel may overwrite."""

_CHUNK_BYTES = 1 << 18
_KEEP_CHUNKS = 2
_MAX_SIDE = 32767


@dataclass(frozen=True)
class Codec:
    """How the records of one format are decoded."""

    kernel: Callable[..., tuple[int, int]]
    """(records, height, width, state, t, x, y, p) -> (events, index of the first bad record or -1). It carries `state`
    on, validates, and with None for the four arrays only counts."""
    state: tuple[int, ...]
    """Its own part of the state at the begin of a recording."""
    word: type
    """dtype of the entries of `records`."""
    words: int = 1
    """Entries a record."""
    most: int = 1
    """Events a record, at most."""

    @property
    def record(self) -> int:
        """Bytes a record."""
        return np.dtype(self.word).itemsize * self.words

    def begin(self) -> np.ndarray:
        """State at the begin of a recording."""
        return np.array((-1, 0, 0, 0, 0, *self.state), np.int64)


@dataclass(frozen=True)
class Index:
    """What one pass over the file tells of its C chunks; ends at the first fault."""

    states: np.ndarray
    """(C, S) int64 decoder state before each chunk."""
    before: np.ndarray
    """(C + 1,) int64 events before each chunk, and in all."""
    last: np.ndarray
    """(C,) int64 µs, ascending: time of the last event up to the end of each chunk, -1 before the first event."""


class Buffers:
    """Arrays that decoded events are written to; they grow when asked."""

    def __init__(self, capacity: int = 0):
        self.t, self.p = np.empty(capacity, np.int64), np.empty(capacity, np.uint8)
        self.x, self.y = np.empty(capacity, np.uint16), np.empty(capacity, np.uint16)

    def __len__(self) -> int:
        return len(self.t)

    def grow(self, capacity: int, used: int) -> None:
        """Room for `capacity` events, of which the first `used` are kept."""
        larger = Buffers(capacity)
        larger.put(0, self, 0, used)
        self.__dict__.update(larger.__dict__)

    def put(self, at: int, other: Buffers, begin: int, end: int) -> None:
        """Copies events begin, …, end − 1 of another buffer (or of this one, from further back) to `at`."""
        for mine, theirs in zip(self.arrays(), other.arrays(), strict=True):
            mine[at : at + end - begin] = theirs[begin:end]

    def arrays(self, begin: int = 0, end: int | None = None) -> tuple[np.ndarray, ...]:
        """Views of t, x, y and p."""
        return tuple(array[begin:end] for array in (self.t, self.x, self.y, self.p))


class Stream(EventSource):
    """A recording in records, decoded a chunk of the file at a time.

    Slices need to know where each chunk begins: the first one runs the kernel over the file once, counting only
    (`_build_index`). `read` and `chunks` decode straight away.
    """

    def __init__(
        self, path: Path, codec: Codec, *, begin: int, height: int, width: int, recover: bool, what: str = "events"
    ):
        """Opens the file.

        Args:
            path: the file.
            codec: decoder of its records.
            begin: byte at which the records begin.
            height: sensor rows.
            width: sensor columns.
            recover: end at the first fault, with a warning, instead of raising.
            what: name of a record, for messages.

        Raises:
            ValueError: the sensor size is none.
            EventFormatError: there is not one whole record.
        """
        self.path, self.codec, self.begin, self.height, self.width = path, codec, begin, height, width
        self.recover = recover
        if not (0 < height <= _MAX_SIDE and 0 < width <= _MAX_SIDE):
            raise ValueError(f"{path}: sensor size {height}x{width} is not in 1..{_MAX_SIDE}; give height and width")
        self._size = os.path.getsize(path)
        self._num, partial = divmod(max(self._size - begin, 0), codec.record)
        if self._num == 0:
            raise EventFormatError(f"{path}: byte {begin}: {self._size - begin} bytes hold no {what}")
        if partial:
            warnings.warn(
                f"{path}: byte {self._size - partial}: dropped a trailing partial record of {partial} bytes; "
                "the file may be truncated",
                stacklevel=5,
            )
        self._per_chunk = max(_CHUNK_BYTES // codec.record, 1)
        self._raw: np.ndarray = np.empty(min(self._per_chunk, self._num) * codec.words, codec.word)
        self._file = open(path, "rb", buffering=0)
        self._found: Index | None = None
        self._kept: tuple[int, int, Events] | None = None
        self._warned = False

    def close(self) -> None:
        self._file.close()

    def __len__(self) -> int:
        return int(self._index().before[-1])

    def by_index(self, start: int, stop: int) -> Events:
        start, stop, _ = slice(start, stop).indices(len(self))
        if stop <= start:
            return Events.empty(self.height, self.width)
        before = self._index().before
        begin = int(np.searchsorted(before, start, side="right")) - 1
        end = int(np.searchsorted(before, stop, side="left"))
        return self._slice(begin, end)[start - int(before[begin]) : stop - int(before[begin])]

    def by_time(self, t0: int, t1: int) -> Events:
        index = self._index()
        begin, end = np.searchsorted(index.last, [t0, t1], side="left")
        if t1 <= t0 or begin == len(index.last):
            return Events.empty(self.height, self.width)
        events = self._slice(int(begin), min(int(end) + 1, len(index.last)))
        first, last = np.searchsorted(events.t, [t0, t1], side="left")
        return events[int(first) : int(last)]

    @property
    def span(self) -> tuple[int, int]:
        return int(self.by_index(0, 1).t[0]), int(self._index().last[-1]) + 1

    def read(self) -> Events:
        if self._found is None:
            return self._walk(keep=True)
        return self.by_index(0, len(self))

    def chunks(self, count: int = 1 << 20) -> Iterator[Events]:
        most = self._per_chunk * self.codec.most + SLACK
        out, used, state = Buffers(count + most), 0, self.codec.begin()
        found = False
        for chunk in range(self._num_chunks()):
            if used + most > len(out):
                out.grow(used + most, used)
            records = self._load(chunk)
            added, bad = self._kernel(records, state, out, used)
            used, done, found = used + added, 0, found or added > 0
            if bad >= 0:
                self._broken(chunk, bad, used, state)
            while used - done >= count:
                yield self._events(out, done, done + count)
                done += count
            if done:
                out.put(0, out, done, used)
                used -= done
            if bad >= 0:
                break
        if used:
            yield self._events(out, 0, used)
        if not found:
            raise self._empty()

    def _build_index(self) -> Index:
        """The index, by a pass over the file."""
        self._walk(keep=self._num_chunks() == 1)
        assert self._found is not None
        return self._found

    def _index(self) -> Index:
        if self._found is None:
            self._found = self._build_index()
        return self._found

    def _walk(self, keep: bool) -> Events:
        """Goes over the whole file once and leaves the index; with `keep` the events come with it."""
        state, used, before = self.codec.begin(), 0, [0]
        states, last = [], []
        num, most = self._num_chunks(), self._per_chunk * self.codec.most + SLACK
        out = Buffers(min(most, self._num * self.codec.most + SLACK) if keep else 0)
        for chunk in range(num):
            states.append(state.copy())
            records = self._load(chunk)
            needed = used + len(records) // self.codec.words * self.codec.most + SLACK
            if keep and needed > len(out):
                out.grow(max(needed, int(1.1 * used * num / max(chunk, 1)) + most), used)
            added, bad = self._kernel(records, state, out if keep else None, used)
            used += added
            before.append(used)
            last.append(state[LAST])
            if bad >= 0:
                self._broken(chunk, bad, used, state)
                break
        if used == 0:
            raise self._empty()
        self._found = Index(np.array(states), np.array(before, np.int64), np.array(last, np.int64))
        if not keep:
            return Events.empty(self.height, self.width)
        if len(out) > used + used // 8:
            for array in (out.t, out.x, out.y, out.p):
                array.resize(used, refcheck=False)
        events = self._events(out, 0, used)
        if len(self._found.last) == 1:
            self._kept = (0, 1, events)
        return events

    def _slice(self, begin: int, end: int) -> Events:
        """The events of chunks begin, …, end − 1, from the index."""
        if self._kept is not None and self._kept[:2] == (begin, end):
            return self._kept[2]
        index = self._index()
        total = int(index.before[end] - index.before[begin])
        out, used, state = Buffers(total + self._per_chunk * self.codec.most + SLACK), 0, index.states[begin].copy()
        for chunk in range(begin, end):
            added, bad = self._kernel(self._load(chunk), state, out, used)
            used += added
            if bad >= 0:
                self._broken(chunk, bad, int(index.before[begin]) + used, state)
            if used != index.before[chunk + 1] - index.before[begin] or state[LAST] != index.last[chunk]:
                raise EventFormatError(
                    f"{self.path}: byte {self._byte(chunk)}: the events are not those that were counted on opening; "
                    "the file was changed, or its clock ran over more than once"
                )
        events = self._events(out, 0, used)
        self._kept = (begin, end, events) if end - begin <= _KEEP_CHUNKS else None
        return events

    def _kernel(self, records: np.ndarray, state: np.ndarray, out: Buffers | None, used: int) -> tuple[int, int]:
        arrays = (None,) * 4 if out is None else out.arrays(used)
        return self.codec.kernel(records, self.height, self.width, state, *arrays)

    def _load(self, chunk: int) -> np.ndarray:
        """Records of a chunk, in memory that the next call reuses."""
        num = min(self._per_chunk, self._num - chunk * self._per_chunk)
        records = self._raw[: num * self.codec.words]
        at, got, view = self._byte(chunk), 0, records.data.cast("B")
        self._file.seek(at)
        while got < len(view):
            more = self._file.readinto(view[got:])
            if not more:
                raise EventFormatError(f"{self.path}: byte {at + got}: the file ends here, it was longer when opened")
            got += more
        return records

    def _byte(self, chunk: int) -> int:
        return self.begin + chunk * self._per_chunk * self.codec.record

    def _num_chunks(self) -> int:
        return -(-self._num // self._per_chunk)

    def _events(self, out: Buffers, begin: int, end: int) -> Events:
        t, x, y, p = out.arrays(begin, end)
        return Events(t, x, y, p, self.height, self.width)

    def _empty(self) -> EventFormatError:
        return EventFormatError(f"{self.path}: byte {self.begin}: the recording holds no events")

    def _broken(self, chunk: int, bad: int, kept: int, state: np.ndarray) -> None:
        """Raises, or warns once, that a record is bad."""
        byte = self._byte(chunk) + bad * self.codec.record
        if not self._warned:
            lost = f"the last {self._size - byte:,} of {self._size:,} bytes"
            cause, recover = self.fault(state), self.recover and kept > 0
            damaged(self.path, byte, cause, recover=recover, kept=kept, lost=lost)
        self._warned = True

    def fault(self, state: np.ndarray) -> str:
        """What the kernel found wrong, for people."""
        x, y, t = (int(state[place]) for place in (FAULT_X, FAULT_Y, FAULT_T))
        if state[FAULT] == OUTSIDE:
            return f"event at x = {x}, y = {y} lies outside the {self.height}x{self.width} sensor"
        if state[FAULT] == BACKWARDS:
            return f"the time steps back from {int(state[LAST])} to {t} µs"
        if state[FAULT] == CLOCK:  # a time word by itself; LAST stays the last event's
            return f"the time steps back from {x} to {t} µs"
        if state[FAULT] == POLARITY:
            return f"polarity {x} is neither 0 nor 1"
        return f"no word is of the type 0x{x:X}"


def parts(path: str | Path, events: Events | EventSource, count: int = 1 << 18) -> Iterator[Events]:
    """Validated events for a writer, `count` at a time.

    Raises:
        ValueError: there are none; no stream format can tell an empty recording from a damaged file.
    """
    if len(events) == 0:
        raise ValueError(f"{path}: an empty recording cannot be told from a damaged file; there is nothing to write")
    if isinstance(events, Events):
        events.validate(str(path))
        return (events[at : at + count] for at in range(0, len(events), count))
    return events.chunks(count)
