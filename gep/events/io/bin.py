"""N-MNIST and N-Caltech101 `.bin`: 5 bytes an event, big-endian, with timer-overflow rows."""

from __future__ import annotations

from pathlib import Path

import numba
import numpy as np

from gep.events.io.files import replacing
from gep.events.io.source import EventSource, Format
from gep.events.io.stream import BACKWARDS, FAULT, FAULT_T, FAULT_X, FAULT_Y, LAST, OUTSIDE, OWN, Codec, Stream, parts
from gep.events.types import Events

_RECORD = 5
_OVERFLOW_ROW = 240  # a record with this y is no event: it adds _OVERFLOW_US to every later time
_OVERFLOW_US = 1 << 13
_TIME_LIMIT = 1 << 23
_WRITE_LIMIT = 1 << 32
_NMNIST = (34, 34)
_NCALTECH101 = (180, 240)
_SHIFT = OWN  # µs that the overflow rows so far add


@numba.njit(nogil=True, cache=True)
def _decode(raw, height, width, state, t, x, y, p):
    count, shift, last = 0, state[_SHIFT], state[LAST]
    for record in range(len(raw) // _RECORD):
        at = np.uint64(record) * np.uint64(_RECORD)
        column, row, high = raw[at], raw[at + np.uint64(1)], raw[at + np.uint64(2)]
        if row == _OVERFLOW_ROW:
            shift += _OVERFLOW_US
            continue
        low = np.int64(raw[at + np.uint64(3)]) << 8 | np.int64(raw[at + np.uint64(4)])
        time = (np.int64(high & 0x7F) << 16 | low) + shift
        if time < last or row >= height or column >= width:
            state[FAULT] = BACKWARDS if time < last else OUTSIDE
            state[LAST], state[FAULT_X], state[FAULT_Y], state[FAULT_T] = last, column, row, time
            return count, record
        last = time
        if t is not None:
            k = np.uint64(count)
            t[k], x[k], y[k], p[k] = time, column, row, high >> 7
        count += 1
    state[_SHIFT], state[LAST] = shift, last
    return count, -1


@numba.njit(nogil=True, cache=True)
def _extent(raw):
    """(rows, columns) that the events of some records use."""
    rows, columns = np.uint8(0), np.uint8(0)
    for record in range(len(raw) // _RECORD):
        column, row = raw[record * _RECORD], raw[record * _RECORD + 1]
        if row != _OVERFLOW_ROW:
            rows, columns = max(rows, row), max(columns, column)
    return np.int64(rows) + 1, np.int64(columns) + 1


BIN = Codec(_decode, (0,), np.uint8, words=_RECORD)


class BinStream(Stream):
    """A `.bin` recording."""

    inferred = False

    def infer_size(self) -> None:
        """Sets the sensor to N-MNIST's if every event fits it, else to N-Caltech101's."""
        self.inferred = True
        self.height, self.width = _NMNIST
        for chunk in range(self._num_chunks()):
            rows, columns = _extent(self._load(chunk))
            if rows > _NMNIST[0] or columns > _NMNIST[1]:
                self.height, self.width = _NCALTECH101

    def fault(self, state: np.ndarray) -> str:
        if self.inferred and state[FAULT] == OUTSIDE:
            return (
                f"event at x = {state[FAULT_X]}, y = {state[FAULT_Y]} fits neither N-MNIST (34x34) nor N-Caltech101 "
                "(180x240); pass height and width if another sensor took it"
            )
        return super().fault(state)


def open_bin(path: Path, *, height: int | None, width: int | None, recover: bool) -> BinStream:
    """A `.bin` recording; arguments and errors are those of `read_bin`."""
    size = (height, width) if height is not None and width is not None else None
    given = size or (_OVERFLOW_ROW, 256)
    stream = BinStream(path, BIN, begin=0, height=given[0], width=given[1], recover=recover, what="5-byte event record")
    if size is None:
        stream.infer_size()
    return stream


def read_bin(path: str | Path, *, height: int | None = None, width: int | None = None, recover: bool = False) -> Events:
    """Events of an N-MNIST or N-Caltech101 recording.

    The format does not hold the sensor size. Where none is given it is 34x34 (N-MNIST) if every coordinate
    fits that, else 180x240 (N-Caltech101): the cameras' fields, not the largest coordinate, so that
    recordings of one data set have one size. A trailing partial record is dropped with a warning.

    Args:
        path: the file.
        height: sensor rows.
        width: sensor columns.
        recover: end at the first fault, with a warning, instead of raising.

    Returns:
        Validated events; t in µs as stored.

    Raises:
        EventFormatError: naming the file, the byte offset of the record and the fault.

    Source: Orchard et al. 2015, the data sets' file description.
    """
    with open_bin(Path(path), height=height, width=width, recover=recover) as stream:
        return stream.read()


def write_bin(path: str | Path, events: Events | EventSource) -> None:
    """Writes a `.bin` that `read_bin` reads back unchanged, replacing `path` only once complete.

    Times from 2**23 µs on are reached through overflow rows (one per 8,192 µs beyond), as the format has it.

    Args:
        path: the file to write.
        events: at least one event; x < 256, y < 240, 0 <= t < 2**32 µs.

    Raises:
        ValueError: the events do not fit the format.
    """
    before = 0
    with replacing(path) as temporary, open(temporary, "wb") as file:
        for part in parts(path, events):
            if part.x.max() > 255 or part.y.max() >= _OVERFLOW_ROW:
                raise ValueError(
                    f"{path}: .bin holds x < 256 and y < {_OVERFLOW_ROW}, got up to x = {part.x.max()}, "
                    f"y = {part.y.max()}; crop or resize the events"
                )
            if part.t[0] < 0 or part.t[-1] >= _WRITE_LIMIT:
                raise ValueError(
                    f"{path}: .bin holds 0 <= t < 2**32 µs, got {part.t[0]}..{part.t[-1]}; "
                    "subtract the first time (gep convert --from-zero), or cut the recording"
                )
            # Overflow rows needed before each event, so that what is left of its time fits 23 bits.
            needed = np.maximum(0, -((_TIME_LIMIT - 1 - part.t) // _OVERFLOW_US))
            at = np.arange(len(part)) + needed - before
            records = np.zeros((len(part) + int(needed[-1]) - before, _RECORD), np.uint8)
            records[:, 1] = _OVERFLOW_ROW
            left = part.t - needed * _OVERFLOW_US
            columns = (part.x, part.y, part.p.astype(np.int64) << 7 | left >> 16, left >> 8 & 0xFF, left & 0xFF)
            for column, values in enumerate(columns):
                records[at, column] = values
            file.write(records.tobytes())
            before = int(needed[-1])


FORMATS = (Format("bin", (".bin",), "N-MNIST, N-Caltech101", lambda head, path: False, open_bin, write_bin),)
