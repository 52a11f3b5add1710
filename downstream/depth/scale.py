"""Metric depth as a network's target in [0, 1], and back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DepthScale:
    """The log-normalised depth: y = 1 + ln(d / max_m) / alpha, so that y = 1 is max_m and y = 0 is min_m.

    Args:
        max_m: depth [m] at y = 1; farther depth becomes 1.
        alpha: ln(max_m / min_m).
    Raises:
        ValueError: a value that is not above 0.
    Source:
        Hidalgo-Carrió et al. 2020 (E2Depth), §3.2.
    """

    max_m: float
    alpha: float

    def __post_init__(self) -> None:
        for name in ("max_m", "alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"depth {name}={getattr(self, name)} must be above 0 and finite")

    @classmethod
    def between(cls, min_m: float, max_m: float) -> DepthScale:
        """The scale with y = 0 at min_m and y = 1 at max_m [m]."""
        if not 0 < min_m < max_m < math.inf:
            raise ValueError(f"depth from {min_m} m to {max_m} m is no range; choose 0 < min_m < max_m")
        return cls(max_m, math.log(max_m / min_m))

    @property
    def min_m(self) -> float:
        """Depth [m] at y = 0; nearer depth becomes 0."""
        return self.max_m * math.exp(-self.alpha)

    def to_target(self, depth_m: Tensor) -> Tensor:
        """y in [0, 1] of depth in metres.

        Args:
            depth_m: (...) float, m; NaN, 0 and below = none, infinity = farther than max_m.
        Returns:
            (...) of the same type (float32 for half precision), NaN where there is none.
        """
        depth = depth_m if depth_m.dtype == torch.float64 else depth_m.float()
        depth = torch.where(depth > 0, depth.clamp(max=self.max_m), torch.nan)
        return (1 + (depth / self.max_m).log() / self.alpha).clamp(0, 1)

    def to_metres(self, y: Tensor) -> Tensor:
        """Depth in metres, in [min_m, max_m], of y; a y outside [0, 1] counts as the nearer end.

        Args:
            y: (...) float; NaN is kept.
        Returns:
            (...) of the same type (float32 for half precision), m.
        """
        y = y if y.dtype == torch.float64 else y.float()
        return self.max_m * torch.exp(self.alpha * (y.clamp(0, 1) - 1))


# MVSEC's and EventScape's as published (E2Depth, RAMNet). For DSEC nothing is: MVSEC's, as its columns are cut at 80 m
# too and hardly a disparity belongs to less than 2 m.
SCALES = {
    "mvsec": DepthScale(80.0, 3.70378),
    "dsec": DepthScale(80.0, 3.70378),
    "eventscape": DepthScale(1000.0, 5.70378),
}
