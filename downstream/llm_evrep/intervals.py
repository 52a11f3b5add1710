"""How sure a number of a finite test set is: percentile bootstrap of a mean, and of a difference of two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_AT_ONCE = 1 << 22  # drawn indices held at a time


class Interval(NamedTuple):
    """A mean with what it would be in most other test sets of this size."""

    mean: float
    low: float
    high: float


def bootstrap(
    values: Sequence[float] | np.ndarray, *, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Mean and percentile interval over resamples with replacement.

    Args:
        values: (N,) one a sample; booleans count as 0 and 1.
        draws: resamples.
        level: share of the resampled means inside the interval.
        seed: of the draws; the same values and seed give the same interval.
    Returns:
        All NaN for N = 0.
    Raises:
        ValueError: draws below 1, a level outside (0, 1), or values that are not finite.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13.
    """
    array = np.asarray(values, np.float64).reshape(-1)
    if draws < 1 or not 0 < level < 1:
        raise ValueError(f"bootstrap: draws={draws} must be at least 1 and level={level} in (0, 1)")
    if not np.isfinite(array).all():
        raise ValueError(f"bootstrap: {int((~np.isfinite(array)).sum())} of {len(array)} values are not finite")
    if len(array) == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    rows = max(1, _AT_ONCE // len(array))
    for start in range(0, draws, rows):
        count = min(rows, draws - start)
        means[start : start + count] = array[rng.integers(len(array), size=(count, len(array)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(array.mean()), float(low), float(high))


def paired_difference(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    *,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean of first − second over the same samples, which are resampled in pairs.

    Two accuracies of one test set rise and fall together: their difference is surer than either.

    Args:
        first, second: (N,) in the same order of samples.
        draws, level, seed: as in `bootstrap`.
    Raises:
        ValueError: unequal lengths; see `bootstrap`.
    """
    a, b = np.asarray(first, np.float64).reshape(-1), np.asarray(second, np.float64).reshape(-1)
    if len(a) != len(b):
        raise ValueError(f"paired_difference: {len(a)} and {len(b)} values are not of the same samples")
    return bootstrap(a - b, draws=draws, level=level, seed=seed)
