"""Which labelled samples a share of a set has: the same on every machine, smaller shares inside larger ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def nested_share(keys: Sequence[str], fraction: float, seed: int) -> np.ndarray:
    """The first of the samples in a seeded order, which depends on their keys alone.

    Args:
        keys: N unique names.
        fraction: of them, in (0, 1].
        seed: another order, another choice.
    Returns:
        int64 (max(1, round(fraction · N)),) indices, ascending; those of a smaller fraction are among them.
    """
    ranks = [hashlib.sha256(f"{seed} {key}".encode()).digest() for key in keys]
    order = np.array(sorted(range(len(keys)), key=ranks.__getitem__), np.int64)
    return np.sort(order[: max(1, round(fraction * len(keys)))])
