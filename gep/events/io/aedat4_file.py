"""The container of AEDAT 4.0: a header, then LZ4 or Zstandard packets of flatbuffers.

Read by hand, with every size held against what is there: the decoder library panics on flipped bytes.
"""

from __future__ import annotations

import re
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gep.events.types import EventFormatError

MAGIC = b"#!AER-DAT4.0\r\n"
_CODECS = {0: None, 1: "lz4", 2: "lz4", 3: "zstd", 4: "zstd"}
_MAX_RATIO = 255  # LZ4 cannot do better; with Zstandard it bounds what a packet can ask for
_FREE = 1 << 26  # bytes that any packet may decompress to, whatever its ratio
_MAX_FIELDS = 64


class Fault(Exception):
    """What is wrong at the current place; the caller knows path and byte."""


class Stream(NamedTuple):
    """A stream that the header names."""

    id: int
    kind: str
    height: int | None
    width: int | None


class Flat:
    """Bounds-checked reads from a flatbuffer."""

    def __init__(self, data: bytes, root: int):
        self.data = data
        self.at = root + self.get("<I", root)
        table = self.at - self.get("<i", self.at)
        size = self.get("<H", table)
        if size > _MAX_FIELDS * 2 + 4:
            raise Fault(f"a flatbuffer table of {size:,} bytes")
        self.offsets = [self.get("<H", table + at) for at in range(4, size - 1, 2)]

    def get(self, layout: str, at: int) -> int:
        """The number at an offset."""
        if not 0 <= at <= len(self.data) - struct.calcsize(layout):
            raise Fault("a flatbuffer offset points outside its packet")
        return struct.unpack_from(layout, self.data, at)[0]

    def scalar(self, field: int, layout: str, default: int) -> int:
        """The number in a field of the table, or its default."""
        offset = self.offsets[field] if field < len(self.offsets) else 0
        return self.get(layout, self.at + offset) if offset else default

    def vector(self, field: int, item: int) -> tuple[int, int]:
        """(number of items, offset of the first) of a vector whose items take `item` bytes."""
        offset = self.offsets[field] if field < len(self.offsets) else 0
        if not offset:
            return 0, 0
        begin = self.at + offset + self.get("<I", self.at + offset)
        count = self.get("<I", begin)
        if count * item > len(self.data) - begin - 4:
            raise Fault(f"a vector of {count:,} items does not fit its packet")
        return count, begin + 4


def _inflate(body: memoryview, codec: str | None) -> bytes:
    """A packet's flatbuffer without its size prefix."""
    import pyarrow as pa

    most = max(_FREE, _MAX_RATIO * len(body))
    try:
        reader = pa.BufferReader(pa.py_buffer(body))
        with pa.CompressedInputStream(reader, codec) if codec else reader as stream:
            prefix = stream.read(4)
            size = int.from_bytes(prefix, "little")
            if len(prefix) < 4 or not 8 <= size <= most:
                raise Fault(f"a packet of {len(body):,} bytes claims to hold {size:,}")
            pieces, missing = [], size
            while missing and (piece := stream.read(min(missing, 1 << 24))):  # a false size allocates little
                pieces.append(piece)
                missing -= len(piece)
            if missing or stream.read(1):
                raise Fault(f"a packet does not hold the {size:,} bytes it claims to")
    except OSError as error:
        raise Fault(f"the packet does not decompress: {error}") from error
    return b"".join(pieces)


def flatbuffer(body: memoryview, codec: str | None, identifier: bytes) -> Flat:
    """A packet's flatbuffer, which must be of the given type."""
    data = _inflate(body, codec)
    if data[4:8] != identifier:
        raise Fault(f"a packet of type {data[4:8]!r} where {identifier!r} is expected")
    return Flat(data, 0)


class File:
    """The parts of a file that both events and frames need."""

    def __init__(self, path: Path):
        self.path = path
        self.raw = np.memmap(path, np.uint8, "r").data if path.stat().st_size else memoryview(b"")
        if bytes(self.raw[:14]) != MAGIC:
            raise EventFormatError(f"{path}: byte 0: does not begin with {MAGIC!r}; no AEDAT 4.0 file")
        size = int.from_bytes(self.raw[14:18], "little")
        if not 8 <= size <= len(self.raw) - 18:
            raise EventFormatError(f"{path}: byte 14: a header of {size:,} bytes in a file of {len(self.raw):,}")
        try:
            header = Flat(bytes(self.raw[18 : 18 + size]), 0)
            kind = header.scalar(0, "<i", 0)
            if kind not in _CODECS:
                raise Fault(f"unknown compression {kind}")
            self.codec, table = _CODECS[kind], header.scalar(1, "<q", -1)
            count, at = header.vector(2, 1)
            self.streams = _streams(header.data[at : at + count])
        except Fault as fault:
            raise EventFormatError(f"{path}: byte 18: {fault}") from fault
        self.begin = 18 + size
        # A recording that was cut short has no table of packets at its end.
        self.end = table if self.begin <= table <= len(self.raw) else len(self.raw)

    def stream(self, kind: str) -> Stream | None:
        """The first stream of a kind, with a warning where there are more."""
        found = sorted(stream for stream in self.streams if stream.kind == kind)
        if len(found) > 1:
            ids = ", ".join(str(stream.id) for stream in found)
            warnings.warn(f"{self.path}: holds {kind} streams {ids}; reading stream {found[0].id} only", stacklevel=4)
        return found[0] if found else None

    def packets(self) -> Iterator[tuple[int, int, memoryview]]:
        """(stream, byte, body) of each packet; raises Fault with the byte as second argument."""
        at = self.begin
        while at < self.end:
            if self.end - at < 8:
                raise Fault("the file ends inside a packet header", at)
            stream, size = struct.unpack_from("<iI", self.raw, at)
            if size > self.end - at - 8 or stream not in {known.id for known in self.streams}:
                raise Fault(f"a packet of stream {stream} and {size:,} bytes does not fit the file", at)
            yield stream, at, self.raw[at + 8 : at + 8 + size]
            at += 8 + size


def _streams(xml: bytes) -> list[Stream]:
    from xml.etree import ElementTree

    if re.search(rb"<!(DOCTYPE|ENTITY)", xml):
        raise Fault("the header's XML declares entities")
    try:
        root = ElementTree.fromstring(xml.rstrip(b"\0"))
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise Fault(f"the header's XML is damaged: {error}") from error
    found = []
    for node in root.iterfind("./node[@name='outInfo']/node"):
        values = {attr.get("key"): attr.text or "" for attr in node.iter("attr")}
        try:
            size = [int(values[key]) if key in values else None for key in ("sizeY", "sizeX")]
            found.append(Stream(int(node.get("name", "")), values.get("typeIdentifier", ""), *size))
        except ValueError as error:
            raise Fault(f"the header's XML is damaged: {error}") from error
    return found
