"""Reading and writing recordings: `read_events`, `open_events`, `write_events`; one module per format family."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path

from gep.events.io import aedat as _aedat
from gep.events.io import aedat4 as _aedat4
from gep.events.io import arrow as _arrow
from gep.events.io import bin as _bin
from gep.events.io import dat as _dat
from gep.events.io import ddd17 as _ddd17
from gep.events.io import es as _es
from gep.events.io import evt as _evt
from gep.events.io import hdf5 as _hdf5
from gep.events.io import npy as _npy
from gep.events.io import npz as _npz
from gep.events.io import text as _text
from gep.events.io.arrow import write_arrow as write_arrow
from gep.events.io.bin import read_bin as read_bin
from gep.events.io.bin import write_bin as write_bin
from gep.events.io.convert import write_events as write_events
from gep.events.io.dat import write_dat as write_dat
from gep.events.io.evt2 import write_evt2 as write_evt2
from gep.events.io.evt3 import write_evt3 as write_evt3
from gep.events.io.hdf5 import open_hdf5 as open_hdf5
from gep.events.io.npy import read_npy as read_npy
from gep.events.io.npz import read_npz as read_npz
from gep.events.io.source import EventSource as EventSource
from gep.events.io.source import Format as Format
from gep.events.io.source import InMemory
from gep.events.types import EventFormatError, Events

FORMATS: tuple[Format, ...] = (
    *_arrow.FORMATS,
    *_hdf5.FORMATS,
    *_npz.FORMATS,
    *_npy.FORMATS,
    *_aedat4.FORMATS,
    *_aedat.FORMATS,
    *_es.FORMATS,
    *_ddd17.FORMATS,
    *_evt.FORMATS,
    *_dat.FORMATS,
    *_bin.FORMATS,
    *_text.FORMATS,
)
"""Every format, in the order in which content is looked at; a new one is a module with `FORMATS` and a line here."""

_HEAD = 4096
_OPEN, _WHOLE = 64, 8  # sources kept open: those that hold handles, maps and a few chunks; those that hold all events


def open_events(
    path: str | Path, *, height: int | None = None, width: int | None = None, recover: bool = False
) -> EventSource:
    """A recording, opened for reading in parts.

    Args:
        path: the file (for DDD17 the folder or its events.dat.t); its format is told by content, then by suffix.
        height: sensor rows; None = as the file says, else the format's documented default.
        width: sensor columns; None likewise.
        recover: of a damaged file, give the longest sound prefix and warn how much is lost, instead of raising.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: only one of height and width is given.
        EventFormatError: unknown format, or a damaged, empty or truncated file; names file, byte and cause.
    """
    path = Path(path)
    if (height is None) != (width is None):
        raise ValueError(f"give both height and width or neither, got height={height}, width={width}")
    return find_format(path).open(path, height=height, width=width, recover=recover)


def read_events(
    path: str | Path, *, height: int | None = None, width: int | None = None, recover: bool = False
) -> Events:
    """All events of one recording; arguments and errors are those of `open_events`.

    Returns:
        Validated events, t in µs as the file has it (not shifted to 0).
    """
    with open_events(path, height=height, width=width, recover=recover) as source:
        return source.read()


def find_format(path: str | Path) -> Format:
    """The format of a recording on disk.

    Raises:
        FileNotFoundError, EventFormatError: there is no such file, or no format knows it.
    """
    path = Path(path)
    head = b""
    if path.is_file():
        with open(path, "rb") as file:
            head = file.read(_HEAD)
        if not head:
            raise EventFormatError(f"{path}: byte 0: the file is empty")
    elif not path.exists():
        raise FileNotFoundError(f"no event file at {path}")
    for found in FORMATS:
        if found.sniff(head, path):
            return found
    if path.is_file():
        for found in FORMATS:
            if path.name.lower().endswith(found.suffixes):
                return found
    known = ", ".join(f"{found.name} ({'/'.join(found.suffixes)}: {found.what})" for found in FORMATS)
    raise EventFormatError(f"{path}: byte 0: unknown event format; known are {known}")


_lock = threading.Lock()
_kept: tuple[OrderedDict[tuple, EventSource], ...] = (OrderedDict(), OrderedDict())


def opened(path: str | Path, *, height: int | None = None, width: int | None = None) -> EventSource:
    """`open_events`, kept open: the sources used last by this thread are shared and must not be closed."""
    path = Path(path)
    # A file that was replaced is opened anew.
    state = path.stat() if path.exists() else None
    key = (
        os.getpid(),
        threading.get_ident(),
        (state.st_size, state.st_mtime_ns) if state else None,
        path,
        height,
        width,
    )
    with _lock:
        for sources in _kept:
            if key in sources:
                sources.move_to_end(key)
                return sources[key]
    source = open_events(path, height=height, width=width)
    whole = isinstance(source, InMemory)
    sources = _kept[whole]
    with _lock:
        sources[key] = source
        if len(sources) > (_WHOLE if whole else _OPEN):
            sources.popitem(last=False)  # not closed: a caller may still read from it
    return source
