"""One record batch of the native container: packing, checking and unpacking its events.

Plain batches hold t int64, x uint16, y uint16, p uint8. Compressed ones hold what compresses better and unpacks
faster (docs/LOG.md has the figures): t as uint32 steps from the event before, x, y uint16, each of the three with
its bytes shuffled (all lowest bytes, then all next), and p as bits.
"""

from __future__ import annotations

import numba
import numpy as np

_K = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)


@numba.njit(nogil=True, cache=True)
def _mix(words, seed):
    # Each step is a bijection of its lane, so one changed word always changes the sum; eight lanes hide the latency.
    a, b, c, d = seed, seed + _K, seed ^ _K, seed * _K
    e, f, g, h = ~a, ~b, ~c, ~d
    whole = len(words) // 8
    for block in range(whole):
        i = 8 * block
        a, b, c, d = (a ^ words[i]) * _K, (b ^ words[i + 1]) * _K, (c ^ words[i + 2]) * _K, (d ^ words[i + 3]) * _K
        e, f, g, h = (e ^ words[i + 4]) * _K, (f ^ words[i + 5]) * _K, (g ^ words[i + 6]) * _K, (h ^ words[i + 7]) * _K
        a, b, c, d = a ^ a >> _HALF, b ^ b >> _HALF, c ^ c >> _HALF, d ^ d >> _HALF
        e, f, g, h = e ^ e >> _HALF, f ^ f >> _HALF, g ^ g >> _HALF, h ^ h >> _HALF
    for i in range(8 * whole, len(words)):
        a = (a ^ words[i]) * _K
        a = a ^ a >> _HALF
    total = a
    for lane in (b, c, d, e, f, g, h):
        total = (total ^ lane) * _K
        total = total ^ total >> _HALF
    return total


def checksum(arrays: tuple[np.ndarray, ...]) -> int:
    """64-bit sum over the bytes of the arrays, in order: tells damage, not malice."""
    total = np.uint64(0)
    for array in arrays:
        total = np.uint64(_add(array.view(np.uint8), total))
    return int(total)


@numba.njit(nogil=True, cache=True)
def _add(raw, total):
    whole = len(raw) // 8 * 8
    rest = np.uint64(len(raw) % 256) << np.uint64(56)
    for i in range(whole, len(raw)):
        rest |= np.uint64(raw[i]) << np.uint64(8 * (i - whole))
    return _mix(raw[:whole].view(np.uint64), total ^ rest)


@numba.njit(nogil=True, cache=True)
def pack(t, x, y, p, steps, columns, rows, bits):
    """Shuffled uint8 planes of the time steps (4 N), x (2 N), y (2 N), and the polarity bits; all given zeroed."""
    count = len(t)
    for plane in range(4):
        part, shift = steps[plane * count : (plane + 1) * count], np.int64(8 * plane)
        for i in range(1, count):
            part[i] = (t[i] - t[i - 1]) >> shift & 255
    _split(x, columns)
    _split(y, rows)
    for i in range(count):
        bits[i >> 3] |= p[i] << np.uint8(i & 7)


@numba.njit(nogil=True, cache=True)
def _split(values, planes):
    low, high = planes[: len(values)], planes[len(values) :]
    for i in range(len(values)):
        low[i], high[i] = values[i] & 255, values[i] >> 8


@numba.njit(nogil=True, cache=True)
def unpack(steps, columns, rows, bits, first, height, width, t, x, y, p):
    """Writes the batch's events into (N,) arrays; returns (last time, whether all lie inside the sensor)."""
    count = len(t)
    # One plain loop a column over separate planes: those LLVM vectorises, 6 times as fast as one loop for all.
    low, mid, high, top = steps[:count], steps[count : 2 * count], steps[2 * count : 3 * count], steps[3 * count :]
    for i in range(count):
        half = np.uint32(low[i]) | np.uint32(mid[i]) << np.uint32(8)
        t[i] = np.int64(half | np.uint32(high[i]) << np.uint32(16) | np.uint32(top[i]) << np.uint32(24))
    time = np.int64(first)
    for i in range(count):
        time += t[i]
        t[i] = time
    inside = _join(columns, x) < width and _join(rows, y) < height
    for byte in range(count // 8):
        value = bits[byte]
        for bit in range(8):
            p[8 * byte + bit] = value >> np.uint8(bit) & np.uint8(1)
    for i in range(count // 8 * 8, count):
        p[i] = bits[i >> 3] >> np.uint8(i & 7) & np.uint8(1)
    return time, inside


@numba.njit(nogil=True, cache=True)
def _join(planes, out):
    low, high = planes[: len(out)], planes[len(out) :]
    largest = np.uint16(0)
    for i in range(len(out)):
        value = np.uint16(low[i]) | np.uint16(np.uint16(high[i]) << np.uint16(8))
        out[i] = value
        largest = max(largest, value)
    return largest


@numba.njit(nogil=True, cache=True)
def sound(t, x, y, p, height, width):
    """Whether the times ascend and all events lie inside the sensor: one pass, no temporaries."""
    late = False
    for i in range(1, len(t)):
        late |= t[i] < t[i - 1]
    columns, rows, ones = np.uint16(0), np.uint16(0), np.uint8(0)
    for i in range(len(x)):
        columns = max(columns, x[i])
    for i in range(len(y)):
        rows = max(rows, y[i])
    for i in range(len(p)):
        ones |= p[i]
    return not late and columns < width and rows < height and ones < 2
