"""Numbers that the papers report, from arrays of predictions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def top_k_accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of samples (%) whose label is among the k highest logits; ties count against the label.

    Args:
        logits: (N, C) float.
        labels: (N,) int64.
        k: 1 ≤ k; a k above C counts as C.
    Returns:
        Percent in [0, 100]; NaN for N = 0.
    """
    if len(labels) == 0:
        return float("nan")
    own = logits.gather(1, labels[:, None])
    ahead = (~(logits < own)).sum(dim=1) - 1  # NaN counts against the label too
    return 100 * (ahead < k).double().mean().item()


def mean_std(values: Sequence[float]) -> list[float]:
    """[mean, sample standard deviation] of repeated measurements; the deviation of one value is 0."""
    array = np.asarray(values, dtype=np.float64)
    return [float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else 0.0]


def per_class_accuracy(predictions: Tensor, labels: Tensor, num_classes: int) -> list[float]:
    """Accuracy (%) of each class; NaN for a class without samples."""
    right = torch.bincount(labels[predictions == labels], minlength=num_classes).double()
    total = torch.bincount(labels, minlength=num_classes).double()
    return (100 * right / total).tolist()
