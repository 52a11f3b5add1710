"""What a data set holds, before anything is read: recordings, labels, images, targets, and a hash of it all."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from gep.data.view import View
from gep.events.io import EventSource, opened

TargetOf = Callable[[int], np.ndarray]


class ImageSource(Protocol):
    """The images paired with a listing's samples; pickles, so that data workers can take it along."""

    def encoded(self, index: int) -> tuple[bytes, str]:
        """The image file's bytes as they are on disk, and their suffix (".jpg", ".png")."""

    def view(self, index: int) -> View:
        """How that picture becomes the view of the sensor."""

    def __call__(self, index: int) -> np.ndarray:
        """uint8 (3, H, W): the image in the view of the sensor."""


class RecordingOf(Protocol):
    """Where the events of a listing's samples come from when they are not files of their own (shards)."""

    def __call__(self, index: int) -> EventSource: ...


@dataclass(frozen=True, eq=False)
class Listing:
    """One split of a set of samples: each a recording, or a span of one, with what belongs to it.

    Args:
        name: data set, e.g. "nmnist".
        split: the split's published name, or the part of it that this listing is.
        keys: N names, unique and stable over machines (paths relative to the data set's root, with the place in
            the recording where a recording gives several samples).
        files: N recordings on disk (one recording may occur often); empty where `recording` is given.
        labels: int64 (N,), indices into `classes`; -1 where there is no label.
        classes: class names in sorted order; () for a set without.
        sensor: (height, width) of every recording, or None where it differs or the file says it.
        image: index -> uint8 (3, H, W), see `ImageSource`; None for a set without images.
        spans: int64 (N, 2) µs [t0, t1) of each sample in its recording, as the file counts time; None = whole files.
        anchor: whether a sample's windows count from its span's start, or end at its end (the time of its image).
        targets: "mask" -> index -> uint8 (H, W), "depth" -> index -> float32 (H, W) m, NaN = none; in the view of the
            sensor (after `rectify`).
        rectify: index -> float32 (H, W, 2), at [y, x] the rectified (x, y) of a raw pixel; None where events stay raw.
        recording: index -> open source, instead of `files`.
        notes: further facts to print with the split, e.g. {"subsampling": "ESS"}.
        groups: N names of the recording or sequence each sample belongs to, as stable as keys; () = what the keys say:
            without spans each is its own, with them what stands before "#" or "@" in the last part of the key, and
            with anchor "end", where there is neither, before the last part (sequence/image). See `hold_out`.
    """

    name: str
    split: str
    keys: tuple[str, ...]
    files: tuple[Path, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    sensor: tuple[int, int] | None = None
    image: ImageSource | None = None
    spans: np.ndarray | None = None
    anchor: Literal["start", "end"] = "start"
    targets: Mapping[str, TargetOf] = field(default_factory=dict)
    rectify: TargetOf | None = None
    recording: RecordingOf | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    groups: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def hash(self) -> str:
        """First 12 hex digits of the SHA-256 over the lines "key label": the same list has the same hash."""
        lines = "".join(f"{key} {label}\n" for key, label in zip(self.keys, self.labels))
        return hashlib.sha256(lines.encode()).hexdigest()[:12]

    def source(self, index: int) -> EventSource:
        """The open recording that sample `index` is in (see `gep.events.io.opened`)."""
        if self.recording is not None:
            return self.recording(index)
        height, width = self.sensor or (None, None)
        return opened(self.files[index], height=height, width=width)

    @property
    def shard(self) -> np.ndarray | None:
        """int64 (N,): the shard that each sample lies in; None where every sample is a file."""
        return _shard(self.recording)

    def subset(self, indices: Sequence[int] | np.ndarray, split: str) -> Listing:
        """The samples at `indices`, in that order, under the name `split`."""
        indices = np.asarray(indices, dtype=np.int64)

        def part(function: Any) -> Any:
            return None if function is None else Remapped(function, indices)

        return dataclasses.replace(
            self,
            split=split,
            keys=tuple(self.keys[i] for i in indices),
            files=tuple(self.files[i] for i in indices) if self.files else (),
            labels=self.labels[indices],
            image=part(self.image),
            spans=None if self.spans is None else self.spans[indices],
            targets={name: part(target) for name, target in self.targets.items()},
            rectify=part(self.rectify),
            recording=part(self.recording),
            groups=tuple(self.groups[i] for i in indices) if self.groups else (),
        )

    def hold_out(self, fraction: float) -> tuple[Listing, Listing]:
        """Splits into (kept, held out) by the hash of each sample's group.

        A sample's side depends on its own group's name alone, so that files added later move none of the others; and
        two samples of one recording, which look alike, never land on both sides. But of few groups at least one is held
        out, the one that a larger fraction would take first, and at least one is kept, the one it would take last.

        Raises:
            ValueError: all samples are of one recording.
        """
        names = self.groups or [self._group(key) for key in self.keys]
        place = {name: int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 for name in names}
        if len(place) == 1:
            by_time = " split it by time (data.train_split=0-80% data.eval_split=80-100%)," * (self.name == "folder")
            raise ValueError(
                f"{self.name} {self.split}: all {len(self)} samples are of one recording ({names[0]}), of which none "
                f"can be held out for evaluation (data.holdout={fraction:g});{by_time} name data.eval_split, or add "
                "recordings"
            )
        apart = {name for name, at in place.items() if at < fraction}
        if place and not apart:
            apart = {min(place, key=place.__getitem__)}
        if place and len(apart) == len(place):
            apart.remove(max(place, key=place.__getitem__))
        held = np.array([name in apart for name in names], bool)
        return (
            self.subset(np.flatnonzero(~held), f"{self.split}[kept]"),
            self.subset(np.flatnonzero(held), f"{self.split}[held out {fraction:g}]"),
        )

    def _group(self, key: str) -> str:
        """The recording that a key names; of the key alone, so that shards, which keep the keys, split as their set."""
        if self.spans is None:
            return key
        group = re.sub(r"[#@][^/]*$", "", key)
        return group.rpartition("/")[0] or group if group == key and self.anchor == "end" else group

    def describe(self) -> str:
        """One line for people: name, split, sizes, hash."""
        extras = ["with images" if self.image is not None else "without images", *sorted(self.targets)]
        kind = "recordings" if self.spans is None else "samples"
        notes = "".join(f", {name} {value}" for name, value in self.notes.items())
        return (
            f"{self.name} {self.split}: {len(self)} {kind}, {len(self.classes)} classes, {', '.join(extras)}{notes}, "
            f"list {self.hash}"
        )


def _shard(recording: Any) -> np.ndarray | None:
    if isinstance(recording, Remapped):
        inner = _shard(recording.whole)
        return None if inner is None else inner[recording.indices]
    return getattr(recording, "shard", None)


@dataclass(frozen=True)
class Remapped:
    """What belongs to the samples of a subset; a class and not a closure, so that data workers can pickle it."""

    whole: Any
    indices: np.ndarray

    def __call__(self, index: int) -> Any:
        return self.whole(int(self.indices[index]))

    def encoded(self, index: int) -> tuple[bytes, str]:
        return self.whole.encoded(int(self.indices[index]))

    def view(self, index: int) -> View:
        return self.whole.view(int(self.indices[index]))
