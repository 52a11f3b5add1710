"""Sequences of event windows and images for stage 2: frame-aligned, and within one recording by construction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gep.data.mix import source_order
from gep.data.paired import collate
from gep.data.sampler import Batch, LaneOf, Sample, SampleSource

EVENT, IMAGE = 0, 1
LAYOUTS = ("image_last", "image_first", "interleave", "events")


@dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """Odds of each layout, drawn per sample; evaluation uses the likeliest. T event windows E1 … ET."""

    image_last: float = 1.0
    """E1, …, ET, image"""
    image_first: float = 0.0
    """image, E1, …, ET"""
    interleave: float = 0.0
    """E1, image, E2, image, …: each window followed by the image of its time"""
    events: float = 0.0
    """E1, …, ET without images"""

    def __post_init__(self) -> None:
        odds = self.odds
        if min(odds) < 0 or sum(odds) <= 0:
            raise ValueError(f"sequence: odds {dict(zip(LAYOUTS, odds))} must be >= 0, and one of them above 0")

    @property
    def uses_images(self) -> bool:
        """Whether any layout that is drawn holds an image."""
        return self.image_last + self.image_first + self.interleave > 0

    @property
    def is_mixed(self) -> bool:
        """Whether more than one layout is drawn."""
        return sum(odd > 0 for odd in self.odds) > 1

    @property
    def odds(self) -> tuple[float, ...]:
        return tuple(getattr(self, name) for name in LAYOUTS)


class Sequences:
    """Adds to each sample of `recordings` the order in which a backbone reads its windows and images.

    A sample gains `images` uint8 (J, 3, H, W) where there are any, `pair` int64 (T,) (the image shown during window t),
    and the frames' `modality`, `source` (index among the windows or the images) and `frame_t_us`, each int64 (F,).
    """

    def __init__(self, recordings: SampleSource, config: SequenceConfig):
        self.recordings, self.config = recordings, config

    def __len__(self) -> int:
        return len(self.recordings)

    def order(self, seed: int, lane_of: LaneOf) -> Callable[[int], int]:
        """The order of the recordings."""
        return source_order(self.recordings, seed, lane_of)

    def sample(self, index: int, rng: np.random.Generator | None) -> Sample:
        sample = self.recordings.sample(index, rng)
        odds = np.array(self.config.odds)
        choice = int(odds.argmax()) if rng is None else int(rng.choice(len(odds), p=odds / odds.sum()))
        windows = len(sample["t_us"])
        if "images" in sample:  # a video clip: each window ends at its own image
            images, pair, image_t_us = {"images": sample["images"]}, np.arange(windows), sample["t_us"][:, 1]
        else:
            # A still was on show for the whole recording: one image, paired with every window.
            images = {"images": sample.pop("image")[None]} if "image" in sample else {}
            pair, image_t_us = np.zeros(windows, dtype=np.int64), sample["t_us"][-1:, 1]
        frames = lay_out(LAYOUTS[choice], sample["t_us"], pair, image_t_us)
        return {**sample, **images, "pair": pair, **frames}


def lay_out(kind: str, t_us: np.ndarray, pair: np.ndarray, image_t_us: np.ndarray) -> dict[str, np.ndarray]:
    """The frames of one sequence.

    Args:
        kind: one of `LAYOUTS`.
        t_us: (T, 2) bounds of the windows; a window's frame stands at its end.
        pair: (T,) image that belongs to each window.
        image_t_us: (J,) times of the images.
    Returns:
        modality, source, frame_t_us: int64 (F,).
    """
    ends = t_us[:, 1]
    events = [(EVENT, index, int(end)) for index, end in enumerate(ends)]
    if kind == "events":
        frames = events
    elif kind == "image_last":
        frames = [*events, (IMAGE, int(pair[-1]), int(image_t_us[pair[-1]]))]
    elif kind == "image_first":
        frames = [(IMAGE, int(pair[0]), int(t_us[0, 0])), *events]
    elif kind == "interleave":
        frames = [frame for event, image in zip(events, pair) for frame in (event, (IMAGE, int(image), event[2]))]
    else:
        raise ValueError(f"sequence layout {kind!r} is not known; choose one of {', '.join(LAYOUTS)}")
    modality, source, times = (np.array(column, dtype=np.int64) for column in zip(*frames))
    return {"modality": modality, "source": source, "frame_t_us": times}


def collate_sequences(samples: Sequence[Sample]) -> Batch:
    """Sequences of any lengths -> batch, shorter ones padded at the end and marked in `valid` bool (B, F)."""
    batch = collate(samples)
    length = max(len(sample["modality"]) for sample in samples)
    for name in ("modality", "source", "frame_t_us"):
        # Padding repeats the last frame, so that every index and time in the batch stays a legal one.
        rows = [np.pad(s[name], (0, length - len(s[name])), mode="edge") for s in samples]
        batch[name] = torch.from_numpy(np.stack(rows))
    lengths = torch.tensor([len(sample["modality"]) for sample in samples])
    batch["valid"] = torch.arange(length)[None] < lengths[:, None]
    batch["padded"] = bool((lengths < length).any())
    if "images" in samples[0]:
        count = max(len(sample["images"]) for sample in samples)
        # Stills among video clips: the one image is repeated, and never looked at.
        rows = [sample["images"][np.minimum(np.arange(count), len(sample["images"]) - 1)] for sample in samples]
        batch["images"] = torch.from_numpy(np.stack(rows))
    batch["pair"] = torch.from_numpy(np.stack([sample["pair"] for sample in samples]))
    return batch
