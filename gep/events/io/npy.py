"""EST's re-release of N-Caltech101 and N-Cars: `.npy`, float N x 4 of x, y, seconds, polarity."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gep.events.io.source import Format, InMemory
from gep.events.types import EventFormatError, Events

_SENSOR = (180, 240)
_MAX_SECONDS = 9e12  # beyond this the time in µs leaves int64


def read_npy(path: str | Path, *, height: int | None = None, width: int | None = None) -> Events:
    """Events of an EST `.npy` recording.

    Args:
        path: the file: float (N, 4) of x, y, t [s], p in {-1, 1}.
        height: sensor rows, 180 (N-Caltech101) by default.
        width: sensor columns, 240 (N-Caltech101) by default.

    Returns:
        Validated events; t rounded to whole µs in float64.

    Raises:
        EventFormatError: damaged file, another shape, non-finite values, or events out of order or bounds.

    Source: Gehrig et al., EST, arXiv 1904.08245, and its released data.
    """
    with open(path, "rb") as file:
        # NumPy reports damage through several exception types (header syntax, short data, memory, ...).
        try:
            rows = np.load(file, allow_pickle=False)
        except Exception as error:
            at = file.tell()
            raise EventFormatError(f"{path}: byte {at}: not a readable .npy array: {error}") from error
        begin = file.tell() - getattr(rows, "nbytes", 0)
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.shape[1] != 4 or rows.dtype.kind != "f":
        what = f"{rows.dtype} {rows.shape}" if isinstance(rows, np.ndarray) else "an archive"
        raise EventFormatError(f"{path}: holds {what}, expected float (N, 4) of x, y, t in seconds, p in -1/+1")
    if len(rows) == 0:
        raise EventFormatError(f"{path}: byte {begin}: holds no events")
    seconds = rows[:, 2].astype(np.float64)
    good = np.isfinite(rows).all(axis=1) & (np.abs(seconds) < _MAX_SECONDS)
    if not good.all():
        index = int(np.argmin(good))
        at = f"byte {begin + index * rows.strides[0]}: " if rows.flags.c_contiguous else ""
        raise EventFormatError(f"{path}: {at}event {index} is not finite or out of range: {rows[index].tolist()}")
    if height is None or width is None:
        height, width = _SENSOR
    return Events.from_arrays(
        t=np.rint(seconds * 1e6).astype(np.int64),
        x=rows[:, 0],
        y=rows[:, 1],
        p=rows[:, 3],
        height=height,
        width=width,
        source=str(path),
    )


def open_npy(path: Path, *, height: int | None, width: int | None, recover: bool) -> InMemory:
    """The recording, read whole."""
    return InMemory(path, read_npy(path, height=height, width=width))


FORMATS = (
    Format(
        "npy", (".npy",), "EST re-release of N-Caltech101", lambda head, path: head.startswith(b"\x93NUMPY"), open_npy
    ),
)
