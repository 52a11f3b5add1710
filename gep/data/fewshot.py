"""Which labelled samples a k-shot experiment may use: a function of (labels, k, seed, draw) alone."""

from __future__ import annotations

import numpy as np


def draw_shots(
    labels: np.ndarray, shots: int, *, seed: int, draw: int, leave: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """k labelled samples a class, and the rest.

    Args:
        labels: (N,) int64.
        shots: k ≥ 1.
        seed, draw: which of the draws; the same pair gives the same samples, and draws nest in k:
            the samples of k = 1 are among those of k = 2.
        leave: samples of each class that must remain; 0 where another set is tested on.
    Returns:
        (chosen, rest): ascending int64 indices; disjoint, together all N.
    Raises:
        ValueError: a class that occurs has fewer than k + leave samples.
    """
    if shots < 1:
        raise ValueError(f"shots={shots} must be at least 1")
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < shots + leave:
            raise ValueError(
                f"class {label} has {len(members)} samples: too few for {shots} shots and {leave} to test on"
            )
        rng = np.random.default_rng([seed, draw, int(label)])
        chosen.append(rng.permutation(members)[:shots])
    picked = np.sort(np.concatenate(chosen))
    return picked, np.setdiff1d(np.arange(len(labels)), picked)
