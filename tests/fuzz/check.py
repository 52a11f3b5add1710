"""What a reader may do with a recording: sound events, or one clear error."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gep.events.io import open_events
from gep.events.types import EventFormatError, Events


class Unsound(AssertionError):
    """A reader handed on what it should not have."""


def _require(good: bool, what: str) -> None:
    if not good:
        raise Unsound(what)


def _names(path: Path, message: str) -> None:
    files = [path.name, *(file.name for file in (path if path.is_dir() else path.parent).iterdir())]
    _require(any(name in message for name in files), f"the message does not name the file: {message}")


def _same(a: Events, b: Events) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in "txyp")


def _read(path: Path, recover: bool, opener: Callable) -> Events:
    """All events, and the source's answers held against them."""
    with opener(path, recover=recover) as source:
        events = source.read()
        _require(type(events) is Events, f"read() gives {type(events)}")
        events.validate("events handed on")
        _require((events.height, events.width) == (source.height, source.width), "the sensor's size differs")
        _require(len(source) == len(events) > 0, f"len() is {len(source)} where {len(events)} events are read")
        first, last = int(events.t[0]), int(events.t[-1])
        _require(source.span == (first, last + 1), f"span is {source.span}, the times are {first}..{last}")
        t0, t1 = first + (last - first) // 3, last - (last - first) // 4
        for begin, end in ((t0, t1), (last + 1, last + 9), (first - 5, first), (t0, last + 1)):
            inside = (events.t >= begin) & (events.t < end)
            wanted = Events(*(getattr(events, name)[inside] for name in "txyp"), events.height, events.width)
            _require(_same(source.by_time(begin, end), wanted), f"by_time({begin}, {end}) is another slice than read()")
        start, stop = len(events) // 3, len(events) - len(events) // 4
        _require(_same(source.by_index(start, stop), events[start:stop]), f"by_index({start}, {stop}) differs")
    return events


def _slice(path: Path, opener: Callable) -> None:
    """A slice of a file that cannot be read as a whole: sound events or the same kind of error."""
    with opener(path, recover=False) as source:
        first, last = source.span
        for begin, end in ((first, first + (last - first) // 2), (first + (last - first) // 2, last)):
            source.by_time(begin, end).validate("slice handed on")
        source.by_index(0, len(source) // 2).validate("slice handed on")


def outcome(path: Path, opener: Callable = open_events) -> tuple[str, str]:
    """("events" | "recovered" | "error" | "FAILURE", what happened)."""
    results, message = {}, ""
    try:
        for recover in (False, True):
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                try:
                    results[recover] = _read(path, recover, opener)
                except EventFormatError as error:
                    message = str(error)
                    _names(path, message)
            if recover and recover in results and False not in results:
                _require(bool(told), "recovered events without a warning")
        if False in results:
            _require(True in results and _same(*results.values()), "recover=True reads a sound file differently")
            return "events", f"{len(results[False])} events"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                _slice(path, opener)
            except EventFormatError as error:
                _names(path, str(error))
        return ("recovered", f"{len(results[True])} events") if results else ("error", message)
    except Unsound as error:
        return "FAILURE", str(error)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic of a Rust library is no Exception
        return "FAILURE", traceback.format_exc(limit=-6)
