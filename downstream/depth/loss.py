"""What a depth model is trained by: a scale-invariant term and the gradients of the error at several scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def depth_loss(
    y_pred: Tensor, y_true: Tensor, *, gradient: float = 0.25, scales: int = 4, balance: float = 0.5
) -> dict[str, Tensor]:
    """Scale-invariant log loss + gradient · multi-scale gradient loss, each a mean over the frames of a batch.

    y is log-normalised depth (`DepthScale`), so R = y_pred − y_true is the error of log depth divided by alpha, and the
    scale-invariant term is mean(R²) − balance · mean(R)² over a frame's pixels with depth. Balance 1 (E2Depth's
    configuration) leaves the absolute scale free; 0.5 (Eigen's) learns metric depth, and is the default. A frame
    without depth counts as 0, with a gradient of 0, so that neither accumulation nor the number of ranks changes the
    objective. Computed in float32 whatever the prediction is.

    Args:
        y_pred: (B, H, W) float, raw.
        y_true: (B, H, W) float in [0, 1]; NaN = no depth.
        gradient: weight of the gradient term, see `gradient_loss`.
        scales: of the gradient term: 1, 1/2, 1/4, …
        balance: how much of a frame's mean error is forgiven, 0 (plain square) to 1 (all of it).
    Returns:
        `loss` with its gradient, and `silog` and `gradient` (both unweighted, detached): float32 scalars.
    Raises:
        ValueError: a truth of another size than the prediction.
    Source:
        Eigen et al. 2014, eq. 4; Hidalgo-Carrió et al. 2020 (E2Depth), §3.3, with weight 0.25 for MVSEC.
    """
    if y_pred.dim() != 3 or y_pred.shape != y_true.shape:
        raise ValueError(f"prediction {tuple(y_pred.shape)} and truth {tuple(y_true.shape)} are not both (B, H, W)")
    valid = y_true.isfinite()
    error = torch.where(valid, y_pred.float() - torch.where(valid, y_true.float(), 0.0), 0.0)
    count = valid.sum(dim=(1, 2)).clamp(min=1)
    mean = error.sum(dim=(1, 2)) / count
    silog = (error.square().sum(dim=(1, 2)) / count - balance * mean.square()).mean()
    edges = gradient_loss(error, valid, scales)
    return {"loss": silog + gradient * edges, "silog": silog.detach(), "gradient": edges.detach()}


def gradient_loss(error: Tensor, valid: Tensor, scales: int = 4) -> Tensor:
    """Mean absolute difference of the error between neighbours, horizontal + vertical, averaged over scales.

    At scale s the error is averaged over blocks of 2ˢ × 2ˢ, over the valid pixels of a block alone, and a block is
    valid where one of its pixels is; strided pixels would leave nearly nothing of a lidar's truth. Only pairs of valid
    neighbours count. Blocks that the border cuts are kept.

    Args:
        error: (B, H, W) float32, 0 where not valid.
        valid: (B, H, W) bool.
        scales: number of scales.
    Returns:
        Scalar, the mean over frames; a frame or a scale without a pair counts as 0.
    Source:
        Li & Snavely 2018 (MegaDepth), §4; Hidalgo-Carrió et al. 2020 (E2Depth), §3.3.
    """
    total = error.new_zeros(len(error))
    weight = valid.float()
    for scale in range(scales):
        cells, known = error, valid
        if scale:
            pool = {"kernel_size": 2**scale, "ceil_mode": True}
            share = F.avg_pool2d(weight[:, None], **pool)[:, 0]
            known = share > 0
            cells = F.avg_pool2d(error[:, None], **pool)[:, 0] / torch.where(known, share, 1.0)
        for dim in (1, 2):
            size = known.shape[dim]
            pairs = known.narrow(dim, 0, size - 1) & known.narrow(dim, 1, size - 1)
            step = cells.diff(dim=dim).abs() * pairs
            total = total + step.sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)
    return (total / scales).mean()
