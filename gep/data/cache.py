"""Decoded recordings kept on disk: what a slow format costs is paid once, not every epoch."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from gep.data.listing import Listing
from gep.events.io import EventSource
from gep.events.io.arrow import write_arrow
from gep.events.io.arrow_source import ArrowSource
from gep.events.io.source import InMemory

_BATCH = 1 << 14  # events checked at once: a sample is often a short slice


def cached_source(listing: Listing, index: int, folder: Path) -> EventSource:
    """The recording of a sample, from the cache where it is there, else put there first.

    An entry is named by the file's path, size and time of change and by the sensor size, so that a changed file is
    read anew. Entries are complete or not there at all; several processes may fill one cache.

    Args:
        listing, index: the sample.
        folder: the cache; made where missing. Entries are plain: 13 bytes an event.
    """
    if listing.recording is not None:  # shards are a cache by themselves
        return listing.source(index)
    file, (height, width) = listing.files[index], listing.sensor or (None, None)
    state = os.stat(file)
    name = f"{os.path.abspath(file)}|{state.st_size}|{state.st_mtime_ns}|{height}x{width}"
    entry = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.arrow"
    try:
        return ArrowSource.from_file(entry, mapped=False)
    except FileNotFoundError:
        source = listing.source(index)
    if not isinstance(source, InMemory):  # read in parts as it lies
        return source
    folder.mkdir(parents=True, exist_ok=True)
    write_arrow(entry, source.read(), compression="none", batch=_BATCH)
    return source
