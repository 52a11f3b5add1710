"""Opening HDF5 files, truncated ones too, and writing the DSEC layout."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from gep.events.io.files import replacing
from gep.events.io.source import EventSource
from gep.events.types import EventFormatError, Events

if TYPE_CHECKING:
    import h5py
    from typing_extensions import Buffer

DAMAGE = (OSError, KeyError, RuntimeError, ValueError, TypeError, MemoryError, OverflowError, IndexError)
"""What h5py reports damage through: whatever the C library and its own code run into."""
COMPRESSIONS = ("lz4", "zstd", "gzip", "none")

_MAX_PAD = 1 << 25  # zeros that one read may get: a damaged size can ask for any number
_CACHE = 1 << 24  # bytes of unpacked chunks a dataset keeps: windows share chunks
_CHUNK = 1 << 16
_MAX_T = (1 << 32) - 1  # DSEC keeps t as uint32


def open_file(path: Path, recover: bool) -> h5py.File:
    """h5py.File for reading, Blosc and its kin registered.

    Raises:
        ImportError: h5py is missing; names the extra.
        EventFormatError: no sound HDF5 file.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f'{path}: reading HDF5 needs h5py: pip install "gep[io]"') from error
    try:
        import hdf5plugin  # noqa: F401 - importing it registers the filters
    except ImportError:
        pass  # only compressed datasets need it; their check says so
    try:
        return h5py.File(path, "r", rdcc_nbytes=_CACHE)
    except FileNotFoundError:
        raise
    except DAMAGE as error:
        if recover:
            try:
                return h5py.File(_Padded(path), "r", rdcc_nbytes=_CACHE)
            except DAMAGE:
                pass
        cause = str(error).partition("\n")[0]
        raise EventFormatError(f"{path}: byte 0: no readable HDF5 file: {cause}") from error


class _Padded(io.RawIOBase):
    """A truncated file as long as its superblock says, zeros for what is missing: HDF5 opens no shorter one."""

    def __init__(self, path: Path):
        self._file, self._at = open(path, "rb"), 0
        head = self._file.read(64)
        at = {0: 40, 1: 44, 2: 28, 3: 28}.get(head[8] if len(head) == 64 else -1, -1)
        if at < 0:
            raise OSError("no superblock")
        (self._size,) = struct.unpack_from("<Q", head, at)
        if self._size > 1 << 50:
            raise OSError("the superblock is damaged")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        self._file.seek(self._at)
        got = self._file.readinto(view) or 0
        wanted = min(len(view), max(self._size - self._at, 0))
        if wanted - got > _MAX_PAD:
            raise OSError(f"{wanted:,} bytes are asked for where {got:,} are left")
        view[got:wanted] = bytes(max(wanted - got, 0))
        self._at += wanted
        return wanted

    def close(self) -> None:
        self._file.close()
        super().close()


def write_hdf5(path: str | Path, events: Events | EventSource, *, compression: str = "lz4") -> None:
    """Writes events in the DSEC layout, chunk by chunk, replacing `path` only once complete.

    t_offset is the first time; attributes height and width of the file keep the sensor size.

    Args:
        path: the file to write.
        events: at least one event, spanning less than 2**32 µs.
        compression: "lz4" or "zstd" through Blosc (gzip where hdf5plugin is missing), "gzip" or "none".

    Raises:
        ImportError: h5py is missing; names the extra.
        ValueError: unknown compression, no events, or a recording too long for the layout.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f'{path}: writing HDF5 needs h5py: pip install "gep[io]"') from error
    if compression not in COMPRESSIONS:
        raise ValueError(f"compression is {compression!r}; HDF5 knows {', '.join(COMPRESSIONS)}")
    filters = _filters(compression)
    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        group = file.create_group("events")
        for name, dtype in (("t", "u4"), ("x", "u2"), ("y", "u2"), ("p", "u1")):
            group.create_dataset(name, (0,), dtype, chunks=(_CHUNK,), maxshape=(None,), **filters)
        start, first = 0, 0
        index: list[np.ndarray] = []
        for chunk in (events.validate(str(path)),) if isinstance(events, Events) else events.chunks(16 * _CHUNK):
            if len(chunk) == 0:
                continue
            first = int(chunk.t[0]) if start == 0 else first
            if int(chunk.t[-1]) - first > _MAX_T:
                raise ValueError(
                    f"{path}: the DSEC layout holds less than 2**32 µs (71 minutes), event times span more; "
                    "write .arrow, or cut the recording"
                )
            t = chunk.t - first
            for name, values in (("t", t), ("x", chunk.x), ("y", chunk.y), ("p", chunk.p)):
                group[name].resize((start + len(chunk),))
                group[name][start:] = values
            due = np.arange(sum(map(len, index)), int(t[-1]) // 1000 + 1)
            index.append(start + np.searchsorted(t, due * 1000))
            start += len(chunk)
        if start == 0:
            raise ValueError(f"{path}: the DSEC layout cannot tell an empty recording from a damaged file")
        file.create_dataset("ms_to_idx", data=np.concatenate(index).astype("u8"), **filters)
        file.create_dataset("t_offset", data=np.int64(first))
        file.attrs["height"], file.attrs["width"] = events.height, events.width


def _filters(compression: str) -> dict:
    if compression == "none":
        return {}
    if compression in ("lz4", "zstd"):
        try:
            import hdf5plugin

            codec: Literal["lz4", "zstd"] = "lz4" if compression == "lz4" else "zstd"
            return dict(hdf5plugin.Blosc(cname=codec, clevel=5, shuffle=hdf5plugin.Blosc.SHUFFLE))
        except ImportError:
            pass
    return {"compression": "gzip", "shuffle": True}
