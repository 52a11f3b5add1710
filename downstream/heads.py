"""Heads that learn on top of a model: the linear probe in closed reach of its optimum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A linear classifier on standardised features.

    Args:
        mean: (D,) float64 of the training features.
        scale: (D,) or () float64, what the centred features are divided by.
        weight: (C, D) float64.
        bias: (C,) float64.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """(N, D) -> logits (N, C) float64."""
        return (features.double() - self.mean) / self.scale @ self.weight.T + self.bias


def fit_linear_probe(
    features: Tensor, labels: Tensor, num_classes: int, *, l2: float = 1e-2, max_iterations: int = 200
) -> LinearProbe:
    """Multinomial logistic regression by L-BFGS in float64: deterministic, and to its optimum.

    The features are centred, divided by the standard deviation of each (which, for few samples, is shrunk towards
    the mean over all), and by √D, so that one `l2` suits any width.

    Args:
        features: (N, D) float of frozen features.
        labels: (N,) int64 in [0, C).
        num_classes: C; a class without samples is never predicted before one with.
        l2: weight of ½‖W‖² beside the mean cross-entropy; the bias is not penalised.
        max_iterations: of L-BFGS.
    Raises:
        ValueError: no samples, or a label outside [0, C).
    """
    if len(features) == 0 or len(features) != len(labels):
        raise ValueError(
            f"a probe needs samples with labels, got {len(features)} features, {len(labels)} labels"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels span {int(labels.min())}..{int(labels.max())}, classes are 0..{num_classes - 1}"
        )
    x = features.double()
    mean = x.mean(dim=0)
    variance = (x - mean).square().mean(dim=0)
    # The shrinkage weight is that of 16 further samples with the average variance.
    overall = variance.mean()
    shrunk = (len(x) * variance + 16 * overall) / (len(x) + 16)
    scale = (shrunk * x.shape[1]).sqrt().clamp_min(1e-12)
    x = (x - mean) / scale
    weight = torch.zeros(num_classes, x.shape[1], dtype=torch.float64, device=x.device, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=max_iterations, tolerance_grad=1e-8, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, labels) + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    return LinearProbe(mean, scale, weight.detach(), bias.detach())
