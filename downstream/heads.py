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
        scale: (D,) float64, what the centred features are divided by.
        weight: (K, D) float64.
        bias: (K,) float64.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """(N, D) -> logits (N, K) float64."""
        return (features.double() - self.mean) / self.scale @ self.weight.T + self.bias

    def folded(self) -> dict[str, Tensor]:
        """`weight` (K, D) and `bias` (K,) on features as they are: standardisation and classifier in one."""
        weight = self.weight / self.scale
        return {"weight": weight, "bias": self.bias - weight @ self.mean}


def fit_linear_probe(
    features: Tensor, labels: Tensor, num_classes: int, *, c: float = 1.0, max_iterations: int = 500
) -> LinearProbe:
    """Multinomial logistic regression on standardised features by L-BFGS in float64: deterministic, to its optimum.

    The objective is scikit-learn's: the sum of the cross-entropies + ‖W‖² / (2 C), here divided by N; the bias is not
    penalised. With C = 1 it is that library's default on standardised features, the commonest probe in the field.

    Args:
        features: (N, D) float of frozen features.
        labels: (N,) int64 in [0, K).
        num_classes: K; a class without samples is never predicted before one with.
        c: inverse strength of the penalty, > 0.
        max_iterations: of L-BFGS.
    Raises:
        ValueError: no samples, or a label outside [0, K).
    """
    if len(features) == 0 or len(features) != len(labels):
        raise ValueError(f"a probe needs samples with labels, got {len(features)} features, {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels span {int(labels.min())}..{int(labels.max())}, classes are 0..{num_classes - 1}")
    x = features.double()
    mean, scale = x.mean(dim=0), x.std(dim=0, correction=0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    x = (x - mean) / scale
    basis = None
    if x.shape[1] > len(x):
        # The penalty keeps the optimum in the span of the samples: N unknowns a class instead of D, exactly.
        basis = torch.linalg.qr(x.T).Q
        x = x @ basis
    weight = torch.zeros(num_classes, x.shape[1], dtype=torch.float64, device=x.device, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        tolerance_grad=1e-8,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, labels) + weight.square().sum() / (2 * c * len(x))
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    found = weight.detach() if basis is None else weight.detach() @ basis.T
    return LinearProbe(mean, scale, found, bias.detach())
