"""From any recording that can be read to any format that can be written."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

from gep.events.io.source import EventSource
from gep.events.types import Events


def write_events(path: str | Path, events: Events | EventSource, *, compression: str | None = None) -> None:
    """Writes events in the format that the suffix of `path` names; complete, or not there at all.

    Args:
        path: the file to write.
        events: events, or an open recording (written chunk by chunk where the format can).
        compression: for .arrow "lz4", "zstd" or "none"; for .h5 "gzip", too; None = the format's default.

    Raises:
        ValueError: no format of that suffix can be written (lists those that can), the format has no such
            compression, or it cannot hold the events.
    """
    name, write = _writable(Path(path))
    if compression is None:
        write(Path(path), events)
        return
    if "compression" not in inspect.signature(write).parameters:
        raise ValueError(f"{path}: {name} has no choice of compression; leave compression={compression!r} out")
    write(Path(path), events, compression=compression)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    height: int | None = None,
    width: int | None = None,
    recover: bool = False,
    from_zero: bool = False,
    compression: str | None = None,
    progress: bool = True,
) -> int:
    """Reads a recording and writes it in the format of the target's suffix.

    Args:
        source: a recording in any format that `open_events` knows.
        target: the file to write; replaced only once complete.
        height: sensor rows, where the source does not say.
        width: sensor columns, likewise.
        recover: of a damaged source take the longest sound prefix, with a warning.
        from_zero: count times from the first event, as formats need that hold no times of day.
        compression: see `write_events`.
        progress: show a bar.

    Returns:
        Number of events written.

    Raises:
        FileNotFoundError: no such source, or no such folder for the target.
        ValueError: the target is the source, or `write_events` refuses.
        EventFormatError: the source is damaged.
    """
    from gep.events.io import open_events

    source, target = Path(source), Path(target)
    _writable(target)
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"{target}: source and target are one file; give another target")
    with open_events(source, height=height, width=width, recover=recover) as recording:
        watched = _Watched(recording, target.name, progress, from_zero)
        with watched:
            write_events(target, watched, compression=compression)
    return watched.count


def _writable(path: Path) -> tuple[str, Callable[..., None]]:
    from gep.events.io import FORMATS

    name = path.name.lower()
    for found in FORMATS:
        if found.write is not None and name.endswith(found.suffixes):
            return found.name, found.write
    known = ", ".join(f"{'/'.join(found.suffixes)} ({found.name})" for found in FORMATS if found.write is not None)
    raise ValueError(f"{path}: no format of this suffix can be written; choose one of {known}")


class _Watched(EventSource):
    """A recording whose chunks move a progress bar and are counted, in times from its first event where wanted."""

    def __init__(self, inner: EventSource, name: str, progress: bool, from_zero: bool):
        from tqdm import tqdm

        self.path, self.height, self.width = inner.path, inner.height, inner.width
        self.count, self._inner = 0, inner
        self._first = inner.span[0] if from_zero and len(inner) else 0
        self._bar = tqdm(total=len(inner), desc=name, unit="events", unit_scale=True, disable=not progress)

    def __len__(self) -> int:
        return len(self._inner)

    def by_index(self, start: int, stop: int) -> Events:
        return self._counted(self._inner.by_index(start, stop))

    def by_time(self, t0: int, t1: int) -> Events:
        return self._counted(self._inner.by_time(t0 + self._first, t1 + self._first))

    @property
    def span(self) -> tuple[int, int]:
        begin, end = self._inner.span
        return begin - self._first, end - self._first

    def read(self) -> Events:
        return self._counted(self._inner.read())

    def chunks(self, count: int = 1 << 20) -> Iterator[Events]:
        for chunk in self._inner.chunks(count):
            yield self._moved(chunk)
            self._add(len(chunk))

    def close(self) -> None:
        self._bar.close()

    def _counted(self, events: Events) -> Events:
        self._add(len(events))
        return self._moved(events)

    def _moved(self, events: Events) -> Events:
        return dataclasses.replace(events, t=events.t - self._first) if self._first else events

    def _add(self, count: int) -> None:
        self.count += count
        self._bar.update(count)
