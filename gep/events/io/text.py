"""Events as text: `t x y p` lines of the RPG layout, and CSV with or without named columns."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gep.events.io.columns import to_events
from gep.events.io.files import replacing
from gep.events.io.source import EventSource, Format, InMemory, damaged
from gep.events.types import EventFormatError, Events

_SENSOR = (180, 240)  # DAVIS240C, the camera of the RPG data set
_NAMES = {
    "t": ("t", "ts", "time", "timestamp", "timestamps", "t_us", "timestamp_us", "t_s"),
    "x": ("x", "x_pos", "col", "column"),
    "y": ("y", "y_pos", "row"),
    "p": ("p", "pol", "polarity", "on"),
}
_ORDER = ("t", "x", "y", "p")
_SIZE = re.compile(rb"#\s*sensor\s+(\d+)\s*x\s*(\d+)")
_TEXT = frozenset(b"\t\n\r" + bytes(range(32, 127)))
_FLOAT = re.compile(rb"[.eEnN]")
_MAX_SECONDS_US = 10**15  # beyond this, seconds as float64 no longer tell µs apart


@dataclass(frozen=True)
class _Head:
    begin: int
    """Byte of the first event."""
    columns: tuple[str, ...]
    """Name of each column; "" for one that is not used."""
    size: tuple[int, int] | None
    """(rows, columns) of the sensor, where the file says."""


def read_text(
    path: str | Path, *, height: int | None = None, width: int | None = None, recover: bool = False
) -> Events:
    """Events of a text file, one a line, columns separated by blanks, tabs, commas or semicolons.

    Lines that begin with `#` are skipped before the first event (`# sensor WIDTHxHEIGHT` is read); then may come the
    RPG layout's `width height`, then a line that names the columns, in any order (t, ts, time, timestamp, x, y, p,
    pol, polarity; `t_us` is µs, `t_s` seconds). Without names the columns are t x y p.

    Args:
        path: the file. t with a decimal point or exponent is seconds, without it µs; polarity 0/1 or -1/1.
        height: sensor rows; None = as the file says, else 180 (DAVIS240C, the RPG data set).
        width: sensor columns; likewise 240.
        recover: give the events before the first faulty line and warn, instead of raising.

    Returns:
        Validated events; seconds are rounded to µs in float64.

    Raises:
        EventFormatError: naming the line and its first byte.

    Source: Mueggler et al., The Event-Camera Dataset and Simulator, IJRR 2017: its text format.
    """
    path = Path(path)
    data = path.read_bytes()
    head = _head(data)
    if head is None:
        raise EventFormatError(
            f"{path}: byte 0: no line of numbers t x y p (or of columns named t, x, y, p) in the first 64 kB"
        )
    if height is None or width is None:
        height, width = head.size or _SENSOR
    columns = _parse(data, head)
    fault = _faulty(data, head) if columns is None else None
    if fault is not None:
        line, begin, end = fault
        text = data[begin:end].decode("ascii", "replace")[:60]
        cause = f"line {line}: {text!r} is no event of columns {', '.join(filter(None, head.columns))}"
        if end == len(data) and begin > head.begin:
            warnings.warn(f"{path}: byte {begin}: dropped a partial last line ({line}); truncated?", stacklevel=2)
        else:
            lost = f"{len(data) - begin:,} of {len(data):,} bytes"
            kept = len(list(_lines(data[:begin], head.begin)))
            damaged(path, begin, cause, recover=recover and kept > 0, kept=kept, lost=lost)
        data = data[:begin]
    if columns is None:
        columns = _parse(data, head)
    if columns is None:  # a point only further down
        columns = _parse(data, head, floats=True)
    if columns is None or len(columns["t"]) == 0:
        raise EventFormatError(f"{path}: byte {head.begin}: holds no events")
    unit = {"t_us": "us", "timestamp_us": "us", "t_s": "s"}.get(next(n for n in head.columns if n in _NAMES["t"]))
    return to_events(
        path,
        columns,
        height=height,
        width=width,
        unit=unit,
        recover=recover,
        byte_of=lambda index: next(b for n, (_, b, _) in enumerate(_lines(data, head.begin)) if n == index),
    )


def write_text(path: str | Path, events: Events | EventSource) -> None:
    """Writes `.csv` as `t,x,y,p` with t in µs, any other suffix in the RPG layout (`t x y p`, t in seconds).

    Both begin with the sensor size: a `# sensor WIDTHxHEIGHT` line, or `width height`.

    Raises:
        ValueError: no events, or seconds too large to tell µs apart (|t| >= 1e15 µs; write .csv then).
    """
    import pyarrow as pa
    from pyarrow import csv

    path = Path(path)
    comma = path.suffix.lower() == ".csv"
    fields = [("t", pa.int64() if comma else pa.float64()), ("x", pa.uint16()), ("y", pa.uint16()), ("p", pa.uint8())]
    schema = pa.schema(fields)
    options = csv.WriteOptions(include_header=False, delimiter="," if comma else " ", quoting_style="none")
    count = 0
    with replacing(path) as temporary, open(temporary, "wb") as file:
        size = (events.width, events.height)
        file.write(b"# sensor %dx%d\nt,x,y,p\n" % size if comma else b"%d %d\n" % size)
        with csv.CSVWriter(file, schema, write_options=options) as writer:
            for chunk in (events.validate(str(path)),) if isinstance(events, Events) else events.chunks():
                t = chunk.t
                if not comma and len(t) and max(abs(int(t[0])), abs(int(t[-1]))) >= _MAX_SECONDS_US:
                    raise ValueError(f"{path}: seconds as text cannot hold {t[-1]} µs exactly; write .csv or .arrow")
                t = t if comma else t / 1e6
                writer.write(pa.record_batch([pa.array(t), *(pa.array(getattr(chunk, n)) for n in "xyp")], schema))
                count += len(chunk)
        if count == 0:
            raise ValueError(f"{path}: a text file of no events cannot be told from a damaged one")


def _head(data: bytes) -> _Head | None:
    """What comes before the events; None where no events come in the first 64 kB."""
    size, names = None, None
    for _, begin, end in _lines(data[: 1 << 16], 0):
        line = data[begin:end].strip()
        if line.startswith(b"#"):
            found = _SIZE.match(line)
            size = (int(found[2]), int(found[1])) if found else size
            continue
        words = re.split(rb"[\s,;]+", line)
        if all(_is_number(word) for word in words):
            if len(words) == 2 and size is None and names is None and all(word.isdigit() for word in words):
                size = (int(words[1]), int(words[0]))
                continue
            columns = names or (_ORDER if len(words) == 4 else None)
            return _Head(begin, columns, size) if columns and len(columns) == len(words) else None
        given = tuple(word.decode("ascii", "replace").strip('"').lower() for word in words)
        if names is not None or not all(sum(n in known for n in given) == 1 for known in _NAMES.values()):
            return None
        wanted = {name for known in _NAMES.values() for name in known}
        names = tuple(name if name in wanted else "" for name in given)
    return None


def _parse(data: bytes, head: _Head, floats: bool = False) -> dict[str, np.ndarray] | None:
    """Columns t, x, y, p; None where a line is faulty."""
    import pyarrow as pa
    from pyarrow import csv

    body = data[head.begin :]
    line = body[: body.find(b"\n") + 1 or None].strip()
    separators = {bytes([c]) for c in line if c in b" \t,;"}
    if len(separators) != 1 or re.search(rb"[ \t]{2}|^[ \t]|[ \t]\r?$", body[: 1 << 16], re.MULTILINE):
        body = re.sub(rb"[ \t]*[,; \t][ \t]*", b" ", body)
        body = re.sub(rb"^ | (?=\r?$)", b"", body, flags=re.MULTILINE)
        separators = {b" "}
    names = [str(number) for number in range(len(head.columns))]
    where = {field: next(i for i, n in enumerate(head.columns) if n in known) for field, known in _NAMES.items()}
    # Digits decide the unit of t; a column is read as float where any of the first lines has a point in it.
    sample = [re.split(rb"[\s,;]+", part.strip()) for part in body[: 1 << 14].splitlines()[:-1][:200]] or [line.split()]
    types = {}
    for number, name in enumerate(names):
        point = any(len(words) > number and _FLOAT.search(words[number]) for words in sample)
        types[name] = pa.float64() if floats or point else pa.int64()
    try:
        table = csv.read_csv(
            pa.BufferReader(body),
            csv.ReadOptions(use_threads=False, column_names=names),
            csv.ParseOptions(delimiter=separators.pop().decode(), quote_char=False),
            csv.ConvertOptions(
                column_types=types,
                include_columns=[names[i] for i in where.values()],
                null_values=[],
            ),
        )
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError):
        return None
    columns = {field: table.column(names[index]) for field, index in where.items()}
    if any(column.null_count for column in columns.values()):
        return None
    return {field: column.to_numpy() for field, column in columns.items()}


def _faulty(data: bytes, head: _Head) -> tuple[int, int, int] | None:
    """(number, first byte, end) of the first line that is no event; None where every line is one."""
    for line, begin, end in _lines(data, head.begin):
        words = re.split(rb"[\s,;]+", data[begin:end].strip())
        used = [word for word, name in zip(words, head.columns) if name]
        if len(words) != len(head.columns) or not all(_is_number(word) for word in used):
            return line, begin, end
    return None


def _lines(data: bytes, start: int) -> Iterator[tuple[int, int, int]]:
    """(number, first byte, end) of every line from a byte on that is not blank."""
    number = data.count(b"\n", 0, start)
    file = io.BytesIO(data)
    file.seek(start)
    begin = start
    for line in file:
        number += 1
        if line.strip():
            yield number, begin, begin + len(line.rstrip(b"\r\n"))
        begin += len(line)


def _is_number(word: bytes) -> bool:
    try:
        value = float(word)
    except ValueError:
        return False
    return b"_" not in word and (bool(_FLOAT.search(word)) or abs(value) < 2**63)


def _sniff(head: bytes, path: Path) -> bool:
    if not set(head) <= _TEXT or head.startswith((b"#!AER", b"%")):
        return False
    whole = head if len(head) < 4096 else head[: head.rfind(b"\n") + 1]
    return _head(whole) is not None


def open_text(path: Path, *, height: int | None, width: int | None, recover: bool) -> InMemory:
    """The recording, read whole."""
    return InMemory(path, read_text(path, height=height, width=width, recover=recover))


FORMATS = (Format("text", (".txt", ".csv"), "RPG layout, CSV", _sniff, open_text, write_text),)
