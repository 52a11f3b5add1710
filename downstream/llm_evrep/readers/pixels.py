"""What image processors do to an image, in torch and differentiable: resize, crop, normalise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def shortest_edge(height: int, width: int, edge: int) -> tuple[int, int]:
    """(H, W) whose shorter side is `edge`, the longer one cut to whole pixels, as torchvision's Resize has it."""
    if height <= width:
        return edge, int(edge * width / height)
    return int(edge * height / width), edge


def resize(images: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Images (B, 3, h, w) in [0, 1] to size (H, W), antialiased; nothing is done where they have it.

    First the width, then the height, the overshoot of "bicubic" cut off after each: what Pillow and torch do to
    images of 8 bits, but for the rounding.

    Args:
        mode: "bicubic" or "bilinear".
    """
    for target in ((images.shape[-2], size[1]), size):
        if tuple(images.shape[-2:]) != tuple(target):
            images = F.interpolate(images, target, mode=mode, align_corners=False, antialias=True).clamp(0, 1)
    return images


def center_crop(images: Tensor, size: tuple[int, int], whole: Callable[[float], int] = round) -> Tensor:
    """The middle (H, W) of images (B, 3, h, w), with zeros around where they are smaller.

    Args:
        whole: of half a pixel's offset: `round`, as torchvision has it, or `int`, as transformers does.
    """
    (height, width), (h, w) = size, images.shape[-2:]
    if h < height or w < width:
        more_h, more_w = max(height - h, 0), max(width - w, 0)
        images = F.pad(images, (more_w // 2, (more_w + 1) // 2, more_h // 2, (more_h + 1) // 2))
        h, w = images.shape[-2:]
    top, left = whole((h - height) / 2), whole((w - width) / 2)
    return images[..., top : top + height, left : left + width]


def normalise(images: Tensor, mean: float | Sequence[float], std: float | Sequence[float]) -> Tensor:
    """(images - mean) / std by channel."""
    centre, scale = (
        torch.as_tensor(v, dtype=images.dtype, device=images.device).reshape(-1, 1, 1) for v in (mean, std)
    )
    return (images - centre) / scale
