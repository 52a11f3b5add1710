"""The up to 12 events that a mask of a vector word stands for, by table."""

from __future__ import annotations

import numba
import numpy as np

BITS = 12
"""Mask bits at a time; each call of `spread` overwrites that many entries, however few bits are set."""

_SET = (np.arange(1 << BITS)[:, None] >> np.arange(BITS)) & 1 == 1
NUM_SET = _SET.sum(axis=1).astype(np.uint8)
"""(4096,) bits set in a mask."""
TOP = np.where(_SET, np.arange(1, BITS + 1), 0).max(axis=1).astype(np.uint8)
"""(4096,) position + 1 of the highest bit set, 0 for none."""
_POSITION = np.argsort(~_SET, axis=1, kind="stable").astype(np.uint8)  # (4096, 12): those of the bits set come first


@numba.njit(nogil=True, cache=True, inline="always")
def spread(mask, base, row, polarity, time, at, t, x, y, p):
    """Writes an event for each bit of `mask` from entry `at` on: column base + bit; returns their number.

    A branch for each bit would be guessed wrong every few events. Writing all 12 entries and keeping the first few
    takes a handful of vector stores; the next call overwrites the rest.
    """
    if t is not None:
        for k in range(BITS):
            x[at + np.uint64(k)] = base + _POSITION[mask, k]
        for k in range(BITS):
            y[at + np.uint64(k)] = row
        for k in range(BITS):
            p[at + np.uint64(k)] = polarity
        for k in range(BITS):
            t[at + np.uint64(k)] = time
    return np.uint64(NUM_SET[mask])
