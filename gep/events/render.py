"""Events as pictures for people."""

from __future__ import annotations

import numpy as np
from PIL import Image

from gep.events.represent_functions import event_image
from gep.events.slicing import into_windows
from gep.events.types import EventBatch, Events

_SMALLEST = 160  # px: a 34-pixel sensor would be a dot on a screen


def strip(events: Events, *, windows: int = 6, percentile: float = 99.0) -> Image.Image:
    """Equal windows of a recording side by side: ON red, OFF blue, on white.

    Args:
        events: N events.
        windows: pictures, from left to right.
        percentile: of the counts, that full colour stands for.
    Returns:
        RGB picture; small sensors are magnified by a whole number.
    """
    parts = into_windows(events, windows)
    pictures = event_image(EventBatch.from_windows(parts.events, parts.bounds), percentile=percentile).numpy()
    pixels = (255 * pictures).round().clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    zoom = max(1, -(-_SMALLEST // max(events.height, events.width)))
    gap = np.full((events.height * zoom, 4, 3), 255, np.uint8)
    row = [piece for picture in pixels for piece in (picture.repeat(zoom, 0).repeat(zoom, 1), gap)]
    return Image.fromarray(np.concatenate(row[:-1], axis=1))
