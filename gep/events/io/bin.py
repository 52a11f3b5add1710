"""N-MNIST and N-Caltech101 `.bin`: 5 bytes an event, big-endian, with timer-overflow rows."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numba
import numpy as np

from gep.events.io.source import Format, InMemory
from gep.events.types import EventFormatError, Events

_RECORD = 5
_OVERFLOW_ROW = 240  # a record with this y is no event: it adds _OVERFLOW_US to every later time
_OVERFLOW_US = 1 << 13
_TIME_LIMIT = 1 << 23
_WRITE_LIMIT = 1 << 32
_NMNIST = (34, 34)
_NCALTECH101 = (180, 240)


@numba.njit(nogil=True, cache=True)
def _decode(raw, height, width, t, x, y, p):
    """Returns (number of events, rows + 1 used, columns + 1 used, first bad record or -1)."""
    count, rows, columns = 0, 0, 0
    shift, previous = np.int64(0), np.int64(-1)
    for record in range(len(t)):
        at = np.uint64(record) * np.uint64(5)
        column, row, high = raw[at], raw[at + np.uint64(1)], raw[at + np.uint64(2)]
        if row == _OVERFLOW_ROW:
            shift += _OVERFLOW_US
            continue
        low = np.int64(raw[at + np.uint64(3)]) << 8 | np.int64(raw[at + np.uint64(4)])
        time = (np.int64(high & 0x7F) << 16 | low) + shift
        if time < previous or row >= height or column >= width:
            return count, rows, columns, record
        previous = time
        t[count] = time
        x[count] = column
        y[count] = row
        p[count] = high >> 7
        rows, columns = max(rows, np.int64(row) + 1), max(columns, np.int64(column) + 1)
        count += 1
    return count, rows, columns, -1


def read_bin(path: str | Path, *, height: int | None = None, width: int | None = None) -> Events:
    """Events of an N-MNIST or N-Caltech101 recording.

    The format does not hold the sensor size. Where none is given it is 34x34 (N-MNIST) if every coordinate
    fits that, else 180x240 (N-Caltech101): the cameras' fields, not the largest coordinate, so that
    recordings of one data set have one size. A trailing partial record is dropped with a warning.

    Args:
        path: the file.
        height: sensor rows.
        width: sensor columns.

    Returns:
        Validated events; t in µs as stored.

    Raises:
        EventFormatError: naming the file, the byte offset of the record and the fault.

    Source: Orchard et al. 2015, the data sets' file description.
    """
    raw = np.fromfile(path, np.uint8)
    num, partial = divmod(len(raw), _RECORD)
    if num == 0:
        raise EventFormatError(f"{path}: byte 0: {len(raw)} bytes hold no 5-byte event record")
    if partial:
        warnings.warn(
            f"{path}: byte {num * _RECORD}: dropped a trailing partial record of {partial} bytes; "
            "the file may be truncated",
            stacklevel=2,
        )
    inferred = height is None or width is None
    height, width = (_OVERFLOW_ROW + 1, 256) if inferred else (height, width)
    t, p = np.empty(num, np.int64), np.empty(num, np.uint8)
    x, y = np.empty(num, np.uint16), np.empty(num, np.uint16)
    count, rows, columns, bad = _decode(raw, height, width, t, x, y, p)
    if bad >= 0:
        raise EventFormatError(f"{path}: byte {bad * _RECORD}: {_fault(raw, bad, height, width)}")
    if inferred:
        height, width = _NMNIST if rows <= _NMNIST[0] and columns <= _NMNIST[1] else _NCALTECH101
        if rows > height or columns > width:
            outside = (x[:count] >= width) | (y[:count] >= height)
            events = np.flatnonzero(raw[1 : num * _RECORD : _RECORD] != _OVERFLOW_ROW)
            at = int(events[np.argmax(outside)]) * _RECORD
            raise EventFormatError(
                f"{path}: byte {at}: event at x = {raw[at]}, y = {raw[at + 1]} fits neither N-MNIST "
                "(34x34) nor N-Caltech101 (180x240); pass height and width if another sensor took it"
            )
    return Events(t[:count], x[:count], y[:count], p[:count], height, width)


def _fault(raw: np.ndarray, record: int, height: int, width: int) -> str:
    x, y = raw[record * _RECORD : record * _RECORD + 2]
    if y >= height or x >= width:
        return f"event at x = {x}, y = {y} lies outside the {height}x{width} sensor"
    return "the time steps back; the file is damaged or no N-MNIST/N-Caltech101 .bin"


def write_bin(path: str | Path, events: Events) -> None:
    """Writes a `.bin` that `read_bin` reads back unchanged, replacing `path` only once complete.

    Times from 2**23 µs on are reached through overflow rows (one per 8,192 µs beyond), as the format has it.

    Args:
        path: the file to write.
        events: at least one event; x < 256, y < 240, 0 <= t < 2**32 µs.

    Raises:
        ValueError: the events do not fit the format.
    """
    events.validate(str(path))
    if len(events) == 0:
        raise ValueError(f"{path}: the .bin format cannot tell an empty recording from a damaged file")
    if events.x.max() > 255 or events.y.max() >= _OVERFLOW_ROW:
        raise ValueError(
            f"{path}: .bin holds x < 256 and y < {_OVERFLOW_ROW}, got up to x = {events.x.max()}, "
            f"y = {events.y.max()}; crop or resize the events"
        )
    if events.t[0] < 0 or events.t[-1] >= _WRITE_LIMIT:
        raise ValueError(
            f"{path}: .bin holds 0 <= t < 2**32 µs, got {events.t[0]}..{events.t[-1]}; "
            "subtract the first time, or cut the recording"
        )
    # Overflow rows needed before each event, so that what is left of its time fits 23 bits.
    needed = np.maximum(0, -((_TIME_LIMIT - 1 - events.t) // _OVERFLOW_US))
    at = np.arange(len(events)) + needed
    records = np.zeros((len(events) + int(needed[-1]), _RECORD), np.uint8)
    records[:, 1] = _OVERFLOW_ROW
    left = events.t - needed * _OVERFLOW_US
    columns = (events.x, events.y, events.p.astype(np.int64) << 7 | left >> 16, left >> 8 & 0xFF, left & 0xFF)
    for column, values in enumerate(columns):
        records[at, column] = values
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(records.tobytes())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def open_bin(path: Path, *, height: int | None, width: int | None, recover: bool) -> InMemory:
    """The recording, read whole."""
    return InMemory(path, read_bin(path, height=height, width=width))


FORMATS = (Format("bin", (".bin",), "N-MNIST, N-Caltech101", lambda head, path: False, open_bin, write_bin),)
