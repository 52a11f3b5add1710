"""AEDAT 2.0 (jAER) and 3.1 (cAER): DVS128 and DAVIS recordings, CIFAR10-DVS, DVS128 Gesture."""

from __future__ import annotations

import re
import struct
import warnings
from pathlib import Path

import numba
import numpy as np

from gep.events.io.blocks import Blocks
from gep.events.io.source import EventSource, Format, damaged
from gep.events.types import EventFormatError, Events

_CHIPS = {
    "DVS128": (128, 128),
    "DAVIS128": (128, 128),
    "DAVIS208": (192, 208),
    "DAVIS240": (180, 240),
    "DAVIS346": (260, 346),
    "DAVIS640": (480, 640),
}
_VERSION = re.compile(rb"#\s?!AER-DAT(\d)\.(\d)")
_LINE = re.compile(rb"#[^\x00-\x08\x0a-\x1f]*\r?\n")
_MAX_HEADER = 1 << 22
_END_2, _END_3 = b"#End Of ASCII Header", b"#!END-HEADER"
_RECORD = 8
_BLOCK = 1 << 16
_PACKET = struct.Struct("<hhiiiiii")
_POLARITY = 1  # event type
# Why the decoders stop.
_OUTSIDE, _BACKWARDS, _NO_ADDRESS = 1, 2, 3
_CAUSES = {
    _OUTSIDE: "event outside the sensor",
    _BACKWARDS: "the time steps back (the camera's clock was reset, or the file is damaged)",
    _NO_ADDRESS: "the address does not fit a DVS128; the file is damaged or of a camera that its header does not name",
}


@numba.njit(nogil=True, cache=True)
def _decode2(raw, start, stop, davis, chip_rows, chip_columns, height, width, wraps, previous, t, x, y, p):
    """Decodes records; returns (number of events, wraps, last raw time, first bad record or -1, cause)."""
    count = 0
    for record in range(start, stop):
        at = record * 8
        address = np.int64(raw[at]) << 24 | np.int64(raw[at + 1]) << 16 | np.int64(raw[at + 2]) << 8 | raw[at + 3]
        time = np.int64(raw[at + 4]) << 24 | np.int64(raw[at + 5]) << 16 | np.int64(raw[at + 6]) << 8 | raw[at + 7]
        if davis:
            if address & 0x80000400:  # an APS or IMU sample, an external event
                continue
            column, row, on = address >> 12 & 0x3FF, address >> 22 & 0x1FF, address >> 11 & 1
        else:
            if address >> 16:
                return count, wraps, previous, record, _NO_ADDRESS
            if address & 0x8000:  # a special event
                continue
            column, row, on = address >> 1 & 0x7F, address >> 8 & 0x7F, 1 - (address & 1)
        column, row = chip_columns - 1 - column, chip_rows - 1 - row
        if column < 0 or row < 0 or column >= width or row >= height:
            return count, wraps, previous, record, _OUTSIDE
        if time < previous:
            if previous - time < 1 << 31:
                return count, wraps, previous, record, _BACKWARDS
            wraps += 1
        previous = time
        t[count] = (np.int64(wraps) << 32) + time
        x[count] = column
        y[count] = row
        p[count] = on
        count += 1
    return count, wraps, previous, -1, 0


@numba.njit(nogil=True, cache=True)
def _decode3(data, times, base, height, width, previous, t, x, y, p):
    """Decodes one packet's words; returns (number of events, last time, first bad event or -1, cause)."""
    count = 0
    for event in range(len(data)):
        word = data[event]
        if not word & 1:  # marked invalid by a filter of the recording program
            continue
        column, row = word >> 17, word >> 2 & 0x7FFF
        if column >= width or row >= height:
            return count, previous, event, _OUTSIDE
        time = base + np.int64(times[event])
        if times[event] < 0 or time < previous:
            return count, previous, event, _BACKWARDS
        previous = time
        t[count] = time
        x[count] = column
        y[count] = row
        p[count] = word >> 1 & 1
        count += 1
    return count, previous, -1, 0


def _header(path: Path, raw: np.ndarray) -> tuple[bytes, str]:
    """(header, "2" or "3")."""
    head = raw[:_MAX_HEADER].tobytes()
    version = _VERSION.match(head)
    if not version or version.groups() not in ((b"2", b"0"), (b"3", b"1")):
        found = b".".join(version.groups()).decode() if version else "none (1.0, or no AEDAT file)"
        raise EventFormatError(f"{path}: byte 0: AEDAT version {found}; 2.0, 3.1 and 4.0 are read")
    major = version.group(1).decode()
    at = 0
    while line := _LINE.match(head, at):
        at = line.end()
        if line.group().startswith(_END_2 if major == "2" else _END_3):
            return head[:at], major
    if major == "3":
        raise EventFormatError(f"{path}: byte {at}: the header has no line {_END_3.decode()!r}")
    return head[:at], major


class Aedat2(Blocks):
    """An open AEDAT 2.0 recording: big-endian (address u32, time u32 µs); a block is 65,536 records.

    The camera is the header's AEChip, else its HardwareInterface, else a DVS128 as long as the addresses are a
    DVS128's. Addresses are turned as jAER shows them, row 0 at the top. The clock wraps at 2**32 µs; any other
    step back in time is a fault (the real recordings that this was written against have none).

    Source: iniVation's description of AEDAT 2.0; jAER's address layouts of DVS128 and DAVIS.
    """

    def __init__(
        self, path: Path, raw: np.ndarray, header: bytes, height: int | None, width: int | None, recover: bool
    ):
        chip = _chip(header, b"AEChip") or _chip(header, b"HardwareInterface")
        named = re.search(rb"# AEChip: *([^\r\n]*)", header)
        given = None if height is None or width is None else (height, width)
        if chip is None and named:
            name = named.group(1).decode("ascii", "replace")
            raise EventFormatError(f"{path}: byte {named.start(1)}: unknown camera {name!r}; known are {list(_CHIPS)}")
        self._davis = chip is not None and chip.startswith("DAVIS")
        self._chip = _CHIPS[chip or "DVS128"]
        self.path = path
        self.height, self.width = given or self._chip
        Events.empty(self.height, self.width).validate(str(path))
        num, partial = divmod(len(raw) - len(header), _RECORD)
        self._raw = raw[len(header) :]
        counts, spans, states, wraps, previous = [], [], [], 0, 0
        scratch = self._buffers(min(num, _BLOCK))
        for start in range(0, num, _BLOCK):
            states.append((start, wraps, previous))
            stop = min(start + _BLOCK, num)
            count, wraps, previous, bad, cause = self._run(start, stop, wraps, previous, scratch)
            counts.append(count)
            spans.append(scratch[0][[0, count - 1]] if count else (0, 0))
            if bad >= 0:
                at, kept = len(header) + bad * _RECORD, sum(counts)
                lost = f"{len(raw) - at:,} of {len(raw):,} bytes"
                damaged(path, at, _CAUSES[cause], recover=recover and kept > 0, kept=kept, lost=lost)
                num, partial = bad, 0
                break
        if not sum(counts):
            raise EventFormatError(f"{path}: byte {len(header)}: holds no events")
        if partial:
            warnings.warn(
                f"{path}: byte {len(raw) - partial}: dropped a trailing partial record of {partial} bytes; "
                "the file may be truncated",
                stacklevel=4,
            )
        used = np.array(counts) > 0
        self._states = [state for state, count in zip(states, counts) if count]
        self._num = num
        t_first, t_last = np.array(spans, np.int64)[used].T
        super().__init__(path, self.height, self.width, counts=np.array(counts)[used], t_first=t_first, t_last=t_last)

    @staticmethod
    def _buffers(count: int) -> tuple[np.ndarray, ...]:
        return tuple(np.empty(count, dtype) for dtype in (np.int64, np.uint16, np.uint16, np.uint8))

    def _run(self, start: int, stop: int, wraps: int, previous: int, into: tuple[np.ndarray, ...]) -> tuple[int, ...]:
        return _decode2(
            self._raw, start, stop, self._davis, *self._chip, self.height, self.width, wraps, previous, *into
        )

    def decode(self, begin: int, end: int) -> Events:
        start, wraps, previous = self._states[begin]
        stop = self._states[end][0] if end < len(self._states) else self._num
        into = self._buffers(stop - start)
        count, _, _, bad, cause = self._run(start, stop, wraps, previous, into)
        if bad >= 0 or count != self._begin[end] - self._begin[begin]:
            raise EventFormatError(f"{self.path}: the file changed while it was open: {_CAUSES.get(cause, 'count')}")
        t, x, y, p = (array[:count] for array in into)
        return Events(t, x, y, p, self.height, self.width)

    def close(self) -> None:
        self._raw = None  # type: ignore[assignment]  # a read after this must fail


class Aedat3(Blocks):
    """An open AEDAT 3.1 recording: little-endian packets; a block is a packet of polarity events.

    Other events, and events marked invalid, are left out. Times are µs, continued over the clock's 31 bits by
    the packets' overflow counter.

    Source: iniVation's description of AEDAT 3.1.
    """

    def __init__(
        self, path: Path, raw: np.ndarray, header: bytes, height: int | None, width: int | None, recover: bool
    ):
        self.path, self._raw = path, raw
        self._size = None if height is None or width is None else (height, width)
        if self._size:
            Events.empty(*self._size).validate(str(path))
        self._packets: list[tuple[int, int, int, int]] = []  # byte, size of an event, number, overflows
        counts, spans, previous, at, source_seen = [], [], np.int64(0), len(header), None
        cause, bad = "", at
        while at < len(raw) and not cause:
            bad = at
            if len(raw) - at < _PACKET.size:
                cause = "the file ends inside a packet header"
                break
            kind, source, size, offset, overflow, _, number, _ = _PACKET.unpack_from(raw.data, at)
            at += _PACKET.size
            if size < 1 or number < 0 or size * number > len(raw) - at or kind < 0 or overflow < 0:
                compressed = "; compressed packets are not read" if kind < 0 else ""
                cause = f"a packet of type {kind} with {number:,} events of {size:,} bytes does not fit{compressed}"
                break
            if kind == _POLARITY and number:
                if size < 8 or offset != 4:
                    cause = f"polarity events of {size} bytes with the time at {offset}"
                    break
                if source_seen not in (None, source):
                    cause = f"events of source {source} beside those of source {source_seen}; split the file"
                    break
                source_seen = source
                self.height, self.width = self._size or self._sensor(header, source)
                packet = (at, size, number, overflow)
                into = Aedat2._buffers(number)
                count, previous, event, fault = self._run(packet, previous, into)
                if event >= 0:
                    # The events before the fault are a packet of their own.
                    bad, cause, packet = at + event * size, _CAUSES[fault], (at, size, event, overflow)
                if count:
                    self._packets.append(packet)
                    counts.append(count)
                    spans.append(into[0][[0, count - 1]])
            at += size * number
        if cause:
            lost = f"{len(raw) - bad:,} of {len(raw):,} bytes"
            damaged(path, bad, cause, recover=recover and bool(counts), kept=sum(counts), lost=lost)
        if not counts:
            raise EventFormatError(f"{path}: byte {len(header)}: holds no events")
        t_first, t_last = np.array(spans, np.int64).T
        super().__init__(path, self.height, self.width, counts=np.array(counts), t_first=t_first, t_last=t_last)

    def _sensor(self, header: bytes, source: int) -> tuple[int, int]:
        name = _chip(header, b"Source %d" % source)
        if name is None:
            raise EventFormatError(
                f"{self.path}: byte 0: the header's source {source} is none of {list(_CHIPS)}; pass height and width"
            )
        return _CHIPS[name]

    def _run(self, packet: tuple[int, int, int, int], previous: int, into: tuple[np.ndarray, ...]) -> tuple[int, ...]:
        at, size, number, overflow = packet
        rows = np.ndarray((number, size), np.uint8, self._raw, at)[:, :8]
        words = np.ascontiguousarray(rows).view("<u4")
        base = np.int64(overflow) << 31
        return _decode3(words[:, 0], words[:, 1].view("<i4"), base, self.height, self.width, previous, *into)

    def decode(self, begin: int, end: int) -> Events:
        parts, previous = [], np.int64(0)
        for packet in self._packets[begin:end]:
            into = Aedat2._buffers(packet[2])
            count, previous, event, _ = self._run(packet, previous, into)
            if event >= 0:
                raise EventFormatError(f"{self.path}: byte {packet[0]}: the file changed while it was open")
            parts.append([array[:count] for array in into])
        t, x, y, p = (np.concatenate(arrays) for arrays in zip(*parts))
        return Events(t, x, y, p, self.height, self.width)

    def close(self) -> None:
        self._raw = None  # type: ignore[assignment]  # a read after this must fail


def _chip(header: bytes, field: bytes) -> str | None:
    """The camera that a header line names."""
    line = re.search(rb"#\s?" + field + rb":([^\r\n]*)", header)
    text = line.group(1).decode("ascii", "replace").upper() if line else ""
    return next((name for name in _CHIPS if name in text), None)


def open_aedat(
    path: Path, *, height: int | None = None, width: int | None = None, recover: bool = False
) -> EventSource:
    """A recording of either version, as the header says."""
    raw = np.memmap(path, np.uint8, "r")
    header, major = _header(path, raw)
    return (Aedat2 if major == "2" else Aedat3)(path, raw, header, height, width, recover)


def _sniff(head: bytes, path: Path) -> bool:
    version = _VERSION.match(head)
    return version is not None and version.group(1) in (b"2", b"3")


FORMATS = (Format("AEDAT", (".aedat",), "jAER and cAER, AEDAT 2.0 and 3.1; CIFAR10-DVS", _sniff, open_aedat),)
