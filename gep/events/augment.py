"""Augmentation: what may be done to a sample, and drawing it once for events, image, mask and depth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gep.events.transform import Transform, centred

__all__ = ["OFF_GRID", "AugmentConfig", "Transform", "draw", "draw_grid_crop", "fit"]

Size = tuple[int, int]
OFF_GRID = ("crop_area_min", "crop_aspect_max", "max_shift_px", "max_rotation_deg", "max_scale")
"""What moves pixels to places that are no whole patches away."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What to draw from; every default leaves events as they are."""

    crop_area_min: float = 1.0
    """Smallest cropped fraction of the sensor's area, drawn from [this, 1]; not with padding."""
    crop_aspect_max: float = 1.0
    """Largest change of the crop's aspect ratio, drawn from [1/this, this]; not with padding."""
    max_shift_px: int = 0
    """Largest shift along x and y, whole sensor pixels; what moves in is empty."""
    max_rotation_deg: float = 0.0
    """Largest rotation about the centre, degrees."""
    max_scale: float = 0.0
    """Largest relative magnification or reduction about the centre, 0.1 = from 1/1.1 to 1.1."""
    flip_x: float = 0.0
    """Odds of mirroring left and right."""
    flip_y: float = 0.0
    """Odds of mirroring top and bottom."""
    flip_polarity: float = 0.0
    """Odds of exchanging ON and OFF."""
    reverse_time: float = 0.0
    """Odds of playing the sample backwards, which also exchanges ON and OFF."""
    max_event_drop: float = 0.0
    """Largest fraction of single events dropped, drawn from [0, this]."""
    area_drop: float = 0.0
    """Odds of dropping all events in a random box."""
    area_drop_max: float = 0.3
    """Largest side of that box, fraction of the output's side."""
    time_drop: float = 0.0
    """Odds of dropping all events in a random interval."""
    time_drop_max: float = 0.3
    """Largest length of that interval, fraction of the sample's span."""
    max_noise: float = 0.0
    """Largest number of uniform noise events added, fraction of a window's events."""
    grid_crop: tuple[int, int] = (0, 0)
    """Stage 1: (height, width) of a random crop of the canvas, whole patches, px; (0, 0) = none. The teacher sees the
    whole picture, and its tokens are cropped alike."""
    grid_px: int = 14
    """The encoder's patch, on whose multiples that crop lies, px."""

    def __post_init__(self) -> None:
        for name in ("flip_x", "flip_y", "flip_polarity", "reverse_time", "max_event_drop", "area_drop",
                     "area_drop_max", "time_drop", "time_drop_max"):  # fmt: skip
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be in [0, 1]")
        for name in ("max_shift_px", "max_rotation_deg", "max_scale", "max_noise"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} = {getattr(self, name)} must not be negative")
        if not 0 < self.crop_area_min <= 1:
            raise ValueError(f"crop_area_min = {self.crop_area_min} must be in (0, 1]; 1 turns it off")
        if not self.crop_aspect_max >= 1:
            raise ValueError(f"crop_aspect_max = {self.crop_aspect_max} must be at least 1; 1 turns it off")
        if self.grid_px < 1:
            raise ValueError(f"grid_px = {self.grid_px} must be at least 1: it is the encoder's patch")
        rows, columns = self.grid_crop
        if min(rows, columns) < 0 or bool(rows) != bool(columns) or rows % self.grid_px or columns % self.grid_px:
            raise ValueError(
                f"grid_crop = {list(self.grid_crop)} must be two multiples of grid_px = {self.grid_px}, the encoder's "
                "patch; [0, 0] turns it off"
            )


def draw(
    cfg: AugmentConfig,
    rng: np.random.Generator,
    source: Size,
    size: Size | None = None,
    how: Literal["resize", "pad"] = "resize",
) -> Transform:
    """Draws one sample's transform.

    The same numbers are drawn whatever is switched on, so that one option does not change another's draws.

    Args:
        cfg: what to draw from.
        rng: where from.
        source: (height, width) of the sensor.
        size: (height, width) of the output; None = the sensor's.
        how: resize the crop to the output, or centre the sensor in it pixel for pixel.
    Raises:
        ValueError: a crop, which has to be resized, together with padding.
    """
    (height, width), size = source, size or source
    u = rng.random(22)
    seed = int(rng.integers(2**63))
    if how == "pad":
        if cfg.crop_area_min < 1 or cfg.crop_aspect_max > 1:
            raise ValueError("augment.crop_area_min and crop_aspect_max resize; with them set data.fit=resize")
        crop = centred(source, size)
    else:
        area = cfg.crop_area_min + (1 - cfg.crop_area_min) * u[0]
        aspect = cfg.crop_aspect_max ** (2 * u[1] - 1)
        rows = min(height, max(1, round(height * math.sqrt(area / aspect))))
        columns = min(width, max(1, round(width * math.sqrt(area * aspect))))
        crop = (int(u[2] * (height - rows + 1)), int(u[3] * (width - columns + 1)), rows, columns)
    shift_y, shift_x = (int(v * (2 * cfg.max_shift_px + 1)) - cfg.max_shift_px for v in u[4:6])

    box = (0, 0, 0, 0)
    if u[10] < cfg.area_drop:
        rows, columns = (round(v * cfg.area_drop_max * side) for v, side in zip(u[11:13], size))
        box = (int(u[13] * (size[0] - rows + 1)), int(u[14] * (size[1] - columns + 1)), rows, columns)
    interval = (0.0, 0.0)
    if u[15] < cfg.time_drop:
        length = float(u[16]) * cfg.time_drop_max
        first = float(u[17]) * (1 - length)
        interval = (first, first + length)
    return Transform(
        source=(height, width),
        crop=(crop[0] - shift_y, crop[1] - shift_x, crop[2], crop[3]),
        size=size,
        rotation_deg=(2 * float(u[6]) - 1) * cfg.max_rotation_deg,
        scale=(1 + cfg.max_scale) ** (2 * float(u[7]) - 1),
        flip_x=bool(u[8] < cfg.flip_x),
        flip_y=bool(u[9] < cfg.flip_y),
        flip_polarity=bool(u[18] < cfg.flip_polarity),
        reverse_time=bool(u[19] < cfg.reverse_time),
        event_drop=float(u[20]) * cfg.max_event_drop,
        area_drop=box,
        time_drop=interval,
        noise=float(u[21]) * cfg.max_noise,
        seed=seed,
    )


def draw_grid_crop(cfg: AugmentConfig, rng: np.random.Generator, canvas: Size) -> Transform | None:
    """Draws the crop of a canvas whose edges lie between patches; None without `grid_crop`.

    Args:
        cfg: size of the crop and of a patch.
        rng: where from; nothing is drawn where there is no crop.
        canvas: (height, width) of what is cropped, at least as large as the crop.
    """
    rows, columns = cfg.grid_crop
    if not rows:
        return None
    spare = ((canvas[0] - rows) // cfg.grid_px, (canvas[1] - columns) // cfg.grid_px)
    top, left = (cfg.grid_px * int(rng.integers(count + 1)) for count in spare)
    return Transform(source=canvas, crop=(top, left, rows, columns), size=(rows, columns))


def fit(source: Size, size: Size, how: str) -> Transform:
    """The transform without randomness: from a sensor's (height, width) to an output's, by "pad" or "resize".

    Raises:
        ValueError: how is neither.
    """
    if how not in ("pad", "resize"):
        raise ValueError(f"fit = {how!r} is not one of pad, resize")
    return Transform.pad(source, size) if how == "pad" else Transform.resize(source, size)
