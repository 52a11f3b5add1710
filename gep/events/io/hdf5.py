"""HDF5 recordings in the DSEC, M3ED, MVSEC and v2e layouts, sliced by index and time without reading the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gep.events.io import blosc
from gep.events.io.arrow_batch import sound
from gep.events.io.columns import microseconds, to_events
from gep.events.io.hdf5_file import DAMAGE, write_hdf5
from gep.events.io.hdf5_handle import Handle
from gep.events.io.hdf5_layouts import find_layout, sensor_size
from gep.events.io.source import EventSource, Format, damaged
from gep.events.types import EventFormatError, Events

if TYPE_CHECKING:
    import h5py

_MAGIC = b"\x89HDF\r\n\x1a\n"
_STEP = 1 << 16  # events between two probes of an uncompressed dataset
_PIECE = 1 << 19  # events read ahead at once: a few such pieces, 13 bytes an event, stay in the processor's cache
_MANY = 4  # chunks from which on they are unpacked together; below, those that h5py keeps serve several windows


class Hdf5Source(EventSource):
    """An HDF5 recording; it may be used in forked processes, as a pickle, and by several threads."""

    read_ahead = 1

    def __init__(self, path: Path, *, height: int | None, width: int | None, recover: bool, camera: str):
        self.path, self.camera, self._recover = path, camera, recover
        self._probes: dict[int | str, Any] = {}
        self._handle = Handle(path, recover)
        file = self._handle.file()
        with self._guarded(lambda: (0, "the file's structure")):
            self._layout = find_layout(file, path, camera)
            size = sensor_size(file, self._layout)
            offset = self._layout.offset
            self._offset = int(file[offset][()]) if offset and offset in file else 0
            self._len = len(file[self._layout.datasets[0]])
            self._table = self._layout.columns["t"][1] is not None
            rows = (file[self._layout.datasets[0]].chunks or (_PIECE,))[0]
            self.piece = max(_PIECE // rows, _MANY) * rows
        self.height, self.width = size if height is None or width is None else (height, width)
        Events.empty(self.height, self.width).validate(str(path))
        if recover:
            self._keep_sound()

    def __len__(self) -> int:
        return self._len

    @property
    def span(self) -> tuple[int, int]:
        return self._time_at(0), self._time_at(self._len - 1) + 1

    def by_index(self, start: int, stop: int) -> Events:
        start, stop, _ = slice(start, stop).indices(self._len)
        if stop <= start:
            return Events.empty(self.height, self.width)
        names, events = self._layout.datasets, None
        with self._guarded(partial(self._first_bad, names[0], start, stop)):
            if self._layout.unit == "us" and (columns := self._simple(start, stop, *names)):
                events = blosc.events(columns, start, stop, self._offset, self.height, self.width)
        return self._events(start, self._raw(start, stop, "txyp")) if events is None else events

    def by_time(self, t0: int, t1: int) -> Events:
        if t1 <= t0:
            return Events.empty(self.height, self.width)
        begin, raw, t = self._around(t0, t1)
        backwards = t[1:] < t[:-1]
        if backwards.any():  # a search would find anything
            at = begin + int(np.argmax(backwards)) + 1
            byte = self._byte(self._layout.datasets[0], at)
            raise EventFormatError(f"{self.path}: byte {byte}: event {at}: the time steps back")
        low, high = (int(index) for index in np.searchsorted(t, [t0, t1]))
        if high == low:
            return Events.empty(self.height, self.width)
        columns = {name: column[low:high] for name, column in raw.items()} | {"t": t[low:high]}
        if not self._table:
            columns |= self._raw(begin + low, begin + high, "xyp")
        return self._events(begin + low, columns, unit="us", offset=0)

    def before(self, t: int) -> int:
        begin, _, times = self._around(t, t + 1)
        return begin + int(np.searchsorted(times, t))

    def close(self) -> None:
        self._handle.close()

    @contextmanager
    def _guarded(self, where: Callable[[], tuple[int, str]]) -> Iterator[None]:
        try:
            yield
        except (EventFormatError, ImportError):
            raise
        except DAMAGE as error:
            self._handle.check()  # another thread may have closed it during the read
            byte, what = where()
            cause = str(error).partition("\n")[0].strip("'\"") or type(error).__name__
            raise EventFormatError(f"{self.path}: byte {byte}: {what} cannot be read: {cause}") from error

    def _raw(self, start: int, stop: int, names: str) -> dict[str, np.ndarray]:
        """Columns as stored; of a table all four, they lie side by side."""
        raw: dict[str, np.ndarray] = {}
        for dataset in self._layout.datasets:
            mine = [n for n in "txyp" if self._layout.columns[n][0] == dataset and (self._table or n in names)]
            if not mine:
                continue
            with self._guarded(partial(self._first_bad, dataset, start, stop)):
                direct = self._unpacked(dataset, start, stop)
                values = self._handle.dataset(dataset)[start:stop] if direct is None else direct
            if direct is None:  # a lost chunk is no Blosc chunk
                self._check_filled(dataset, start, values)
            raw |= {n: values[:, self._layout.columns[n][1]] if self._table else values for n in mine}
        return raw

    def _unpacked(self, name: str, start: int, stop: int) -> np.ndarray | None:
        """Elements of a long stretch by `blosc.read`; None where h5py is to read them."""
        columns = self._simple(start, stop, name)
        column = blosc.read(columns[0], start, stop, wide=name == self._layout.columns["t"][0]) if columns else None
        return None if column is None else column.values

    def _simple(self, start: int, stop: int, *names: str) -> tuple[h5py.Dataset, ...]:
        """The datasets if `blosc` may read a stretch of them, else none: of short ones h5py keeps the chunks."""
        columns = tuple(self._handle.dataset(name) for name in names)
        short = any(not data.chunks or stop - start < _MANY * data.chunks[0] for data in columns)
        if self._table or self._recover or short:
            return ()
        if (key := f"simple {names}") not in self._probes:
            self._probes[key] = all(blosc.is_simple(data) for data in columns)
        return columns if self._probes[key] else ()

    def _events(
        self, start: int, raw: dict[str, np.ndarray], unit: str | None = None, offset: int | None = None
    ) -> Events:
        unit, offset = unit or self._layout.unit, self._offset if offset is None else offset
        t, x, y, p = (raw[name] for name in "txyp")
        # The usual columns need no conversion but that of t, and one pass that checks them.
        if unit == "us" and t.dtype.kind in "iu" and x.dtype == y.dtype == np.uint16 and p.dtype.itemsize == 1:
            times, good = (t, None) if t.dtype == np.int64 else microseconds(t, unit)
            if good is None:
                times, p = np.add(times, offset, out=times) if offset else times, p.view(np.uint8)
                if sound(times, x, y, p, self.height, self.width):
                    return Events(times, x, y, p, self.height, self.width)
                np.subtract(times, offset, out=times)  # they may be the raw ones
        return to_events(
            self.path,
            raw,
            height=self.height,
            width=self.width,
            unit=unit,
            offset=offset,
            first=start,
            byte_of=lambda index: self._byte(self._layout.datasets[0], index),
        )

    def _times(self, raw: np.ndarray) -> np.ndarray:
        t, good = microseconds(raw, self._layout.unit)
        if good is not None:
            raise EventFormatError(
                f"{self.path}: byte {self._byte(self._layout.datasets[0], 0)}: times that do not fit int64 µs"
            )
        return np.add(t, self._offset, out=t) if self._offset else t

    def _time_at(self, index: int) -> int:
        if index not in self._probes:
            self._probes[index] = int(self._times(self._raw(index, index + 1, "t")["t"])[0])
        return self._probes[index]

    def _around(self, t0: int, t1: int) -> tuple[int, dict[str, np.ndarray], np.ndarray]:
        """(first index, raw columns, µs) of a piece that holds all events of [t0, t1)."""
        guess = self._by_index_map(t0, t1)
        if guess is not None:
            # One event more on either side: only they show that the map says the truth.
            begin, end = max(guess[0] - 1, 0), min(guess[1] + 1, self._len)
            raw = self._raw(begin, end, "t")
            t = self._times(raw["t"])
            if len(t) and (begin == 0 or t[0] < t0) and (end == self._len or t[-1] >= t1):
                return begin, raw, t
        step = (self._handle.dataset(self._layout.datasets[0]).chunks or (_STEP,))[0]
        begin = self._bisect(t0, step, (self._len - 1) // step + 1)
        end = self._bisect(t1, step, (self._len - 1) // step + 1)
        begin, end = max(begin - 1, 0) * step, min(end * step, self._len)
        raw = self._raw(begin, end, "t")
        return begin, raw, self._times(raw["t"])

    def _bisect(self, t: int, step: int, count: int) -> int:
        """Number of the first piece of `step` events that begins at or after t."""
        low, high = 0, count
        while low < high:
            middle = (low + high) // 2
            if self._time_at(middle * step) < t:
                low = middle + 1
            else:
                high = middle
        return low

    def _by_index_map(self, t0: int, t1: int) -> tuple[int, int] | None:
        name = self._layout.index
        data = self._handle.find(name) if name else None
        if data is None:
            return None
        if "map" not in self._probes:
            with self._guarded(lambda: self._first_bad(str(name), 0, len(data))):
                self._probes["map"] = data[:].astype(np.int64)
        index = self._probes["map"]
        low, high = (t0 - self._offset) // 1000, -(-(t1 - self._offset) // 1000)
        begin = 0 if low < 0 else index[low] if low < len(index) else self._len
        end = 0 if high < 0 else index[high] if high < len(index) else self._len
        # Past the map's end lies at most the last millisecond (M3ED: two).
        begin = index[-1] if begin == self._len and len(index) else begin
        return (int(begin), int(end)) if 0 <= begin <= end <= self._len else None

    def _byte(self, name: str, element: int) -> int:
        """Byte of the file where an element's chunk, or the element itself, lies; 0 where HDF5 does not say."""
        try:
            data = self._handle.dataset(name)
            if data.chunks:
                at = (element // data.chunks[0] * data.chunks[0], *(0 for _ in data.shape[1:]))
                return int(data.id.get_chunk_info_by_coord(at).byte_offset or 0)
            return int(data.id.get_offset() or 0) + element * data.dtype.itemsize * (4 if self._table else 1)
        except (*DAMAGE, EventFormatError):
            return 0

    def _first_bad(self, name: str, start: int, stop: int) -> tuple[int, str]:
        """(byte, dataset and elements) of the first chunk in a range that cannot be read."""
        data = self._handle.dataset(name)
        step = (data.chunks or (max(stop - start, 1),))[0]
        for begin in range(start // step * step, stop, step):
            try:
                data[begin : begin + step]
            except DAMAGE:
                return self._byte(name, begin), f"dataset '{name}', elements {begin}..{min(begin + step, stop) - 1},"
        return self._byte(name, start), f"dataset '{name}', elements {start}..{stop - 1},"

    def _keep_sound(self) -> None:
        total, last, fault = self._len, np.iinfo(np.int64).min, None
        step = max((self._handle.dataset(self._layout.datasets[0]).chunks or (_STEP,))[0], 1024)
        start, stop = 0, min(step, total)
        while start < total:
            try:
                events = self._sound(start, stop, last)
                start, last = stop, int(events.t[-1])
                stop = min(start + step, total)
            except EventFormatError as error:
                # The piece is halved until the one faulty event, or the chunk that holds it, is left.
                fault, step = error, (stop - start) // 2
                stop = start + step
                if step == 0:
                    break
        if fault is None:
            if self._handle.file().driver == "fileobj":  # open_file had to pad it
                size = self.path.stat().st_size
                cause = "the file ends before its superblock says"
                damaged(self.path, size, cause, recover=True, kept=total, lost="no event")
            return
        self._len = start
        head, cause = str(fault).removeprefix(f"{self.path}: byte ").split(": ", 1)
        if start == 0:
            raise EventFormatError(f"{self.path}: byte {head}: {cause}; nothing before it is sound")
        damaged(self.path, int(head), cause, recover=True, kept=start, lost=f"{total - start:,} of {total:,} events")

    def _sound(self, start: int, stop: int, last: int) -> Events:
        with self._guarded(lambda: (self._byte(self._layout.datasets[0], start), f"elements {start}..{stop - 1}")):
            self._check_present(start, stop)
        events = self._events(start, self._raw(start, stop, "txyp"))
        if events.t[0] < last:
            byte = self._byte(self._layout.datasets[0], start)
            raise EventFormatError(f"{self.path}: byte {byte}: event {start}: the time steps back")
        return events

    def _check_filled(self, name: str, start: int, values: np.ndarray) -> None:
        """Looks for chunks that begin with zeros; HDF5 reads lost ones so."""
        stop = start + len(values)
        step = (self._handle.dataset(name).chunks or (max(stop, 1),))[0]
        for at in range(start // step * step, stop, step):
            if not np.any(values[max(at - start, 0)]):
                self._check_present(at, min(at + step, stop), (name,))

    def _check_present(self, start: int, stop: int, names: tuple[str, ...] = ()) -> None:
        """Refuses chunks that a truncated file has lost: what stands in for them reads as zeros."""
        size = self.path.stat().st_size
        for name in names or self._layout.datasets:
            data = self._handle.dataset(name)
            row = data.dtype.itemsize * (4 if self._table else 1)
            for at in range(start, stop, data.chunks[0]) if data.chunks else (stop,):
                if data.chunks:
                    at = at // data.chunks[0] * data.chunks[0]
                    with self._guarded(partial(_chunks_of, name)):
                        info = data.id.get_chunk_info_by_coord((at, *(0 for _ in data.shape[1:])))
                    begin, end = info.byte_offset, (info.byte_offset or 0) + info.size
                else:
                    begin = data.id.get_offset()
                    end = (begin or 0) + at * row
                if begin is None or end > size:
                    raise EventFormatError(
                        f"{self.path}: byte {min(begin or 0, size)}: dataset '{name}' is cut off before element {at}"
                    )


def _chunks_of(name: str) -> tuple[int, str]:
    return 0, f"the chunks of dataset '{name}'"


def open_hdf5(
    path: str | Path,
    *,
    height: int | None = None,
    width: int | None = None,
    recover: bool = False,
    camera: str = "left",
) -> Hdf5Source:
    """An HDF5 recording in the DSEC, M3ED, MVSEC or v2e layout, told by the names of its datasets.

    Times are absolute µs: DSEC's t + t_offset, MVSEC's unix seconds rounded to µs in float64, M3ED's and v2e's t as
    stored. Without ms_to_idx (or where it does not fit the times) a window is found by bisection.

    Args:
        path: the file.
        height: sensor rows; None = attributes height and width of the file, M3ED's calib/resolution, else
            480x640 (DSEC), 720x1280 (M3ED), 260x346 (MVSEC, v2e).
        width: sensor columns; None likewise.
        recover: give the longest prefix of sound events (whole chunks where they are compressed), and warn.
        camera: "left" or "right" of MVSEC and M3ED; `open_events` gives the left one.

    Raises:
        ImportError: h5py or a compression filter is missing; names the extra.
        EventFormatError: damaged file or unknown layout; names the dataset, its elements and the chunk's byte.
    """
    if camera not in ("left", "right"):
        raise ValueError(f"camera is {camera!r}; the layouts know left and right")
    return Hdf5Source(Path(path), height=height, width=width, recover=recover, camera=camera)


FORMATS = (
    Format(
        "HDF5",
        (".h5", ".hdf5"),
        "DSEC, M3ED, MVSEC, v2e",
        lambda head, path: head.startswith(_MAGIC),
        open_hdf5,
        write_hdf5,
    ),
)
