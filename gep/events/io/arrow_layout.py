"""Where the parts of an Arrow IPC file lie: the few flatbuffer tables that the native container needs.

pyarrow hides the offsets and the declared sizes of compressed buffers and would allocate what a damaged file asks
for, so the tables are looked up here, every access inside the bounds of the bytes given. Compiled: a training sample
opens a file and looks at three messages or more.

Source: Arrow columnar format, "Encapsulated message format" and "IPC file format"; FlatBuffers binary format.
"""

from __future__ import annotations

import struct
from typing import NamedTuple, Protocol

import numba
import numpy as np

MAGIC = b"ARROW1"
_CONTINUATION = 0xFFFFFFFF
_SCHEMA, _BATCH = 1, 3  # Message.header_type
_CODECS = {-1: "", 0: "lz4", 1: "zstd"}
_MAX_TABLE = 1 << 26  # bytes of one message's tables; ours take a few hundred
_MAX_BUFFERS, _MAX_PAIRS = 64, 16  # looked at; ours have 8 and at most 4
_BLOCK = np.dtype([("offset", "<i8"), ("tables", "<i4"), ("pad", "<i4"), ("body", "<i8")])


class LayoutError(ValueError):
    """The bytes are no sound Arrow IPC file; `byte` is where that shows."""

    def __init__(self, byte: int, cause: str):
        super().__init__(cause)
        self.byte = byte


class Message(NamedTuple):
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


class Bytes(Protocol):
    """Bytes that are sliced: a memoryview, or a file that is read when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> memoryview: ...


def message_at(data: Bytes, begin: int) -> Message | None:
    """The message that starts at a byte; None where the file marks the end of its messages.

    Raises:
        LayoutError: truncated, or no sound message of a kind the container has.
    """
    try:
        marker, size = struct.unpack("<Ii", data[begin : begin + 8])
    except struct.error:
        raise LayoutError(begin, "the file ends where a message should start") from None
    if marker != _CONTINUATION:
        raise LayoutError(begin, "no Arrow message starts here")
    if size == 0:
        return None
    body = begin + 8 + size
    if not 0 < size <= _MAX_TABLE or body > len(data):
        raise LayoutError(begin, f"a message of {size:,} bytes does not fit the file's {len(data):,}")
    tables = data[begin + 8 : body]
    try:
        kind, length, rows, codec, count, pairs, *places = _message(np.frombuffer(tables, np.uint8)).tolist()
    except ValueError as error:
        raise LayoutError(begin, f"the message's tables are damaged ({error})") from None
    if kind not in (_SCHEMA, _BATCH):
        raise LayoutError(begin, f"a message of kind {kind} where a schema or a record batch is expected")
    if not 0 <= length <= len(data) - body:
        raise LayoutError(begin, f"a body of {length:,} bytes does not fit the file")
    buffers = []
    for index, (offset, taken) in enumerate(zip(places[: 2 * count : 2], places[1 : 2 * count : 2])):
        if offset < 0 or taken < 0 or offset + taken > length:
            raise LayoutError(begin, f"buffer {index} of the record batch lies outside its body")
        buffers.append((body + offset, taken))
    metadata, at = {}, 2 * count
    for key, key_size, value, value_size in zip(*(places[at + k : at + 4 * pairs : 4] for k in range(4))):
        metadata[bytes(tables[key : key + key_size])] = bytes(tables[value : value + value_size])
    kind_of = _CODECS.get(codec, "unknown")
    return Message(begin, body, body + length, kind == _BATCH, metadata, rows, tuple(buffers), kind_of)


def batches(data: Bytes) -> np.ndarray:
    """Byte at which each record batch starts, from the footer.

    Raises:
        LayoutError: no sound footer, as in a truncated file.
    """
    tail = len(data) - len(MAGIC) - 4
    if tail < 0 or data[tail + 4 :] != MAGIC:
        raise LayoutError(max(len(data) - len(MAGIC), 0), "the closing ARROW1 is missing: the file is truncated")
    (size,) = struct.unpack("<i", data[tail : tail + 4])
    if not 0 < size <= tail:
        raise LayoutError(tail, f"the footer claims {size:,} bytes")
    tables = np.frombuffer(data[tail - size : tail], np.uint8)
    try:
        count, at = _footer(tables)
    except ValueError as error:
        raise LayoutError(tail - size, f"the footer is damaged ({error})") from None
    offsets = tables[at : at + count * _BLOCK.itemsize].view(_BLOCK)["offset"].astype(np.int64)
    if count and (offsets[0] < 8 or offsets[-1] >= tail or (offsets[1:] <= offsets[:-1]).any()):
        raise LayoutError(tail - size, "the footer's record batches do not follow each other inside the file")
    return offsets


@numba.njit(nogil=True, cache=True)
def _message(tables):
    """[header type, body length, rows, codec or -1, N, P, then N × (offset, size), P × (key, size, value, size)]."""
    found = np.zeros(6 + 2 * _MAX_BUFFERS + 4 * _MAX_PAIRS, np.int64)
    root = _root(tables)
    kind_at, header_at, length_at = _slot(tables, root, 1), _slot(tables, root, 2), _slot(tables, root, 3)
    found[0] = _number(tables, kind_at, 1) if kind_at else 0
    found[1] = _number(tables, length_at, 8) if length_at else 0
    found[3] = -1
    end = 6
    if found[0] != _SCHEMA and found[0] != _BATCH:
        return found[:end]
    header = _follow(tables, header_at)
    if found[0] == _SCHEMA:
        vector = _slot(tables, header, 2)
    else:
        rows_at, codec_at = _slot(tables, header, 0), _slot(tables, header, 3)
        found[2] = _number(tables, rows_at, 8) if rows_at else 0
        if codec_at:
            codec_at = _slot(tables, _follow(tables, codec_at), 0)
            found[3] = _number(tables, codec_at, 1) if codec_at else 0
        count, at = _vector(tables, _slot(tables, header, 2), 16)
        found[4] = min(count, _MAX_BUFFERS)
        for k in range(2 * found[4]):
            found[end + k] = _number(tables, at + 8 * k, 8)
        end += 2 * found[4]
        vector = _slot(tables, root, 4)
    count, at = _vector(tables, vector, 4)
    found[5] = min(count, _MAX_PAIRS)
    for k in range(found[5]):
        pair = _follow(tables, at + 4 * k)
        for field in range(2):
            size, text = _vector(tables, _slot(tables, pair, field), 1)
            found[end], found[end + 1] = text, size
            end += 2
    return found[:end]


@numba.njit(nogil=True, cache=True)
def _footer(tables):
    return _vector(tables, _slot(tables, _root(tables), 3), 24)


@numba.njit(nogil=True, cache=True)
def _number(tables, at, size):
    """The little-endian integer of 1, 2, 4 (unsigned) or 8 bytes (signed)."""
    # A negative position would count from the end, silently.
    if at < 0 or at > len(tables) - size:
        raise ValueError("an offset leaves the table")
    value = np.int64(0)
    for k in range(size):
        value |= np.int64(tables[at + k]) << np.int64(8 * k)
    return value


@numba.njit(nogil=True, cache=True)
def _root(tables):
    return _inside(tables, _number(tables, 0, 4))


@numba.njit(nogil=True, cache=True)
def _inside(tables, at):
    if at <= 0 or at >= len(tables):
        raise ValueError("an offset leaves the table")
    return at


@numba.njit(nogil=True, cache=True)
def _slot(tables, table, index):
    """Position of a table's field, 0 when it is left out."""
    back = _number(tables, table, 4)
    vtable = _inside(tables, table - (back if back < 1 << 31 else back - (1 << 32)))
    if 4 + 2 * index + 2 > _number(tables, vtable, 2):
        return np.int64(0)
    offset = _number(tables, vtable + 4 + 2 * index, 2)
    return _inside(tables, table + offset) if offset else np.int64(0)


@numba.njit(nogil=True, cache=True)
def _follow(tables, at):
    if at == 0:
        raise ValueError("a field is missing")
    return _inside(tables, at + _number(tables, at, 4))


@numba.njit(nogil=True, cache=True)
def _vector(tables, at, item):
    """(length, position of the first item) of a vector field; (0, 0) when it is left out."""
    if at == 0:
        return np.int64(0), np.int64(0)
    at = _follow(tables, at)
    count = _number(tables, at, 4)
    if count * item > len(tables) - at - 4:
        raise ValueError("a vector leaves the table")
    return count, at + 4
