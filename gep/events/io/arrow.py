"""gep's own container, `.arrow`: an Arrow IPC file with columns t, x, y, p, read through a memory map.

Record batches of up to 65,536 events each carry their first index, first and last time and a checksum, so a slice by
index or time touches the batches it needs and no index has to be read. Plain files hand out views on the map.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gep.events.io import arrow_batch
from gep.events.io.arrow_source import BATCH, KEY, VERSION, ArrowSource, seal
from gep.events.io.files import replacing
from gep.events.io.source import EventSource, Format
from gep.events.types import Events

if TYPE_CHECKING:
    import pyarrow as pa

COMPRESSIONS = ("lz4", "zstd", "none")

_MAX_STEP = (1 << 32) - 1  # µs between two events of one compressed batch


def write_arrow(
    path: str | Path, events: Events | EventSource, *, compression: str = "lz4", batch: int = BATCH
) -> None:
    """Writes events to the native container, chunk by chunk, replacing `path` only once complete.

    Args:
        path: the file to write.
        events: events, or an open recording of any format.
        compression: "lz4" (3 to 4 bytes an event, the default), "zstd" (about a quarter less, half as fast to
            read) or "none" (13 bytes an event, read as views on the file).
        batch: events that are checked, and unpacked, at once, at most 65,536; fewer suit short slices.

    Raises:
        ValueError: unknown compression, or a batch out of range.
        EventFormatError: the events are not valid.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        _write(file, events, compression, str(path), batch)


def to_bytes(events: Events | EventSource, compression: str = "lz4") -> bytes:
    """The native container as bytes, the same for the same events; arguments and errors are `write_arrow`'s."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    _write(sink, events, compression, "events")
    return sink.getvalue().to_pybytes()


def from_bytes(
    buffer: bytes | memoryview, name: str | Path = "events", *, recover: bool = False, max_events: int | None = None
) -> ArrowSource:
    """Opens a native container that lies in memory, such as a member of a mapped tar file.

    Args:
        buffer: the container's bytes; plain ones are not copied, so events keep the buffer alive.
        name: what messages call it.
        recover: give the longest sound prefix and warn, instead of raising.
        max_events: refuse a container that claims more, before anything is decompressed.

    Raises:
        EventFormatError: damaged or truncated bytes; names the byte in the buffer.
    """
    return ArrowSource(memoryview(buffer).cast("B"), Path(name), recover=recover, max_events=max_events)


def _write(sink: object, events: Events | EventSource, compression: str, name: str, batch: int = BATCH) -> None:
    import pyarrow as pa

    if compression not in COMPRESSIONS:
        raise ValueError(f"compression is {compression!r}; the native container knows {', '.join(COMPRESSIONS)}")
    if not 0 < batch <= BATCH:
        raise ValueError(f"batches of {batch} events; the native container has 1 to {BATCH:,}")
    encoding = "none" if compression == "none" else "shuffled"
    options = pa.ipc.IpcWriteOptions(compression=None if compression == "none" else compression)
    schema = _schema(encoding, events.height, events.width)
    start = 0
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        for part in _parts(events, encoding, name, batch):
            columns = _plain(part) if encoding == "none" else _shuffled(part)
            head = b"%d %d %d %d %d" % (start, len(part), part.t[0], part.t[-1], arrow_batch.checksum(columns))
            head += b" " + seal(head, events.height, events.width, encoding)
            buffers = [pa.py_buffer(np.ascontiguousarray(column)) for column in columns]
            arrays = [
                pa.Array.from_buffers(field.type, len(part), [None, b])
                for field, b in zip(schema, buffers, strict=True)
            ]
            writer.write_batch(pa.record_batch(arrays, schema=schema), custom_metadata={KEY: head})
            start += len(part)


def _schema(encoding: str, height: int, width: int) -> pa.Schema:
    import pyarrow as pa

    Events.empty(height, width).validate()
    metadata = {"gep.events": VERSION, "height": str(height), "width": str(width), "encoding": encoding}
    if encoding == "none":
        fields = [pa.field("t", pa.int64(), False), *(pa.field(n, pa.uint16(), False) for n in "xy")]
        return pa.schema([*fields, pa.field("p", pa.uint8(), False)], metadata=metadata)
    # Arrow's own way to say that stored values stand for others: an extension type on the storage type.
    steps = {"ARROW:extension:name": "gep.shuffled_steps"}
    shuffled = {"ARROW:extension:name": "gep.shuffled"}
    fields = [pa.field("t", pa.uint32(), False, steps), *(pa.field(n, pa.uint16(), False, shuffled) for n in "xy")]
    return pa.schema([*fields, pa.field("p", pa.bool_(), False)], metadata=metadata)


def _parts(events: Events | EventSource, encoding: str, name: str, batch: int) -> Iterator[Events]:
    """Checked pieces that a record batch each can hold, in order."""
    chunks = (events.validate(name),) if isinstance(events, Events) else events.chunks(8 * BATCH)
    last = np.iinfo(np.int64).min
    for chunk in chunks:
        if len(chunk) == 0:
            continue
        if chunk.t[0] < last:
            raise ValueError(f"{name}: a chunk begins at {chunk.t[0]} µs, before the end {last} µs of the one before")
        last = int(chunk.t[-1])
        edges = set(range(0, len(chunk), batch))
        if encoding == "shuffled":
            # Differences of int64 wrap to the right unsigned value.
            wide = np.diff(chunk.t).view(np.uint64) > _MAX_STEP
            edges |= set((np.flatnonzero(wide) + 1).tolist())
        cuts = [*sorted(edges), len(chunk)]
        for begin, end in itertools.pairwise(cuts):
            yield chunk[begin:end]


def _plain(part: Events) -> tuple[np.ndarray, ...]:
    return tuple(np.ascontiguousarray(getattr(part, name)).view(np.uint8) for name in "txyp")


def _shuffled(part: Events) -> tuple[np.ndarray, ...]:
    count = len(part)
    columns = tuple(np.zeros(size, np.uint8) for size in (4 * count, 2 * count, 2 * count, -(-count // 8)))
    arrow_batch.pack(*(np.ascontiguousarray(getattr(part, name)) for name in "txyp"), *columns)
    return columns


def _open_arrow(path: Path, *, height: int | None, width: int | None, recover: bool) -> ArrowSource:
    source = ArrowSource.from_file(path, recover)
    if height is not None and (height, width) != (source.height, source.width):
        raise ValueError(
            f"{path}: holds a {source.height}x{source.width} sensor, not the {height}x{width} asked for; "
            "leave height and width out"
        )
    return source


FORMATS = (
    Format(
        "gep",
        (".arrow",),
        "gep's own container",
        lambda head, path: head.startswith(b"ARROW1"),
        _open_arrow,
        write_arrow,
    ),
)
