"""Events from still images in motion: the pixels of a batch of recordings, stepped along a camera path."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from gep.events.camera import CameraPath
from gep.events.sensor import NMNIST_SENSOR, Draws, SensorModel, draw
from gep.events.types import Events

__all__ = ["NMNIST_SENSOR", "SensorModel", "render", "simulate_counts", "simulate_events"]

Outside = Literal["zeros", "border", "reflection"]
# Pixels stepped together: on a CPU the state of a chunk should stay in the cache.
_CHUNK_PIXELS = {"cpu": 2**18, "cuda": 2**23}


def simulate_events(
    images: torch.Tensor,
    path: CameraPath,
    *,
    sensor: SensorModel,
    height: int,
    width: int,
    outside: Outside = "zeros",
    generator: torch.Generator | None = None,
) -> list[Events]:
    """Recordings of still images that move over the sensor.

    One seed a recording is drawn from the generator, first of all: a recording depends on its seed, image and
    path, and not on the others in the batch or on the device of the images.

    Args:
        images: (B, H0, W0) float32 or float64 in [0, 1], on any device; float64 computes in float64.
        path: B camera paths; brightness changes linearly between its times.
        sensor: the pixel.
        height: sensor rows.
        width: sensor columns.
        outside: what lies beyond an image: "zeros" (black), "border" or "reflection".
        generator: CPU generator; None uses torch's global one.

    Returns:
        B recordings with path.t_us[0] <= t < path.t_us[-1], sorted by (t, y, x, p).

    Raises:
        ValueError: images of another shape, dtype or range, or not as many as paths.
    """
    recordings: list[Events] = []
    pixel_bits = (height * width - 1).bit_length()
    start, end = int(path.t_us[0]), int(path.t_us[-1])
    span = end - start
    keys: list[np.ndarray] = []
    for step in _run(images, path, sensor, height, width, outside, generator):
        # One number an event holds recording, time, pixel and polarity: sorting plain int64 is fastest.
        if step.num_recordings * span >= 2 ** (62 - pixel_bits):
            raise ValueError(f"{span} µs at {height}x{width} are too long to sort; split the path")
        key = (step.recording * span + (step.t - start) << pixel_bits) + step.pixel
        keys.append((2 * key + step.on).cpu().numpy())
        if step.end < end:
            continue
        key = np.sort(np.concatenate(keys))
        keys = []
        t, pixel, p = key >> (pixel_bits + 1), (key >> 1) & (2**pixel_bits - 1), (key & 1).astype(np.uint8)
        cuts = np.searchsorted(t, np.arange(step.num_recordings + 1) * span).tolist()
        for index, (a, b) in enumerate(itertools.pairwise(cuts)):
            y, x = (v.astype(np.uint16) for v in np.divmod(pixel[a:b].astype(np.uint32), np.uint32(width)))
            recordings.append(Events(t[a:b] - (index * span - start), x, y, p[a:b].copy(), height, width))
    return recordings


def simulate_counts(
    images: torch.Tensor,
    path: CameraPath,
    *,
    sensor: SensorModel,
    height: int,
    width: int,
    bins: int = 0,
    bounds: np.ndarray | torch.Tensor | None = None,
    outside: Outside = "zeros",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Histograms of the events that `simulate_events` gives for the same arguments, without these events.

    Args:
        images: see `simulate_events`.
        path: see `simulate_events`.
        sensor: see `simulate_events`.
        height: see `simulate_events`.
        width: see `simulate_events`.
        bins: number of equal windows T over the path; edge k lies at t0 + floor(k (t1 - t0) / T).
        bounds: instead of bins, (T, 2) integer µs [t0, t1) of each window; gaps and overlaps are allowed.
        outside: see `simulate_events`.
        generator: see `simulate_events`.

    Returns:
        (B, T, 2, height, width) float32 counts on the images' device; polarity 0 = OFF, 1 = ON.

    Raises:
        ValueError: both or neither of bins and bounds, or what `simulate_events` refuses.
    """
    if (bins > 0) == (bounds is not None):
        raise ValueError(f"give either bins >= 1 or bounds, got bins = {bins} and bounds = {bounds}")
    if bounds is None:
        t0, t1 = int(path.t_us[0]), int(path.t_us[-1])
        edges = [t0 + k * (t1 - t0) // bins for k in range(bins + 1)]
        windows = list(itertools.pairwise(edges))
    else:
        array = np.asarray(bounds.cpu() if isinstance(bounds, torch.Tensor) else bounds)
        if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iu":
            raise ValueError(f"bounds must be integer µs of shape (T, 2), got {array.dtype} {array.shape}")
        windows = array.tolist()
    counts = torch.zeros(len(images), len(windows), 2, height, width, device=images.device)
    flat = counts.view(-1)
    for step in _run(images, path, sensor, height, width, outside, generator):
        place = (step.recording + step.first) * len(windows)
        for window, (t0, t1) in enumerate(windows):
            if t1 <= step.begin or step.end <= t0:
                continue
            index = ((place + window) * 2 + step.on) * (height * width) + step.pixel
            if t0 > step.begin or t1 < step.end:
                index = index[(step.t >= t0) & (step.t < t1)]
            flat.index_add_(0, index, flat.new_ones(len(index)))
    return counts


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
    grid = images.new_empty(len(images), height, width, 2)
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


class _Step(NamedTuple):
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


def _run(
    images: torch.Tensor,
    path: CameraPath,
    sensor: SensorModel,
    height: int,
    width: int,
    outside: Outside,
    generator: torch.Generator | None,
) -> Iterator[_Step]:
    """All steps of the first chunk of recordings, then those of the next: what both entries share."""
    _check(images, path, height, width, outside)
    device = "cpu" if generator is None else generator.device
    seeds = torch.randint(2**62, (len(images),), generator=generator, device=device).tolist()
    times, num_pixels = path.t_us.tolist(), height * width
    size = max(1, _CHUNK_PIXELS.get(images.device.type, 2**18) // num_pixels)
    for first in range(0, len(images), size):
        chunk = slice(first, first + size)
        part, homography = images[chunk], path.homography[chunk].to(images)
        if sensor.blur_px:
            part = _blur(part, sensor.blur_px, outside)
        draws = draw(sensor, seeds[chunk], path.t_us, num_pixels, like=images)
        brightness = render(part, homography[:, 0], height=height, width=width, outside=outside).flatten()
        level = sensor.level(brightness)
        state = _State(level.clone(), draws.start, torch.zeros_like(level))
        for step, (begin, end) in enumerate(itertools.pairwise(times)):
            seen = render(part, homography[:, step + 1], height=height, width=width, outside=outside)
            brightness = seen.flatten()
            level = sensor.level(brightness)
            if sensor.cutoff_hz:
                passed = 1 - math.exp(-2e-6 * math.pi * sensor.cutoff_hz * (end - begin))
                level = torch.lerp(state.level, level, passed)
            pixel, t, on = _advance(state, level, brightness, end - begin, sensor, draws, step)
            recording = torch.div(pixel, num_pixels, rounding_mode="floor")
            pixel = pixel - recording * num_pixels
            yield _Step(recording, pixel, t + begin, on.long(), first, len(part), begin, end)


def _check(images: torch.Tensor, path: CameraPath, height: int, width: int, outside: str) -> None:
    if images.ndim != 3 or images.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"images must be float32 (B, H0, W0), got {images.dtype} {tuple(images.shape)}")
    if len(images) != len(path):
        raise ValueError(f"{len(images)} images but {len(path)} camera paths; give one path an image")
    if height < 1 or width < 1:
        raise ValueError(f"sensor size {height}x{width} must be at least 1x1")
    if outside not in ("zeros", "border", "reflection"):
        raise ValueError(f"outside = {outside!r} is not one of zeros, border, reflection")
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        low, high = float(images.min()), float(images.max())
        raise ValueError(f"images span {low:g}..{high:g}; scale them to [0, 1]")


def _blur(images: torch.Tensor, sigma: float, outside: str) -> torch.Tensor:
    radius = math.ceil(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1).to(images) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    # Replicated, too, for "reflection", which torch allows only up to the image's size.
    mode = "constant" if outside == "zeros" else "replicate"
    padded = torch.nn.functional.pad(images[:, None], (radius,) * 4, mode=mode)
    blurred = torch.nn.functional.conv2d(padded, kernel[None, None, None, :])
    return torch.nn.functional.conv2d(blurred, kernel[None, None, :, None])[:, 0]


@dataclass
class _State:
    """What the pixels of a chunk remember between steps, all (n,)."""

    level: torch.Tensor
    difference: torch.Tensor
    """Level minus stored level."""
    hold: torch.Tensor
    """Time from the begin of the coming step until a pixel leaves its reset, µs; <= 0 where it has."""


def _advance(
    state: _State,
    level: torch.Tensor,
    brightness: torch.Tensor,
    duration: int,
    sensor: SensorModel,
    draws: Draws,
    step: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Moves the state over one step, in which every level goes linearly to its new value.

    Only the few pixels in which something happens are followed, event by event.

    Returns:
        pixel (n,) int64, t (n,) int64 µs after the begin of the step, and on (n,) bool of the events.
    """
    rise = torch.sub(level, state.level, out=state.level)
    if sensor.leak_rate_hz:
        rise = rise + draws.threshold_on * (sensor.leak_rate_hz * 1e-6 * duration)
    before, state.level = state.difference, level
    state.difference = before + rise
    busy = (state.difference >= draws.threshold_on) | (state.difference <= draws.threshold_off)
    if sensor.refractory_us:
        busy |= state.hold > 0
    noise_pixel, noise_t, noise_on = draws.noise.at(step, sensor, brightness)
    busy[noise_pixel] = True

    pixel = busy.nonzero()[:, 0]
    slope = rise[pixel] / duration
    difference, now = before[pixel], state.hold[pixel].clamp_min(0)
    goal = torch.where(slope > 0, draws.threshold_on[pixel], draws.threshold_off[pixel])
    fired = torch.zeros_like(pixel)
    cursor = torch.searchsorted(noise_pixel, pixel)
    # A guard behind the last candidate, so that looking at the next one always works.
    noise_pixel = torch.nn.functional.pad(noise_pixel, (0, 1), value=-1)
    noise_t = torch.nn.functional.pad(noise_t, (0, 1), value=math.inf)
    noise_on = torch.nn.functional.pad(noise_on, (0, 1))
    found = [(pixel[:0], pixel[:0], noise_on[:0])]
    while len(pixel):
        crossing = torch.where(slope == 0, math.inf, now + (goal - difference) / slope)
        crossing = torch.maximum(crossing, now)  # rounding may put it a little before
        at_noise = torch.where(noise_pixel[cursor] == pixel, noise_t[cursor], math.inf)
        by_noise = at_noise < crossing
        t = torch.minimum(crossing, at_noise)

        over = (t >= duration).nonzero()[:, 0]
        rest = (duration - now[over]).clamp_min(0)
        state.difference[pixel[over]] = difference[over] + slope[over] * rest
        state.hold[pixel[over]] = now[over] - duration

        going = (t < duration).nonzero()[:, 0]
        pixel, slope, difference, now, goal, fired, cursor, t, by_noise = (
            v[going] for v in (pixel, slope, difference, now, goal, fired, cursor, t, by_noise)
        )
        fires = ~by_noise | (t >= now)  # noise is lost on a pixel in reset
        on = torch.where(by_noise, noise_on[cursor], slope > 0)
        found.append((pixel[fires], t[fires].long(), on[fires]))
        difference = torch.where(fires, 0, difference)
        now = torch.where(fires, t + sensor.refractory_us, now)
        cursor = cursor + by_noise
        if sensor.max_events_per_step:
            fired = fired + fires
            now = torch.where(fired >= sensor.max_events_per_step, now.clamp_min(duration), now)
    pixels, times, polarities = (torch.cat(column) for column in zip(*found))
    return pixels, times, polarities
