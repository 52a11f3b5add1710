"""A geometric and temporal transform of a sample, exact on event coordinates and alike for all its targets.

Coordinates: pixel i covers [i, i + 1), so its centre is i + 0.5, for events, crop boxes and torch's resizing
alike. An event is moved as the centre of its pixel and lands on the pixel it falls into; where several source
pixels fall into one, their events add up.

Order: rotation and scale about the sensor's centre, crop and resize, flips; then event dropping and noise, in
output coordinates; then polarity and time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numba
import numpy as np
import torch

from gep.events.types import Events

Box = tuple[int, int, int, int]
"""(top, left, height, width) in pixels; a box may reach beyond its frame."""
Array = TypeVar("Array", np.ndarray, torch.Tensor)


def centred(source: tuple[int, int], size: tuple[int, int]) -> Box:
    """The box of the given size about the centre of source; the odd pixel goes to the bottom and right."""
    # Truncation, not floor, so that the odd pixel is at the end for padding as for cropping.
    top, left = (int((inner - outer) / 2) for inner, outer in zip(source, size))
    return (top, left, *size)


@numba.njit(nogil=True, cache=True)
def _gather(rows, columns, y, x):
    """rows[y] and columns[x] in one pass."""
    new_y, new_x = np.empty(len(y), np.uint16), np.empty(len(x), np.uint16)
    for i in range(len(y)):
        new_y[i] = rows[y[i]]
        new_x[i] = columns[x[i]]
    return new_y, new_x


@dataclass(frozen=True)
class Transform:
    """One drawn augmentation: the same for all windows and targets of a sample, however often applied."""

    source: tuple[int, int]
    """(height, width) of the sensor it takes."""
    crop: Box
    """What is cropped from the sensor; beyond it lies emptiness (padding)."""
    size: tuple[int, int]
    """(height, width) it gives: the crop resized."""
    rotation_deg: float = 0.0
    """Rotation about the sensor's centre before the crop, from the x axis towards the y axis."""
    scale: float = 1.0
    """Magnification about the sensor's centre before the crop."""
    flip_x: bool = False
    flip_y: bool = False
    flip_polarity: bool = False
    reverse_time: bool = False
    event_drop: float = 0.0
    """Probability of each event to be dropped."""
    area_drop: Box = (0, 0, 0, 0)
    """Output box whose events are dropped."""
    time_drop: tuple[float, float] = (0.0, 0.0)
    """Interval dropped, as fractions of the sample's span."""
    noise: float = 0.0
    """Noise events added to each window, as a fraction of its events."""
    seed: int = 0
    """Decides which events are dropped and where noise falls."""

    @classmethod
    def identity(cls, height: int, width: int) -> Transform:
        """Leaves everything as it is."""
        return cls((height, width), (0, 0, height, width), (height, width))

    @classmethod
    def resize(cls, source: tuple[int, int], size: tuple[int, int]) -> Transform:
        """Resizes the whole sensor from (height, width) to (height, width)."""
        return cls(source, (0, 0, *source), size)

    @classmethod
    def pad(cls, source: tuple[int, int], size: tuple[int, int]) -> Transform:
        """Centres the sensor in a larger (or smaller) frame, pixel for pixel.

        The odd pixel of padding goes to the bottom and the right.
        """
        return cls(source, centred(source, size), size)

    @property
    def _turns(self) -> bool:
        return self.rotation_deg != 0 or self.scale != 1

    @cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Output row of each sensor row and output column of each sensor column; -1 = outside."""
        tables = []
        for axis, flip in enumerate((self.flip_y, self.flip_x)):
            offset, length, size = self.crop[axis], self.crop[axis + 2], self.size[axis]
            # floor((i + 0.5 - offset) * size / length) in whole numbers, so that ties are exact.
            to = (2 * (np.arange(self.source[axis]) - offset) + 1) * size // (2 * length)
            table = np.where((to >= 0) & (to < size), size - 1 - to if flip else to, -1)
            tables.append(table.astype(np.int32))
        return tables[0], tables[1]

    def _move(self, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Output rows and columns (int32) of sensor pixels; -1 = outside."""
        if not self._turns:
            rows, columns = self._tables
            return rows[y], columns[x]
        angle = math.radians(self.rotation_deg)
        cos, sin = self.scale * math.cos(angle), self.scale * math.sin(angle)
        centre_y, centre_x = self.source[0] / 2, self.source[1] / 2
        from_x, from_y = x + (0.5 - centre_x), y + (0.5 - centre_y)
        moved = []
        for axis, value in enumerate((sin * from_x + cos * from_y + centre_y, cos * from_x - sin * from_y + centre_x)):
            to = np.floor((value - self.crop[axis]) * (self.size[axis] / self.crop[axis + 2])).astype(np.int32)
            flipped = self.size[axis] - 1 - to if (self.flip_y, self.flip_x)[axis] else to
            moved.append(np.where((to >= 0) & (to < self.size[axis]), flipped, -1))
        return moved[0], moved[1]

    def _origin(self) -> tuple[np.ndarray, np.ndarray]:
        """(h, w) float64 sensor coordinates (y, x) from which each output pixel's centre comes."""
        axes = []
        for axis, flip in enumerate((self.flip_y, self.flip_x)):
            centre = (np.arange(self.size[axis]) + 0.5) * self.crop[axis + 2] / self.size[axis] + self.crop[axis]
            axes.append(centre[::-1] if flip else centre)
        y, x = np.meshgrid(*axes, indexing="ij")
        if self._turns:
            angle = math.radians(self.rotation_deg)
            cos, sin = math.cos(angle) / self.scale, math.sin(angle) / self.scale
            centre_y, centre_x = self.source[0] / 2, self.source[1] / 2
            from_y, from_x = y - centre_y, x - centre_x
            y, x = cos * from_y - sin * from_x + centre_y, sin * from_y + cos * from_x + centre_x
        return y, x

    def apply_events(self, windows: Sequence[Events], bounds: np.ndarray) -> tuple[list[Events], np.ndarray]:
        """The windows of a sample, transformed.

        Args:
            windows: T windows of the sensor size `source`.
            bounds: (T, 2) int64 µs [t0, t1) of each.

        Returns:
            T windows of size `size` and their bounds; in the opposite order when time is reversed.

        Raises:
            ValueError: a window of another sensor size, or bounds of another length.
        """
        bounds = np.asarray(bounds, np.int64)
        if bounds.shape != (len(windows), 2):
            raise ValueError(f"bounds are {bounds.shape} for {len(windows)} windows; give one [t0, t1) each")
        for index, window in enumerate(windows):
            if (window.height, window.width) != self.source:
                raise ValueError(
                    f"window {index} is {window.height}x{window.width}, the transform was drawn for "
                    f"{self.source[0]}x{self.source[1]}"
                )
        if not windows:
            return [], bounds
        # All windows at once: on small windows the time goes into calls, not into events.
        if len(windows) == 1:
            t, x, y, p = (getattr(windows[0], name) for name in "txyp")
        else:
            t, x, y, p = (np.concatenate([getattr(w, name) for w in windows]) for name in "txyp")
        offsets = np.zeros(len(windows) + 1, np.int64)
        np.cumsum([len(window) for window in windows], out=offsets[1:])
        begin, end = int(bounds[:, 0].min()), int(bounds[:, 1].max())
        rng = np.random.default_rng(self.seed) if self.event_drop or self.noise else None

        if self._keeps_all:
            y, x = _gather(*self._inside, y, x)
        else:
            y, x = self._move(y, x)
            kept = self._kept(t, y, x, begin, end, rng)
            if not kept.all():
                t, x, y, p = (array[kept] for array in (t, x, y, p))
                offsets = np.concatenate([[0], np.cumsum(kept)])[offsets]
            x, y = x.astype(np.uint16), y.astype(np.uint16)
        if self.flip_polarity != self.reverse_time:
            p = p ^ np.uint8(1)
        height, width = self.size
        moved = [
            Events(t[a:b], x[a:b], y[a:b], p[a:b], height, width)
            for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist())
        ]
        if self.noise and rng is not None:
            moved = [self._add_noise(w, edges, rng) for w, edges in zip(moved, bounds.tolist())]
        if self.reverse_time:
            mirror = begin + end
            moved = [
                dataclasses.replace(w, t=mirror - 1 - w.t[::-1], x=w.x[::-1], y=w.y[::-1], p=w.p[::-1])
                for w in reversed(moved)
            ]
            bounds = mirror - bounds[::-1, ::-1]
        return moved, bounds

    @property
    def _keeps_all(self) -> bool:
        """Whether no event can be lost: nothing is dropped, and no sensor pixel leaves the output."""
        drops = self.event_drop or self.time_drop[1] > self.time_drop[0] or (self.area_drop[2] and self.area_drop[3])
        return not (self._turns or drops) and all(int(table.min()) >= 0 for table in self._tables)

    @cached_property
    def _inside(self) -> tuple[np.ndarray, np.ndarray]:
        """`_tables` as uint16, for events that stay inside."""
        rows, columns = self._tables
        return rows.astype(np.uint16), columns.astype(np.uint16)

    def _kept(
        self, t: np.ndarray, y: np.ndarray, x: np.ndarray, begin: int, end: int, rng: np.random.Generator | None
    ) -> np.ndarray:
        """bool (N,): of events at output places (y, x), those that stay inside and are not dropped."""
        kept = (y | x) >= 0
        top, left, rows, columns = self.area_drop
        if rows and columns:
            kept &= (y < top) | (y >= top + rows) | (x < left) | (x >= left + columns)
        if self.time_drop[1] > self.time_drop[0]:
            first, last = (begin + round(part * (end - begin)) for part in self.time_drop)
            kept &= (t < first) | (t >= last)
        if self.event_drop and rng is not None:
            kept &= rng.random(len(t), np.float32) >= self.event_drop
        return kept

    def _add_noise(self, window: Events, edges: list[int], rng: np.random.Generator) -> Events:
        num = round(self.noise * len(window))
        if num == 0:
            return window
        t = np.concatenate([window.t, rng.integers(edges[0], edges[1], num)])
        y = np.concatenate([window.y, rng.integers(window.height, size=num, dtype=np.uint16)])
        x = np.concatenate([window.x, rng.integers(window.width, size=num, dtype=np.uint16)])
        p = np.concatenate([window.p, rng.integers(2, size=num, dtype=np.uint8)])
        order = np.argsort(t, kind="stable")
        return Events(t[order], x[order], y[order], p[order], window.height, window.width)

    def apply_image(self, image: Array, fill: float = 0.0) -> Array:
        """An image of the sensor's view, transformed: bilinear, antialiased when it gets smaller.

        Args:
            image: uint8 (C, H, W), array or tensor, (H, W) = `source`.
            fill: value beyond the image.

        Returns:
            uint8 (C, h, w) of the same kind.
        """
        self._check(image, "image", 3)
        top, left, rows, columns = self.crop
        inside = top <= 0 and left <= 0 and top + rows >= self.source[0] and left + columns >= self.source[1]
        if isinstance(image, np.ndarray) and inside and (rows, columns) == self.size and not self._turns:
            # Only a margin around it, pixel for pixel: the path of small sensors, worth the fifty times it gains.
            wider = np.full((len(image), rows, columns), round(fill), np.uint8)
            wider[:, -top : self.source[0] - top, -left : self.source[1] - left] = image
            return np.ascontiguousarray(wider[:, :: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1])
        out = torch.as_tensor(image).float() - fill
        if self._turns:
            whole = dataclasses.replace(
                Transform.identity(*self.source), rotation_deg=self.rotation_deg, scale=self.scale
            )
            y, x = whole._origin()
            grid = np.stack([2 * x / self.source[1] - 1, 2 * y / self.source[0] - 1], -1)
            out = torch.nn.functional.grid_sample(out[None], torch.from_numpy(grid)[None].float(), align_corners=False)[
                0
            ]
        top, left, rows, columns = self.crop
        if self.crop != (0, 0, *self.source):
            y0, y1 = max(top, 0), min(top + rows, self.source[0])
            x0, x1 = max(left, 0), min(left + columns, self.source[1])
            canvas = out.new_zeros(len(out), rows, columns)
            if y0 < y1 and x0 < x1:
                canvas[:, y0 - top : y1 - top, x0 - left : x1 - left] = out[:, y0:y1, x0:x1]
            out = canvas
        if (rows, columns) != self.size:
            out = torch.nn.functional.interpolate(
                out[None], self.size, mode="bilinear", align_corners=False, antialias=True
            )[0]
        axes = [axis for axis, flip in ((1, self.flip_y), (2, self.flip_x)) if flip]
        out = (out.flip(axes) if axes else out).add(fill).round().clamp(0, 255).to(torch.uint8)
        return out.numpy() if isinstance(image, np.ndarray) else out

    def apply_mask(self, mask: Array, ignore: int = 255) -> Array:
        """A label map (H, W) of any integer dtype, transformed: nearest, `ignore` beyond it."""
        return self._nearest(mask, "mask", ignore)

    def apply_depth(self, depth: Array) -> Array:
        """A depth map (H, W) float, transformed: nearest, so that NaN stays NaN; NaN beyond it.

        Metres are not changed by a crop that magnifies: the camera is taken to have another focal length.
        """
        return self._nearest(depth, "depth", math.nan)

    def _nearest(self, array: Array, name: str, fill: float) -> Array:
        self._check(array, name, 2)
        y, x = (np.floor(v).astype(np.int64) for v in self._origin())
        inside = (y >= 0) & (y < self.source[0]) & (x >= 0) & (x < self.source[1])
        plain = np.asarray(array)
        out = np.full(self.size, fill, plain.dtype)
        out[inside] = plain[y[inside], x[inside]]
        return out if isinstance(array, np.ndarray) else torch.from_numpy(out)

    def _check(self, array: Array, name: str, ndim: int) -> None:
        if array.ndim != ndim or tuple(array.shape[-2:]) != self.source:
            raise ValueError(
                f"{name} is {tuple(array.shape)}, expected {'(C, ' * (ndim == 3) or '('}"
                f"{self.source[0]}, {self.source[1]}); resize it to the sensor's view first"
            )
