"""pixel_values of a transformers image processor, in torch and differentiable, and the check that they are its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from downstream.llm_evrep.readers import pixels
from gep.models.teacher import as_float

_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, which configs are written in
# A processor rounds to 8 bits after a resize, some between its two passes too.
_LEVELS = 2.5


class Unknown(ValueError):
    """A step of an image processor that is not reproduced here."""


def pixel_values(images: Tensor, processor: Any) -> Tensor:
    """What an image processor makes of images, without its rounding to 8 bits, with a graph to them.

    Args:
        images: (B, 3, H, W), uint8 or float in [0, 1].
        processor: a transformers image processor: resize, centre crop, rescale and normalise as it says.
    Returns:
        (B, 3, h, w) float32.
    Raises:
        Unknown: its settings ask for something else.
    """
    images = as_float(images)
    if getattr(processor, "do_resize", False):
        mode = _RESAMPLE.get(int(getattr(processor, "resample", 2)))
        if mode is None:
            raise Unknown(f"resample={processor.resample}")
        images = pixels.resize(images, _target(dict(processor.size), *images.shape[-2:]), mode)
    if getattr(processor, "do_center_crop", False):
        crop = dict(processor.crop_size)
        images = pixels.center_crop(images, (int(crop["height"]), int(crop["width"])), int)
    images = images * (255 * processor.rescale_factor if getattr(processor, "do_rescale", True) else 255)
    if getattr(processor, "do_normalize", False):
        images = pixels.normalise(images, processor.image_mean, processor.image_std)
    return images


def check(images: Tensor, processor: Any, want: Tensor) -> None:
    """Unknown unless `pixel_values` of uint8 images are `want`, the processor's own, up to its rounding."""
    got = pixel_values(images, processor)
    if got.shape != want.shape:
        raise Unknown(f"its pixel_values are {tuple(want.shape)}, not {tuple(got.shape)}")
    level = processor.rescale_factor if getattr(processor, "do_rescale", True) else 1.0
    if getattr(processor, "do_normalize", False):
        level = level / torch.as_tensor(processor.image_std, dtype=got.dtype).reshape(-1, 1, 1)
    off = float(((got - want.to(got)).abs() / torch.as_tensor(level).to(got)).max())
    if not off <= _LEVELS:
        raise Unknown(f"its pixel_values are other numbers, by up to {off:.3g} of 255 levels")


def _target(size: dict[str, Any], height: int, width: int) -> tuple[int, int]:
    size = {name: value for name, value in size.items() if value is not None}
    if set(size) == {"height", "width"}:
        return int(size["height"]), int(size["width"])
    if set(size) == {"shortest_edge"}:
        return pixels.shortest_edge(height, width, int(size["shortest_edge"]))
    raise Unknown(f"size={size}")
