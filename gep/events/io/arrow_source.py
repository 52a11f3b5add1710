"""Reading the native container: slices by index and time out of a memory map or any other buffer."""

from __future__ import annotations

import bisect
import mmap
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gep.events.io import arrow_batch, arrow_layout
from gep.events.io.arrow_layout import Bytes, LayoutError, Message
from gep.events.io.files import FileBytes
from gep.events.io.source import EventSource, damaged
from gep.events.types import EventFormatError, Events

BATCH = 1 << 16
"""Events in a record batch; a longer one is refused, which bounds what a damaged file can ask for."""
VERSION = b"1"
KEY = b"gep.batch"

_KEPT = 16  # unpacked batches: windows follow each other, and the batch that one ends in is the next one's first
_BYTES = {"none": (8, 2, 2, 1), "shuffled": (4, 2, 2, 0.125)}  # of t, x, y, p, an event


@dataclass(frozen=True)
class _Batch:
    message: Message
    start: int
    rows: int
    first: int
    last: int
    sum: int


class ArrowSource(EventSource):
    """Events in the native container, from a file or from any buffer that holds one."""

    _from_file = False

    def __init__(self, data: Bytes, path: Path, *, recover: bool = False, max_events: int | None = None):
        self.path, self._data = path, data
        self._checked: set[int] = set()
        self._kept: dict[int, Events] = {}
        self._known: dict[int, _Batch] = {}
        self._recover = recover
        self._read_schema()
        self._begins, fault = self._find_batches(recover)
        self._len = 0
        if recover:
            fault = self._keep_sound(fault)
        if len(self._begins):
            first, final = self._batch(0), self._batch(len(self._begins) - 1)
            self._len = final.start + final.rows
            if first.start != 0 or first.first > final.last:
                raise self._error(first.message.begin, "the record batches are not in order")
        if not recover and not self._ends():
            raise self._error(self._end(), "the footer leaves out record batches")
        if fault is not None:
            if self._len == 0:
                raise self._error(*fault)
            lost = f"{len(data) - fault[0]:,} of {len(data):,} bytes"
            damaged(path, fault[0], fault[1], recover=True, kept=self._len, lost=lost)
        if max_events is not None and self._len > max_events:
            raise self._error(0, f"holds {self._len:,} events where at most {max_events:,} are allowed")

    def __len__(self) -> int:
        return self._len

    @property
    def span(self) -> tuple[int, int]:
        if self._len == 0:
            return (0, 0)
        return self._batch(0).first, self._batch(len(self._begins) - 1).last + 1

    def by_index(self, start: int, stop: int) -> Events:
        start, stop, _ = slice(start, stop).indices(self._len)
        if stop <= start:
            return Events.empty(self.height, self.width)
        if isinstance(self._data, FileBytes):
            rows, count = self._batch(0).rows, len(self._begins)
            low, high = min(start // rows, count - 1), (stop - 1) // rows + 1
            self._data.load(int(self._begins[low]), int(self._begins[high]) if high < count else self._end())
        parts = [self._part(number, low, high) for number, low, high in self._parts(start, stop)]
        return parts[0] if len(parts) == 1 else _join(parts, _empty(stop - start, self.height, self.width))

    def by_time(self, t0: int, t1: int) -> Events:
        return self.by_index(self._lower(t0), self._lower(t1)) if t1 > t0 else self.by_index(0, 0)

    def chunks(self, count: int = BATCH) -> Iterator[Events]:
        """The recording in order, `count` events at a time, in buffers that the next chunk overwrites."""
        kept = _empty(min(count, self._len), self.height, self.width)
        for start in range(0, self._len, count):
            stop = min(start + count, self._len)
            spans = list(self._parts(start, stop))
            if len(spans) == 1 and self._encoding == "none":
                yield self._part(*spans[0])
                continue
            done = 0
            for number, low, high in spans:
                part = kept[done : done + high - low]
                if self._encoding != "none" and len(part) == self._batch(number).rows:
                    self._unpack(number, part)
                else:
                    _join([self._part(number, low, high)], part)
                done += len(part)
            yield kept[:done]

    def close(self) -> None:
        self._kept, self._data = {}, memoryview(b"")

    def __reduce__(self) -> tuple[Callable[..., ArrowSource], tuple[Any, ...]]:
        if not self._from_file:
            raise TypeError(f"{self.path}: only a container opened from a file can be sent to another process")
        return ArrowSource.from_file, (self.path, self._recover, not isinstance(self._data, FileBytes))

    @classmethod
    def from_file(cls, path: Path, recover: bool = False, mapped: bool = True) -> ArrowSource:
        """The container in a file, memory-mapped, or read slice by slice: see `FileBytes`."""
        if not mapped:
            source = cls(FileBytes(path), path, recover=recover)
            source._from_file = True
            return source
        with open(path, "rb", buffering=0) as file:
            # A map of nothing is refused by the system.
            size = os.fstat(file.fileno()).st_size
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        source = cls(memoryview(whole), path, recover=recover)
        source._from_file = True
        return source

    def _error(self, byte: int, cause: str) -> EventFormatError:
        return EventFormatError(f"{self.path}: byte {byte}: {cause}")

    def _read_schema(self) -> None:
        if bytes(self._data[:6]) != arrow_layout.MAGIC:
            raise self._error(0, "no Arrow IPC file (it does not begin with ARROW1)")
        try:
            message = arrow_layout.message_at(self._data, 8)
        except LayoutError as error:
            raise self._error(error.byte, str(error)) from None
        found = {} if message is None or message.is_batch else message.metadata
        if message is None or found.get(b"gep.events") != VERSION:
            raise self._error(
                8,
                "an Arrow file, but its schema has no gep.events = 1: other Arrow files are not read; "
                "write_events makes such files",
            )
        try:
            self.height, self.width = int(found[b"height"]), int(found[b"width"])
            self._encoding = found[b"encoding"].decode()
            Events.empty(self.height, self.width).validate()
            _BYTES[self._encoding]
        except (KeyError, ValueError) as error:
            raise self._error(8, f"the schema's metadata is damaged: {error}") from None
        self._after_schema = message.end

    def _find_batches(self, recover: bool) -> tuple[np.ndarray, tuple[int, str] | None]:
        fault = None
        try:
            self._begins = arrow_layout.batches(self._data)
            if not recover or self._ends():
                return self._begins, None
        except LayoutError as error:
            if not recover:
                raise self._error(error.byte, f"{error}; recover=True reads what comes before") from None
            fault = (error.byte, str(error))
        # The footer is the damaged part, so what follows the schema is walked through.
        self._known.clear()
        begins, at = [], self._after_schema
        try:
            while (message := arrow_layout.message_at(self._data, at)) is not None:
                begins.append(at)
                at = message.end
        except LayoutError as error:
            fault = (error.byte, str(error))
        if fault is None:
            fault = (at, "the footer does not list the record batches that are there")
        return np.array(begins, np.int64), fault

    def _ends(self) -> bool:
        """Whether the end mark follows the last record batch that the footer lists."""
        try:
            return arrow_layout.message_at(self._data, self._end()) is None
        except (LayoutError, EventFormatError):
            return False

    def _end(self) -> int:
        return self._batch(len(self._begins) - 1).message.end if len(self._begins) else self._after_schema

    def _keep_sound(self, fault: tuple[int, str] | None) -> tuple[int, str] | None:
        last, start = np.iinfo(np.int64).min, 0
        for number, begin in enumerate(self._begins):
            try:
                batch = self._batch(number)
                if batch.first < last or batch.start != start:
                    raise self._error(int(begin), "the record batch does not continue the one before")
                self._part(number, 0, batch.rows)
            except EventFormatError as error:
                self._begins = self._begins[:number]
                return int(begin), str(error).split(": ", 2)[-1]
            last, start = batch.last, batch.start + batch.rows
        return fault

    def _batch(self, number: int) -> _Batch:
        """What the head of a batch says; sealed by a sum of its own, so it can be relied on for a search."""
        if number in self._known:
            return self._known[number]
        begin = int(self._begins[number])
        try:
            message = arrow_layout.message_at(self._data, begin)
        except LayoutError as error:
            raise self._error(error.byte, str(error)) from None
        if message is None or not message.is_batch:
            raise self._error(begin, "no record batch starts here")
        text, _, mark = message.metadata.get(KEY, b"").rpartition(b" ")
        if not text or mark != seal(text, self.height, self.width, self._encoding):
            raise self._error(begin, "the record batch's head is damaged (its checksum differs)")
        start, rows, first, last, total = (int(word) for word in text.split())
        if rows != message.rows or not 0 < rows <= BATCH:
            raise self._error(begin, f"a record batch of {message.rows:,} events, expected {rows:,} <= {BATCH:,}")
        batch = _Batch(message, start, rows, first, last, total)
        self._known[number] = batch
        return batch

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(batch, from, to) of every batch that the events start, …, stop − 1 are in."""
        # All batches but those before a long gap are of one length, so the guess is nearly always right.
        number = min(start // self._batch(0).rows, len(self._begins) - 1)
        if not self._batch(number).start <= start < self._batch(number).start + self._batch(number).rows:
            key = lambda index: self._batch(index).start  # noqa: E731
            number = bisect.bisect_right(range(len(self._begins)), start, key=key) - 1
        while start < stop:
            if number >= len(self._begins) or not 0 <= start - self._batch(number).start < self._batch(number).rows:
                raise self._error(int(self._begins[0]), "the record batches do not follow each other")
            batch = self._batch(number)
            high = min(stop - batch.start, batch.rows)
            yield number, start - batch.start, high
            start, number = batch.start + high, number + 1

    def _lower(self, t: int) -> int:
        """Index of the first event with a time >= t."""
        key = lambda index: self._batch(index).last  # noqa: E731
        number = bisect.bisect_left(range(len(self._begins)), t, key=key)
        if number == len(self._begins):
            return self._len
        batch = self._batch(number)
        if t <= batch.first:
            return batch.start
        return batch.start + int(np.searchsorted(self._part(number, 0, batch.rows).t, t))

    def _part(self, number: int, low: int, high: int) -> Events:
        """Checked events low, …, high − 1 of a batch."""
        if self._encoding == "none":
            return self._plain(number)[low:high]
        if number not in self._kept:
            events = _empty(self._batch(number).rows, self.height, self.width)
            self._unpack(number, events)
            while len(self._kept) >= _KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[number] = events
        return self._kept[number][low:high]

    def _unpack(self, number: int, into: Events) -> None:
        batch = self._batch(number)
        arrays = self._arrays(batch)
        self._check_sum(number, batch, arrays)
        t, x, y, p = arrays
        last, inside = arrow_batch.unpack(
            t, x, y, p, batch.first, self.height, self.width, into.t, into.x, into.y, into.p
        )
        if last != batch.last or not inside:
            raise self._error(batch.message.begin, "events outside the sensor, or times that do not add up")

    def _plain(self, number: int) -> Events:
        batch = self._batch(number)
        arrays = self._arrays(batch)
        t, x, y, p = (array.view(dtype) for array, dtype in zip(arrays, ("i8", "u2", "u2", "u1")))
        events = Events(t, x, y, p, self.height, self.width)
        if number not in self._checked:
            self._check_sum(number, batch, arrays)
            if not arrow_batch.sound(events.t, events.x, events.y, events.p, self.height, self.width):
                events.validate(f"{self.path}: byte {batch.message.begin}")
            if events.t[0] != batch.first or events.t[-1] != batch.last:
                raise self._error(batch.message.begin, "times other than the record batch's head says")
        return events

    def _check_sum(self, number: int, batch: _Batch, arrays: tuple[np.ndarray, ...]) -> None:
        if number not in self._checked and arrow_batch.checksum(arrays) != batch.sum:
            raise self._error(batch.message.begin, f"{batch.rows:,} events are damaged (their checksum differs)")
        self._checked.add(number)

    def _arrays(self, batch: _Batch) -> tuple[np.ndarray, ...]:
        """The stored bytes of t, x, y, p, decompressed."""
        message = batch.message
        if len(message.buffers) != 8:
            raise self._error(message.begin, f"{len(message.buffers)} buffers where four columns have 8")
        out, body = [], self._data[message.body : message.end]
        for width, (at, size) in zip(_BYTES[self._encoding], message.buffers[1::2], strict=True):
            expected = -(-int(batch.rows * width * 8) // 8)
            raw = body[at - message.body : at - message.body + size]
            if message.codec:
                raw = self._decompress(raw, message, at, expected)
            if len(raw) < expected:
                raise self._error(at, f"a column of {len(raw):,} bytes where {batch.rows:,} events take {expected:,}")
            array = np.frombuffer(raw, np.uint8, expected)
            # A buffer may lie anywhere in memory (a tar member); kernels and views want whole words.
            out.append(array if array.ctypes.data % 8 == 0 else array.copy())
        return tuple(out)

    def _decompress(self, raw: memoryview, message: Message, at: int, expected: int) -> memoryview:
        import pyarrow as pa

        size = int.from_bytes(raw[:8], "little", signed=True)
        if size == -1:
            return raw[8:]
        # Asked before anything is allocated: the claim may be damaged.
        if size != expected or message.codec == "unknown":
            raise self._error(at, f"a column that claims {size:,} bytes where {expected:,} are due")
        try:
            return memoryview(pa.Codec(message.codec).decompress(raw[8:], size))
        except (OSError, ValueError, MemoryError) as error:
            raise self._error(at, f"{message.codec} cannot decompress a column: {error}") from None


def seal(text: bytes, height: int, width: int, encoding: str) -> bytes:
    """The sum that closes a batch head, over the head and what the schema says."""
    return b"%08x" % zlib.crc32(b"%d %d %s " % (height, width, encoding.encode()) + text)


def _empty(count: int, height: int, width: int) -> Events:
    t, x, y, p = (np.empty(count, dtype) for dtype in ("i8", "u2", "u2", "u1"))
    return Events(t, x, y, p, height, width)


def _join(parts: list[Events], into: Events) -> Events:
    for name in "txyp":
        np.concatenate([getattr(part, name) for part in parts], out=getattr(into, name))
    return into
