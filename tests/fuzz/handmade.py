"""Recordings of the formats that gep reads and does not write, byte by byte from their descriptions."""

from __future__ import annotations

import itertools
import struct

import numpy as np

from gep.events.types import Events

MAGIC4 = b"#!AER-DAT4.0\r\n"
_XML = """<dv version="2.0"><node name="outInfo" path="/mainloop/Recorder/outInfo/">{streams}</node></dv>"""
_STREAM = """<node name="{id}" path="/{id}/"><attr key="typeIdentifier" type="string">{kind}</attr><node name="info"
path="/{id}/info/"><attr key="sizeX" type="int">{width}</attr><attr key="sizeY" type="int">{height}</attr></node></node>
"""


def table(
    fields: dict[int, bytes], vectors: dict[int, tuple[int, bytes]] | None = None, base: int = 12
) -> tuple[int, bytes]:
    """(offset of the table, vtable and table and vectors) of a flatbuffer table that begins `base` bytes in.

    Numbers and the items of vectors are aligned, since other readers insist on it.
    """
    vectors = vectors or {}
    slots = [0] * (max([*fields, *vectors]) + 1)
    begin = -(-(4 + 2 * len(slots)) // 8) * 8
    inline, places = bytearray(4), {}
    for index in range(len(slots)):
        if index not in fields and index not in vectors:
            continue
        value = fields.get(index, bytes(4))
        inline += bytes(-(base + begin + len(inline)) % len(value))
        slots[index] = len(inline)
        if index in vectors:
            places[index] = len(inline)
        inline += value
    vtable = struct.pack(f"<HH{len(slots)}H", 4 + 2 * len(slots), len(inline), *slots)
    inline[:4] = struct.pack("<i", begin)
    data = bytearray(vtable.ljust(begin, b"\0") + inline)
    for index, place in places.items():
        data += bytes(-(base + len(data) + 4) % 8)
        struct.pack_into("<I", data, begin + place, len(data) - begin - place)
        count, items = vectors[index]
        data += struct.pack("<I", count) + items
    return begin, bytes(data) + bytes(-len(data) % 8)


def flatbuffer(identifier: bytes, begin: int, data: bytes, prefix: bool = True) -> bytes:
    body = struct.pack("<I", 8 + begin) + identifier + data
    return struct.pack("<I", len(body)) + body if prefix else body


def aedat4(
    packets: list[tuple[int, bytes]],
    *,
    height: int,
    width: int,
    codec: str | None = "lz4",
    index: list[tuple[int, int, int]] | None = None,
    streams: tuple[tuple[int, str], ...] = ((0, "EVTS"), (1, "FRME")),
) -> bytes:
    """A file of (stream, flatbuffer) packets; `index` = (count, first, last time) of each adds the table."""
    import pyarrow as pa

    xml = _XML.format(streams="".join(_STREAM.format(id=i, kind=k, width=width, height=height) for i, k in streams))
    compression = struct.pack("<i", {None: 0, "lz4": 1, "zstd": 3}[codec])

    def head(at: int) -> bytes:
        begin, data = table({0: compression, 1: struct.pack("<q", at)}, {2: (len(xml), xml.encode())}, base=8)
        header = flatbuffer(b"IOHE", begin, data, prefix=False)
        return MAGIC4 + struct.pack("<I", len(header)) + header

    def pack(body: bytes) -> bytes:
        return pa.compress(body, codec, asbytes=True) if codec else body

    body, entries = b"", []
    for number, (stream, flat) in enumerate(packets):
        packed = pack(flat)
        at = len(head(0)) + len(body) + 8
        body += struct.pack("<ii", stream, len(packed)) + packed
        if index:
            values = {0: at, 2: index[number][0], 3: index[number][1], 4: index[number][2]}
            fields = {key: struct.pack("<q", value) for key, value in values.items()}
            entries.append(table({**fields, 1: struct.pack("<ii", stream, len(packed))}, base=0))
    if not index:
        return head(-1) + body
    # The vector holds the distance from each of its items to a table, which come right behind it.
    vector, tables = b"", b""
    pad = 4 * (len(entries) % 2)
    for number, (begin, data) in enumerate(entries):
        vector += struct.pack("<I", 4 * (len(entries) - number) + pad + len(tables) + begin)
        tables += data
    begin, data = table({}, {0: (len(entries), vector + bytes(pad) + tables)})
    return head(len(head(0)) + len(body)) + body + pack(flatbuffer(b"FTAB", begin, data))


def events4(events: Events) -> bytes:
    """The flatbuffer of an AEDAT 4.0 packet of events."""
    rows = np.zeros(len(events), [("t", "<i8"), ("x", "<i2"), ("y", "<i2"), ("p", "u1"), ("unused", "u1", 3)])
    for name in "txyp":
        rows[name] = getattr(events, name)
    return flatbuffer(b"EVTS", *table({}, {0: (len(rows), rows.tobytes())}))


def frame4(t: int, image: np.ndarray) -> bytes:
    """The flatbuffer of an AEDAT 4.0 frame, gray (H, W) or RGB (H, W, 3)."""
    height, width = image.shape[:2]
    kind, pixels = (0, image) if image.ndim == 2 else (16, image[..., ::-1])
    fields = {0: struct.pack("<q", t), 5: struct.pack("<B", kind)}
    fields |= {6: struct.pack("<h", width), 7: struct.pack("<h", height)}
    return flatbuffer(b"FRME", *table(fields, {10: (pixels.size, pixels.tobytes())}))


def packets4(events: Events, parts: int = 3, **given) -> bytes:
    """An AEDAT 4.0 file of `parts` packets with a frame in between and the table at the end."""
    cuts = np.linspace(0, len(events), parts + 1).astype(int)
    pieces = [events[a:b] for a, b in itertools.pairwise(cuts)]
    image = np.arange(events.height * events.width, dtype=np.uint8).reshape(events.height, events.width)
    packets = [(0, events4(piece)) for piece in pieces]
    index = [(len(piece), int(piece.t[0]), int(piece.t[-1])) for piece in pieces]
    packets.insert(1, (1, frame4(int(events.t[0]), image)))
    index.insert(1, (1, int(events.t[0]), int(events.t[0])))
    given.setdefault("index", index)
    return aedat4(packets, height=events.height, width=events.width, **given)


def aedat2(events: Events, chip: str | None = "ch.unizh.ini.jaer.chip.retina.DVS128", end: bool = True) -> bytes:
    """An AEDAT 2.0 file; the layout is a DAVIS's where the chip's name says so."""
    head = b"#!AER-DAT2.0\r\n# Timestamps tick: 1 us\r\n"
    head += f"# AEChip: {chip}\r\n".encode() if chip else b""
    head += b"#End Of ASCII Header\r\n" if end else b""
    t, x, y, p = (getattr(events, name).astype(np.int64) for name in "txyp")
    if chip and "DAVIS" in chip.upper():
        address = (events.height - 1 - y) << 22 | (events.width - 1 - x) << 12 | p << 11
    else:
        address = (127 - y) << 8 | (127 - x) << 1 | (1 - p)
    return head + np.stack([address, t & 0xFFFFFFFF], axis=1).astype(">u4").tobytes()


def packet3(t: np.ndarray, words: np.ndarray, kind: int = 1, source: int = 1, overflow: int = 0) -> bytes:
    """An AEDAT 3.1 packet of 8-byte events."""
    rows = np.stack([words.astype(np.int64), t.astype(np.int64)], axis=1).astype("<u4")
    return struct.pack("<hhiiiiii", kind, source, 8, 4, overflow, len(rows), len(rows), len(rows)) + rows.tobytes()


def aedat3(events: Events, source: str = "DVS128", parts: int = 3) -> bytes:
    """An AEDAT 3.1 file with a packet of special events in front."""
    head = f"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: {source}\r\n#!END-HEADER\r\n".encode()
    x, y, p = (getattr(events, name).astype(np.int64) for name in "xyp")
    words = x << 17 | y << 2 | p << 1 | 1
    body = packet3(np.array([1, 2]), np.array([3, 5]), kind=0)
    for high in np.unique(events.t >> 31).tolist():
        for part in np.array_split(np.flatnonzero(events.t >> 31 == high), parts):
            if len(part):
                body += packet3(events.t[part] & 0x7FFFFFFF, words[part], overflow=high)
    return head + body


def es(events: Events, exposures: np.ndarray | None = None) -> bytes:
    """An Event Stream 2.0 file; with `exposures` (N,) bool an ATIS one."""
    atis = exposures is not None
    shift = 2 if atis else 1
    full = (256 >> shift) - 1
    body, last = bytearray(), 0
    for index, (t, x, y, p) in enumerate(zip(events.t.tolist(), events.x, events.y, events.p.tolist())):
        times, step = divmod(t - last, full)
        flags = p << 1 | int(exposures[index]) if atis else p
        most = (1 << shift) - 1
        body += bytes([full << shift | most]) * (times // most)
        body += bytes([full << shift | times % most]) if times % most else b""
        body += struct.pack("<BHH", step << shift | flags, int(x), events.height - 1 - int(y))
        last = t
    return b"Event Stream\x02\x00\x00" + struct.pack("<BHH", 1 + atis, events.width, events.height) + bytes(body)


def ddd17(events: Events, ns: int = 0) -> dict[str, bytes]:
    """The two files of a DDD17 folder; `ns` below a µs is added to every time."""
    xyp = np.stack([events.x, events.y, events.p], axis=1).astype("<i2")
    return {"events.dat.t": (events.t * 1000 + ns).astype("<i8").tobytes(), "events.dat.xyp": xyp.tobytes()}
