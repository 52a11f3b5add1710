"""Reading recordings: one entry, `read_events`, and one module per format family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gep.events.io.bin import read_bin as read_bin
from gep.events.io.bin import write_bin as write_bin
from gep.events.io.npy import read_npy as read_npy
from gep.events.io.npz import read_npz as read_npz
from gep.events.types import EventFormatError, Events

# A further format is one module with a reader of this signature and one line in each table it needs.
MAGIC: dict[bytes, Callable[..., Events]] = {
    b"PK\x03\x04": read_npz,
    b"\x93NUMPY": read_npy,
}
"""First bytes of a file -> reader; what a file holds counts more than what it is called."""

SUFFIXES: dict[str, Callable[..., Events]] = {
    ".bin": read_bin,
    ".npz": read_npz,
    ".npy": read_npy,
}
"""File suffix -> reader, for formats without a signature."""

FORMATS: dict[str, str] = {
    ".bin": "N-MNIST, N-Caltech101",
    ".npz": "N-ImageNet",
    ".npy": "EST re-release of N-Caltech101",
}
"""File suffix -> the data sets that use it, for messages and `gep info`."""


def read_events(path: str | Path, *, height: int | None = None, width: int | None = None) -> Events:
    """All events of one recording.

    Args:
        path: the file; its reader is chosen by content, then by suffix.
        height: sensor rows; None leaves it to the reader's documented default.
        width: sensor columns; None likewise.

    Returns:
        Validated events, t in µs as the file has it (not shifted to 0).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: only one of height and width is given.
        EventFormatError: unknown format, or a damaged, empty or truncated file.
    """
    path = Path(path)
    if (height is None) != (width is None):
        raise ValueError(f"give both height and width or neither, got height={height}, width={width}")
    if not path.is_file():
        raise FileNotFoundError(f"no event file at {path}")
    with open(path, "rb") as file:
        head = file.read(8)
    if not head:
        raise EventFormatError(f"{path}: byte 0: the file is empty")
    reader = next((found for magic, found in MAGIC.items() if head.startswith(magic)), None)
    reader = reader or SUFFIXES.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(f"{suffix} ({name})" for suffix, name in FORMATS.items())
        raise EventFormatError(f"{path}: byte 0: unknown event format; known are {known}")
    return reader(path, height=height, width=width)
