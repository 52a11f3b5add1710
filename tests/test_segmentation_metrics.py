"""mIoU, Acc and mAcc against hand-computed cases, sklearn, and the faults known of other code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score, recall_score

from downstream.metrics import confusion, segmentation_metrics

IGNORE = 255
CLASSES = [f"c{number}" for number in range(6)]


def random_maps(samples: int = 5, classes: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions right half of the time, truth with a fifth unlabelled."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(classes, (samples, 13, 17), generator=generator)
    guess = torch.randint(classes, truth.shape, generator=generator)
    prediction = torch.where(torch.rand(truth.shape, generator=generator) < 0.5, truth, guess)
    truth = torch.where(torch.rand(truth.shape, generator=generator) < 0.2, IGNORE, truth)
    return prediction, truth


def test_a_hand_computed_case() -> None:
    truth = torch.tensor([[[0, 0, 0, 1], [1, 1, 2, 255]]], dtype=torch.uint8)
    prediction = torch.tensor([[[0, 0, 1, 1], [1, 2, 2, 0]]])
    matrix = confusion(prediction, truth, 3)
    assert matrix.dtype == torch.int64
    assert matrix.tolist() == [[[2, 1, 0], [0, 2, 1], [0, 0, 1]]]  # rows are the truth; the ignored pixel is nowhere

    result = segmentation_metrics(matrix.sum(dim=0), ["sky", "road", "car"])
    assert result["iou"] == pytest.approx({"sky": 100 * 2 / 3, "road": 100 * 2 / 4, "car": 100 * 1 / 2})
    assert result["miou"] == pytest.approx(100 * (2 / 3 + 1 / 2 + 1 / 2) / 3)
    assert result["acc"] == pytest.approx(100 * 5 / 7)
    assert result["macc"] == pytest.approx(100 * (2 / 3 + 2 / 3 + 1) / 3)
    assert result["absent"] == []


@pytest.mark.parametrize("seed", range(3))
def test_random_maps_agree_with_sklearn(seed: int) -> None:
    prediction, truth = random_maps(seed=seed)
    matrices = confusion(prediction, truth, 6)
    for one, p, t in zip(matrices, prediction.numpy(), truth.numpy()):
        np.testing.assert_array_equal(one.numpy(), confusion_matrix(t[t != 255], p[t != 255], labels=range(6)))
    t, p = truth[truth != IGNORE].numpy(), prediction[truth != IGNORE].numpy()
    result = segmentation_metrics(matrices.sum(dim=0), CLASSES)
    np.testing.assert_allclose(list(result["iou"].values()), 100 * jaccard_score(t, p, average=None), rtol=1e-12)
    assert result["miou"] == pytest.approx(100 * jaccard_score(t, p, average="macro"), rel=1e-12)
    assert result["acc"] == pytest.approx(100 * accuracy_score(t, p), rel=1e-12)
    assert result["macc"] == pytest.approx(100 * recall_score(t, p, average="macro"), rel=1e-12)


def test_one_matrix_over_the_set_is_not_the_mean_over_images() -> None:
    truth = torch.tensor([[[0, 0, 0, 0]], [[0, 1, 1, 1]]])
    prediction = torch.tensor([[[0, 0, 0, 1]], [[1, 1, 1, 1]]])
    result = segmentation_metrics(confusion(prediction, truth, 2).sum(dim=0), ["a", "b"])
    assert result["miou"] == pytest.approx(100 * (3 / 5 + 3 / 5) / 2)  # by image: ((3/4) + (0 + 3/4) / 2) / 2


def test_absent_classes_are_named_and_left_out() -> None:
    """The fault of a mean that is NaN, or that a class nobody could find drags down."""
    truth = torch.tensor([[[0, 0, 0, 0, 2, 2]]])
    prediction = torch.tensor([[[0, 0, 0, 1, 2, 2]]])  # class 1 is predicted and absent, class 3 is nowhere
    result = segmentation_metrics(confusion(prediction, truth, 4).sum(dim=0), ["a", "b", "c", "d"])
    assert result["absent"] == ["b", "d"]
    assert result["iou"] == {"a": pytest.approx(75.0), "b": None, "c": pytest.approx(100.0), "d": None}
    assert result["miou"] == pytest.approx(87.5)
    assert result["macc"] == pytest.approx(87.5)
    assert result["acc"] == pytest.approx(100 * 5 / 6)


def test_two_ranks_give_the_numbers_of_one() -> None:
    prediction, truth = random_maps(samples=7)
    whole = confusion(prediction, truth, 6)
    parts = [confusion(prediction[rank::2], truth[rank::2], 6) for rank in range(2)]
    rows = torch.empty_like(whole)
    rows[0::2], rows[1::2] = parts
    assert torch.equal(rows, whole)
    assert segmentation_metrics(parts[0].sum(0) + parts[1].sum(0), CLASSES) == segmentation_metrics(
        whole.sum(0), CLASSES
    )


def test_a_set_without_labels_is_nan_and_says_so() -> None:
    truth = torch.full((2, 3, 3), IGNORE, dtype=torch.uint8)
    matrix = confusion(torch.zeros(2, 3, 3, dtype=torch.long), truth, 2)
    assert matrix.sum() == 0
    with pytest.warns(UserWarning, match="no pixel of the set is labelled"):
        result = segmentation_metrics(matrix.sum(dim=0), ["a", "b"])
    assert all(math.isnan(result[name]) for name in ("miou", "acc", "macc"))
    assert result["iou"] == {"a": None, "b": None} and result["absent"] == ["a", "b"]
    assert confusion(torch.zeros(0, 3, 3, dtype=torch.long), truth[:0], 2).shape == (0, 2, 2)


def test_an_ignored_id_below_the_number_of_classes() -> None:
    truth, prediction = torch.tensor([[[0, 1, 2]]]), torch.tensor([[[0, 1, 0]]])
    assert confusion(prediction, truth, 3, ignore=0).tolist() == [[[0, 0, 0], [0, 1, 0], [1, 0, 0]]]


def test_ids_out_of_range_are_refused() -> None:
    good = torch.tensor([[[0, 1]]])
    with pytest.raises(ValueError, match=r"ids \[7\] are none of the 2 classes and not ignore=255"):
        confusion(good, torch.tensor([[[0, 7]]]), 2)
    with pytest.raises(AssertionError, match="outside"):
        confusion(torch.tensor([[[0, 2]]]), good, 2)
    with pytest.raises(AssertionError, match="logits"):
        confusion(good.float(), good, 2)
    with pytest.raises(AssertionError):
        segmentation_metrics(torch.ones(3, 3), ["a", "b"])
