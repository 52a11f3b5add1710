"""Losses of segmentation and depth against float64 loops; ignored pixels, absent classes, empty truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from downstream.depth.loss import depth_loss, gradient_loss
from downstream.segmentation.loss import segmentation_loss

IGNORE = 255
NAN = float("nan")


def maps(seed: int = 0, samples: int = 3, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and masks; classes differ between samples, some pixels are unlabelled."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(samples, classes, 5, 7, generator=generator)
    mask = torch.randint(classes, (samples, 5, 7), generator=generator)
    mask[0][mask[0] == 2] = 1  # absent from the first sample
    mask[torch.rand(mask.shape, generator=generator) < 0.3] = IGNORE
    return logits, mask.to(torch.uint8)


def segmentation_reference(logits: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """(cross-entropy, Dice loss) by loops over pixels."""
    entropies, dices = [], []
    for sample, truth in zip(logits.astype(np.float64), mask):
        entropy, count = 0.0, 0
        overlap, mass, size = (np.zeros(len(sample)) for _ in range(3))
        for y, x in np.ndindex(*truth.shape):
            if truth[y, x] == IGNORE:
                continue
            raised = np.exp(sample[:, y, x])
            p = raised / raised.sum()
            entropy -= math.log(p[truth[y, x]])
            count += 1
            overlap[truth[y, x]] += p[truth[y, x]]
            mass += p
            size[truth[y, x]] += 1
        entropies.append(entropy / count if count else 0.0)
        terms = [1 - 2 * overlap[c] / (mass[c] + size[c]) for c in range(len(sample)) if size[c]]
        dices.append(sum(terms) / len(terms) if terms else 0.0)
    return float(np.mean(entropies)), float(np.mean(dices))


@pytest.mark.parametrize("dice", [0.0, 1.0, 2.5])
def test_segmentation_loss_is_the_reference(dice: float) -> None:
    logits, mask = maps()
    entropy, soft = segmentation_reference(logits.numpy(), mask.numpy())
    losses = segmentation_loss(logits, mask, dice=dice)
    assert losses["cross_entropy"].item() == pytest.approx(entropy, rel=1e-5)
    assert losses["dice"].item() == pytest.approx(soft, rel=1e-5)
    assert losses["loss"].item() == pytest.approx(entropy + dice * soft, rel=1e-5)
    assert all(value.dtype == torch.float32 and value.dim() == 0 for value in losses.values())


def test_segmentation_loss_by_hand() -> None:
    """Two pixels of class 0 with p = 3/4 and 1/2, one unlabelled; class 1 is absent and has no term."""
    logits = torch.tensor([[[[math.log(3), 0.0, -9.0]], [[0.0, 0.0, 9.0]]]])
    losses = segmentation_loss(logits, torch.tensor([[[0, 0, IGNORE]]]))
    assert losses["cross_entropy"].item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    assert losses["dice"].item() == pytest.approx(1 - 2 * 1.25 / (1.25 + 2))


def test_a_right_prediction_costs_nothing_and_a_wrong_one_all() -> None:
    mask = torch.tensor([[[0, 1], [1, IGNORE]]])
    logits = 60 * torch.nn.functional.one_hot(mask.clamp(max=1), 2).permute(0, 3, 1, 2).float()
    assert segmentation_loss(logits, mask)["loss"].item() == pytest.approx(0, abs=1e-6)
    assert segmentation_loss(-logits, mask)["dice"].item() == pytest.approx(1)


def test_unlabelled_pixels_have_no_gradient() -> None:
    logits, mask = maps()
    logits.requires_grad_()
    segmentation_loss(logits, mask)["loss"].backward()
    labelled = (mask != IGNORE)[:, None].expand_as(logits)
    assert torch.all(logits.grad[~labelled] == 0) and torch.all(logits.grad[labelled] != 0)


def test_the_segmentation_gradient_is_that_of_differences() -> None:
    logits, mask = maps(samples=2)
    logits.requires_grad_()
    segmentation_loss(logits, mask)["loss"].backward()
    step = 1e-4
    for place in [(0, 0, 1, 2), (0, 2, 4, 4), (1, 3, 0, 6)]:
        values = []
        for sign in (1, -1):
            moved = logits.detach().double().numpy().copy()
            moved[place] += sign * step
            values.append(sum(segmentation_reference(moved, mask.numpy())))
        assert logits.grad[place].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-3, abs=1e-7)


def test_nothing_labelled_is_zero_with_a_gradient_of_zero() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    losses = segmentation_loss(logits, torch.full((2, 4, 4), IGNORE, dtype=torch.uint8))
    assert losses["loss"].item() == 0
    losses["loss"].backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("kind", ["segmentation", "depth"])
def test_accumulation_and_ranks_do_not_change_the_objective(kind: str) -> None:
    """Halves of a batch average to the whole, though labels are spread unevenly and a sample has none."""
    if kind == "segmentation":
        prediction, truth = maps(samples=6)
        truth[0, :4] = IGNORE
        truth[3] = IGNORE
        loss = segmentation_loss
    else:
        prediction, truth = depths(frames=6)
        truth[0, :7] = NAN
        truth[3] = NAN
        loss = depth_loss
    prediction.requires_grad_()
    whole = loss(prediction, truth)
    (gradient,) = torch.autograd.grad(whole["loss"], prediction)
    halves = [loss(prediction[part], truth[part]) for part in (slice(0, 3), slice(3, 6))]
    (summed,) = torch.autograd.grad(sum(half["loss"] for half in halves) / 2, prediction)
    for name, value in whole.items():
        assert value.item() == pytest.approx(sum(half[name].item() for half in halves) / 2, rel=1e-6), name
    torch.testing.assert_close(summed, gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_and_near(dtype: torch.dtype) -> None:
    """300 × 300 pixels of one class: their sum is above what float16 holds."""
    logits = (30 * torch.randn(1, 3, 300, 300, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    mask = torch.zeros(1, 300, 300, dtype=torch.uint8)
    exact = logits.detach().double()
    entropy = torch.nn.functional.cross_entropy(exact, mask.long()).item()
    soft = 1 - 2 * (mass := exact.softmax(dim=1)[:, 0].sum().item()) / (mass + mask.numel())
    for autocast in (True, False):
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            half = segmentation_loss(logits, mask)
        (gradient,) = torch.autograd.grad(half["loss"], logits)
        assert half["loss"].dtype == torch.float32 and gradient.isfinite().all()
        assert half["cross_entropy"].item() == pytest.approx(entropy, rel=1e-5)
        assert half["dice"].item() == pytest.approx(soft, rel=1e-4)

    y = torch.rand(1, 300, 300, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    truth = torch.rand(1, 300, 300, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", dtype=dtype):
        half = depth_loss(y, truth)
    half["loss"].backward()
    assert half["loss"].dtype == torch.float32 and y.grad.isfinite().all()
    assert half["loss"].item() == pytest.approx(depth_loss(y.detach().float(), truth)["loss"].item(), rel=1e-6)


def test_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="mask \\(1, 4, 5\\)"):
        segmentation_loss(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 5, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="out of bounds"):
        segmentation_loss(torch.zeros(1, 3, 4, 4), torch.full((1, 4, 4), 3, dtype=torch.uint8))


def depths(frames: int = 3, height: int = 11, width: int = 13, share: float = 0.4) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw predictions, and truth of which `share` is known."""
    generator = torch.Generator().manual_seed(4)
    truth = torch.rand(frames, height, width, generator=generator)
    truth[torch.rand(truth.shape, generator=generator) > share] = NAN
    return torch.rand(frames, height, width, generator=generator) * 1.5 - 0.2, truth


def gradient_reference(error: np.ndarray, scales: int) -> float:
    """One frame's multi-scale gradient by loops; NaN = not valid."""
    total = 0.0
    for scale in range(scales):
        size = 2**scale
        rows, columns = -(-error.shape[0] // size), -(-error.shape[1] // size)
        cells = np.full((rows, columns), np.nan)
        for y, x in np.ndindex(rows, columns):
            block = error[y * size : (y + 1) * size, x * size : (x + 1) * size]
            if not np.isnan(block).all():
                cells[y, x] = np.nanmean(block)
        across = [abs(cells[y, x + 1] - cells[y, x]) for y in range(rows) for x in range(columns - 1)]
        down = [abs(cells[y + 1, x] - cells[y, x]) for y in range(rows - 1) for x in range(columns)]
        for steps in (across, down):
            known = [step for step in steps if not math.isnan(step)]
            total += sum(known) / len(known) if known else 0.0
    return total / scales


@pytest.mark.parametrize(
    "share, scales, size", [(1.0, 4, (16, 24)), (0.4, 4, (11, 13)), (0.05, 3, (11, 13)), (0.5, 4, (3, 5))]
)
@pytest.mark.parametrize("balance", [0.5, 1.0])
def test_depth_loss_is_the_reference(share: float, scales: int, size: tuple[int, int], balance: float) -> None:
    prediction, truth = depths(height=size[0], width=size[1], share=share)
    error = prediction.double().numpy() - truth.double().numpy()
    known = [frame[~np.isnan(frame)] for frame in error]
    silog = np.mean([np.mean(e**2) - balance * np.mean(e) ** 2 for e in known])
    edges = np.mean([gradient_reference(frame, scales) for frame in error])
    losses = depth_loss(prediction, truth, gradient=0.25, scales=scales, balance=balance)
    assert losses["silog"].item() == pytest.approx(silog, rel=1e-5)
    assert losses["gradient"].item() == pytest.approx(edges, rel=1e-5)
    assert losses["loss"].item() == pytest.approx(silog + 0.25 * edges, rel=1e-5)


def test_depth_loss_by_hand() -> None:
    """Errors 0.1, 0.3 above 0.2 and an unknown pixel: at scale 1 two pairs, at scale 2 a single block."""
    truth = torch.tensor([[[0.5, 0.5], [0.5, NAN]]])
    prediction = torch.tensor([[[0.6, 0.8], [0.7, 9.0]]])
    losses = depth_loss(prediction, truth, scales=2)
    assert losses["silog"].item() == pytest.approx(0.14 / 3 - 0.5 * 0.04, rel=1e-5)
    assert losses["gradient"].item() == pytest.approx((0.2 + 0.1) / 2, rel=1e-5)


def test_balance_one_forgives_a_shift_of_log_depth_and_half_does_not() -> None:
    _, truth = depths()
    shifted = truth.nan_to_num(0.5) + 0.1
    assert depth_loss(shifted, truth, balance=1.0)["loss"].item() == pytest.approx(0, abs=1e-7)
    assert depth_loss(shifted, truth)["loss"].item() == pytest.approx(0.005, rel=1e-4)
    assert depth_loss(shifted, truth, balance=0.0)["loss"].item() == pytest.approx(0.01, rel=1e-4)


def test_unknown_depth_has_no_gradient_and_an_empty_frame_none_at_all() -> None:
    prediction, truth = depths()
    truth[1] = NAN
    prediction.requires_grad_()
    depth_loss(prediction, truth)["loss"].backward()
    assert prediction.grad.isfinite().all()
    assert torch.all(prediction.grad[truth.isnan()] == 0)
    assert torch.count_nonzero(prediction.grad[0][~truth[0].isnan()]) > 0
    nothing = depth_loss(prediction, torch.full_like(truth, NAN))
    assert nothing["loss"].item() == 0
    (gradient,) = torch.autograd.grad(nothing["loss"], prediction)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_prediction_at_unknown_depth_changes_nothing() -> None:
    prediction, truth = depths()
    other = torch.where(truth.isnan(), prediction + 100, prediction)
    assert depth_loss(other, truth)["loss"].item() == depth_loss(prediction, truth)["loss"].item()
    error, valid = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool)
    error[0, 0, 0], valid[0, 0, 0] = 5.0, True  # a single pixel has no neighbour at any scale
    assert gradient_loss(error, valid).item() == 0


def test_depth_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="not both \\(B, H, W\\)"):
        depth_loss(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4))
