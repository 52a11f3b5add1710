"""Numbers that the papers report, from arrays of predictions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

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


def confusion(prediction: Tensor, target: Tensor, num_classes: int, ignore: int = 255) -> Tensor:
    """Confusion matrix of every sample: how many pixels of class i (row, truth) were called j (column).

    A row a sample, so that a set's matrix is one sum whatever ranks and batches it came from.

    Args:
        prediction: (B, H, W) int64 class ids.
        target: (B, H, W) integer class ids; `ignore` = no label.
        num_classes: C.
        ignore: the id that is left out.
    Returns:
        (B, C, C) int64.
    Raises:
        ValueError: an id in the truth that is neither a class nor `ignore`.
    """
    try:
        from torchmetrics.functional.classification import multiclass_confusion_matrix  # 5 s to import
    except ImportError as error:
        raise ImportError("segmentation metrics need torchmetrics: pip install torchmetrics") from error

    assert prediction.shape == target.shape, f"{tuple(prediction.shape)} and {tuple(target.shape)}"
    assert not prediction.is_floating_point(), "class ids, not logits"
    target = target.long()
    wrong = target[((target < 0) | (target >= num_classes)) & (target != ignore)]
    if len(wrong):
        raise ValueError(
            f"mask: ids {wrong.unique().tolist()[:5]} are none of the {num_classes} classes and not ignore={ignore}"
        )
    assert ((prediction >= 0) & (prediction < num_classes)).all(), f"a prediction outside [0, {num_classes})"
    matrices = [
        multiclass_confusion_matrix(of, truth, num_classes, ignore_index=ignore, validate_args=False)
        for of, truth in zip(prediction, target)
    ]
    return torch.stack(matrices) if matrices else target.new_zeros(0, num_classes, num_classes)


def segmentation_metrics(matrix: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """mIoU, accuracy and class-mean accuracy of one confusion matrix over a whole set.

    IoU = TP / (TP + FP + FN). A class without a pixel in the truth is absent: it is named, has no IoU and no accuracy,
    and is left out of both means, also where it was predicted; those pixels still count as missed by the classes they
    belong to, in IoU and accuracy alike.

    Args:
        matrix: (C, C) integer, rows = truth.
        classes: C names.
    Returns:
        `miou`, `acc` (share of pixels that are right) and `macc` (mean over classes of that share) in percent, NaN
        with a warning where no pixel is labelled; `iou`: class -> percent, None for an absent one; `absent`: names.
    """
    assert matrix.shape == (len(classes), len(classes)), f"{tuple(matrix.shape)} for {len(classes)} classes"
    counts = matrix.detach().cpu().double()
    right, truth, predicted = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
    present = truth > 0
    if not present.any():
        warnings.warn("no pixel of the set is labelled: mIoU and accuracies are NaN", stacklevel=2)
    iou = 100 * right / (truth + predicted - right)  # 0 / 0 for a class that is nowhere
    recall = 100 * right / truth
    return {
        "miou": iou[present].mean().item(),
        "acc": (100 * right.sum() / truth.sum()).item(),
        "macc": recall[present].mean().item(),
        "iou": {name: iou[c].item() if present[c] else None for c, name in enumerate(classes)},
        "absent": [name for c, name in enumerate(classes) if not present[c]],
    }
