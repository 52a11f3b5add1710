"""Events from still images in motion: the pixels of a batch of recordings, stepped along a camera path."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from gep.events.camera import CameraPath
from gep.events.sensor import NMNIST_SENSOR, SensorModel
from gep.events.stepping import Outside, Run, Sensor, Stills, View, in_order
from gep.events.stepping import render as render
from gep.events.types import EventBatch, Events

__all__ = [
    "NMNIST_SENSOR",
    "SensorModel",
    "render",
    "simulate_batch",
    "simulate_counts",
    "simulate_events",
    "simulate_view",
]


def simulate_events(
    images: torch.Tensor,
    path: CameraPath,
    *,
    sensor: Sensor,
    height: int,
    width: int,
    outside: Outside = "zeros",
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Events]:
    """Recordings of still images that move over the sensor.

    A recording depends on its seed, image, path and sensor, and not on the others in the batch or on the device
    of the images.

    Args:
        images: (B, H0, W0) float32 or float64 in [0, 1], on any device; float64 computes in float64.
        path: B camera paths; brightness changes linearly between its times.
        sensor: the pixel, or B of them.
        height: sensor rows.
        width: sensor columns.
        outside: what lies beyond an image: "zeros" (black), "border" or "reflection".
        generator: CPU generator that the seeds are drawn from, first of all; None uses torch's global one.
        seeds: B seeds to use instead.

    Returns:
        B recordings with path.t_us[0] <= t < path.t_us[-1], sorted by (t, y, x, p).

    Raises:
        ValueError: images of another shape, dtype or range, or not as many as paths, sensors or seeds.
    """
    stills = Stills(images, path, height=height, width=width, outside=outside)
    return simulate_view(stills, sensor=sensor, seeds=_seeds(len(images), seeds, generator))


def simulate_view(view: View, *, sensor: Sensor, seeds: Sequence[int]) -> list[Events]:
    """Recordings of anything that can say what its pixels see (`Stills`, `gep.events.layers.Layers`).

    Args:
        view: B scenes and their cameras.
        sensor: the pixel, or B of them.
        seeds: B numbers; a recording depends on its own alone.

    Returns:
        B recordings as `simulate_events` gives them.
    """
    recordings: list[Events] = []
    begin, end = int(view.t_us[0]), int(view.t_us[-1])
    for chunk in in_order(Run(view, sensor, _seeds(len(view), seeds, None))):
        t, pixel, p = (v.cpu().numpy() for v in (chunk.t, chunk.pixel, chunk.on))
        cuts = np.searchsorted(t, np.arange(chunk.num_recordings + 1) * (end - begin)).tolist()
        for index, (a, b) in enumerate(itertools.pairwise(cuts)):
            y, x = (v.astype(np.uint16) for v in np.divmod(pixel[a:b].astype(np.uint32), np.uint32(view.width)))
            own = t[a:b] - (index * (end - begin) - begin)
            recordings.append(Events(own, x, y, p[a:b].copy(), view.height, view.width))
    return recordings


def simulate_batch(
    images: torch.Tensor,
    path: CameraPath,
    *,
    sensor: Sensor,
    height: int,
    width: int,
    bounds: np.ndarray | torch.Tensor,
    outside: Outside = "zeros",
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
) -> EventBatch:
    """Windows of the events that `simulate_events` gives for the same arguments, made on the images' device.

    Args:
        images: see `simulate_events`, as the other arguments.
        bounds: (T, 2) or (B, T, 2) integer µs [t0, t1) of each window; gaps and overlaps are allowed.

    Returns:
        B * T windows, recording by recording.

    Raises:
        ValueError: bounds of another shape, or what `simulate_events` refuses.
    """
    windows = _windows(bounds, len(images))
    begin, end = int(path.t_us[0]), int(path.t_us[-1])
    parts: list[tuple[torch.Tensor, ...]] = []
    stills = Stills(images, path, height=height, width=width, outside=outside)
    for chunk in in_order(Run(stills, sensor, _seeds(len(images), seeds, generator))):
        own = windows[chunk.first : chunk.first + chunk.num_recordings]
        shift = torch.arange(len(own))[:, None] * (end - begin) - begin
        cuts = torch.searchsorted(chunk.t, (own.clamp(begin, end) + shift[..., None]).to(chunk.t.device))
        first, size = cuts[..., 0].flatten(), (cuts[..., 1] - cuts[..., 0]).clamp_min(0).flatten()
        place = torch.arange(int(size.sum()), device=size.device)
        place += (first - size.cumsum(0) + size).repeat_interleave(size)
        shift = shift.expand(own.shape[:2]).flatten().to(size.device).repeat_interleave(size)
        pixel = chunk.pixel[place]
        y = torch.div(pixel, width, rounding_mode="floor")
        parts.append((chunk.t[place] - shift, (pixel - y * width).short(), y.short(), chunk.on[place], size))
    empty = torch.zeros(0, dtype=torch.int64, device=images.device)
    columns = zip(*parts) if parts else [[empty], [empty.short()], [empty.short()], [empty.byte()], [empty]]
    t, x, y, p, size = (torch.cat(list(column)) for column in columns)
    t0, t1 = windows.to(t.device).flatten(0, 1).unbind(1)
    offsets = torch.nn.functional.pad(size.cumsum(0), (1, 0))
    return EventBatch(t, x, y, p, offsets, t0, t1, height, width, checked=True)


def simulate_counts(
    images: torch.Tensor,
    path: CameraPath,
    *,
    sensor: Sensor,
    height: int,
    width: int,
    bins: int = 0,
    bounds: np.ndarray | torch.Tensor | None = None,
    outside: Outside = "zeros",
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
) -> torch.Tensor:
    """Histograms of the events that `simulate_events` gives for the same arguments, without these events.

    Args:
        images: see `simulate_events`, as the other arguments.
        bins: number of equal windows T over the path; edge k lies at t0 + floor(k (t1 - t0) / T).
        bounds: instead of bins, (T, 2) or (B, T, 2) integer µs [t0, t1) of each window; gaps and overlaps are
            allowed.

    Returns:
        (B, T, 2, height, width) float32 counts on the images' device; polarity 0 = OFF, 1 = ON.

    Raises:
        ValueError: both or neither of bins and bounds, or what `simulate_events` refuses.
    """
    if (bins > 0) == (bounds is not None):
        raise ValueError(f"give either bins >= 1 or bounds, got bins = {bins} and bounds = {bounds}")
    if bounds is None:
        t0, t1 = int(path.t_us[0]), int(path.t_us[-1])
        edges = torch.tensor([t0 + k * (t1 - t0) // bins for k in range(bins + 1)])
        bounds = torch.stack([edges[:-1], edges[1:]], 1)
    windows = _windows(bounds, len(images))
    num = windows.shape[1]
    same = bool((windows == windows[:1]).all())
    spans = [(int(w[:, 0].min()), int(w[:, 1].max())) if len(w) else (0, 0) for w in windows.unbind(1)]
    begins, ends = (v.to(images.device) for v in windows.unbind(2))
    counts = torch.zeros(len(images), num, 2, height, width, device=images.device)
    flat = counts.view(-1)
    stills = Stills(images, path, height=height, width=width, outside=outside)
    for step in Run(stills, sensor, _seeds(len(images), seeds, generator)):
        recording = step.recording + step.first
        for window, (t0, t1) in enumerate(spans):
            if t1 <= step.begin or step.end <= t0:
                continue
            index = ((recording * num + window) * 2 + step.on) * (height * width) + step.pixel
            if not same:
                low, high = begins[recording, window], ends[recording, window]
                index = index[(step.t >= low) & (step.t < high)]
            elif t0 > step.begin or t1 < step.end:
                index = index[(step.t >= t0) & (step.t < t1)]
            flat.index_add_(0, index, flat.new_ones(len(index)))
    return counts


def _seeds(num: int, seeds: Sequence[int] | None, generator: torch.Generator | None) -> list[int]:
    if seeds is None:
        device = "cpu" if generator is None else generator.device
        return torch.randint(2**62, (num,), generator=generator, device=device).tolist()
    if len(seeds) != num:
        raise ValueError(f"{num} images but {len(seeds)} seeds; give one seed an image")
    return [int(seed) for seed in seeds]


def _windows(bounds: np.ndarray | torch.Tensor, num: int) -> torch.Tensor:
    """(B, T, 2) int64 on the CPU."""
    array = np.asarray(bounds.cpu() if isinstance(bounds, torch.Tensor) else bounds)
    good = array.ndim == 2 or (array.ndim == 3 and len(array) == num)
    if not good or array.shape[-1] != 2 or array.dtype.kind not in "iu":
        raise ValueError(f"bounds must be integer µs of shape (T, 2) or ({num}, T, 2), got {array.dtype} {array.shape}")
    return torch.from_numpy(array.astype(np.int64)).expand(num, *array.shape[-2:])
