"""Where the parts of an Arrow IPC file lie: the few flatbuffer tables that the native container needs.

pyarrow hides the offsets and the declared sizes of compressed buffers and would allocate what a damaged file asks
for, so the tables are looked up here, every access inside the bounds of the bytes given.

Source: Arrow columnar format, "Encapsulated message format" and "IPC file format"; FlatBuffers binary format.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

MAGIC = b"ARROW1"
_CONTINUATION = 0xFFFFFFFF
_SCHEMA, _BATCH = 1, 3  # Message.header_type
_CODECS = {0: "lz4", 1: "zstd"}
_MAX_TABLE = 1 << 26  # bytes of one message's tables; ours take a few hundred
_BLOCK = np.dtype([("offset", "<i8"), ("tables", "<i4"), ("pad", "<i4"), ("body", "<i8")])


class LayoutError(ValueError):
    """The bytes are no sound Arrow IPC file; `byte` is where that shows."""

    def __init__(self, byte: int, cause: str):
        super().__init__(cause)
        self.byte = byte


@dataclass(frozen=True)
class Message:
    """One encapsulated message: a schema or a record batch."""

    begin: int
    """Byte of the file at which it starts."""
    body: int
    """Byte at which its buffers start."""
    end: int
    """First byte after it."""
    is_batch: bool
    """A record batch; else the schema."""
    metadata: dict[bytes, bytes]
    """The message's (for the schema, the schema's) own key-value pairs."""
    rows: int = 0
    """Rows of the batch."""
    buffers: tuple[tuple[int, int], ...] = ()
    """(byte, length) of every buffer, byte counted in the file."""
    codec: str = ""
    """Compression of the buffers: "", "lz4" or "zstd"."""


def message_at(data: memoryview, begin: int) -> Message | None:
    """The message that starts at a byte; None where the file marks the end of its messages.

    Raises:
        LayoutError: truncated, or no sound message of a kind the container has.
    """
    try:
        marker, size = struct.unpack_from("<Ii", data, begin)
    except struct.error:
        raise LayoutError(begin, "the file ends where a message should start") from None
    if marker != _CONTINUATION:
        raise LayoutError(begin, "no Arrow message starts here")
    if size == 0:
        return None
    body = begin + 8 + size
    if not 0 < size <= _MAX_TABLE or body > len(data):
        raise LayoutError(begin, f"a message of {size:,} bytes does not fit the file's {len(data):,}")
    try:
        return _message(data[begin + 8 : body], begin, body, len(data))
    except (struct.error, IndexError, ValueError) as error:
        if isinstance(error, LayoutError):
            raise
        raise LayoutError(begin, f"the message's tables are damaged ({error})") from None


def batches(data: memoryview) -> np.ndarray:
    """Byte at which each record batch starts, from the footer.

    Raises:
        LayoutError: no sound footer, as in a truncated file.
    """
    tail = len(data) - len(MAGIC) - 4
    if tail < 0 or data[tail + 4 :] != MAGIC:
        raise LayoutError(max(len(data) - len(MAGIC), 0), "the closing ARROW1 is missing: the file is truncated")
    (size,) = struct.unpack_from("<i", data, tail)
    if not 0 < size <= tail:
        raise LayoutError(tail, f"the footer claims {size:,} bytes")
    tables = data[tail - size : tail]
    try:
        count, at = _vector(tables, _slot(tables, _root(tables), 3), _BLOCK.itemsize)
        blocks = np.frombuffer(tables[at : at + count * _BLOCK.itemsize], _BLOCK)
    except (struct.error, IndexError, ValueError) as error:
        raise LayoutError(tail - size, f"the footer is damaged ({error})") from None
    offsets = blocks["offset"].astype(np.int64)
    if count and (offsets[0] < 8 or offsets[-1] >= tail or (offsets[1:] <= offsets[:-1]).any()):
        raise LayoutError(tail - size, "the footer's record batches do not follow each other inside the file")
    return offsets


def _message(tables: memoryview, begin: int, body: int, limit: int) -> Message:
    root = _root(tables)
    kind_at, header_at, size_at = (_slot(tables, root, index) for index in (1, 2, 3))
    kind = tables[kind_at] if kind_at else 0
    (length,) = struct.unpack_from("<q", tables, size_at) if size_at else (0,)
    if kind not in (_SCHEMA, _BATCH):
        raise LayoutError(begin, f"a message of kind {kind} where a schema or a record batch is expected")
    if not 0 <= length <= limit - body:
        raise LayoutError(begin, f"a body of {length:,} bytes does not fit the file")
    header = _follow(tables, header_at)
    if kind == _SCHEMA:
        return Message(begin, body, body + length, False, _pairs(tables, _slot(tables, header, 2)))
    rows_at, buffers_at, compression_at = (_slot(tables, header, index) for index in (0, 2, 3))
    (rows,) = struct.unpack_from("<q", tables, rows_at) if rows_at else (0,)
    count, at = _vector(tables, buffers_at, 16)
    codec = ""
    if compression_at:
        codec_at = _slot(tables, _follow(tables, compression_at), 0)
        codec = _CODECS.get(tables[codec_at] if codec_at else 0, "unknown")
    count = min(count, 64)
    pairs = struct.unpack_from(f"<{2 * count}q", tables, at)
    buffers = tuple(zip(pairs[::2], pairs[1::2], strict=True))
    for index, (offset, size) in enumerate(buffers):
        if offset < 0 or size < 0 or offset + size > length:
            raise LayoutError(begin, f"buffer {index} of the record batch lies outside its body")
    buffers = tuple((body + offset, size) for offset, size in buffers)
    return Message(begin, body, body + length, True, _pairs(tables, _slot(tables, root, 4)), rows, buffers, codec)


def _root(tables: memoryview) -> int:
    return _inside(tables, struct.unpack_from("<I", tables, 0)[0])


def _inside(tables: memoryview, at: int) -> int:
    # A negative position would count from the end, silently.
    if not 0 < at < len(tables):
        raise ValueError(f"an offset of {at} leaves the table")
    return at


def _slot(tables: memoryview, table: int, index: int) -> int:
    """Position of a table's field, 0 when it is left out."""
    vtable = table - struct.unpack_from("<i", tables, table)[0]
    size = struct.unpack_from("<H", tables, _inside(tables, vtable))[0]
    if 4 + 2 * index + 2 > size:
        return 0
    offset = struct.unpack_from("<H", tables, vtable + 4 + 2 * index)[0]
    return _inside(tables, table + offset) if offset else 0


def _follow(tables: memoryview, at: int) -> int:
    if at == 0:
        raise ValueError("a field is missing")
    return _inside(tables, at + struct.unpack_from("<I", tables, at)[0])


def _vector(tables: memoryview, at: int, item: int) -> tuple[int, int]:
    """(length, position of the first item) of a vector field; (0, 0) when it is left out."""
    if at == 0:
        return 0, 0
    at = _follow(tables, at)
    (count,) = struct.unpack_from("<I", tables, at)
    if count * item > len(tables) - at - 4:
        raise ValueError(f"a vector of {count:,} items leaves the table")
    return count, at + 4


def _pairs(tables: memoryview, at: int) -> dict[bytes, bytes]:
    count, first = _vector(tables, at, 4)
    pairs = {}
    for index in range(count):
        table = _follow(tables, first + 4 * index)
        texts = []
        for field in (0, 1):
            size, text = _vector(tables, _slot(tables, table, field), 1)
            texts.append(bytes(tables[text : text + size]))
        pairs[texts[0]] = texts[1]
    return pairs
