"""Prophesee `.dat`: text header, then 8-byte records; N-Cars and the Gen1 and 1 Mpx automotive data sets."""

from __future__ import annotations

from pathlib import Path

import numba
import numpy as np

from gep.events.io.evt_header import Header, parse_header
from gep.events.io.files import replacing
from gep.events.io.source import EventSource, Format
from gep.events.io.stream import (
    BACKWARDS,
    FAULT,
    FAULT_T,
    FAULT_X,
    FAULT_Y,
    LAST,
    OUTSIDE,
    OWN,
    POLARITY,
    Codec,
    Index,
    Stream,
    parts,
)
from gep.events.types import EventFormatError, Events

_RECORD = 8
_KINDS = (0, 12)  # event types whose records are change detections
_NCARS, _ATIS = (100, 120), (240, 304)
_CLOCK = 1 << 32
_MAX_SIDE = 1 << 14
_BASE = OWN  # µs that the 32-bit clock's turns add


@numba.njit(nogil=True, cache=True)
def _decode(words, height, width, state, t, x, y, p):
    base, last = state[_BASE], state[LAST]
    rows, columns, side = np.uint32(height), np.uint32(width), np.uint32(_MAX_SIDE - 1)
    num, one = len(words) // 2, np.uint64(1)
    # One vectorised pass; a fault, or a turn of the clock, only raises a flag.
    odd = np.uint32(base + np.int64(words[0]) < last)
    for i in range(1, num):
        odd |= np.uint32(words[np.uint64(2 * i)] < words[np.uint64(2 * i - 2)])
    for i in range(num):
        k = np.uint64(i)
        word = words[k + k + one]
        column, row, polarity = word & side, word >> np.uint32(14) & side, word >> np.uint32(28)
        odd |= np.uint32(column >= columns) | np.uint32(row >= rows) | polarity >> np.uint32(1)
        if t is not None:
            t[k], x[k], y[k], p[k] = base + np.int64(words[k + k]), column, row, polarity
    if not odd:
        state[LAST] = base + np.int64(words[np.uint64(2 * num - 2)])
        return num, -1
    for i in range(num):
        time, word = base + np.int64(words[2 * i]), np.int64(words[2 * i + 1])
        if last - time > _CLOCK // 2:
            base, time = base + _CLOCK, time + _CLOCK
        column, row, polarity = word & (_MAX_SIDE - 1), word >> 14 & (_MAX_SIDE - 1), word >> 28
        fault = 0
        if polarity > 1:
            fault, column = POLARITY, polarity
        elif time < last:
            fault = BACKWARDS
        elif column >= width or row >= height:
            fault = OUTSIDE
        if fault:
            state[FAULT], state[LAST] = fault, last
            state[FAULT_X], state[FAULT_Y], state[FAULT_T] = column, row, time
            return i, i
        if t is not None:
            t[i] = time
        last = time
    state[_BASE], state[LAST] = base, last
    return num, -1


@numba.njit(nogil=True, cache=True)
def _extent(words):
    """(rows, columns) that the events of some records use."""
    rows, columns, side = np.uint32(0), np.uint32(0), np.uint32(_MAX_SIDE - 1)
    for i in range(len(words) // 2):
        word = words[2 * i + 1]
        columns, rows = max(columns, word & side), max(rows, word >> np.uint32(14) & side)
    return np.int64(rows) + 1, np.int64(columns) + 1


DAT = Codec(_decode, (0,), np.uint32, words=2)


class DatStream(Stream):
    """A `.dat` recording; its chunks are found without a pass over the file, as every record is one event."""

    def _build_index(self) -> Index:
        num = self._num_chunks()
        first, end = self._clock(0), np.empty(num, np.int64)
        times = np.empty(2 * num, np.int64)  # of the first and last record of each chunk
        for chunk in range(num):
            stop = min((chunk + 1) * self._per_chunk, self._num)
            times[2 * chunk] = self._clock(chunk * self._per_chunk) if chunk else first
            times[2 * chunk + 1] = self._clock(stop - 1)
            end[chunk] = stop
        turns = np.zeros(2 * num, np.int64)
        turns[1:] = np.cumsum(times[:-1] - times[1:] > _CLOCK // 2)
        times += turns * _CLOCK
        if self.recover or (np.diff(times) < 0).any():
            return super()._build_index()  # Only a pass finds the first fault.
        states = np.tile(self.codec.begin(), (num, 1))
        states[1:, LAST], states[1:, _BASE] = times[1:-1:2], turns[1:-1:2] * _CLOCK
        return Index(states, np.concatenate([[0], end]), times[1::2].copy())

    def _clock(self, record: int) -> int:
        self._file.seek(self.begin + record * _RECORD)
        return int.from_bytes(self._file.read(4), "little")

    def infer_size(self) -> None:
        """Sets the sensor to the smallest of N-Cars' and the ATIS camera's that holds all events.

        Raises:
            EventFormatError: it is neither.
        """
        rows = columns = 0
        for chunk in range(self._num_chunks()):
            more_rows, more_columns = _extent(self._load(chunk))
            rows, columns = max(rows, more_rows), max(columns, more_columns)
            if rows > _ATIS[0] or columns > _ATIS[1]:
                raise EventFormatError(
                    f"{self.path}: byte {self._byte(chunk)}: the header states no sensor size, and events up to "
                    f"x = {columns - 1}, y = {rows - 1} fit neither N-Cars (120x100) nor the ATIS camera (304x240); "
                    "give height and width"
                )
        self.height, self.width = _NCARS if rows <= _NCARS[0] and columns <= _NCARS[1] else _ATIS


def open_dat(path: Path, *, height: int | None, width: int | None, recover: bool) -> DatStream:
    """A `.dat` recording: ASCII header, event type, record size, then uint32 t [µs] and uint32 x, y, p.

    The 32-bit clock turns over after 71.6 minutes; turns are followed. Without a size from the caller or the header,
    the sensor is 120x100 (N-Cars) if every event fits that, else 304x240 (the ATIS camera).

    Args:
        path: the file.
        height: sensor rows.
        width: sensor columns.
        recover: end at the first fault, with a warning, instead of raising.

    Raises:
        EventFormatError: records of another kind, none at all, or no sensor size.

    Source: Prophesee's page on the DAT format (docs.prophesee.ai); older versions than 2 pack the bits differently.
    """
    header = parse_header(path)
    with open(path, "rb") as file:
        file.seek(header.size)
        kind = file.read(2)
    _check(header, kind)
    size = (height, width) if height is not None and width is not None else header.stated_size()
    given = size or (_MAX_SIDE, _MAX_SIDE)
    stream = DatStream(
        path, DAT, begin=header.size + 2, height=given[0], width=given[1], recover=recover, what="8-byte event record"
    )
    if size is None:
        try:
            stream.infer_size()
        except EventFormatError:
            stream.close()
            raise
    return stream


def _check(header: Header, kind: bytes) -> None:
    path, version = header.path, header.fields.get("version", "2")
    if version.split(".")[0] in ("0", "1"):
        raise EventFormatError(f"{path}: byte 0: .dat of version {version}; known is version 2, convert the file")
    if len(kind) < 2:
        raise EventFormatError(f"{path}: byte {header.size}: the file ends before its records' type and size")
    if kind[0] not in _KINDS or kind[1] != _RECORD:
        raise EventFormatError(
            f"{path}: byte {header.size}: records of type {kind[0]} and {kind[1]} bytes; "
            f"events have type {' or '.join(map(str, _KINDS))} and {_RECORD} bytes"
        )


def write_dat(path: str | Path, events: Events | EventSource) -> None:
    """Writes a `.dat` that reads back unchanged, replacing `path` only once complete.

    Args:
        path: the file to write.
        events: at least one event; the first 0 <= t < 2**32 µs, no pause of 2**31 µs, sensor up to 16384 x 16384.

    Raises:
        ValueError: the events do not fit the format.
    """
    if max(events.height, events.width) > _MAX_SIDE:
        raise ValueError(f"{path}: .dat holds sensors up to 16384x16384, got {events.height}x{events.width}")
    lines = ("Data file containing CD events.", "Version 2", f"Height {events.height}", f"Width {events.width}")
    previous = None
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write("".join(f"% {line}\n" for line in lines).encode() + bytes((_KINDS[1], _RECORD)))
        for part in parts(path, events):
            steps = np.diff(part.t, prepend=part.t[0] if previous is None else previous)
            if (previous is None and not 0 <= part.t[0] < _CLOCK) or steps.max() >= _CLOCK // 2:
                raise ValueError(
                    f"{path}: .dat holds a first 0 <= t < 2**32 µs and pauses under 2**31 µs; "
                    "subtract the first time (gep convert --from-zero)"
                )
            records = np.empty((len(part), 2), np.uint32)
            records[:, 0] = part.t & (_CLOCK - 1)
            records[:, 1] = part.p.astype(np.uint32) << 28 | part.y.astype(np.uint32) << 14 | part.x
            file.write(records.tobytes())
            previous = part.t[-1]


def _sniff(head: bytes, path: Path) -> bool:
    header = parse_header(path, head)
    kind = head[header.size : header.size + 2]
    return (
        header.size > 0 and "evt" not in header.fields and len(kind) == 2 and kind[0] in _KINDS and kind[1] == _RECORD
    )


FORMATS = (Format("DAT", (".dat",), "N-Cars, Prophesee's Gen1 and 1 Mpx data sets", _sniff, open_dat, write_dat),)
