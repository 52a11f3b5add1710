"""Recordings cut into windows and put on the model's canvas, with the image and the label that belong to them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from gep.data.labelled import list_recordings
from gep.data.listing import Listing
from gep.data.sampler import Batch, Sample
from gep.events import augment
from gep.events.augment import AugmentConfig
from gep.events.io import read_events
from gep.events.slicing import Windows, cut_windows
from gep.events.types import EventBatch, Events


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which recordings, and what of each becomes a sample."""

    name: Literal["nmnist", "ncaltech101", "nimagenet"] = "nmnist"
    """data set; decides the layout that is looked for below the root"""
    root: str = ""
    """folder that holds the data set in its published layout"""
    train_split: str = "train"
    """split to learn from"""
    eval_split: str = ""
    """split to evaluate on; empty = the part of the training split that `holdout` keeps apart"""
    holdout: float = 0.1
    """share of the training split kept apart for evaluation where there is no eval_split"""
    height: int = 36
    """rows of the model's input [px]"""
    width: int = 36
    """columns of the model's input [px]"""
    fit: Literal["pad", "resize"] = "pad"
    """how a sensor's view becomes the model's input: centred with a margin, or scaled"""
    windows: int = 6
    """windows that a recording is cut into"""
    window_us: int = 50_000
    """length of a window [µs], counted from the first event; 0 = equal parts of the recording"""
    num_events: int = 0
    """cut this many consecutive events out first (random place in training, the middle in evaluation); 0 = all"""
    pick: int = 0
    """windows a training sample keeps, drawn at random and in order; 0 = all of them"""
    jitter_us: int = 0
    """in training the first window begins up to this much earlier or later [µs]"""
    cache: bool = False
    """keep decoded recordings in memory (small sets)"""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """changes drawn once a training sample for events and image alike"""

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise ValueError(f"data.windows={self.windows} must be at least 1")
        if not 0 <= self.pick <= self.windows:
            raise ValueError(f"data.pick={self.pick} is not in 0..data.windows={self.windows}")
        if not self.eval_split and not 0 < self.holdout < 1:
            raise ValueError(f"data.holdout={self.holdout} is not in (0, 1); or name data.eval_split")
        for name in ("window_us", "num_events", "jitter_us"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name}={getattr(self, name)} is negative")
        if self.num_events and self.window_us:
            raise ValueError(
                f"data.num_events={self.num_events} cuts by count and data.window_us={self.window_us} by time; "
                "set one of them to 0"
            )


def take_over(config: DataConfig, settings: Mapping[str, Any], source: str) -> DataConfig:
    """The config with an export's input settings; warns where the config asked for something else.

    Args:
        config: the user's.
        settings: `GEPModel.input_settings`.
        source: the export's name, for the message.
    """
    default = DataConfig()
    ignored = [
        f"data.{name}={getattr(config, name)} ({value} there)"
        for name, value in settings.items()
        if getattr(config, name) not in (value, getattr(default, name))
    ]
    if ignored:
        warnings.warn(f"no effect, as {source} fixes its own input: {', '.join(ignored)}", stacklevel=2)
    return dataclasses.replace(config, **settings)


class Recordings:
    """Samples of one listing; see DESIGN's contract for what a sample holds.

    Args:
        listing: files, labels, images.
        config: windows, canvas and augmentation.
        paired: whether every sample must have its image.
    Raises:
        ValueError: paired, and the set has no images.
    """

    def __init__(self, listing: Listing, config: DataConfig, *, paired: bool):
        if paired and listing.image is None:
            raise ValueError(
                f"data.root: {listing.name} {listing.split} has no images to pair with its recordings; "
                "put them beside the recordings (N-MNIST: train_images.npz or MNIST's train-images-idx3-ubyte; "
                "N-ImageNet: imagenet_train/<synset>/<stem>.JPEG), or use a task that needs none"
            )
        self.listing, self.config, self.paired = listing, config, paired
        self._cache: dict[int, Events] = {}

    def __len__(self) -> int:
        return len(self.listing)

    def sample(self, index: int, rng: np.random.Generator | None) -> Sample:
        """Sample `index`; `rng=None` gives all windows, unaugmented, the same each time."""
        key = self.listing.keys[index]
        windows = self._cut(self._events(index), rng)
        image = self.listing.image(index) if self.paired and self.listing.image is not None else None
        sensor = (windows.events[0].height, windows.events[0].width)
        transform = self._transform(sensor, rng)
        windows = Windows(*transform.apply_events(windows.events, windows.bounds))
        sample: Sample = {
            "key": key,
            "events": windows.events,
            "t_us": windows.bounds,
            "label": int(self.listing.labels[index]),
        }
        if image is not None:
            sample["image"] = transform.apply_image(image)
        return sample

    def _events(self, index: int) -> Events:
        events = self._cache.get(index)
        if events is None:
            height, width = self.listing.sensor or (None, None)
            events = read_events(self.listing.files[index], height=height, width=width)
            if self.config.cache:
                self._cache[index] = events
        return events

    def _cut(self, events: Events, rng: np.random.Generator | None) -> Windows:
        config = self.config
        if config.num_events and len(events) > config.num_events:
            spare = len(events) - config.num_events
            start = spare // 2 if rng is None else int(rng.integers(spare + 1))
            events = events[start : start + config.num_events]
        windows = cut_windows(events, config.windows, config.window_us, _jitter(config.jitter_us, rng))
        if rng is not None and 0 < config.pick < config.windows:
            kept = np.sort(rng.choice(config.windows, config.pick, replace=False))
            windows = Windows([windows.events[i] for i in kept], windows.bounds[kept])
        return windows

    def _transform(self, sensor: tuple[int, int], rng: np.random.Generator | None) -> augment.Transform:
        """From the sensor's view to the canvas, in training with the drawn changes."""
        config = self.config
        if rng is None:
            return augment.fit(sensor, (config.height, config.width), config.fit)
        return augment.draw(config.augment, rng, sensor, (config.height, config.width), config.fit)


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples with equal T -> batch: ragged events (sample-major), `windows` T, stacked tensors, keys."""
    bounds = np.concatenate([sample["t_us"] for sample in samples])
    batch: Batch = {
        "key": [sample["key"] for sample in samples],
        "events": EventBatch.from_windows([window for sample in samples for window in sample["events"]], bounds),
        "windows": len(samples[0]["events"]),
        "t_us": torch.from_numpy(np.stack([sample["t_us"] for sample in samples])),
        "label": torch.tensor([sample["label"] for sample in samples]),
    }
    if "image" in samples[0]:
        batch["image"] = torch.from_numpy(np.stack([sample["image"] for sample in samples]))
    return batch


def build(config: DataConfig, *, paired: bool) -> tuple[Recordings, Recordings]:
    """(training, evaluation) sets of a config; disjoint by construction.

    Raises:
        FileNotFoundError, ValueError: see `list_recordings` and `Recordings`.
    """
    listing = list_recordings(config.name, config.root, config.train_split)
    if config.eval_split:
        train, held = listing, list_recordings(config.name, config.root, config.eval_split)
    else:
        train, held = listing.hold_out(config.holdout)
    if train.classes != held.classes:
        differing = sorted(set(train.classes) ^ set(held.classes)) or ["(their order)"]
        raise ValueError(
            f"data: {train.split} and {held.split} do not hold the same classes, so that one label would mean two "
            f"things: {', '.join(differing[:5])} … ({len(train.classes)} and {len(held.classes)}); complete the splits"
        )
    for name, part in (("training", train), ("evaluation", held)):
        if len(part) == 0:
            raise ValueError(
                f"data: the {name} set is empty ({len(listing)} recordings, data.holdout={config.holdout})"
            )
    return Recordings(train, config, paired=paired), Recordings(held, config, paired=paired)


def _jitter(limit_us: int, rng: np.random.Generator | None) -> int:
    return 0 if rng is None or limit_us == 0 else int(rng.integers(-limit_us, limit_us + 1))
