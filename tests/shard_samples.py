"""A small listing with everything a sample can have, which the tests of shards write and compare with."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from gep.data.listing import Listing
from gep.data.shard_write import write_shards
from gep.data.view import View, encode_png
from gep.events.io.source import EventSource, InMemory
from gep.events.types import EventFormatError, Events

SENSOR = (24, 32)


def events_of(index: int, count: int = 300) -> Events:
    rng = np.random.default_rng(index)
    t = np.sort(rng.integers(1_000_000, 1_050_000, count))
    return Events.from_arrays(t, rng.integers(0, 32, count), rng.integers(0, 24, count), rng.integers(0, 2, count),
                              height=SENSOR[0], width=SENSOR[1])  # fmt: skip


class Recorded:
    """index -> the events of that index; number 5 is broken where asked for. Slow where asked for [s]."""

    def __init__(self, broken: bool = False, slow: float = 0.0):
        self.broken, self.slow = broken, slow

    def __call__(self, index: int) -> EventSource:
        time.sleep(self.slow)
        if self.broken and index == 5:
            raise EventFormatError("five.raw: byte 16: no such event type")
        return InMemory(Path("x.raw"), events_of(index))


class Pictures:
    def encoded(self, index: int) -> tuple[bytes, str]:
        return encode_png(np.full((12, 16, 3), index % 256, np.uint8)), ".png"

    def view(self, index: int) -> View:
        return View(SENSOR, place=(index % 5, 3))

    def __call__(self, index: int) -> np.ndarray:
        return self.view(index).apply(np.full((12, 16, 3), index % 256, np.uint8))


def mask_of(index: int) -> np.ndarray:
    return np.full(SENSOR, index % 11, np.uint8)


def depth_of(index: int) -> np.ndarray:
    depth = np.full(SENSOR, index + 0.5, np.float32)
    depth[0, :3] = np.nan
    return depth


def make(count: int = 23, *, broken: bool = False, slow: float = 0.0, spans: bool = False) -> Listing:
    return Listing(
        "made", "train", tuple(f"class.a/../{i}.raw" if i % 2 else f"b/{i}" for i in range(count)), (),
        np.arange(count) % 4 - 1, ("a", "b", "ä"), SENSOR, Pictures(),
        spans=np.array([(1_010_000 + i, 1_020_000 + 2 * i) for i in range(count)]) if spans else None,
        anchor="end" if spans else "start",
        targets={"mask": mask_of, "depth": depth_of}, recording=Recorded(broken, slow), notes={"seen": "once"},
    )  # fmt: skip


write = partial(write_shards, progress=False, samples_per_shard=5)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def assert_same(read: Events, written: Events) -> None:
    for name in "txyp":
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    assert (read.height, read.width) == (written.height, written.width)


def assert_is(read: Listing, written: Listing) -> None:
    assert (read.keys, read.classes, read.sensor, read.hash) == (
        written.keys,
        written.classes,
        written.sensor,
        written.hash,
    )
    np.testing.assert_array_equal(read.labels, written.labels)
    for index in range(len(written)):
        assert_same(read.source(index).read(), written.source(index).read())
        np.testing.assert_array_equal(read.image(index), written.image(index))
        assert read.image.encoded(index) == written.image.encoded(index)
        for name in ("mask", "depth"):
            np.testing.assert_array_equal(read.targets[name](index), written.targets[name](index))


def members_of(folder: Path, key: str) -> tuple[str, dict[str, list[int]]]:
    for entry in json.loads((folder / "index.json").read_text())["shards"]:
        if key in entry["keys"]:
            place = entry["keys"].index(key)
            return entry["file"], {suffix: column[place] for suffix, column in entry["members"].items()}
    raise KeyError(key)


def foreign_tar(path: Path, *members: tuple[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path
