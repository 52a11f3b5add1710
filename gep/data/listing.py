"""What a data set holds, before anything is read: files, labels, classes, images, and a hash of it all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ImageOf = Callable[[int], np.ndarray]


@dataclass(frozen=True, eq=False)
class Listing:
    """One split of a labelled, optionally paired, set of short recordings.

    Args:
        name: data set, e.g. "nmnist".
        split: the split's published name, or the part of it that this listing is.
        keys: N names, unique and stable over machines (paths relative to the data set's root).
        files: N recordings on disk.
        labels: int64 (N,), indices into `classes`.
        classes: class names in sorted order.
        sensor: (height, width) of every recording, or None where it differs from file to file.
        image: index -> uint8 (3, H, W), the image paired with that recording in the view of the sensor;
            None for a set without images.
    """

    name: str
    split: str
    keys: tuple[str, ...]
    files: tuple[Path, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    sensor: tuple[int, int] | None = None
    image: ImageOf | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def hash(self) -> str:
        """First 12 hex digits of the SHA-256 over the lines "key label": the same list has the same hash."""
        lines = "".join(f"{key} {label}\n" for key, label in zip(self.keys, self.labels))
        return hashlib.sha256(lines.encode()).hexdigest()[:12]

    def subset(self, indices: Sequence[int] | np.ndarray, split: str) -> Listing:
        """The samples at `indices`, in that order, under the name `split`."""
        indices = np.asarray(indices, dtype=np.int64)
        whole = self.image
        return Listing(
            name=self.name,
            split=split,
            keys=tuple(self.keys[i] for i in indices),
            files=tuple(self.files[i] for i in indices),
            labels=self.labels[indices],
            classes=self.classes,
            sensor=self.sensor,
            image=None if whole is None else _Remapped(whole, indices),
        )

    def hold_out(self, fraction: float) -> tuple[Listing, Listing]:
        """Splits into (kept, held out) by the hash of each key.

        A sample's side depends on its own key alone, so that files added later move none of the others.
        """
        draws = np.array([int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32 for key in self.keys])
        held = draws < fraction
        return (
            self.subset(np.flatnonzero(~held), f"{self.split}[kept]"),
            self.subset(np.flatnonzero(held), f"{self.split}[held out {fraction:g}]"),
        )

    def describe(self) -> str:
        """One line for people: name, split, sizes, hash."""
        pairs = "with images" if self.image is not None else "without images"
        return (
            f"{self.name} {self.split}: {len(self)} recordings, {len(self.classes)} classes, {pairs}, list {self.hash}"
        )


@dataclass(frozen=True)
class _Remapped:
    """The images of a subset; a class and not a closure, so that data workers can pickle it."""

    image: ImageOf
    indices: np.ndarray

    def __call__(self, index: int) -> np.ndarray:
        return self.image(int(self.indices[index]))
