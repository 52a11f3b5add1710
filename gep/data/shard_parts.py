"""What a listing of shards is made of: recordings, images and targets, each read from its member when asked for."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gep.data.bad import BadSample
from gep.data.shard_bytes import EVENTS, Shards
from gep.data.view import View, decode
from gep.events.io import EventSource, read_events
from gep.events.io.arrow import from_bytes
from gep.events.io.source import InMemory
from gep.events.types import EventFormatError, Events

MASK, DEPTH, FACTS = "mask.png", "depth.npy", "json"
IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "pgm")
"""Suffixes that a sample's image may have."""


@dataclass(frozen=True, eq=False)
class ShardRecordings:
    """index -> open recording."""

    shards: Shards
    suffixes: tuple[str, ...]

    @property
    def shard(self) -> np.ndarray:
        """int64 (N,): the shard each sample lies in; see `ShardOrder`."""
        return self.shards.table.shard

    def __call__(self, index: int) -> EventSource:
        shards, key = self.shards, self.shards.table.keys[index]
        suffix = shards.suffix(index, self.suffixes) or EVENTS
        data, name = shards.member(index, suffix), shards.name(index, suffix)
        spans = shards.table.spans
        covered = None
        if spans is not None:
            covered = (int(spans[index, 0]) - shards.past_us, int(spans[index, 1]) + shards.future_us)
        try:
            return ShardSource(_open(data, name, suffix), key, covered)
        except EventFormatError as error:
            raise BadSample(key, str(error)) from error


class ShardSource(EventSource):
    """A recording in a shard: what is wrong with its bytes makes it a bad sample, what was not stored is an error."""

    def __init__(self, inner: EventSource, key: str, covered: tuple[int, int] | None):
        self.inner, self.key, self.covered = inner, key, covered
        self.path, self.height, self.width = inner.path, inner.height, inner.width

    def __len__(self) -> int:
        return len(self.inner)

    def by_index(self, start: int, stop: int) -> Events:
        return self._sound(self.inner.by_index, start, stop)

    def by_time(self, t0: int, t1: int) -> Events:
        if self.covered is not None and t1 > t0 and not (self.covered[0] <= t0 and t1 <= self.covered[1]):
            before, after = max(0, self.covered[0] - t0), max(0, t1 - self.covered[1])
            raise ValueError(
                f"{self.path}: windows begin {before} µs before and end {after} µs after what the shards hold of a "
                "recording; take shorter windows, or write the shards with a longer past_us (future_us)"
            )
        return self._sound(self.inner.by_time, t0, t1)

    @property
    def span(self) -> tuple[int, int]:
        return self._sound(lambda: self.inner.span)

    def _sound(self, function: Callable[..., Any], *arguments: int) -> Any:
        try:
            return function(*arguments)
        except EventFormatError as error:
            raise BadSample(self.key, str(error)) from error


@dataclass(frozen=True, eq=False)
class ShardImages:
    """The images in shards: see `ImageSource`."""

    shards: Shards
    recordings: ShardRecordings

    def encoded(self, index: int) -> tuple[bytes, str]:
        suffix = self.shards.suffix(index, IMAGES) or IMAGES[0]
        return bytes(self.shards.member(index, suffix)), f".{suffix}"

    def view(self, index: int) -> View:
        name, values = self.shards.name(index, FACTS), facts(self.shards, index).get("view")
        if values is None:  # others' shards do not say: the picture is stretched to the sensor
            source = self.recordings(index)
            return View((source.height, source.width))
        try:
            return View.from_json(values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadSample(self.shards.table.keys[index], f"{name}: its view is damaged ({error})") from error

    def __call__(self, index: int) -> np.ndarray:
        data, suffix = self.encoded(index)
        try:
            return self.view(index).apply(decode(data, self.shards.name(index, suffix[1:])))
        except BadSample:
            raise
        except ValueError as error:
            raise BadSample(self.shards.table.keys[index], str(error)) from error


@dataclass(frozen=True, eq=False)
class ShardTargets:
    """index -> mask uint8 (H, W) or depth float32 (H, W)."""

    shards: Shards
    suffix: str

    def __call__(self, index: int) -> np.ndarray:
        data, name = self.shards.member(index, self.suffix), self.shards.name(index, self.suffix)
        try:
            return _mask(data) if self.suffix == MASK else _depth(data)
        except Exception as error:  # Pillow's and NumPy's readers fail in a dozen ways
            raise BadSample(self.shards.table.keys[index], f"{name}: not readable ({error})") from error


def _mask(data: memoryview) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        mask = np.asarray(picture)
    if mask.ndim != 2 or mask.dtype != np.uint8:
        raise ValueError(f"{mask.dtype} {mask.shape} where class ids uint8 (H, W) belong")
    return mask


def _depth(data: memoryview) -> np.ndarray:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    # The header is believed only as far as there are bytes for it.
    if dtype != np.float32 or len(shape) != 2 or fortran or len(data) - file.tell() != 4 * shape[0] * shape[1]:
        raise ValueError(f"{dtype} {shape} where depth float32 (H, W) belongs")
    return np.frombuffer(data, np.float32, offset=file.tell()).reshape(shape)


def facts(shards: Shards, index: int) -> dict[str, Any]:
    """A sample's JSON member; empty where it has none.

    Raises:
        BadSample: it is damaged.
    """
    if shards.suffix(index, (FACTS,)) is None:
        return {}
    member = shards.member(index, FACTS)
    try:
        values = json.loads(bytes(member))
    except (ValueError, RecursionError) as error:
        reason = f"{shards.name(index, FACTS)}: not valid JSON ({error})"
        raise BadSample(shards.table.keys[index], reason) from error
    return values if isinstance(values, dict) else {}


def _open(data: memoryview, name: str, suffix: str) -> EventSource:
    if suffix == EVENTS:
        return from_bytes(data, name)
    # Other formats are read from files; such shards are written by others, and converted if speed matters.
    with tempfile.NamedTemporaryFile(suffix=f".{suffix}") as file:
        file.write(data)
        file.flush()
        try:
            return InMemory(Path(name), read_events(file.name))
        except EventFormatError as error:
            raise EventFormatError(str(error).replace(file.name, name)) from error
