"""`.npz` recordings: N-ImageNet, EventScape, and plain archives of one array a column."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from gep.events.io.columns import UNITS, to_events
from gep.events.io.files import replacing
from gep.events.io.npy_header import num_bytes, read_head
from gep.events.io.npz_salvage import salvage
from gep.events.io.source import EventSource, Format, InMemory, damaged
from gep.events.types import EventFormatError, Events

try:  # extra io
    from isal import isal_zlib
except ImportError:
    isal_zlib = None  # type: ignore[assignment]


FIELDS = ("x", "y", "t", "p")

_NIMAGENET = (480, 640)
_EVENTSCAPE = (256, 512)
_STRUCTURED = "event_data"
_NAMES = {
    "x": ("x", "x_pos", "xs"),
    "y": ("y", "y_pos", "ys"),
    "t": ("t", "t_us", "t_ns", "ts", "timestamp", "timestamps"),
    "p": ("p", "polarity", "pol", "ps", "polarities"),
}
_MAX_RATIO = 1040  # deflate reaches 1032 : 1 at the utmost
_STAMPS = ("boundary_timestamps.txt", "timestamps.txt")


def column_names(names: Iterable[str] | None) -> tuple[dict[str, str], str | None]:
    """(x, y, t, p -> the name it goes by, as far as there is one; the unit that t's name tells, or None)."""
    names = tuple(names or ())
    found = {field: next((n for n in known if n in names), "") for field, known in _NAMES.items()}
    unit = {"t_us": "us", "t_ns": "ns"}.get(found["t"])
    return {field: name for field, name in found.items() if name}, unit


def read_npz(
    path: str | Path,
    *,
    height: int | None = None,
    width: int | None = None,
    recover: bool = False,
    unit: str | None = None,
) -> Events:
    """Events of an `.npz` recording.

    Args:
        path: the file; key `event_data` (or one structured array of any key) with the fields x, y, t, p; or one array
            a column: x_pos, y_pos, timestamp, polarity (older N-ImageNet files), x, y, t, p (ours, EventScape),
            x, y, t_us, p and other usual names. Polarity may be bool, {0, 1} or {-1, 1}.
        height: sensor rows; None = the archive's `height`, else 256 where the file lies in an EventScape sequence
            (timestamps.txt or boundary_timestamps.txt beside it), else 480.
        width: sensor columns; `width`, 512, 640 likewise.
        recover: give the longest sound prefix and warn, instead of raising: of a truncated archive the events that
            all columns still hold. A whole member whose checksum differs has no sound part.
        unit: of t: "s", "ms", "us" or "ns"; None = by name (t_us, t_ns), in an EventScape sequence as its time stamps
            show (from memory: its simulator counts ns), else µs where t is integer and s where it is float.

    Returns:
        Validated events.

    Raises:
        EventFormatError: damaged archive, unknown keys, or events that are out of order or bounds.

    Source: Kim et al., N-ImageNet, arXiv 2112.01041, and its released loader's keys; Gehrig et al., RAM-Net,
        arXiv 2102.09320 (EventScape).
    """
    path = Path(path)
    # NumPy and zipfile report damage through a dozen exception types (zip, zlib, header syntax, memory, ...).
    try:
        columns, named_unit, size = _read(path)
    except (FileNotFoundError, EventFormatError):
        raise
    except Exception as error:
        cause = f"{path}: not a readable .npz archive: {error}"
        if not recover:
            raise EventFormatError(cause) from error
        columns, named_unit, size = _truncated(path, cause)
    if len(columns["t"]) == 0:
        raise EventFormatError(f"{path}: holds no events")
    stamps = None if unit or named_unit else _stamps(path)
    unit = unit or named_unit or (None if stamps is None else _unit_by(stamps, columns["t"]))
    if height is None or width is None:
        height, width = size if len(size) == 2 else _NIMAGENET if stamps is None else _EVENTSCAPE
    return to_events(path, columns, height=height, width=width, unit=unit, recover=recover)


def write_npz(path: str | Path, events: Events | EventSource) -> None:
    """Writes arrays t (int64 µs), x, y, p and the scalars height, width, deflated.

    Raises:
        ValueError: no events.
    """
    events = events.validate(str(path)) if isinstance(events, Events) else events.read()
    if len(events) == 0:
        raise ValueError(f"{path}: an .npz of no events cannot be told from a damaged one")
    columns = {name: getattr(events, name) for name in "txyp"}
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **columns, height=events.height, width=events.width)


def open_npz(path: Path, *, height: int | None, width: int | None, recover: bool) -> InMemory:
    """The recording, read whole."""
    return InMemory(path, read_npz(path, height=height, width=width, recover=recover))


def _read(path: Path) -> tuple[dict[str, np.ndarray], str | None, list[int]]:
    """(columns t, x, y, p; unit that t's name tells; [height, width] or [])."""
    with zipfile.ZipFile(path) as archive:
        keys = tuple(name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy"))
        structured, names, _ = _wanted(keys)
        arrays = {key: _member(archive, key, path) for key in ([structured] if structured else names.values())}
        size = [int(_member(archive, key, path, 8)) for key in ("height", "width") if key in keys]
    return *_columns(path, keys, arrays), size


def _truncated(path: Path, cause: str) -> tuple[dict[str, np.ndarray], str | None, list[int]]:
    """What `_read` gives, of an archive that ends early: as many events as all columns still hold."""
    arrays = salvage(path)
    if not arrays:
        raise EventFormatError(f"{cause}; no member before the damage is sound")
    columns, unit = _columns(path, tuple(arrays), arrays)
    most, kept = (measure(len(column) for column in columns.values()) for measure in (max, min))
    if kept == 0:
        raise EventFormatError(f"{cause}; nothing before the damage is sound")
    lost = f"{most - kept:,} of {most:,} events" if most > kept else "an unknown number"
    size = path.stat().st_size
    damaged(path, size, cause.removeprefix(f"{path}: "), recover=True, kept=kept, lost=lost)
    return {field: column[:kept] for field, column in columns.items()}, unit, []


def _wanted(keys: tuple[str, ...]) -> tuple[str, dict[str, str], str | None]:
    """(key of the structured array or "", else x, y, t, p -> key, unit that t's name tells)."""
    structured = _STRUCTURED if _STRUCTURED in keys else keys[0] if len(keys) == 1 else ""
    return structured, *column_names(keys)


def _columns(path: Path, keys: tuple[str, ...], arrays: dict) -> tuple[dict[str, np.ndarray], str | None]:
    structured, names, unit = _wanted(keys)
    if structured:
        data = arrays[structured]
        names, unit = column_names(data.dtype.names)
        if structured != _STRUCTURED and not data.dtype.names:
            raise EventFormatError(_unknown(path, keys))
        if set(names) != set(FIELDS) or data.ndim != 1:
            raise EventFormatError(
                f"{path}: '{structured}' is {data.dtype} {data.shape}, expected (N,) with the fields x, y, t, p"
            )
        return {field: data[name] for field, name in names.items()}, unit
    if set(names) != set(FIELDS):
        raise EventFormatError(_unknown(path, keys))
    columns = {field: arrays[name] for field, name in names.items()}
    for field, column in columns.items():
        if column.ndim != 1:
            raise EventFormatError(f"{path}: '{names[field]}' has shape {column.shape}, expected (N,)")
    return columns, unit


def _member(archive: zipfile.ZipFile, key: str, path: Path, most: int | None = None) -> np.ndarray:
    """One array; what its head claims is compared with what the member can hold before anything is allocated."""
    info = archive.getinfo(f"{key}.npy")
    with _inflated(archive, info) or archive.open(info) as file:
        shape, fortran, dtype = read_head(file)
        size = num_bytes(shape, dtype)
        held = min(info.file_size, info.compress_size * _MAX_RATIO, path.stat().st_size * _MAX_RATIO)
        if size > held or (most is not None and size > most):
            raise ValueError(f"'{key}' claims {size:,} bytes, its member holds at most {held:,}")
        data = file.read(size)
        if len(data) != size or file.read(1):  # the read at the end is what checks the CRC
            raise ValueError(f"'{key}' holds other than the {size:,} bytes it claims")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _inflated(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> io.BytesIO | None:
    """A deflated member by ISA-L, which takes half of zlib's time or less; None where it is not installed."""
    if isal_zlib is None or info.compress_type != zipfile.ZIP_DEFLATED or info.flag_bits & 1:
        return None
    if info.file_size > info.compress_size * _MAX_RATIO:
        raise ValueError(f"'{info.filename}' claims {info.file_size:,} bytes of {info.compress_size:,} packed ones")
    file = archive.fp
    assert file is not None
    file.seek(info.header_offset)
    head = file.read(30)
    if len(head) != 30 or head[:4] != b"PK\x03\x04":
        raise ValueError(f"'{info.filename}' has no header at byte {info.header_offset}")
    file.seek(int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little"), os.SEEK_CUR)
    inflate = isal_zlib.decompressobj(-15)
    data = inflate.decompress(file.read(info.compress_size), info.file_size + 1)
    if len(data) != info.file_size or not inflate.eof or isal_zlib.crc32(data) != info.CRC:
        raise ValueError(f"bad CRC-32 or length of '{info.filename}'")
    return io.BytesIO(data)


def _unknown(path: Path, keys: tuple[str, ...]) -> str:
    return (
        f"{path}: keys are {', '.join(keys) or 'none'}; an N-ImageNet file has '{_STRUCTURED}', or x_pos, y_pos, "
        "timestamp, polarity; others x, y, t (or t_us, t_ns), p"
    )


def _stamps(path: Path) -> np.ndarray | None:
    """Time stamps (s) of the EventScape sequence that a file lies in; None where it lies in none."""
    for name in _STAMPS:
        stamps = path.with_name(name)
        if stamps.is_file() and stamps.stat().st_size < 1 << 24:
            try:
                return np.unique(np.loadtxt(stamps, ndmin=2)[:, -1])
            except (ValueError, IndexError):
                return None
    return None


def _unit_by(stamps: np.ndarray, t: np.ndarray) -> str | None:
    """The unit in which a file lasts about as long as the pause between two stamps."""
    if len(stamps) < 2 or t.dtype.kind == "f" or len(t) < 2:
        return None
    pause, lasts = float(np.median(np.diff(stamps))), float(t[-1]) - float(t[0])
    seconds = {unit: lasts * (scale if scale > 0 else -1 / scale) / 1e6 for unit, scale in UNITS.items()}
    # Units are a factor of 1000 apart; a file without many events may well be ten times shorter than the pause.
    close = [unit for unit, value in seconds.items() if pause / 30 < value < pause * 30]
    return close[0] if close else None


FORMATS = (
    Format(
        "npz",
        (".npz",),
        "N-ImageNet, EventScape, x/y/t/p archives",
        lambda head, path: head.startswith(b"PK\x03\x04"),
        open_npz,
        write_npz,
    ),
)
