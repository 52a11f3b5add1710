"""N-ImageNet `.npz`: one structured array, or one array a field in older files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gep.events.io.source import Format, InMemory
from gep.events.types import EventFormatError, Events

_SENSOR = (480, 640)
_STRUCTURED = "event_data"
_FIELDS = ("x", "y", "t", "p")
_OLD_KEYS = ("x_pos", "y_pos", "timestamp", "polarity")


def read_npz(path: str | Path, *, height: int | None = None, width: int | None = None) -> Events:
    """Events of an N-ImageNet recording.

    Args:
        path: the file; key `event_data` with the fields x, y, t [µs], p, or the older keys x_pos, y_pos,
            timestamp, polarity. Polarity may be bool, {0, 1} or {-1, 1}.
        height: sensor rows, 480 by default.
        width: sensor columns, 640 by default.

    Returns:
        Validated events; t in µs as stored.

    Raises:
        EventFormatError: damaged archive, unknown keys, or events that are out of order or bounds.

    Source: Kim et al., N-ImageNet, arXiv 2112.01041, and its released loader's keys.
    """
    with open(path, "rb") as file:
        # NumPy reports damage through a dozen exception types (zip, zlib, header syntax, memory, ...).
        try:
            archive = np.load(file, allow_pickle=False)
            if not hasattr(archive, "files"):
                raise ValueError("it holds a bare array, not an archive of arrays")
            keys = tuple(archive.files)
            wanted = (_STRUCTURED,) if _STRUCTURED in keys else _OLD_KEYS
            arrays = {key: archive[key] for key in wanted if key in keys}
        except Exception as error:
            raise EventFormatError(f"{path}: not a readable .npz archive: {error}") from error
    if _STRUCTURED in arrays:
        data = arrays[_STRUCTURED]
        if not set(_FIELDS) <= set(data.dtype.names or ()) or data.ndim != 1:
            raise EventFormatError(
                f"{path}: '{_STRUCTURED}' is {data.dtype} {data.shape}, expected (N,) with the fields x, y, t, p"
            )
        arrays = {name: data[name] for name in _FIELDS}
    elif set(arrays) == set(_OLD_KEYS):
        arrays = {name: arrays[key] for name, key in zip(_FIELDS, _OLD_KEYS, strict=True)}
    else:
        raise EventFormatError(
            f"{path}: keys are {', '.join(keys) or 'none'}; an N-ImageNet file has '{_STRUCTURED}', "
            f"or {', '.join(_OLD_KEYS)}"
        )
    # Fields of a structured array are strided views; the kernels and every later pass want them packed.
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    if len(arrays["t"]) == 0:
        raise EventFormatError(f"{path}: holds no events")
    if height is None or width is None:
        height, width = _SENSOR
    return Events.from_arrays(**arrays, height=height, width=width, source=str(path))


def open_npz(path: Path, *, height: int | None, width: int | None, recover: bool) -> InMemory:
    """The recording, read whole."""
    return InMemory(path, read_npz(path, height=height, width=width))


FORMATS = (Format("npz", (".npz",), "N-ImageNet", lambda head, path: head.startswith(b"PK\x03\x04"), open_npz),)
