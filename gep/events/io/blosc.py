"""Unpacking many chunks of a Blosc-packed HDF5 column at once, outside HDF5's lock and without its calls a chunk.

Only what DSEC and M3ED are packed with: Blosc 1 with zstd, bytes shuffled, blocks not split. Anything else, and
anything that is not as it should be, is left to h5py, whose messages name the fault.

Source: Blosc 1 "Chunk format".
"""

from __future__ import annotations

import numba
import numpy as np

from gep.events.io import zstd

FILTER = 32001
_KINDS = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "b1")


def is_simple(data: object) -> bool:
    """Whether an `h5py.Dataset` is a column that `read` may be able to unpack: one Blosc filter, plain integers."""
    if data.ndim != 1 or not data.chunks or data.dtype.str[1:] not in _KINDS or data.dtype.str[0] == ">":
        return False
    pipeline = data.id.get_create_plist()
    return pipeline.get_nfilters() == 1 and pipeline.get_filter(0)[0] == FILTER


def read(data: object, start: int, stop: int, dtype: np.dtype | None = None) -> np.ndarray | None:
    """Elements start, …, stop − 1 of a column that `is_simple`; None where h5py has to read them.

    Args:
        data: the h5py.Dataset.
        start: first element.
        stop: the one after the last; more than `start`.
        dtype: of the result, None for the column's own. It may be wider where the column is unsigned.
    """
    decoder = zstd.decoder()
    if decoder is None:
        return None
    rows, item = data.chunks[0], data.dtype.itemsize
    first, last = start // rows, (stop - 1) // rows
    values = np.empty((last - first + 1) * rows, data.dtype if dtype is None else dtype)
    unsigned, planes = values.view(f"u{values.itemsize}"), np.empty(rows * item, np.uint8)
    for number in range(first, last + 1):
        try:
            mask, chunk = data.id.read_direct_chunk((number * rows,))
        except (OSError, ValueError, RuntimeError):
            return None
        part = unsigned[(number - first) * rows :][:rows]
        if mask or not _unpack(np.frombuffer(chunk, np.uint8), item, *decoder, planes, part):
            return None
    return values[start - first * rows : stop - first * rows]


@numba.njit(nogil=True, cache=True)
def _number(raw, at):
    return np.int64(raw[at]) | np.int64(raw[at + 1]) << 8 | np.int64(raw[at + 2]) << 16 | np.int64(raw[at + 3]) << 24


@numba.njit(nogil=True, cache=True)
def _unpack(chunk, item, function, context, planes, out):
    """Unpacks a chunk of numbers of `item` bytes into `out`; False where it is of another kind or damaged."""
    # Versions of the chunk's and of zstd's format; flags: zstd (4 << 5), blocks not split (16), bytes shuffled (1).
    if len(chunk) < 20 or chunk[0] != 2 or chunk[1] != 1 or chunk[2] != 0x91 or chunk[3] != item:
        return False
    size, block = len(out) * item, _number(chunk, 8)
    if _number(chunk, 4) != size or _number(chunk, 12) != len(chunk):
        return False
    if not 0 < block <= min(size, len(planes)) or block % item:
        return False
    count = (size + block - 1) // block
    if 16 + 4 * count > len(chunk):
        return False
    for k in range(count):
        at = _number(chunk, 16 + 4 * k)
        if at < 16 or at + 4 > len(chunk):
            return False
        length, holds = _number(chunk, at), min(block, size - k * block)
        at += 4
        # A block that zstd could not shorten is stored as it is.
        if length < 1 or length >= holds or at + length > len(chunk):
            return False
        if zstd.decompress(function, context, planes.ctypes.data, holds, chunk.ctypes.data + at, length) != holds:
            return False
        begin = k * block // item
        _unshuffle(planes[:holds], item, out[begin : begin + holds // item])
    return True


@numba.njit(nogil=True, cache=True)
def _unshuffle(planes, item, out):
    """Puts together numbers whose bytes lie in planes: all lowest bytes of a block, then all next."""
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
        for group in range(item // 4):
            four = planes[4 * group * count :]
            a, b, c, d = four[:count], four[count : 2 * count], four[2 * count : 3 * count], four[3 * count :]
            for i in range(count):
                low = np.uint32(a[i]) | np.uint32(b[i]) << np.uint32(8)
                word = low | np.uint32(c[i]) << np.uint32(16) | np.uint32(d[i]) << np.uint32(24)
                if group == 0:
                    out[i] = word
                else:
                    out[i] |= np.uint64(word) << np.uint64(32)
