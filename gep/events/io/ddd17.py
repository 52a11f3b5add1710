"""DDD17 as the segmentation release stores it: a folder with two memory-mapped arrays."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from gep.events.io.source import EventSource, Format, damaged
from gep.events.types import EventFormatError, Events

_TIMES, _REST = "events.dat.t", "events.dat.xyp"
_SENSOR = (260, 346)
_CHUNK = 1 << 20
_LIMIT = (1 << 63) - 1


class Ddd17(EventSource):
    """An open recording folder.

    `events.dat.t` is int64 ns, `events.dat.xyp` int16 (N, 3) of x, y, p, both without a header. Times become
    whole µs, rounded down.
    """

    def __init__(self, path: Path, *, height: int | None = None, width: int | None = None, recover: bool = False):
        if path.is_file() and path.name not in (_TIMES, _REST):
            raise EventFormatError(f"{path}: byte 0: a DDD17 recording's files are {_TIMES} and {_REST}")
        folder = path if path.is_dir() else path.parent
        self.path = path
        self.height, self.width = _SENSOR if height is None or width is None else (height, width)
        Events.empty(self.height, self.width).validate(str(path))
        self._files = folder / _TIMES, folder / _REST
        counts = []
        for file, size in zip(self._files, (8, 6)):
            if not file.is_file():
                raise FileNotFoundError(f"{file}: a DDD17 recording is a folder with {_TIMES} and {_REST}")
            count, partial = divmod(file.stat().st_size, size)
            counts.append(count)
            if count == 0:
                raise EventFormatError(f"{file}: byte 0: {partial} bytes hold no event")
            if partial:
                warnings.warn(
                    f"{file}: byte {count * size}: dropped a trailing partial record of {partial} bytes; "
                    "the file may be truncated",
                    stacklevel=3,
                )
        self._num = min(counts)
        if counts[0] != counts[1]:
            short, item = (self._files[0], 8) if counts[0] < counts[1] else (self._files[1], 6)
            cause = f"{self._files[0]} holds {counts[0]:,} events, {self._files[1]} {counts[1]:,}"
            lost = f"{max(counts) - self._num:,} events of the longer file"
            damaged(short, self._num * item, cause, recover=recover, kept=self._num, lost=lost)
        self._t = np.memmap(self._files[0], "<i8", "r", shape=(self._num,))
        self._xyp = np.memmap(self._files[1], "<i2", "r", shape=(self._num, 3))
        if recover:
            self._num = self._sound()

    def _sound(self) -> int:
        """Events before the first fault."""
        for start in range(0, self._num, _CHUNK):
            begin = max(start - 1, 0)  # the step from chunk to chunk counts too
            stop = min(start + _CHUNK, self._num)
            t, (x, y, p) = self._t[begin:stop], self._xyp[begin:stop].T
            wrong = (x < 0) | (x >= self.width) | (y < 0) | (y >= self.height) | (p < 0) | (p > 1)
            wrong[1:] |= t[1:] // 1000 < t[:-1] // 1000
            if wrong.any():
                kept = begin + int(np.argmax(wrong))
                cause = f"event {kept} is out of bounds or out of order"
                lost = f"{self._num - kept:,} of {self._num:,} events"
                damaged(self._files[0], 8 * kept, cause, recover=kept > 0, kept=kept, lost=lost)
                return kept
        return self._num

    def __len__(self) -> int:
        return self._num

    def by_index(self, start: int, stop: int) -> Events:
        start, stop, _ = slice(start, stop).indices(self._num)
        stop = max(start, stop)
        rows = self._xyp[start:stop]
        # As uint16 a negative coordinate is far outside every sensor, and as uint8 & 255 a polarity could come
        # back into range: so the polarity is compared as it is.
        p = rows[:, 2]
        if len(p) and (p.min() < 0 or p.max() > 1):
            index = int(np.argmax((p < 0) | (p > 1)))
            at = start + index
            raise EventFormatError(f"{self._files[1]}: byte {6 * at + 4}: event {at}: p = {p[index]} is no polarity")
        t = np.floor_divide(self._t[start:stop], 1000, dtype=np.int64)
        x, y = (np.ascontiguousarray(rows[:, column]).view(np.uint16) for column in (0, 1))
        events = Events(np.asarray(t), np.asarray(x), np.asarray(y), p.astype(np.uint8), self.height, self.width)
        return events.validate(f"{self._files[0].parent}: events from {start} (byte {8 * start} of {_TIMES})")

    def by_time(self, t0: int, t1: int) -> Events:
        # floor(t / 1000) >= t0 exactly where t >= 1000 t0; beyond int64 there are no events.
        bounds = [max(1000 * int(bound), -_LIMIT) for bound in (t0, t1)]
        begin, end = (
            self._num if bound > _LIMIT else int(np.searchsorted(self._t[: self._num], bound)) for bound in bounds
        )
        return self.by_index(begin, end)

    @property
    def span(self) -> tuple[int, int]:
        return int(self._t[0]) // 1000, int(self._t[self._num - 1]) // 1000 + 1

    def close(self) -> None:
        self._t = self._xyp = None  # type: ignore[assignment]  # a read after this must fail


def _sniff(head: bytes, path: Path) -> bool:
    return path.name in (_TIMES, _REST) or (path / _TIMES).is_file()


FORMATS = (Format("DDD17", (_TIMES, _REST), "DDD17 segmentation release, a folder", _sniff, Ddd17),)
