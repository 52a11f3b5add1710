"""`.npy` recordings: EST's float N x 4 of x, y, seconds, polarity, and structured arrays, memory-mapped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np

from gep.events.io.columns import microseconds, to_events
from gep.events.io.files import replacing
from gep.events.io.npy_header import num_bytes, read_head
from gep.events.io.npz import FIELDS, column_names
from gep.events.io.source import EventSource, Format, InMemory, damaged
from gep.events.types import EventFormatError, Events

_EST = (180, 240)
_STRUCTURED = (480, 640)
_DTYPE = np.dtype([("t", "<i8"), ("x", "<u2"), ("y", "<u2"), ("p", "u1")])


class NpySource(EventSource):
    """A structured `.npy`, sliced out of a memory map; each slice is checked when it is asked for."""

    def __init__(self, path: Path, rows: np.memmap, names: dict[str, str], unit: str | None, size: tuple[int, int]):
        self.path, self._rows, self._names, self._unit = path, rows, names, unit
        self.height, self.width = size

    def __len__(self) -> int:
        return len(self._rows)

    def __reduce__(self) -> tuple[Callable[..., NpySource], tuple[Any, ...]]:
        # A memory map pickles as the array it shows; the other side can map the file itself.
        return _reopen, (self.path, self.height, self.width, len(self))

    @property
    def span(self) -> tuple[int, int]:
        return self._time_at(0), self._time_at(len(self) - 1) + 1

    def by_index(self, start: int, stop: int) -> Events:
        start, stop, _ = slice(start, stop).indices(len(self))
        return self._events(start, max(start, stop))

    def by_time(self, t0: int, t1: int) -> Events:
        start = self._lower(t0)
        events = self.by_index(start, self._lower(t1)) if t1 > t0 else self.by_index(0, 0)
        if len(events) and (events.t[0] < t0 or events.t[-1] >= t1):
            raise EventFormatError(f"{self.path}: byte {self._byte(start)}: the times do not ascend; sort the events")
        return events

    def sound(self, count: int = 1 << 20) -> NpySource:
        """The source cut before its first fault, with a warning."""
        last = np.iinfo(np.int64).min
        for start in range(0, len(self), count):
            events = self._events(start, min(start + count, len(self)), recover=True)
            done = start + len(events)
            if len(events) and events.t[0] < last:
                done = start
                lost = f"{len(self) - start:,} of {len(self):,} events"
                damaged(
                    self.path,
                    self._byte(start),
                    f"event {start}: the time steps back",
                    recover=True,
                    kept=start,
                    lost=lost,
                )
            if done < min(start + count, len(self)):
                rows = cast(np.memmap, self._rows[:done])
                return NpySource(self.path, rows, self._names, self._unit, (self.height, self.width))
            last = int(events.t[-1])
        return self

    def _byte(self, index: int) -> int:
        return int(self._rows.offset) + index * self._rows.itemsize

    def _events(self, start: int, stop: int, recover: bool = False) -> Events:
        rows = np.asarray(self._rows[start:stop])
        columns = {name: rows[field] for name, field in self._names.items()}
        return to_events(
            self.path,
            columns,
            height=self.height,
            width=self.width,
            unit=self._unit,
            recover=recover,
            first=start,
            byte_of=self._byte,
        )

    def _time_at(self, index: int) -> int:
        return int(microseconds(np.asarray(self._rows[index : index + 1])[self._names["t"]], self._unit)[0][0])

    def _lower(self, t: int) -> int:
        """Index of the first event with a time >= t; a search over the whole strided column would copy it."""
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self._time_at(middle) < t else (low, middle)
        return low


def open_npy(
    path: str | Path, *, height: int | None = None, width: int | None = None, recover: bool = False
) -> EventSource:
    """A `.npy` recording: EST's layout read whole, a structured array memory-mapped.

    Args:
        path: the file: float (N, 4) of x, y, t [s], p in {-1, 1}; or a structured (N,) array with fields for
            t, x, y, p (also timestamp, polarity and other usual names; integer t in µs, float t in s).
        height: sensor rows; 180 (N-Caltech101) by default, 480 for a structured array.
        width: sensor columns; 240 and 640 likewise.
        recover: give the longest sound prefix and warn, instead of raising.

    Raises:
        EventFormatError: damaged file, another shape, non-finite values, or events out of order or bounds.

    Source: Gehrig et al., EST, arXiv 1904.08245, and its released data.
    """
    path = Path(path)
    rows = _mapped(path, recover)
    if len(rows) == 0:
        raise EventFormatError(f"{path}: byte {rows.offset}: holds no events")
    if rows.dtype.names:
        names, unit = column_names(rows.dtype.names)
        source = NpySource(path, rows, names, unit, _size(height, width, _STRUCTURED))
        Events.empty(source.height, source.width).validate(str(path))
        return source.sound() if recover else source
    height, width = _size(height, width, _EST)
    values = np.asarray(rows)
    finite = np.isfinite(values).all(axis=1)
    # The time of a row that is not finite anywhere else is spoilt too: one check then finds it.
    seconds = np.where(finite, values[:, 2].astype(np.float64), np.nan)
    columns = {"t": seconds, "x": values[:, 0], "y": values[:, 1], "p": values[:, 3]}
    events = to_events(
        path,
        columns,
        height=height,
        width=width,
        unit="s",
        recover=recover,
        byte_of=lambda index: int(rows.offset) + index * int(rows.strides[0]),
    )
    return InMemory(path, events)


def read_npy(path: str | Path, *, height: int | None = None, width: int | None = None, recover: bool = False) -> Events:
    """All events of a `.npy` recording; arguments and errors are `open_npy`'s."""
    return open_npy(path, height=height, width=width, recover=recover).read()


def write_npy(path: str | Path, events: Events | EventSource) -> None:
    """Writes a structured array of t int64 µs, x, y uint16, p uint8 (13 bytes an event), chunk by chunk.

    The format does not hold the sensor size: a reader other than 480x640 must be given it.

    Raises:
        ValueError: no events.
    """
    if len(events) == 0:
        raise ValueError(f"{path}: a .npy of no events cannot be told from a damaged one")
    chunks = (events.validate(str(path)),) if isinstance(events, Events) else events.chunks()
    with replacing(path) as temporary, open(temporary, "wb") as file:
        head = {"descr": np.lib.format.dtype_to_descr(_DTYPE), "fortran_order": False, "shape": (len(events),)}
        np.lib.format.write_array_header_1_0(file, head)
        for chunk in chunks:
            rows = np.empty(len(chunk), _DTYPE)
            for name in "txyp":
                rows[name] = getattr(chunk, name)
            file.write(rows.data)


def _reopen(path: Path, height: int, width: int, count: int) -> NpySource:
    rows = cast(np.memmap, _mapped(path, recover=True)[:count])
    return NpySource(path, rows, *column_names(rows.dtype.names), (height, width))


def _size(height: int | None, width: int | None, default: tuple[int, int]) -> tuple[int, int]:
    return default if height is None or width is None else (height, width)


def _mapped(path: Path, recover: bool) -> np.memmap:
    """The array on a memory map; its size is checked against the file's first."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        try:
            shape, fortran, dtype = read_head(file)
        except ValueError as error:
            raise EventFormatError(f"{path}: byte {file.tell()}: not a readable .npy array: {error}") from error
        begin = file.tell()
    structured = dtype.names is not None
    fits = len(shape) == 1 and set(column_names(dtype.names)[0]) == set(FIELDS) if structured else dtype.kind == "f"
    if not fits or (not structured and shape[1:] != (4,)):
        raise EventFormatError(
            f"{path}: holds {dtype} {shape}, expected float (N, 4) of x, y, t in seconds, p in -1/+1, "
            "or structured (N,) with fields t, x, y, p"
        )
    if begin + num_bytes(shape, dtype) > size:
        item = num_bytes((1, *shape[1:]), dtype)
        kept = 0 if fortran else (size - begin) // item
        lost = f"{shape[0] - kept:,} of {shape[0]:,} events"
        cause = f"not a readable .npy array: {shape[0]:,} events claimed, {kept:,} are there"
        damaged(path, size, cause, recover=recover and kept > 0, kept=kept, lost=lost)
        shape = (kept, *shape[1:])
    if shape[0] == 0:
        raise EventFormatError(f"{path}: byte {begin}: holds no events")
    return np.memmap(path, dtype, "r", begin, shape, "F" if fortran else "C")


FORMATS = (
    Format(
        "npy",
        (".npy",),
        "EST re-release of N-Caltech101, structured arrays",
        lambda head, path: head.startswith(b"\x93NUMPY"),
        open_npy,
        write_npy,
    ),
)
