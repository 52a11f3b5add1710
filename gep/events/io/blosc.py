"""Unpacking many chunks of a Blosc-packed HDF5 column at once, outside HDF5's lock and without its calls a chunk.

Only what DSEC and M3ED are packed with: Blosc 1 with zstd, bytes shuffled, blocks not split. Anything else, and
anything that is not as it should be, is left to h5py, whose messages name the fault.

Source: Blosc 1 "Chunk format"; RFC 8878 (zstd), 3.1.1 "Frame header".
"""

from __future__ import annotations

import numba
import numpy as np

FILTER = 32001
_GROUP = 16  # chunks unpacked by one call: its set-up and its buffers serve them all
_KINDS = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "b1")


def is_simple(data: object) -> bool:
    """Whether an `h5py.Dataset` is a column that `read` may be able to unpack: one Blosc filter, plain integers."""
    if data.ndim != 1 or not data.chunks or data.dtype.str[1:] not in _KINDS or data.dtype.str[0] == ">":
        return False
    pipeline = data.id.get_create_plist()
    return pipeline.get_nfilters() == 1 and pipeline.get_filter(0)[0] == FILTER


def read(data: object, start: int, stop: int) -> np.ndarray | None:
    """Elements start, …, stop − 1 of a column that `is_simple`; None where h5py has to read them."""
    rows, item = data.chunks[0], data.dtype.itemsize
    first, last = start // rows, (stop - 1) // rows
    values = np.empty(((last - first + 1) * rows,), data.dtype)
    for number in range(first, last + 1, _GROUP):
        numbers = range(number, min(number + _GROUP, last + 1))
        try:
            chunks = [data.id.read_direct_chunk((n * rows,)) for n in numbers]
        except (OSError, ValueError, RuntimeError):
            return None
        begin = (number - first) * rows
        if any(mask for mask, _ in chunks) or not _unpack(
            [chunk for _, chunk in chunks], rows * item, values[begin : begin + len(chunks) * rows]
        ):
            return None
    return values[start - first * rows : stop - first * rows]


def _unpack(chunks: list[bytes], size: int, out: np.ndarray) -> bool:
    """Unpacks chunks of `size` bytes each into `out`; False where one of them is of another kind or damaged."""
    import pyarrow as pa

    packed, end, block = np.empty(sum(map(len, chunks)), np.uint8), 0, 0
    for chunk in chunks:
        end, own = _frames(np.frombuffer(chunk, np.uint8), size, out.itemsize, packed, end)
        if end < 0 or (block and own != block):
            return False
        block = own
    raw = np.empty(out.nbytes, np.uint8)
    try:
        # One stream for all frames: a call each would set up a decoder each, which takes as long as the unpacking.
        with pa.CompressedInputStream(pa.BufferReader(pa.py_buffer(packed[:end])), "zstd") as stream:
            if stream.readinto(raw) != len(raw):
                return False
    except (OSError, ValueError):
        return False
    _unshuffle(raw, size, block, out.view(f"u{out.itemsize}"))
    return True


@numba.njit(nogil=True, cache=True)
def _number(raw, at, size):
    value = np.int64(0)
    for k in range(size):
        value |= np.int64(raw[at + k]) << np.int64(8 * k)
    return value


@numba.njit(nogil=True, cache=True)
def _frames(chunk, size, item, packed, end):
    """Copies the zstd frames of a chunk one after the other; (end of them, bytes of a block), (-1, 0) if unsuitable."""
    bad = np.int64(-1), np.int64(0)
    # Versions of the chunk's and of zstd's format; flags: zstd (4 << 5), blocks not split (16), bytes shuffled (1).
    if len(chunk) < 20 or chunk[0] != 2 or chunk[1] != 1 or chunk[2] != 0x91 or chunk[3] != item:
        return bad
    block = _number(chunk, 8, 4)
    if _number(chunk, 4, 4) != size or _number(chunk, 12, 4) != len(chunk) or not 0 < block <= size or block % item:
        return bad
    count = (size + block - 1) // block
    if 16 + 4 * count > len(chunk):
        return bad
    for k in range(count):
        at = _number(chunk, 16 + 4 * k, 4)
        if at < 16 or at + 16 > len(chunk):
            return bad
        length, holds = _number(chunk, at, 4), min(block, size - k * block)
        at += 4
        # A block that zstd could not shorten is stored as it is.
        if length < 12 or length >= holds or at + length > len(chunk) or end + length > len(packed):
            return bad
        if _number(chunk, at, 4) != 0xFD2FB528 or _content(chunk, at + 4, at + length) != holds:
            return bad
        packed[end : end + length] = chunk[at : at + length]
        end += length
    return np.int64(end), block


@numba.njit(nogil=True, cache=True)
def _content(chunk, at, end):
    """Unpacked bytes of a zstd frame by the header that follows its magic number; -1 where it does not say.

    The frame ends at `end`; a damaged header may claim to be longer.
    """
    head = chunk[at]
    single, kind = head >> 5 & 1, head >> 6
    at += 1 if single else 2
    if head & 3 or (kind == 0 and not single) or at + (1 << kind) > end:
        return np.int64(-1)
    return _number(chunk, at, 1 << kind) + (256 if kind == 1 else 0)


@numba.njit(nogil=True, cache=True)
def _unshuffle(raw, size, block, out):
    """Puts together numbers whose bytes lie in planes: all lowest bytes of a block, then all next."""
    item = out.itemsize
    done = 0
    for chunk in range(0, len(raw), size):
        for begin in range(chunk, chunk + size, block):
            count = min(block, chunk + size - begin) // item
            planes, part = raw[begin : begin + count * item], out[done : done + count]
            # Each case one loop over separate arrays: those LLVM vectorises.
            if item == 1:
                part[:] = planes.view(out.dtype)
            elif item == 2:
                a, b = planes[:count], planes[count:]
                for i in range(count):
                    part[i] = np.uint16(a[i]) | np.uint16(np.uint16(b[i]) << np.uint16(8))
            else:
                for group in range(item // 4):
                    four = planes[4 * group * count :]
                    a, b, c, d = four[:count], four[count : 2 * count], four[2 * count : 3 * count], four[3 * count :]
                    for i in range(count):
                        low = np.uint32(a[i]) | np.uint32(b[i]) << np.uint32(8)
                        word = low | np.uint32(c[i]) << np.uint32(16) | np.uint32(d[i]) << np.uint32(24)
                        if group == 0:
                            part[i] = word
                        else:
                            part[i] |= np.uint64(word) << np.uint64(32)
            done += count
