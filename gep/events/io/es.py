"""Event Stream `.es` 2.x (DVS and ATIS): time steps and overflows of one byte, events of five."""

from __future__ import annotations

import warnings
from pathlib import Path

import numba
import numpy as np

from gep.events.io.source import Format, InMemory, damaged
from gep.events.types import EventFormatError, Events

_MAGIC = b"Event Stream"
_HEADER = 20
_TYPES = ("generic", "DVS", "ATIS", "display", "color")


@numba.njit(nogil=True, cache=True)
def _decode(raw, at, atis, height, width, t, x, y, p):
    """Returns (number of events, byte where it stopped, whether it stopped at an event outside the sensor)."""
    # The first byte of a record: the time step above the flags, all ones for an overflow or a reset.
    shift = 2 if atis else 1
    full = (256 >> shift) - 1
    count, time = 0, np.int64(0)
    while at < len(raw):
        first = np.int64(raw[at])
        step, flags = first >> shift, first & ((1 << shift) - 1)
        if step == full:
            time += full * flags
            at += 1
            continue
        if at + 5 > len(raw):
            return count, at, False
        column = np.int64(raw[at + 1]) | np.int64(raw[at + 2]) << 8
        row = np.int64(raw[at + 3]) | np.int64(raw[at + 4]) << 8
        if column >= width or row >= height:
            return count, at, True
        time += step
        at += 5
        if atis and flags & 1:
            continue
        t[count] = time
        x[count] = column
        y[count] = height - 1 - row
        p[count] = flags >> 1 if atis else flags
        count += 1
    return count, at, False


def open_es(path: Path, *, height: int | None = None, width: int | None = None, recover: bool = False) -> InMemory:
    """The recording, read whole.

    Rows are counted from the top here, from the bottom in the file. Of an ATIS recording the changes are
    read and the exposure measurements are not. Times are µs since the recording began.

    Args:
        path: the file.
        height: sensor rows, in place of the header's.
        width: sensor columns, likewise.
        recover: read the events before a fault.

    Raises:
        EventFormatError: naming the file, the byte offset and the fault.

    Source: the Event Stream 2.0 specification; the order of the flags as faery 0.7 writes them.
    """
    raw = np.fromfile(path, np.uint8)
    head = raw[:_HEADER].tobytes()
    if head[:12] != _MAGIC:
        raise EventFormatError(f"{path}: byte 0: does not begin with {_MAGIC!r}; no Event Stream file")
    if len(head) < 16 or head[12] != 2:
        version = ".".join(str(number) for number in head[12:15]) or "none"
        raise EventFormatError(f"{path}: byte 12: Event Stream version {version}; only 2.x is read")
    if head[15] not in (1, 2):
        kind = _TYPES[head[15]] if head[15] < len(_TYPES) else f"type {head[15]}"
        raise EventFormatError(f"{path}: byte 15: a {kind} stream; only DVS and ATIS hold polarity events")
    if len(head) < _HEADER:
        raise EventFormatError(f"{path}: byte {len(head)}: the file ends inside its header")
    columns, rows = np.frombuffer(head, "<u2", 2, 16).tolist()
    # The header's height says where the bottom row is, so another one given cannot replace it in the flip.
    empty = Events.empty(rows, columns).validate(f"{path}: byte 16")
    most = (len(raw) - _HEADER) // 5
    t, p = np.empty(most, np.int64), np.empty(most, np.uint8)
    x, y = np.empty(most, np.uint16), np.empty(most, np.uint16)
    count, at, outside = _decode(raw, _HEADER, head[15] == 2, rows, columns, t, x, y, p)
    if outside:
        column, row = np.frombuffer(raw[at + 1 : at + 5].tobytes(), "<u2").tolist()
        cause = f"event at x = {column}, y = {row} lies outside the {rows}x{columns} sensor"
        lost = f"{len(raw) - at:,} of {len(raw):,} bytes"
        damaged(path, at, cause, recover=recover and count > 0, kept=count, lost=lost)
    elif count == 0:
        raise EventFormatError(f"{path}: byte {_HEADER}: holds no events")
    elif at < len(raw):
        warnings.warn(
            f"{path}: byte {at}: dropped a trailing partial event of {len(raw) - at} bytes; the file may be truncated",
            stacklevel=2,
        )
    events = Events(t[:count], x[:count], y[:count], p[:count], empty.height, empty.width)
    if height is not None and width is not None:
        events = Events(events.t, events.x, events.y, events.p, height, width).validate(str(path))
    return InMemory(path, events)


def _sniff(head: bytes, path: Path) -> bool:
    return head.startswith(_MAGIC)


FORMATS = (Format("ES", (".es",), "Event Stream 2.x, DVS and ATIS", _sniff, open_es),)
