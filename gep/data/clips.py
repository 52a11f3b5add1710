"""Runs of consecutive images of a video set, each a sample of as many windows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gep.data.listing import ImageSource, Listing


@dataclass(frozen=True, eq=False)
class Clips:
    """Runs of T consecutive images of one recording; each sample is the last of its run."""

    rows: np.ndarray
    """(N, T) samples of the listing, in time order."""
    spans: np.ndarray
    """(M, 2) µs, the listing's."""
    image: ImageSource | None
    """The listing's."""

    @classmethod
    def of(cls, listing: Listing, windows: int) -> Clips:
        """All runs of a listing.

        Raises:
            ValueError: the set is no video (no spans that end at images), or no recording has T images.
        """
        if listing.spans is None or listing.anchor != "end" or not listing.files:
            raise ValueError(f"data.clip=true needs a video set with images of known times; {listing.name} is none")
        rows = np.arange(windows - 1, len(listing))[:, None] - np.arange(windows)[::-1]
        files = np.array([str(file) for file in listing.files])
        good = (files[rows[:, :1]] == files[rows]).all(axis=1)
        good &= (np.diff(listing.spans[rows, 1], axis=1) > 0).all(axis=1)
        if not good.any():
            raise ValueError(
                f"data.windows={windows}: no recording of {listing.name} {listing.split} has so many images"
            )
        return cls(rows[good], listing.spans, listing.image)

    def images(self, index: int) -> list[np.ndarray]:
        """T images uint8 (3, H, W) in the sensor's view."""
        assert self.image is not None
        return [self.image(int(row)) for row in self.rows[index]]
