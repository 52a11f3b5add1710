"""HDF5 recordings in small Blosc chunks, for the tests of what reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gep.events.types import Events

ROWS = 1024
"""Events of a chunk."""


def some_events(count: int, seed: int = 0) -> Events:
    """Events of 480x640 with a pause in the middle."""
    rng = np.random.default_rng(seed)
    t = 1_700_000_000_000_000 + np.cumsum(rng.integers(0, 8, count))
    t[count // 2 :] += 12_345
    x, y, p = rng.integers(0, 640, count), rng.integers(0, 480, count), rng.integers(0, 2, count)
    return Events.from_arrays(t, x, y, p, height=480, width=640)


def same(a: Events, b: Events) -> bool:
    """Whether all columns agree in values and dtypes."""
    pairs = [(getattr(a, name), getattr(b, name)) for name in "txyp"]
    return all(np.array_equal(left, right) and left.dtype == right.dtype for left, right in pairs)


def write_chunks(path: Path, events: Events, chunks: int = ROWS, t: str = "u4", **settings: object) -> None:
    """DSEC's layout in Blosc chunks of so many events; `settings` are those of `hdf5plugin.Blosc`."""
    h5py, hdf5plugin = pytest.importorskip("h5py"), pytest.importorskip("hdf5plugin")
    packed = hdf5plugin.Blosc(**{"cname": "zstd", "clevel": 1, "shuffle": hdf5plugin.Blosc.SHUFFLE} | settings)
    first = int(events.t[0]) if t == "u4" else 0
    with h5py.File(path, "w") as file:
        for name, dtype in (("t", t), ("x", "u2"), ("y", "u2"), ("p", "u1")):
            values = getattr(events, name) - (first if name == "t" else 0)
            file.create_dataset(f"events/{name}", data=values.astype(dtype), chunks=(chunks,), **packed)
        file["t_offset"] = np.int64(first)
