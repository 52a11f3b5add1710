"""What can still be read of a truncated `.npz`, whose list of members (at the end) is lost."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np

from gep.events.io.npy_header import num_bytes, read_head

_MEMBER = b"PK\x03\x04"
_MOST = 1 << 20  # bytes of one step of inflating


def salvage(path: Path) -> dict[str, np.ndarray]:
    """One-dimensional arrays of the members, as far as the file goes; those cut off are shorter than they were.

    A whole member whose checksum differs ends the search: nothing in it is known to be sound.

    Source: PKWARE APPNOTE 6.3, local file headers and the zip64 extra field.
    """
    data = memoryview(path.read_bytes())
    arrays, at = {}, 0
    while bytes(data[at : at + 4]) == _MEMBER and len(data) >= at + 30:
        flags, method, crc, packed, name_len, extra_len = struct.unpack_from("<6xHH4xII4xHH", data, at)
        begin = at + 30 + name_len + extra_len
        name = bytes(data[at + 30 : at + 30 + name_len]).decode("utf-8", "replace").removesuffix(".npy")
        extra = data[at + 30 + name_len : begin]
        if packed == 0xFFFFFFFF and len(extra) >= 20 and bytes(extra[:2]) == b"\x01\x00":
            _, packed = struct.unpack_from("<QQ", extra, 4)
        if method not in (0, 8) or begin > len(data) or (flags & 8):
            break
        raw = data[begin : min(begin + packed, len(data))]
        whole = begin + packed <= len(data)
        try:
            array, content_crc = _array(raw, method == 8)
        except (ValueError, zlib.error):
            break
        if whole and content_crc != crc:
            break
        arrays[name] = array
        at = begin + packed
    return arrays


def _array(raw: memoryview, deflated: bool) -> tuple[np.ndarray, int]:
    """(array, CRC-32 of all that is there) of a member's bytes."""
    content = bytearray()
    wanted = None
    inflate = zlib.decompressobj(-15) if deflated else None
    rest: memoryview | bytes = raw
    while wanted is None or len(content) < wanted:
        piece = bytes(rest) if inflate is None else inflate.decompress(rest, _MOST)
        rest = b"" if inflate is None else inflate.unconsumed_tail
        content += piece
        if wanted is None:
            file = io.BytesIO(bytes(content))
            shape, _, dtype = read_head(file)
            if len(shape) != 1:
                return np.zeros(0), zlib.crc32(content)
            begin = file.tell()
            wanted = begin + num_bytes(shape, dtype)
        if not piece or not len(rest):
            break
    count = (min(len(content), wanted) - begin) // dtype.itemsize
    return np.frombuffer(bytes(content), dtype, count, begin), zlib.crc32(content)
