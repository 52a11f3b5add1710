"""Prophesee EVT2 (32-bit words) and EVT2.1 (64-bit words, up to 32 events each)."""

from __future__ import annotations

from pathlib import Path

import numba
import numpy as np

from gep.events.io.evt_header import header_text
from gep.events.io.evt_vector import BITS, TOP, spread
from gep.events.io.files import replacing
from gep.events.io.source import EventSource
from gep.events.io.stream import (
    BACKWARDS,
    CLOCK,
    FAULT,
    FAULT_T,
    FAULT_X,
    FAULT_Y,
    LAST,
    OUTSIDE,
    OWN,
    RESERVED,
    Codec,
    parts,
)
from gep.events.types import Events

_CD_END = np.uint32(2 << 28)  # words below this are events
_TIME_HIGH = 8
_IGNORED = (10, 14, 15)  # triggers, vendor's and continued words
_HIGH_MASK = (1 << 28) - 1
_WRAP_US = 1 << 34
_BASE, _SWAPPED = OWN, OWN + 1


@numba.njit(nogil=True, cache=True, inline="always")
def _time_high(base, high):
    """The time in µs that a TIME_HIGH word sets, after `base` (-1: the first one); -1 where it steps back.

    The word wraps after 4.8 h, so what seems a step back by more than half of that is one forward.
    """
    if base < 0:
        return high << 6
    step = (high - (base >> 6)) & _HIGH_MASK
    return base + (step << 6) if step <= _HIGH_MASK >> 1 else np.int64(-1)


@numba.njit(nogil=True, cache=True)
def _decode2(words, height, width, state, t, x, y, p):
    base, last = state[_BASE], state[LAST]
    rows, columns = np.uint32(height), np.uint32(width)
    eleven, low_six = np.uint32(2047), np.uint32(63)
    count, at, num = 0, 0, len(words)
    while at < num:
        word = words[np.uint64(at)]
        if word >= _CD_END:
            kind = word >> np.uint32(28)
            if kind == _TIME_HIGH:
                new = _time_high(base, np.int64(word & np.uint32(_HIGH_MASK)))
                if new < 0:
                    state[LAST], state[FAULT] = last, CLOCK
                    state[FAULT_X], state[FAULT_T] = base, np.int64(word & _HIGH_MASK) << 6
                    return count, at
                base = new
            elif kind != _IGNORED[0] and kind != _IGNORED[1] and kind != _IGNORED[2]:
                state[LAST], state[FAULT], state[FAULT_X] = last, RESERVED, kind
                return count, at
            at += 1
            continue
        end = at + 1
        while end < num and words[np.uint64(end)] < _CD_END:
            end += 1
        if base < 0:  # Events before the first TIME_HIGH have no time.
            at = end
            continue
        # One vectorised pass over the run between two other words; faults only raise a flag here.
        wrong = np.uint32(base + np.int64(word >> np.uint32(22) & low_six) < last)
        for i in range(at, end):
            word = words[np.uint64(i)]
            wrong |= np.uint32((word & eleven) >= rows) | np.uint32((word >> np.uint32(11) & eleven) >= columns)
        for i in range(at + 1, end):
            low, before = words[np.uint64(i)] >> np.uint32(22), words[np.uint64(i - 1)] >> np.uint32(22)
            wrong |= np.uint32((low & low_six) < (before & low_six))
        if t is not None:
            to = np.uint64(count - at)
            for i in range(at, end):
                word, k = words[np.uint64(i)], to + np.uint64(i)
                t[k] = base + np.int64(word >> np.uint32(22) & low_six)
                x[k] = word >> np.uint32(11) & eleven
                y[k] = word & eleven
                p[k] = word >> np.uint32(28)
        if wrong:
            for i in range(at, end):
                word = words[np.uint64(i)]
                time = base + np.int64(word >> np.uint32(22) & low_six)
                column, row = np.int64(word >> np.uint32(11) & eleven), np.int64(word & eleven)
                if column >= width or row >= height or time < last:
                    state[FAULT] = BACKWARDS if time < last else OUTSIDE
                    state[LAST], state[FAULT_X], state[FAULT_Y], state[FAULT_T] = last, column, row, time
                    return count + i - at, i
                last = time
        last = base + np.int64(words[np.uint64(end - 1)] >> np.uint32(22) & low_six)
        count += end - at
        at = end
    state[_BASE], state[LAST] = base, last
    return count, -1


@numba.njit(nogil=True, cache=True)
def _decode21(words, height, width, state, t, x, y, p):
    base, last, swapped = state[_BASE], state[LAST], state[_SWAPPED]
    count = np.uint64(0)
    for at in range(len(words)):
        word = words[np.uint64(at)]
        if swapped:
            word = word << np.uint64(32) | word >> np.uint64(32)
        kind = word >> np.uint64(60)
        if kind < 2:
            mask = word & np.uint64(0xFFFFFFFF)
            if base < 0 or mask == 0:
                continue
            time = base + np.int64(word >> np.uint64(54) & np.uint64(63))
            column, row = (
                np.int64(word >> np.uint64(43) & np.uint64(2047)),
                np.int64(word >> np.uint64(32) & np.uint64(2047)),
            )
            top = column
            for piece in range(0, 32, BITS):
                part = mask >> np.uint64(piece) & np.uint64((1 << BITS) - 1)
                top = column + piece + TOP[part] if part else top
            if row >= height or top > width or time < last:
                state[FAULT] = BACKWARDS if time < last else OUTSIDE
                state[LAST], state[FAULT_X], state[FAULT_Y], state[FAULT_T] = last, top - 1, row, time
                return np.int64(count), at
            for piece in range(0, 32, BITS):
                part = mask >> np.uint64(piece) & np.uint64((1 << BITS) - 1)
                count += spread(
                    part, np.uint16(column + piece), np.uint16(row), np.uint8(kind), time, count, t, x, y, p
                )
            last = time
        elif kind == _TIME_HIGH:
            high = np.int64(word >> np.uint64(32) & np.uint64(_HIGH_MASK))
            new = _time_high(base, high)
            if new < 0:
                state[LAST], state[FAULT], state[FAULT_X], state[FAULT_T] = last, CLOCK, base, high << 6
                return np.int64(count), at
            base = new
        elif kind != _IGNORED[0] and kind != _IGNORED[1] and kind != _IGNORED[2]:
            state[LAST], state[FAULT], state[FAULT_X] = last, RESERVED, kind
            return np.int64(count), at
    state[_BASE], state[LAST] = base, last
    return np.int64(count), -1


EVT2 = Codec(_decode2, (-1,), np.uint32)
EVT21 = Codec(_decode21, (-1, 0), np.uint64, most=32)
EVT21_LEGACY = Codec(_decode21, (-1, 1), np.uint64, most=32)
"""Each 64-bit word is two little-endian halves, the upper one first (IMX636); GenX320 writes whole words."""


@numba.njit(nogil=True, cache=True)
def _encode2(t, x, y, p, high, words):
    """Writes at most 2 words an event; returns (words, last TIME_HIGH)."""
    num = 0
    for i in range(len(t)):
        if t[i] >> 6 != high:
            high = t[i] >> 6
            words[num] = np.uint32(_TIME_HIGH << 28 | high & _HIGH_MASK)
            num += 1
        words[num] = np.uint32(np.int64(p[i]) << 28 | (t[i] & 63) << 22 | np.int64(x[i]) << 11 | np.int64(y[i]))
        num += 1
    return num, high


def write_evt2(path: str | Path, events: Events | EventSource) -> None:
    """Writes an EVT2 `.raw` that reads back unchanged, replacing `path` only once complete.

    Args:
        path: the file to write.
        events: at least one event; sensor up to 2048 x 2048, the first 0 <= t < 2**34 µs, no pause of 2**33 µs.

    Raises:
        ValueError: the events do not fit the format.
    """
    high, previous = np.int64(-1), None
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(header_text("2.0", "EVT2", events.height, events.width))
        for part in parts(path, events):
            steps = np.diff(part.t, prepend=part.t[0] if previous is None else previous)
            if (previous is None and not 0 <= part.t[0] < _WRAP_US) or steps.max() >= _WRAP_US // 2:
                raise ValueError(
                    f"{path}: EVT2 holds a first 0 <= t < 2**34 µs and pauses under 2**33 µs; "
                    "subtract the first time (gep convert --from-zero)"
                )
            words = np.empty(2 * len(part), np.uint32)
            num, high = _encode2(part.t, part.x, part.y, part.p, high, words)
            file.write(words[:num].tobytes())
            previous = part.t[-1]
