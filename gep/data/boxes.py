"""Which part of a picture fills the canvas, and what lies around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]
"""(left, top, width, height) in picture pixels, edges at the integers."""


def lay_out(picture: np.ndarray, box: Box, canvas: tuple[int, int], margin: int, outside: str) -> np.ndarray:
    """uint8 (3, H + 2 margin, W + 2 margin): the box fills the canvas, and what is around it the margin.

    The part inside the picture is resampled with antialiasing; beyond it lies what `outside` says.
    """
    left, top, width, height = box
    spans = []
    for begin, extent, cells, side in (
        (left, width, canvas[1], picture.shape[1]),
        (top, height, canvas[0], picture.shape[0]),
    ):
        step = extent / cells
        # Whole cells whose middle is inside the picture; at least one.
        first = max(-margin, math.ceil(-begin / step - 0.5))
        last = min(cells + margin, math.floor((side - begin) / step + 0.5))
        first = min(first, cells + margin - 1)
        last = max(last, first + 1)
        spans.append((first, last, max(0.0, begin + first * step), min(float(side), begin + last * step)))
    (x0, x1, u0, u1), (y0, y1, v0, v1) = spans
    part = Image.fromarray(picture).resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC, box=(u0, v0, u1, v1))
    modes: dict[str, Literal["symmetric", "edge", "constant"]]
    modes = {"reflection": "symmetric", "border": "edge", "zeros": "constant"}
    pads = ((y0 + margin, canvas[0] + margin - y1), (x0 + margin, canvas[1] + margin - x1), (0, 0))
    return np.ascontiguousarray(np.pad(np.asarray(part), pads, mode=modes[outside]).transpose(2, 0, 1))


def centre(shape: Sequence[int], canvas: tuple[int, int]) -> Box:
    """The largest box of the canvas' shape in the middle of the picture."""
    step = min(shape[0] / canvas[0], shape[1] / canvas[1])
    width, height = canvas[1] * step, canvas[0] * step
    return (shape[1] - width) / 2, (shape[0] - height) / 2, width, height


def crop(largest: Box, shares: tuple[float, float], max_aspect: float, rng: np.random.Generator) -> Box:
    """A random box; inside the picture where it fits, else about its middle.

    Args:
        largest: see `centre`.
        shares: range of the box's area relative to the largest.
        max_aspect: largest change of its aspect ratio.
    """
    left, top, width, height = largest
    share = rng.uniform(*shares)
    aspect = max_aspect ** rng.uniform(-0.5, 0.5)
    own_width, own_height = width * math.sqrt(share) * aspect, height * math.sqrt(share) / aspect
    whole = (2 * left + width, 2 * top + height)
    if share <= 1:
        own_width, own_height = min(own_width, whole[0]), min(own_height, whole[1])
    places = [
        rng.random() * (side - own) if own <= side else (side - own) * (0.5 + rng.uniform(-0.25, 0.25))
        for side, own in zip(whole, (own_width, own_height))
    ]
    return places[0], places[1], own_width, own_height
