"""AEDAT 4.0 (iniVation DV): the events of a recording, packet by packet, and its frames."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np

from gep.events.io.aedat4_file import MAGIC, Fault, File, Flat, flatbuffer
from gep.events.io.blocks import Blocks
from gep.events.io.source import Format, damaged
from gep.events.types import EventFormatError, Events

_EVENT = np.dtype([("t", "<i8"), ("x", "<u2"), ("y", "<u2"), ("p", "u1"), ("unused", "u1", 3)])
_CHANNELS = {0: 1, 16: 3, 24: 4}  # OpenCV's types of 8-bit gray, BGR and BGRA


class Aedat4(Blocks):
    """An open AEDAT 4.0 recording; a block is a packet."""

    def __init__(self, path: Path, height: int | None, width: int | None, recover: bool):
        file = File(path)
        stream = file.stream("EVTS")
        if stream is None:
            raise EventFormatError(f"{path}: byte 18: the header names no event stream")
        if height is None or width is None:
            height, width = stream.height, stream.width
        if height is None or width is None:
            raise EventFormatError(f"{path}: byte 18: the header has no sensor size; pass height and width")
        self._file, self._id = file, stream.id
        self.path, self.height, self.width = path, height, width
        Events.empty(height, width).validate(str(path))
        index = self._table()
        if recover or index is None:
            index = self._longest(index, recover)
        if not len(index):
            raise EventFormatError(f"{path}: byte {file.begin}: holds no events")
        self._index = index
        super().__init__(path, height, width, counts=index[:, 1], t_first=index[:, 2], t_last=index[:, 3])

    def _table(self) -> np.ndarray | None:
        """(P, 4) byte, count, first and last time of each packet by the file's own table; None if it is unsound."""
        file = self._file
        if file.end == len(file.raw):
            return None
        try:
            flat = flatbuffer(file.raw[file.end :], file.codec, b"FTAB")
            count, at = flat.vector(0, 4)
            rows, byte = [], file.begin
            for entry in range(at, at + 4 * count, 4):
                row = Flat(flat.data, entry)
                begin, events = row.scalar(0, "<q", 0) - 8, row.scalar(2, "<q", 0)  # it points behind the header
                stream, size = row.scalar(1, "<i", 0), row.get("<i", row.at + row.offsets[1] + 4)
                # The table must describe the file without a gap; then no packet header has to be looked at.
                if begin != byte or size < 0:
                    return None
                byte += 8 + size
                if stream == self._id:
                    rows.append((begin, events, row.scalar(3, "<q", 0), row.scalar(4, "<q", 0)))
        except (Fault, IndexError):
            return None
        index = np.array(rows, np.int64).reshape(-1, 4)
        times = index[:, 2:].ravel()
        return index if byte == file.end and (index[:, 1] > 0).all() and (times[1:] >= times[:-1]).all() else None

    def _longest(self, table: np.ndarray | None, recover: bool) -> np.ndarray:
        """The index of what is sound, by the table or by the packets' own headers, whichever reaches further."""
        file, by_table, fault = self._file, np.empty((0, 4), np.int64), None
        if table is not None:
            by_table, fault = self._sound(table)
            if fault is None:
                return by_table
        by_headers, other = self._scan()
        if other is None and fault is not None:
            warnings.warn(f"{self.path}: byte {file.end}: the table of packets is damaged; lost nothing", stacklevel=5)
        if other is None:
            return by_headers
        index, (at, cause) = by_headers, other
        if fault is not None and by_table[:, 1].sum() > by_headers[:, 1].sum():
            index, (at, cause) = by_table, fault
        kept = int(index[:, 1].sum())
        lost = f"{file.end - at:,} of {len(file.raw):,} bytes"
        damaged(self.path, at, cause, recover=recover and kept > 0, kept=kept, lost=lost)
        return index

    def _sound(self, table: np.ndarray) -> tuple[np.ndarray, tuple[int, str] | None]:
        """The rows of the table before the first packet that is not what its row says, and that fault."""
        for number, row in enumerate(table):
            try:
                self._packet(*row.tolist())
            except Fault as fault:
                return table[:number], (int(row[0]), str(fault))
        return table, None

    def _scan(self) -> tuple[np.ndarray, tuple[int, str] | None]:
        """The rows that a table would have, from the packets themselves, and the fault that ends them."""
        rows: list[tuple[int, int, int, int]] = []
        at, fault = self._file.begin, None
        try:
            for stream, at, body in self._file.packets():
                if stream == self._id and len(events := self._events(body)):
                    first, last = events.t[[0, -1]].tolist()
                    if rows and first < rows[-1][3]:
                        raise Fault(f"the time steps back from {rows[-1][3]} to {first} µs")
                    rows.append((at, len(events), first, last))
        except Fault as found:
            fault = found.args[1] if len(found.args) > 1 else at, str(found.args[0])
        return np.array(rows, np.int64).reshape(-1, 4), fault

    def _packet(self, at: int, count: int, t_first: int, t_last: int) -> Events:
        """A packet's events; a fault where it is not what the index says."""
        stream, size = struct.unpack_from("<iI", self._file.raw, at)
        if stream != self._id or size > self._file.end - at - 8:
            raise Fault("the packet is not the one in the file's table")
        events = self._events(self._file.raw[at + 8 : at + 8 + size])
        ends = events.t[[0, -1]].tolist() if len(events) else ()
        if (len(events), *ends) != (count, t_first, t_last):
            raise Fault("the packet's count or times are not those in the file's table")
        return events

    def _events(self, body: memoryview) -> Events:
        flat = flatbuffer(body, self._file.codec, b"EVTS")
        count, at = flat.vector(0, _EVENT.itemsize)
        rows = np.frombuffer(flat.data, _EVENT, count, at)
        arrays = {name: np.ascontiguousarray(rows[name]) for name in "txyp"}
        try:
            return Events(**arrays, height=self.height, width=self.width).validate("packet")
        except EventFormatError as error:
            raise Fault(str(error)) from error

    def decode(self, begin: int, end: int) -> Events:
        packets = []
        for row in self._index[begin:end].tolist():
            try:
                packets.append(self._packet(*row))
            except Fault as fault:
                kept = int(self._index[: begin + len(packets), 1].sum())
                damaged(self.path, row[0], str(fault), recover=False, kept=kept)
        if len(packets) == 1:
            return packets[0]
        arrays = {name: np.concatenate([getattr(events, name) for events in packets]) for name in "txyp"}
        return Events(**arrays, height=self.height, width=self.width)

    def close(self) -> None:
        self._file = None  # type: ignore[assignment]  # a read after this must fail


def read_frames(path: str | Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """The frames of a DAVIS recording.

    Args:
        path: an AEDAT 4.0 file.

    Returns:
        t_us: (N,) int64 µs on the events' clock, the middle of each exposure as the camera reports it.
        images: N arrays, uint8 (H, W) gray or (H, W, 3) RGB; none where the file holds no frames.

    Raises:
        EventFormatError: naming the file, the byte offset of the packet and the fault.
    """
    file = File(Path(path))
    stream, times, images, at = file.stream("FRME"), [], [], file.begin
    try:
        for packet, at, body in file.packets():  # noqa: B007 - the place, for the message
            if stream is None or packet != stream.id:
                continue
            flat = flatbuffer(body, file.codec, b"FRME")
            kind, height, width = flat.scalar(5, "<B", 0), flat.scalar(7, "<h", 0), flat.scalar(6, "<h", 0)
            count, begin = flat.vector(10, 1)
            channels = _CHANNELS.get(kind)
            if channels is None or min(height, width) < 1 or count != height * width * channels:
                raise Fault(f"a {height}x{width} frame of type {kind} with {count:,} bytes")
            pixels = np.frombuffer(flat.data, np.uint8, count, begin).reshape(height, width, channels)
            times.append(flat.scalar(0, "<q", 0))
            images.append(pixels[..., 0].copy() if channels == 1 else pixels[..., 2::-1].copy())
    except Fault as fault:
        at = fault.args[1] if len(fault.args) > 1 else at
        raise EventFormatError(f"{path}: byte {at}: {fault.args[0]}") from fault
    return np.array(times, np.int64), images


FORMATS = (
    Format(
        "AEDAT4",
        (".aedat4",),
        "iniVation DV",
        lambda head, path: head.startswith(MAGIC[:12]),
        lambda path, *, height, width, recover: Aedat4(path, height, width, recover),
    ),
)
