"""Recordings cut into windows and put on the model's canvas, with the image, label and targets that belong to them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gep.data.bad import BadSample
from gep.data.cache import cached_source
from gep.data.clips import Clips
from gep.data.config import DataConfig
from gep.data.images import collate_stills
from gep.data.listing import Listing
from gep.data.sampler import Batch, LaneOf, Order, Sample
from gep.data.shard_order import ShardOrder
from gep.data.token_cache import TokenCache
from gep.events import augment
from gep.events.frames import Grouped
from gep.events.io import EventSource
from gep.events.slicing import Windows, by_bounds, cut_windows, into_windows
from gep.events.stills import StillBatch
from gep.events.types import EventBatch, Events


class Recordings:
    """Samples of one listing; see DESIGN's contract for what a sample holds.

    Args:
        listing: recordings or spans of them, labels, images, targets.
        config: windows, canvas and augmentation.
        paired: whether every sample must have its image.
        targets: whether samples hold the listing's masks and depth maps.
        crops: whether training samples may be crops on the token grid (`augment.grid_crop`) beside a whole image; they
            then say in `crop_at` int64 (2,) which row and column of the whole image's tokens they begin at.

    With `tokens` set (see `token_cache_fill.attach`), a sample holds `teacher_tokens` and `teacher_pooled` of its image
    in place of the image, which is not decoded.

    Raises:
        ValueError: paired, and the set has no images; windows that no sample has the time for; or events that would
            stay in another view than what they are paired with.
    """

    def __init__(
        self, listing: Listing, config: DataConfig, *, paired: bool, targets: bool = False, crops: bool = False
    ):
        if any(config.augment.grid_crop) and not crops:
            raise ValueError(
                f"data.augment.grid_crop={list(config.augment.grid_crop)} is stage 1's, where the teacher's tokens are "
                "cropped alike; set it to [0, 0] here"
            )
        if paired and listing.image is None:
            raise ValueError(
                f"data.root: {listing.name} {listing.split} has no images to pair with its recordings; "
                "put them beside the recordings (N-MNIST: train_images.npz or MNIST's train-images-idx3-ubyte; "
                "N-ImageNet: imagenet_train/<synset>/<stem>.JPEG; N-Caltech101: 101_ObjectCategories/), or use a task "
                "that needs none"
            )
        if listing.rectify is not None and not config.rectify and (paired or (targets and listing.targets)):
            raise ValueError(
                f"data.rectify=false: the pictures and targets of {listing.name} {listing.split} are in the rectified "
                "view, and its events would stay in the raw one; leave data.rectify=true"
            )
        self.limits = _limits(listing)
        self.clips = Clips.of(listing, config.windows) if config.clip else None
        kept = _with_past(listing, config) if self.clips is None else self.clips.rows[:, -1]
        if len(kept) < len(listing):
            listing, self.limits = listing.subset(kept, listing.split), self.limits[kept]
        self.listing, self.config, self.paired, self.targets = listing, config, paired, targets
        self.tokens: TokenCache | None = None
        self._cache: dict[int, Events] = {}

    def subset(self, indices: Sequence[int] | np.ndarray, split: str) -> Recordings:
        """Some of the samples, in that order, under the name `split`."""
        part = copy.copy(self)
        indices = np.asarray(indices, np.int64)
        part.listing, part.limits, part._cache = self.listing.subset(indices, split), self.limits[indices], {}
        part.tokens = None  # its rows are the whole's
        if self.clips is not None:
            part.clips = dataclasses.replace(self.clips, rows=self.clips.rows[indices])
        return part

    def __len__(self) -> int:
        return len(self.listing)

    def describe(self) -> str:
        """One line for people."""
        return self.listing.describe()

    def order(self, seed: int, lane_of: LaneOf) -> Callable[[int], int]:
        """Position -> sample: a permutation an epoch, which for shards keeps each reader to few of them."""
        shard = self.listing.shard
        return Order(len(self), seed) if shard is None else ShardOrder(shard, seed, lane_of)

    def sample(self, index: int, rng: np.random.Generator | None) -> Sample:
        """Sample `index`; `rng=None` gives all windows, unaugmented, the same each time."""
        listing = self.listing
        windows = self._whole(index, rng) if listing.spans is None else self._span(index, rng)
        if listing.rectify is not None and self.config.rectify:
            table = listing.rectify(index)
            windows = Windows([rectified(window, table) for window in windows.events], windows.bounds)
        sensor = (windows.events[0].height, windows.events[0].width)
        transform = self._transform(sensor, rng)
        windows = Windows(*transform.apply_events(windows.events, windows.bounds))
        # Drawn last, so that it changes no other draw.
        crop = None if rng is None else augment.draw_grid_crop(self.config.augment, rng, transform.size)
        if crop is not None:
            windows = Windows(*crop.apply_events(windows.events, windows.bounds))
        sample: Sample = {
            "key": listing.keys[index],
            "events": windows.events,
            "t_us": windows.bounds,
            "label": int(listing.labels[index]),
        }
        if (cache := self.tokens) is not None:
            flips, box = (transform.flip_x, transform.flip_y), None if crop is None else self._in_tokens(crop.crop)
            tokens, pooled = self._read(lambda row: cache.read(row, flips, box), index)
            sample |= {"teacher_tokens": tokens, "teacher_pooled": pooled}
        elif self.paired and listing.image is not None:
            if crop is not None:
                sample["crop_at"] = np.array(self._in_tokens(crop.crop)[:2], np.int64)
            if self.clips is None:
                sample["image"] = transform.apply_image(self._read(listing.image, index))
            else:
                images = self._read(self.clips.images, index)
                sample["images"] = np.stack([transform.apply_image(image) for image in images])
        for name, target in listing.targets.items() if self.targets else ():
            apply = transform.apply_depth if name == "depth" else transform.apply_mask
            sample[name] = apply(self._read(target, index))
        return sample

    def picture(self, index: int) -> np.ndarray:
        """The image of a sample on the canvas, uint8 (3, H, W), without randomness; its events are not read.

        Raises:
            BadSample: it cannot be read.
        """
        assert self.listing.image is not None
        image = self._read(self.listing.image, index)
        return augment.fit(image.shape[1:], (self.config.height, self.config.width), self.config.fit).apply_image(image)

    def _in_tokens(self, box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """(row, column, rows, columns) of a crop on the token grid, in patches."""
        top, left, rows, columns = (side // self.config.augment.grid_px for side in box)
        return top, left, rows, columns

    def _read(self, function: Callable[[int], Any], index: int) -> Any:
        """What belongs to a sample; damaged, it makes the sample a bad one as damaged events do."""
        try:
            return function(index)
        except BadSample:
            raise
        except (ValueError, OSError) as error:
            raise BadSample(self.listing.keys[index], str(error)) from error

    def _whole(self, index: int, rng: np.random.Generator | None) -> Windows:
        """A sample that is a recording: windows from its first event on, or of events in its middle."""
        config = self.config
        events = self._cache.get(index)
        if events is None:
            source = self._source(index)
            if config.num_events and not config.cache:
                start, stop = _consecutive(len(source), config.num_events, rng)
                events = source.by_index(start, stop)
            else:
                events = source.read()
            if config.cache:
                self._cache[index] = events
        if config.num_events and len(events) > config.num_events:
            start, stop = _consecutive(len(events), config.num_events, rng)
            events = events[start:stop]
        windows = cut_windows(events, config.windows, config.window_us, _jitter(config.jitter_us, rng))
        kept = self._picked(rng)
        return windows if kept is None else Windows([windows.events[i] for i in kept], windows.bounds[kept])

    def _span(self, index: int, rng: np.random.Generator | None) -> Windows:
        """A sample that is a span of a recording; only what the kept windows need is read."""
        assert self.listing.spans is not None
        config, (t0, t1) = self.config, self.listing.spans[index].tolist()
        at_end = self.listing.anchor == "end"
        num, shift = config.windows, _jitter(config.jitter_us, rng)
        if self.clips is not None:
            bounds = self.clips.spans[self.clips.rows[index]]
        elif config.window_us:
            begin = t1 - num * config.window_us if at_end else t0
            low, high = self.limits[index].tolist()
            # Not past what this split has of the recording, beyond which another split may begin.
            shift = min(max(shift, min(0, low - begin)), max(0, high - begin - num * config.window_us))
            edges = begin + shift + config.window_us * np.arange(num + 1, dtype=np.int64)
            bounds = np.stack([edges[:-1], edges[1:]], axis=1)
        else:
            edges = np.array([t0 + k * (t1 - t0) // num for k in range(num + 1)], np.int64)
            bounds = np.stack([edges[:-1], edges[1:]], axis=1)
        kept = self._picked(rng)
        bounds = bounds if kept is None else bounds[kept]
        events = None if shift else self._cache.get(index)
        if events is None:
            first, last = (t0, t1) if config.num_events else (int(bounds[:, 0].min()), int(bounds[:, 1].max()))
            events = self._source(index).by_time(first, last)
            if config.cache and kept is None and not shift:
                self._cache[index] = events
        if config.num_events:
            stop = len(events)
            start = max(0, stop - config.num_events)
            if not at_end:
                start, stop = _consecutive(len(events), config.num_events, rng)
            cut = into_windows(events[start:stop], num)
            return cut if kept is None else Windows([cut.events[i] for i in kept], cut.bounds[kept])
        return by_bounds(events, bounds)

    def _source(self, index: int) -> EventSource:
        folder = self.config.cache_dir
        return cached_source(self.listing, index, Path(folder)) if folder else self.listing.source(index)

    def _picked(self, rng: np.random.Generator | None) -> np.ndarray | None:
        config = self.config
        if rng is None or not 0 < config.pick < config.windows:
            return None
        return np.sort(rng.choice(config.windows, config.pick, replace=False))

    def _transform(self, sensor: tuple[int, int], rng: np.random.Generator | None) -> augment.Transform:
        """From the sensor's view to the canvas, in training with the drawn changes."""
        config = self.config
        if rng is None:
            return augment.fit(sensor, (config.height, config.width), config.fit)
        return augment.draw(config.augment, rng, sensor, (config.height, config.width), config.fit)


def rectified(events: Events, table: np.ndarray) -> Events:
    """Events at the nearest rectified pixel; those that leave the view are dropped.

    Args:
        events: raw, of a sensor (H, W).
        table: float32 (H, W, 2), at [y, x] the rectified (x, y).
    Raises:
        ValueError: a table of another size than the sensor.
    """
    height, width = events.height, events.width
    if table.shape != (height, width, 2):
        raise ValueError(f"a rectify map of {table.shape} does not belong to a {height}x{width} sensor")
    moved = table[events.y, events.x]
    with np.errstate(invalid="ignore"):
        x, y = np.rint(moved[:, 0]), np.rint(moved[:, 1])
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)  # false for NaN too
    x, y = x[inside].astype(np.uint16), y[inside].astype(np.uint16)
    return Events(events.t[inside], x, y, events.p[inside], height, width)


def _with_past(listing: Listing, config: DataConfig) -> np.ndarray:
    """The samples whose windows begin within their recording; others would have empty windows."""
    everything = np.arange(len(listing))
    if listing.spans is not None and listing.anchor == "start" and len(listing):
        shortest = int((listing.spans[:, 1] - listing.spans[:, 0]).min())
        if config.windows * config.window_us > shortest:
            raise ValueError(
                f"data.windows={config.windows} of data.window_us={config.window_us} µs do not fit into samples of "
                f"{shortest} µs of {listing.name} {listing.split}; lower one of them, or set data.window_us=0"
            )
    if listing.spans is None or listing.anchor != "end" or not config.window_us or not listing.files:
        return everything
    first = _limits(listing)[:, 0]
    # The first window may be a little longer than the least span between two images.
    needed = listing.spans[:, 1] - (config.windows - 1) * config.window_us
    kept = everything[needed > first]
    if len(kept) == 0:
        raise ValueError(
            f"data.windows={config.windows} of data.window_us={config.window_us} µs begin before the recording for all "
            f"{len(listing)} samples of {listing.name} {listing.split}; take fewer or shorter windows"
        )
    return kept


def _limits(listing: Listing) -> np.ndarray:
    """(N, 2) µs: from the first begin to the last end of the listing's spans in each sample's recording."""
    if listing.spans is None:
        return np.zeros((len(listing), 2), np.int64)
    if not listing.files:
        return listing.spans
    found: dict[Path, tuple[int, int]] = {}
    for file, (t0, t1) in zip(listing.files, listing.spans.tolist()):
        low, high = found.get(file, (t0, t1))
        found[file] = (min(low, t0), max(high, t1))
    return np.array([found[file] for file in listing.files], np.int64).reshape(-1, 2)


def _consecutive(total: int, count: int, rng: np.random.Generator | None) -> tuple[int, int]:
    """[start, stop) of `count` of `total` events: the middle, or anywhere in training."""
    spare = max(0, total - count)
    start = spare // 2 if rng is None else int(rng.integers(spare + 1))
    return start, min(total, start + count)


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples with equal T -> batch: windows (sample-major), `windows` T, stacked tensors, keys."""
    batch: Batch = {
        "key": [sample["key"] for sample in samples],
        "events": _collate_events(samples),
        "windows": len(samples[0]["t_us"]),
        "t_us": torch.from_numpy(np.stack([sample["t_us"] for sample in samples])),
        "label": torch.tensor([sample["label"] for sample in samples]),
    }
    for name in ("image", "mask", "depth", "crop_at"):
        if all(name in sample for sample in samples):
            batch[name] = torch.from_numpy(np.stack([sample[name] for sample in samples]))
    for name in ("teacher_tokens", "teacher_pooled"):
        if name in samples[0]:
            batch[name] = torch.stack([sample[name] for sample in samples])
    return batch


def _collate_events(samples: Sequence[Sample]) -> EventBatch | StillBatch | Grouped:
    origins = [sample.get("origin", 0) for sample in samples]
    if "origin" not in samples[0]:
        return _collate_one(samples)
    rows = {origin: [row for row, own in enumerate(origins) if own == origin] for origin in sorted(set(origins))}
    parts = [_collate_one([samples[row] for row in part]) for part in rows.values()]
    return Grouped.of(parts, list(rows.values()), list(rows), windows=len(samples[0]["t_us"]))


def _collate_one(samples: Sequence[Sample]) -> EventBatch | StillBatch:
    if "still" in samples[0]:
        return collate_stills(samples)
    bounds = np.concatenate([sample["t_us"] for sample in samples])
    return EventBatch.from_windows([window for sample in samples for window in sample["events"]], bounds)


def _jitter(limit_us: int, rng: np.random.Generator | None) -> int:
    return 0 if rng is None or limit_us == 0 else int(rng.integers(-limit_us, limit_us + 1))
