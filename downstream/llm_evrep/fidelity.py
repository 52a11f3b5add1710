"""Structural fidelity: how far the edges of two images are from each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))
_EPS = 1e-6  # the root's slope at zero would be infinite: a flat region has a magnitude of 0.001


def sobel_magnitude(images: Tensor) -> Tensor:
    """Strength of the edges at each pixel.

    Of the luminance, not of each channel: a contrast-sensitive sensor sees brightness, and the colours of an image of
    events are free, so that edges between hues alone are none that events could have shown.

    Args:
        images: (B, 3, H, W) or (B, 1, H, W) float in [0, 1].
    Returns:
        (B, 1, H, W) float32 sqrt(gx² + gy² + 10⁻⁶) with Sobel's 3 x 3 kernels, the border replicated: a step from
        black to white has 4.
    Raises:
        ValueError: another number of channels.
    Source: LLM-EvRep, arXiv 2502.14273, Eq. 5.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images of shape {tuple(images.shape)}: (B, 3, H, W) or (B, 1, H, W) are needed")
    # Squares of bfloat16 differences would drown in rounding.
    with torch.autocast(images.device.type, enabled=False):
        images = images.float()
        if images.shape[1] == 3:
            images = (images * images.new_tensor(_LUMA)[:, None, None]).sum(dim=1, keepdim=True)
        across = images.new_tensor(_SOBEL)
        kernels = torch.stack([across, across.mT])[:, None]
        slopes = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernels)
        return (slopes.square().sum(dim=1, keepdim=True) + _EPS).sqrt()


def fidelity_loss(images: Tensor, frames_rgb: Tensor) -> Tensor:
    """Mean squared difference of the two edge maps.

    Args:
        images: (B, 3, H, W) float in [0, 1], generated.
        frames_rgb: (B, 3, H, W) float in [0, 1] or uint8, the paired frames.
    Returns:
        Scalar float32.
    Raises:
        ValueError: images of different shapes.
    Source: LLM-EvRep, arXiv 2502.14273, Eq. 6.
    """
    if images.shape != frames_rgb.shape:
        raise ValueError(
            f"generated images {tuple(images.shape)} and frames {tuple(frames_rgb.shape)} differ in shape: put both "
            "on one canvas (data.height, data.width)"
        )
    if frames_rgb.dtype == torch.uint8:
        frames_rgb = frames_rgb.float() / 255
    return F.mse_loss(sobel_magnitude(images), sobel_magnitude(frames_rgb))
