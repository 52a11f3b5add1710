"""The simulator's run: images seen along their camera paths, chunk by chunk and step by step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch

from gep.events.advance import State, advance
from gep.events.camera import CameraPath
from gep.events.sensor import Pixels, SensorModel, draw, light

Outside = Literal["zeros", "border", "reflection"]
Sensor = SensorModel | Sequence[SensorModel]
"""One for all recordings, or one a recording."""
# Pixels stepped together: on a CPU the state of a chunk should stay in the cache.
CHUNK_PIXELS = {"cpu": 2**18, "cuda": 2**23}


def render(
    images: torch.Tensor, homography: torch.Tensor, *, height: int, width: int, outside: Outside = "zeros"
) -> torch.Tensor:
    """Images seen through homographies, bilinear.

    Args:
        images: (B, H0, W0) float.
        homography: (B, 3, 3), output pixel -> source pixel, pixel centres at the integers.
        height: output rows.
        width: output columns.
        outside: what lies beyond an image.

    Returns:
        (B, height, width) of the images' dtype.
    """
    x = torch.arange(width, device=images.device, dtype=images.dtype)
    y = torch.arange(height, device=images.device, dtype=images.dtype)[:, None]
    m = homography.to(images)[..., None, None]
    rows, columns = images.shape[1:]
    # Planes of x and of y, each written as a whole, then seen as pairs.
    grid = images.new_empty(len(images), 2, height, width).permute(0, 2, 3, 1)
    for axis, size in ((0, columns), (1, rows)):
        # grid_sample's coordinates, in which the image's outer edges are -1 and 1: (2 x' + 1) / size - 1.
        a = (2 * m[:, axis] + (1 - size) * m[:, 2]) / size
        torch.add(a[:, 1] * y + a[:, 2], a[:, 0] * x, out=grid[..., axis])
    if bool((m[:, 2, :2] != 0).any() | (m[:, 2, 2] != 1).any()):
        grid /= (m[:, 2, 1] * y + m[:, 2, 2] + m[:, 2, 0] * x)[..., None]
    sampled = torch.nn.functional.grid_sample(
        images[:, None], grid, mode="bilinear", padding_mode=outside, align_corners=False
    )
    return sampled[:, 0]


class Step(NamedTuple):
    """The events of one step of some recordings, in no particular order, all int64 (n,)."""

    recording: torch.Tensor
    """Counted from `first`."""
    pixel: torch.Tensor
    """row * width + column."""
    t: torch.Tensor
    """µs, in [begin, end)."""
    on: torch.Tensor
    """Polarity."""
    first: int
    num_recordings: int
    begin: int
    end: int


class Chunk(NamedTuple):
    """All events of some recordings, sorted by (recording, t, pixel, on)."""

    t: torch.Tensor
    """(n,) int64: µs since the path's begin, plus the path's length for each recording before."""
    pixel: torch.Tensor
    """(n,) int64."""
    on: torch.Tensor
    """(n,) uint8."""
    first: int
    num_recordings: int


def in_order(run: Run) -> Iterator[Chunk]:
    bits, (begin, end) = (run.num_pixels - 1).bit_length(), run.span
    keys: list[torch.Tensor] = []
    for step in run:
        # One number an event holds recording, time, pixel and polarity: sorting plain int64 is fastest.
        if step.num_recordings * (end - begin) >= 2 ** (62 - bits):
            raise ValueError(f"{end - begin} µs of {run.num_pixels} pixels are too long to sort; split the path")
        key = (step.recording * (end - begin) + (step.t - begin) << bits) + step.pixel
        keys.append(2 * key + step.on)
        if step.end == end:
            key = torch.cat(keys)
            key = torch.from_numpy(np.sort(key.numpy())) if key.device.type == "cpu" else key.sort().values
            keys = []
            pixel = (key >> 1) & (2**bits - 1)
            yield Chunk(key >> (bits + 1), pixel, (key & 1).byte(), step.first, step.num_recordings)


class View(Protocol):
    """B scenes as their cameras see them, at the times of a path."""

    @property
    def t_us(self) -> torch.Tensor:
        """(S,) int64 µs, ascending."""

    @property
    def device(self) -> torch.device:
        """Where the pictures are made."""

    @property
    def height(self) -> int:
        """Sensor rows."""

    @property
    def width(self) -> int:
        """Sensor columns."""

    def __len__(self) -> int:
        """B."""

    def watch(self, part: slice, sensors: Sequence[SensorModel]) -> Callable[[int], torch.Tensor]:
        """Index of a time -> (n, height, width) float in [0, 1]: the light on the pixels of the scenes `part`."""


class Stills:
    """Still images that move over the sensor: flat scenes, whose whole view a homography moves.

    Args:
        images: (B, H0, W0) float32 or float64 in [0, 1].
        path: B camera paths.
        height, width: of the sensor.
        outside: what lies beyond an image.
    Raises:
        ValueError: images of another shape, dtype or range, or not as many as paths.
    """

    def __init__(self, images: torch.Tensor, path: CameraPath, *, height: int, width: int, outside: Outside):
        _check(images, path, outside)
        self.images, self.path, self.outside = images, path, outside
        self.height, self.width, self.t_us, self.device = height, width, path.t_us, images.device

    def __len__(self) -> int:
        return len(self.images)

    def watch(self, part: slice, sensors: Sequence[SensorModel]) -> Callable[[int], torch.Tensor]:
        """See `View`; the optics blur the images once, before they move."""
        images = blur(light(sensors, self.images[part]), [sensor.blur_px for sensor in sensors], self.outside)
        homography = self.path.homography[part].to(images)
        size = {"height": self.height, "width": self.width}
        return lambda step: render(images, homography[:, step], outside=self.outside, **size)


class Run:
    """All steps of the first chunk of recordings, then those of the next: what all entries share.

    Raises:
        ValueError: a sensor of no size, or not as many sensors as scenes.
    """

    def __init__(self, view: View, sensor: Sensor, seeds: list[int]):
        if view.height < 1 or view.width < 1:
            raise ValueError(f"sensor size {view.height}x{view.width} must be at least 1x1")
        self.view, self.seeds = view, seeds
        self.num_pixels = view.height * view.width
        self.times = view.t_us.tolist()
        self.span = (self.times[0], self.times[-1])
        self.sensors = [sensor] * len(view) if isinstance(sensor, SensorModel) else list(sensor)
        if len(self.sensors) != len(view):
            raise ValueError(f"{len(view)} images but {len(self.sensors)} sensors; give one, or one an image")

    def __iter__(self) -> Iterator[Step]:
        size = max(1, CHUNK_PIXELS.get(self.view.device.type, 2**18) // self.num_pixels)
        for first in range(0, len(self.view), size):
            yield from self._chunk(slice(first, first + size))

    def _chunk(self, chunk: slice) -> Iterator[Step]:
        sensors, num_pixels, times = self.sensors[chunk], self.num_pixels, self.times
        watch = self.view.watch(chunk, sensors)
        brightness = watch(0).flatten()
        draws = draw(sensors, self.seeds[chunk], self.view.t_us, num_pixels, like=brightness)
        pixels = Pixels(sensors, num_pixels, brightness)
        level = pixels.level(brightness)
        state = State(level.clone(), draws.start, torch.zeros_like(level))
        for step, (begin, end) in enumerate(itertools.pairwise(times)):
            brightness = watch(step + 1).flatten()
            level = pixels.level(brightness)
            passed = pixels.passed(end - begin)
            if isinstance(passed, torch.Tensor) or passed != 1:
                level = torch.lerp(state.level, level, passed)
            pixel, t, on = advance(state, level, brightness, end - begin, pixels, draws, step)
            recording = torch.div(pixel, num_pixels, rounding_mode="floor")
            pixel = pixel - recording * num_pixels
            yield Step(recording, pixel, t + begin, on.long(), chunk.start, len(sensors), begin, end)


def _check(images: torch.Tensor, path: CameraPath, outside: str) -> None:
    if images.ndim != 3 or images.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"images must be float32 (B, H0, W0), got {images.dtype} {tuple(images.shape)}")
    if len(images) != len(path):
        raise ValueError(f"{len(images)} images but {len(path)} camera paths; give one path an image")
    if outside not in ("zeros", "border", "reflection"):
        raise ValueError(f"outside = {outside!r} is not one of zeros, border, reflection")
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        low, high = float(images.min()), float(images.max())
        raise ValueError(f"images span {low:g}..{high:g}; scale them to [0, 1]")


def blur(images: torch.Tensor, sigmas: Sequence[float], outside: str) -> torch.Tensor:
    """Gaussian blur, a sigma a picture [px]; 0 = none.

    Shifted and added by hand: a convolution's order of summation, and so its rounding, depends on the batch.
    """
    radius = math.ceil(3 * max(sigmas, default=0))
    if radius == 0:
        return images
    kernel = torch.tensor([_gaussian(sigma, radius) for sigma in sigmas]).to(images)
    # Replicated, too, for "reflection", which torch allows only up to the image's size.
    mode = "constant" if outside == "zeros" else "replicate"
    for axis, sides in ((2, (radius, radius, 0, 0)), (1, (0, 0, radius, radius))):
        padded = torch.nn.functional.pad(images[None], sides, mode=mode)[0]
        parts = [padded.narrow(axis, tap, images.shape[axis]) for tap in range(2 * radius + 1)]
        images = torch.zeros_like(images)
        for part, weight in zip(parts, kernel.unbind(1)):
            images += part * weight[:, None, None]
    return images


def _gaussian(sigma: float, radius: int) -> list[float]:
    """2 radius + 1 weights of sum 1; 0 from 3 sigma on."""
    reach = math.ceil(3 * sigma)
    taps = [
        math.exp(-0.5 * (tap / sigma) ** 2) if 0 < abs(tap) <= reach else float(tap == 0)
        for tap in range(-radius, radius + 1)
    ]
    return [tap / sum(taps) for tap in taps]
