"""Prophesee EVT3: 16-bit words, each changing one part of the state (row, time, column) or adding events to it."""

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

_ADDR_Y, _ADDR_X, _BASE_X, _VECT_12, _VECT_8, _TIME_LOW, _TIME_HIGH = 0, 2, 3, 4, 5, 6, 8
_IGNORED = (7, 10, 14, 15)  # continued words, triggers, vendor's words
_NO_TIME, _NO_ROW, _NO_COLUMN = -2, 0xFFFF, 1 << 40
_BASE, _LOW, _ROW, _COLUMN, _VECTOR_P, _AHEAD = OWN, OWN + 1, OWN + 2, OWN + 3, OWN + 4, OWN + 5
_HALF = 2048
_MIN_VECTOR = 5  # events from which the four words of a whole vector pay
_WRITE_LIMIT = 1 << 40


@numba.njit(nogil=True, cache=True)
def _decode(words, height, width, state, t, x, y, p):
    """Time: TIME_HIGH is repeated every few words and sets the low part to 0 where it is a new one. Where TIME_LOW
    falls by more than half of its range, the TIME_HIGH that belongs to it is still to come: `ahead`. Smaller steps
    back of TIME_LOW (the real recording has nine, of 3 and 11 µs) do no harm, as no event lies between.
    """
    base, low, last, ahead = state[_BASE], state[_LOW], state[LAST], state[_AHEAD]
    row, column, vector_p = np.uint16(state[_ROW]), state[_COLUMN], np.uint8(state[_VECTOR_P])
    rows, columns = np.uint16(height), np.uint16(width)
    time = base + low if base >= 0 else np.int64(_NO_TIME)
    count = np.uint64(0)
    for at in range(len(words)):
        word = words[np.uint64(at)]
        kind, eleven = word >> np.uint16(12), word & np.uint16(2047)
        if kind & np.uint16(13) == 0:
            # Rows and single events alternate without pattern: no branch between them, the entry is kept or not.
            single = kind == _ADDR_X
            row = row if single else eleven
            if single and ((eleven >= columns) | (row >= rows) | (time < last)):
                if time == _NO_TIME or row == _NO_ROW:  # a stream that begins inside a recording
                    continue
                state[FAULT] = BACKWARDS if time < last else OUTSIDE
                state[LAST], state[FAULT_X], state[FAULT_Y], state[FAULT_T] = last, eleven, row, time
                return np.int64(count), at
            if t is not None:
                t[count], x[count], y[count] = time, eleven, row
                p[count] = word >> np.uint16(11) & np.uint16(1)
            last = time if single else last
            count += np.uint64(single)
        elif kind == _VECT_12 or kind == _VECT_8:
            mask = np.uint64(word & (np.uint16(0xFFF) if kind == _VECT_12 else np.uint16(0xFF)))
            top = column + TOP[mask]
            if (top > width) | (row >= rows) | (time < last):
                if mask != 0 and time != _NO_TIME and row != _NO_ROW and column < _NO_COLUMN:
                    state[FAULT] = BACKWARDS if time < last else OUTSIDE
                    state[LAST], state[FAULT_X], state[FAULT_Y], state[FAULT_T] = last, top - 1, row, time
                    return np.int64(count), at
            else:
                count += spread(mask, np.uint16(column), row, vector_p, time, count, t, x, y, p)
                last = time if mask else last
            column += BITS if kind == _VECT_12 else 8
        elif kind == _BASE_X:
            column, vector_p = np.int64(eleven), np.uint8(word >> np.uint16(11) & np.uint16(1))
        elif kind == _TIME_LOW:
            new = np.int64(word & np.uint16(0xFFF))
            if base >= 0:
                if low - new > _HALF:
                    base, ahead = base + 4096, 1
                low, time = new, base + new
        elif kind == _TIME_HIGH:
            high = np.int64(word & np.uint16(0xFFF))
            step = (high - (base >> 12)) & 0xFFF
            if base < 0:
                base, low = high << 12, 0
            elif step == 0:
                ahead = 0
            elif step < _HALF:
                base, low, ahead = base + (step << 12), 0, 0
            elif not (ahead and step == 0xFFF):
                state[LAST], state[FAULT] = last, CLOCK
                state[FAULT_X], state[FAULT_T] = base, base - ((4096 - step) << 12)
                return np.int64(count), at
            time = base + low
        elif kind != _IGNORED[0] and kind != _IGNORED[1] and kind != _IGNORED[2] and kind != _IGNORED[3]:
            state[FAULT], state[LAST], state[FAULT_X] = RESERVED, last, kind
            return np.int64(count), at
    state[_BASE], state[_LOW], state[LAST], state[_AHEAD] = base, low, last, ahead
    state[_ROW], state[_COLUMN], state[_VECTOR_P] = row, column, vector_p
    return np.int64(count), -1


EVT3 = Codec(_decode, (-1, 0, _NO_ROW, _NO_COLUMN, 0, 0), np.uint16, most=BITS)


@numba.njit(nogil=True, cache=True)
def _encode(t, x, y, p, state, words):
    """Writes at most 7 words an event, and 5 each 16.8 s of pause; returns their number.

    state: time and row of the last event, -1 before the first.
    """
    time, row = state[0], state[1]
    num, i, total = 0, 0, len(t)
    while i < total:
        if time < 0 or t[i] >> 12 != time >> 12:
            # TIME_HIGH in steps that no reader takes for a step back, and both sides of each wrap.
            high, aim = (time >> 12 if time >= 0 else np.int64(0)), t[i] >> 12
            if time < 0:
                words[num] = _TIME_HIGH << 12
                num += 1
            while high < aim:
                high = min(aim, high + 1 if high & 0xFFF == 0xFFF else (high | 0x3FF) + (high & 0x3FF == 0x3FF) * 0x400)
                words[num] = np.uint16(_TIME_HIGH << 12 | high & 0xFFF)
                num += 1
            time = -1
        if time != t[i]:
            words[num] = np.uint16(_TIME_LOW << 12 | t[i] & 0xFFF)
            num += 1
            time = t[i]
        if y[i] != row:
            row = np.int64(y[i])
            words[num] = np.uint16(row)
            num += 1
        polarity, first = np.int64(p[i]) << 11, np.int64(x[i])
        mask, end = np.int64(1), i + 1
        while end < total and t[end] == time and y[end] == row and p[end] == p[i] and x[end] > x[end - 1]:
            if x[end] >= first + 32:
                break
            mask |= 1 << (np.int64(x[end]) - first)
            end += 1
        if end - i >= _MIN_VECTOR:
            words[num] = np.uint16(_BASE_X << 12 | polarity | first)
            words[num + 1] = np.uint16(_VECT_12 << 12 | mask & 0xFFF)
            words[num + 2] = np.uint16(_VECT_12 << 12 | mask >> 12 & 0xFFF)
            words[num + 3] = np.uint16(_VECT_8 << 12 | mask >> 24 & 0xFF)
            num += 4
        else:
            end = i + 1
            words[num] = np.uint16(_ADDR_X << 12 | polarity | first)
            num += 1
        i = end
    state[0], state[1] = time, row
    return num


def write_evt3(path: str | Path, events: Events | EventSource) -> None:
    """Writes an EVT3 `.raw` that reads back unchanged, replacing `path` only once complete.

    Args:
        path: the file to write.
        events: at least one event; sensor up to 2048 x 2048, 0 <= t < 2**40 µs.

    Raises:
        ValueError: the events do not fit the format.
    """
    state = np.array([-1, -1], np.int64)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(header_text("3.0", "EVT3", events.height, events.width))
        for part in parts(path, events):
            if part.t[0] < 0 or part.t[-1] >= _WRITE_LIMIT:
                raise ValueError(
                    f"{path}: EVT3 holds 0 <= t < 2**40 µs, got {part.t[0]}..{part.t[-1]}; "
                    "subtract the first time (gep convert --from-zero)"
                )
            pauses = (int(part.t[-1]) - max(int(state[0]), 0)) >> 22
            words = np.empty(7 * len(part) + 2 * pauses + 8, np.uint16)
            file.write(words[: _encode(part.t, part.x, part.y, part.p, state, words)].tobytes())
