"""From the columns of a table, as any container holds them, to valid events or to the longest sound prefix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from gep.events.io.source import damaged
from gep.events.types import EventFormatError, Events

UNITS = {"s": 1_000_000, "ms": 1_000, "us": 1, "ns": -1_000}
"""µs in one unit of time; negative: units in one µs."""

_MAX_US = 9e18  # beyond this a float time leaves int64


def microseconds(t: np.ndarray, unit: str | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Times in whole µs, converted in float64 or int64.

    Args:
        t: (N,) times of any numeric dtype; not written to.
        unit: "s", "ms", "us" or "ns"; None = seconds where t is float, µs where it is integer.

    Returns:
        ((N,) int64 µs, rounded to nearest for floats and down for integer ns; (N,) bool of the times that could be
        converted, or None where all could).
    """
    t = np.asarray(t)
    scale = UNITS[unit or ("s" if t.dtype.kind == "f" else "us")]
    if t.dtype.kind == "f":
        us = t.astype(np.float64)
        us = us * scale if scale > 0 else us / -scale
        good = np.abs(us) < _MAX_US  # false for NaN, too
        if good.all():
            return np.rint(us).astype(np.int64), None
        return np.rint(np.where(good, us, 0)).astype(np.int64), good
    if scale == 1 and np.can_cast(t.dtype, np.int64):
        return t.astype(np.int64), None
    limit = np.iinfo(np.int64).max // max(scale, 1)
    # The first comparison also catches uint64 values that int64 would wrap.
    fits = None if t.size == 0 or (t.max() <= limit and t.min() >= -limit) else (t <= limit) & (t >= -limit)
    whole = t.astype(np.int64) if fits is None else np.where(fits, t, 0).astype(np.int64)
    return whole * scale if scale > 0 else whole // -scale, fits


def to_events(
    path: Path,
    columns: Mapping[str, np.ndarray],
    *,
    height: int,
    width: int,
    unit: str | None = None,
    offset: int = 0,
    recover: bool = False,
    first: int = 0,
    byte_of: Callable[[int], int] | None = None,
) -> Events:
    """Valid events from columns t, x, y, p of any numeric dtype.

    Args:
        path: what messages call the file.
        columns: (N,) arrays t, x, y, p; polarity as bool, {0, 1} or {-1, 1}.
        height: sensor rows.
        width: sensor columns.
        unit: of t, see `microseconds`.
        offset: µs to add to every time.
        recover: keep the sound prefix and warn, instead of raising; no event at all is still an error.
        first: number of the first event in the file, for messages.
        byte_of: byte of the file at which an event of that number (in the file) lies; None where no byte can be
            named, as in an archive of compressed columns.

    Raises:
        EventFormatError: naming file, byte, event and fault.
    """
    count = min(len(column) for column in columns.values())
    if max(len(column) for column in columns.values()) != count:
        lengths = ", ".join(f"{name}: {len(column):,}" for name, column in columns.items())
        raise EventFormatError(f"{path}: columns of different length ({lengths})")
    for name, column in columns.items():
        if column.dtype.kind not in "biuf":
            raise EventFormatError(f"{path}: {name} holds {column.dtype}, not numbers")
    t, good = microseconds(columns["t"], unit)
    if good is None:
        # Packed: the fields of a structured array are strided views, which every later pass would pay for.
        x, y, p = (np.ascontiguousarray(columns[name]) for name in "xyp")
        try:
            return Events.from_arrays(t + offset if offset else t, x, y, p, height=height, width=width)
        except EventFormatError as error:
            if not str(error).startswith("events: event "):
                raise EventFormatError(str(error).replace("events:", f"{path}:", 1)) from None
    sound, cause = _sound(t, good, columns, height, width)
    cause = f"event {first + sound}{cause}"
    if byte_of is None and not recover:
        raise EventFormatError(f"{path}: {cause}")
    byte = byte_of(first + sound) if byte_of else 0
    lost = f"{count - sound:,} of {count:,} events"
    damaged(path, byte, cause, recover=recover and sound > 0, kept=first + sound, lost=lost)
    kept = {name: np.ascontiguousarray(columns[name][:sound]) for name in "xyp"}
    return Events.from_arrays(t[:sound] + offset, **kept, height=height, width=width, source=str(path))


def _sound(t: np.ndarray, good: np.ndarray | None, columns: Mapping, height: int, width: int) -> tuple[int, str]:
    """(number of events before the first fault, what the fault is)."""
    x, y, p = (np.asarray(columns[name]) for name in "xyp")
    checks = []
    if good is not None:
        checks.append((good, lambda i: f" is not finite or out of range: t = {columns['t'][i]}"))
    for name, array, limit, what in (("x", x, width, "columns"), ("y", y, height, "rows")):
        inside = (array >= 0) & (array < limit) & (array == np.floor(array))
        checks.append((inside, _naming(name, array, f"outside the sensor's {limit} {what}")))
    signed = p.dtype.kind in "if" and bool((p == -1).any())
    checks.append(((p == 1) | (p == (-1 if signed else 0)), _naming("p", p, "not a polarity")))
    forwards = np.ones(len(t), bool)
    forwards[1:] = t[1:] >= t[:-1]
    late = lambda i: f": t = {t[i]} µs is before the previous event's {t[i - 1]} µs; sort the events by time"  # noqa: E731
    checks.append((forwards, late))
    index, say = min(((int(np.argmin(mask)), say) for mask, say in checks if not mask.all()), key=lambda f: f[0])
    return index, say(index)


def _naming(name: str, array: np.ndarray, what: str) -> Callable[[int], str]:
    return lambda index: f": {name} = {array[index]} is {what}"
