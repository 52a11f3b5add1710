"""Unpacking many chunks of a Blosc-packed HDF5 column at once, outside HDF5's lock and without its calls a chunk.

Only what DSEC and M3ED are packed with: Blosc 1 with zstd, bytes shuffled, blocks not split. Anything else, and
anything that is not as it should be, is left to h5py, whose messages name the fault.

Source: Blosc 1 "Chunk format".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numba
import numpy as np

from gep.events.io import zstd
from gep.events.types import Events

if TYPE_CHECKING:
    import h5py

FILTER = 32001
_KINDS = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "b1")
_DTYPES = (np.int64, np.uint16, np.uint16, np.uint8)


def is_simple(data: h5py.Dataset) -> bool:
    """Whether an `h5py.Dataset` is a column that `read` may be able to unpack: one Blosc filter, plain integers."""
    if data.ndim != 1 or not data.chunks or data.dtype.str[1:] not in _KINDS or data.dtype.str[0] == ">":
        return False
    pipeline = data.id.get_create_plist()
    return pipeline.get_nfilters() == 1 and pipeline.get_filter(0)[0] == FILTER


class Column(NamedTuple):
    """Elements of a column, and what was seen of them while they were in the cache."""

    values: np.ndarray
    """(N,) integers."""
    largest: int
    """Largest, as unsigned, of those of one or two bytes, with what else their chunks hold; 0 for wider ones."""
    ascends: bool
    """Whether none of those that come out as int64 is less than the one before."""


def read(data: h5py.Dataset, start: int, stop: int, *, wide: bool = False, offset: int = 0) -> Column | None:
    """Elements start, …, stop − 1 of a column that `is_simple`; None where h5py has to read them.

    Args:
        data: the h5py.Dataset.
        start: first element.
        stop: the one after the last; more than `start`.
        wide: whether unsigned integers of less than eight bytes come out as int64.
        offset: what to add to each element that comes out as int64.
    """
    decoder = zstd.decoder()
    if decoder is None:
        return None
    rows, item = data.chunks[0], data.dtype.itemsize
    dtype = np.dtype(np.int64) if wide and data.dtype.kind == "u" and item < 8 else data.dtype
    first, last = start // rows, (stop - 1) // rows
    values = np.empty((last - first + 1) * rows, dtype)
    numbers = values.view("i8" if values.itemsize == 8 else f"u{values.itemsize}")
    planes, largest, ascends = np.empty(rows * item, np.uint8), 0, True
    low, high = start - first * rows, stop - first * rows
    for number in range(first, last + 1):
        try:
            mask, chunk = data.id.read_direct_chunk((number * rows,))
        except (OSError, ValueError, RuntimeError):
            return None
        if mask:
            return None
        begin, raw = (number - first) * rows, np.frombuffer(chunk, np.uint8)
        part = numbers[begin : begin + rows]
        most = _unpack(raw, item, offset, *decoder, planes, part)
        if most < 0:
            return None
        largest = max(largest, most)
        if values.itemsize == 8:  # with the last one of the chunk before; past the end of the data a chunk holds zeros
            ascends = ascends and _ascends(numbers[max(begin - 1, low) : min(begin + rows, high)])
    return Column(values[low:high], largest, ascends)


def events(
    columns: tuple[h5py.Dataset, ...], start: int, stop: int, offset: int, height: int, width: int
) -> Events | None:
    """Checked events start, …, stop − 1 of simple columns t, x, y, p; None where they, or some, are to be read by h5py.

    Args:
        columns: datasets of t in µs, x, y and p, all of which are `is_simple`.
        start: first event.
        stop: the one after the last; more than `start`.
        offset: µs to add to every t.
        height: sensor rows.
        width: sensor columns.
    """
    t, x, y, p = (data.dtype for data in columns)
    if not (t == np.int64 or (t.kind == "u" and 4 <= t.itemsize < 8)) or not x == y == np.uint16 or p.itemsize != 1:
        return None
    parts: list[np.ndarray] = []
    for data, dtype, limit in zip(columns, _DTYPES, (None, width, height, 2), strict=True):
        part = read(data, start, stop, wide=limit is None, offset=offset if limit is None else 0)
        if part is None or not part.ascends or (limit is not None and part.largest >= limit):
            return None
        parts.append(part.values.view(dtype))
    return Events(parts[0], parts[1], parts[2], parts[3], height, width)


@numba.njit(nogil=True, cache=True)
def _number(raw, at):
    return np.int64(raw[at]) | np.int64(raw[at + 1]) << 8 | np.int64(raw[at + 2]) << 16 | np.int64(raw[at + 3]) << 24


@numba.njit(nogil=True, cache=True)
def _unpack(chunk, item, offset, function, context, planes, out):
    """Unpacks a chunk of numbers of `item` bytes into `out`; their `Column.largest`, -1 for another kind or damage."""
    # Versions of the chunk's and of zstd's format; flags: zstd (4 << 5), blocks not split (16), bytes shuffled (1).
    if len(chunk) < 20 or chunk[0] != 2 or chunk[1] != 1 or chunk[2] != 0x91 or chunk[3] != item:
        return -1
    size, block = len(out) * item, _number(chunk, 8)
    if _number(chunk, 4) != size or _number(chunk, 12) != len(chunk):
        return -1
    if not 0 < block <= min(size, len(planes)) or block % item:
        return -1
    count = (size + block - 1) // block
    if 16 + 4 * count > len(chunk):
        return -1
    largest = 0
    for k in range(count):
        at = _number(chunk, 16 + 4 * k)
        if at < 16 or at + 4 > len(chunk):
            return -1
        length, holds = _number(chunk, at), min(block, size - k * block)
        at += 4
        # A block that zstd could not shorten is stored as it is.
        if length < 1 or length >= holds or at + length > len(chunk):
            return -1
        if zstd.decompress(function, context, planes.ctypes.data, holds, chunk.ctypes.data + at, length) != holds:
            return -1
        begin = k * block // item
        part = out[begin : begin + holds // item]
        _unshuffle(planes[:holds], item, offset, part)
        if item < 4:
            largest = max(largest, np.int64(_largest(part)))
    return largest


@numba.njit(nogil=True, cache=True)
def _unshuffle(planes, item, offset, out):
    """Puts together numbers whose bytes lie in planes: all lowest of a block, then all next; wide ones plus offset."""
    count = len(out)
    # Each case one loop over separate arrays: those LLVM vectorises.
    if item == 1:
        for i in range(count):
            out[i] = planes[i]
    elif item == 2:
        a, b = planes[:count], planes[count:]
        for i in range(count):
            out[i] = np.uint16(a[i]) | np.uint16(np.uint16(b[i]) << np.uint16(8))
    else:
        low, high = planes[: 4 * count], planes[4 * count :]
        a, b, c, d = low[:count], low[count : 2 * count], low[2 * count : 3 * count], low[3 * count :]
        if item == 4:
            for i in range(count):
                word = np.uint32(a[i]) | np.uint32(b[i]) << np.uint32(8)
                word |= np.uint32(c[i]) << np.uint32(16) | np.uint32(d[i]) << np.uint32(24)
                out[i] = np.int64(np.uint32(word)) + offset
        else:
            e, f, g, h = high[:count], high[count : 2 * count], high[2 * count : 3 * count], high[3 * count :]
            for i in range(count):
                word = np.uint32(a[i]) | np.uint32(b[i]) << np.uint32(8)
                word |= np.uint32(c[i]) << np.uint32(16) | np.uint32(d[i]) << np.uint32(24)
                out[i] = np.int64(np.uint32(word))
            for i in range(count):
                word = np.uint32(e[i]) | np.uint32(f[i]) << np.uint32(8)
                word |= np.uint32(g[i]) << np.uint32(16) | np.uint32(h[i]) << np.uint32(24)
                out[i] = (out[i] | np.int64(np.uint32(word)) << 32) + offset


@numba.njit(nogil=True, cache=True)
def _largest(values):
    largest = values[0]
    for i in range(1, len(values)):
        largest = max(largest, values[i])
    return largest


@numba.njit(nogil=True, cache=True)
def _ascends(values):
    late = False
    for i in range(1, len(values)):
        late |= values[i] < values[i - 1]
    return not late
