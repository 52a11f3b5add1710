"""Prophesee `.raw` files: which of EVT2, EVT2.1 and EVT3 a header announces, and of what sensor."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gep.events.io.evt2 import EVT2, EVT21, EVT21_LEGACY, write_evt2
from gep.events.io.evt3 import EVT3, write_evt3
from gep.events.io.evt_header import Header, parse_header
from gep.events.io.source import Format
from gep.events.io.stream import Codec, Stream
from gep.events.types import EventFormatError

_VERSIONS = {"2.0": "EVT2", "2": "EVT2", "2.1": "EVT21", "3.0": "EVT3", "3": "EVT3"}
_CODECS = {"EVT2": EVT2, "EVT3": EVT3}


def open_evt(path: Path, *, height: int | None, width: int | None, recover: bool) -> Stream:
    """A Prophesee `.raw` recording.

    Args:
        path: the file.
        height: sensor rows; None takes the header's geometry, else that of the camera plugin, sensor or generation it
            names (Gen3 640x480, Gen4 and IMX636 1280x720, GenX320 320x320).
        width: sensor columns; None likewise.
        recover: end at the first fault, with a warning, instead of raising.

    Raises:
        EventFormatError: no header says which encoding it is or how large the sensor, or there are no records.

    Source: Prophesee's pages on EVT 2.0, 2.1 and 3.0 (docs.prophesee.ai, data encoding formats).
    """
    header = parse_header(path)
    names = encodings(header)
    if len(names) != 1:
        said = f"header lines say both {' and '.join(sorted(names))}" if names else "no header line says the encoding"
        raise EventFormatError(
            f"{path}: byte 0: {said}, and the words alone do not tell it; a file begins with a line like `% evt 2.0`, "
            "`% evt 2.1` or `% evt 3.0`"
        )
    (name,) = names
    if height is None or width is None:
        height, width = header.sensor_size()
    codec = _CODECS[name] if name in _CODECS else _order_of_halves(header, height, width)
    what = f"{8 * codec.record}-bit word"
    return Stream(path, codec, begin=header.size, height=height, width=width, recover=recover, what=what)


def encodings(header: Header) -> set[str]:
    """Those of "EVT2", "EVT21" and "EVT3" that the header says it is: one, unless it is damaged or another's."""
    found = re.fullmatch(r"EVT(2|21|2\.1|3)", header.options()[""].upper())
    said = {"EVT" + found[1].replace(".", "")} if found else set()
    version = header.fields.get("evt", "")
    return said | {_VERSIONS[version]} if version in _VERSIONS else said


def _order_of_halves(header: Header, height: int, width: int) -> Codec:
    path = header.path
    stated = (header.options().get("endianness") or header.fields.get("endianness", "")).lower()
    if stated in ("legacy", "little"):
        return EVT21_LEGACY if stated == "legacy" else EVT21
    if stated:
        raise EventFormatError(f"{path}: byte 0: endianness {stated}; known are little and legacy")
    # Files from before the key: read in the wrong order, words are soon at fault, or no TIME_HIGH is found.
    with open(path, "rb") as file:
        file.seek(header.size)
        raw = file.read(1 << 15)
    words = np.frombuffer(raw[: len(raw) // 8 * 8], np.uint64)

    def sound(codec: Codec) -> tuple[int, int]:
        num, bad = codec.kernel(words, height, width, codec.begin(), None, None, None, None)
        return (len(words) if bad < 0 else bad), num

    return EVT21_LEGACY if sound(EVT21_LEGACY) > sound(EVT21) else EVT21


def _is(name: str) -> Callable[[bytes, Path], bool]:
    return lambda head, path: head.startswith(b"%") and name in encodings(parse_header(path, head))


FORMATS = (
    Format("EVT3", (".raw",), "Prophesee cameras", _is("EVT3"), open_evt, write_evt3),
    Format("EVT2", (".raw",), "Prophesee cameras", _is("EVT2"), open_evt, write_evt2),
    Format("EVT2.1", (".raw",), "Prophesee cameras", _is("EVT21"), open_evt),
)
