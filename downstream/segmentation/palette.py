"""A colour for every class, the same in every picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Colour = tuple[int, int, int]

IGNORE: Colour = (64, 64, 64)
"""Of pixels without a label: dark grey."""
COLOURS: dict[str, Colour] = {
    "background": (148, 200, 234),
    "building": (151, 97, 75),
    "fence": (240, 207, 145),
    "person": (223, 33, 28),
    "pole": (199, 192, 168),
    "road": (115, 110, 146),
    "sidewalk": (204, 148, 255),
    "vegetation": (85, 181, 80),
    "car": (14, 63, 199),
    "wall": (91, 44, 112),
    "traffic sign": (255, 224, 28),
}
"""Of DSEC-Semantic's classes; DDD17's and the scenes' have those of their likes. Any two of them, and
IGNORE, stay 20 CIELAB units apart also without the red or the green cones."""
_LIKE = {
    "sky": "background", "flat": "road", "object": "traffic sign", "human": "person", "vehicle": "car",
    "checks": "car", "digit": "person", "photograph": "vegetation", "rings": "traffic sign", "stripes": "sidewalk",
}  # fmt: skip

# Linear RGB as seen with all cones, without the long and without the medium ones.
# Source: Machado, Oliveira, Fernandes 2009, "A Physiologically-based Model for Simulation of Color Vision Deficiency".
_SIGHT = np.array(
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    ]
)
# IEC 61966-2-1: linear sRGB to CIE XYZ, over the white point D65.
_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE = np.array([0.95047, 1.0, 1.08883])


def palette(classes: Sequence[str], given: Sequence[Colour | None] = ()) -> np.ndarray:
    """A colour a class: its own where the name is known, else the one farthest from all others in use.

    Args:
        classes: C names, in the order of the masks' ids.
        given: C colours that are to be taken, None = none; () = none at all.
    Returns:
        uint8 (C, 3) RGB; the same names give the same colours.
    """
    chosen: list[Colour | None] = []
    for name, wanted in zip(classes, given or (None,) * len(classes), strict=True):
        if wanted is not None:
            chosen.append(wanted)
            continue
        plain = name.lower().replace("_", " ").strip()
        colour = COLOURS.get(_LIKE.get(plain, plain))
        chosen.append(None if colour in chosen or colour in given else colour)
    if None not in chosen:
        return np.array(chosen, np.uint8).reshape(-1, 3)
    levels = np.linspace(0, 255, 8).round()
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    # White is the ground of the pictures and black their ink.
    taken = np.array([IGNORE, (255, 255, 255), (0, 0, 0), *(colour for colour in chosen if colour)], float)
    far = _apart(candidates, taken).min(axis=1)
    for number, colour in enumerate(chosen):
        if colour is None:
            best = candidates[far.argmax()]
            chosen[number] = tuple(best)
            far = np.minimum(far, _apart(candidates, best[None])[:, 0])
    return np.array(chosen, np.uint8)


def distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How far colours are apart for the eye that tells them apart worst: with all cones, or without one kind.

    Args:
        one, other: (N, 3) and (M, 3) RGB in [0, 255].
    Returns:
        (N, M) float64 CIELAB units (CIE 1976); about 2 is just noticed.
    """
    return _by_sight(one, other).min(axis=0)


def _apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """For choosing: halfway between the eye with all cones and the worst, or most eyes would see few hues."""
    seen = _by_sight(one, other)
    return (seen[0] + seen.min(axis=0)) / 2


def _by_sight(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    seen = [(_lab(one, sight), _lab(other, sight)) for sight in _SIGHT]
    return np.stack([np.linalg.norm(a[:, None] - b[None], axis=-1) for a, b in seen])


def _lab(rgb: np.ndarray, sight: np.ndarray) -> np.ndarray:
    value = np.asarray(rgb, float) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    xyz = (linear @ sight.T).clip(0, 1) @ _XYZ.T / _WHITE
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=-1)


def colourise(mask: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """A label map as a picture.

    Args:
        mask: (H, W) integer class ids; any that has no colour counts as unlabelled.
        colours: uint8 (C, 3).
    Returns:
        uint8 (H, W, 3).
    """
    table = np.concatenate([colours, np.array([IGNORE], np.uint8)])
    known = (mask >= 0) & (mask < len(colours))
    return table[np.where(known, mask, len(colours))]
