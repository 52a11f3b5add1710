"""The pixel: how brightness becomes a level, what it takes to fire, and what is random about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class SensorModel:
    """How a pixel turns brightness in [0, 1] into events.

    A pixel compares its level, a function of brightness, with the level it stored at its last event. When the
    difference reaches a threshold, it emits an event and is held in reset for the refractory period; then it
    stores the level of that moment. A noise event resets it likewise.

    Source: ESIM (Rebecq et al. 2018) for the interpolated crossings; v2e (arXiv 2006.07722) for mismatch,
    leak (a drift of the stored level, which gives ON events) and noise that is rarer on bright pixels.
    """

    response: Literal["log", "linear", "power"] = "log"
    """Level as a function of brightness I: log(I + log_offset), I, or I**gamma."""
    gamma: float = 1.0
    """Exponent of the power response; with log, I is the picture's value to this power (2.2 for photographs)."""
    log_offset: float = 0.02
    """Added to brightness before the logarithm: dark current, as a fraction of full brightness."""
    invert: bool = False
    """Whether darkening gives ON events (the level changes sign), as N-MNIST's polarity bit has it."""
    threshold: float = 0.2
    """Change of level that triggers an event: natural-log units for log, else a fraction of full range."""
    off_ratio: float = 1.0
    """Threshold of OFF events relative to that of ON events."""
    threshold_mismatch: float = 0.03
    """Standard deviation over pixels of each threshold (ON and OFF apart), relative."""
    threshold_spread: float = 0.0
    """Standard deviation over recordings of all thresholds together, relative."""
    cutoff_hz: float = 0.0
    """Corner frequency of the photoreceptor's first-order low-pass, Hz; 0 = none."""
    blur_px: float = 0.0
    """Standard deviation of the optics' Gaussian blur, source pixels; 0 = none."""
    initial_spread: float = 0.0
    """Difference stored at the start: uniform in +- this many thresholds; 1 = a long history."""
    refractory_us: int = 0
    """Time after an event during which a pixel is held in reset, µs."""
    leak_rate_hz: float = 0.0
    """ON events per second of a pixel at constant brightness; initial_spread = 1 has them from the start."""
    shot_noise_hz: float = 0.0
    """Noise events per second of a dark pixel, both polarities together."""
    shot_noise_bright: float = 0.25
    """Noise rate of a fully bright pixel relative to a dark one (linear in between)."""
    shot_noise_on: float = 0.5
    """Fraction of the noise events that are ON."""
    max_events_per_step: int = 0
    """Most events of a pixel in one step of the path, the rest is lost; 0 = no limit."""

    def __post_init__(self) -> None:
        if self.response not in ("log", "linear", "power"):
            raise ValueError(f"response = {self.response!r} is not one of log, linear, power")
        for name in ("threshold", "off_ratio", "gamma", "log_offset"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be above 0")
        for name in ("threshold_mismatch", "threshold_spread", "cutoff_hz", "blur_px", "initial_spread",
                     "refractory_us", "leak_rate_hz", "shot_noise_hz", "shot_noise_bright",
                     "shot_noise_on", "max_events_per_step"):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} = {getattr(self, name)} must not be negative")
        for name in ("shot_noise_bright", "shot_noise_on", "initial_spread"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} = {getattr(self, name)} is a fraction; set it to at most 1")

    def level(self, brightness: torch.Tensor) -> torch.Tensor:
        """The level that brightness settles to, of any shape; brightness in [0, 1]."""
        if self.response == "log":
            level = torch.log(brightness + self.log_offset)
        elif self.response == "power":
            level = brightness**self.gamma
        else:
            level = brightness
        return -level if self.invert else level


# Fitted to 160 recordings by the error of simulated counts per pixel, polarity and 50 ms (continuous ranked
# probability score, so that the randomness fits too). The far background of real recordings shows noise of
# nearly one polarity, spread evenly in time.
NMNIST_SENSOR = SensorModel(
    response="power",
    gamma=1.6,
    invert=True,
    threshold=0.14,
    threshold_mismatch=0.13,
    threshold_spread=0.09,
    blur_px=0.5,
    refractory_us=300,
    shot_noise_hz=0.37,
    shot_noise_on=0.97,
    shot_noise_bright=1.0,
)
"""N-MNIST's sensor: the screen, the optics and the pixel together. Use with `nmnist_saccades`."""

NATURAL_SENSOR = SensorModel(
    response="log",
    gamma=2.2,
    log_offset=0.02,
    threshold=0.3,
    threshold_mismatch=0.1,
    cutoff_hz=200.0,
    blur_px=0.7,
    initial_spread=1.0,
    refractory_us=500,
    leak_rate_hz=0.05,
    shot_noise_hz=0.1,
)
"""A DAVIS- or DVS-like camera that looks at what a photograph shows; blur_px is in pixels of the still."""

VARIABLE = (
    "gamma", "log_offset", "threshold", "off_ratio", "threshold_mismatch", "threshold_spread", "cutoff_hz", "blur_px",
    "initial_spread", "refractory_us", "leak_rate_hz", "shot_noise_hz", "shot_noise_bright", "shot_noise_on",
)  # fmt: skip
"""What may differ between the recordings of a batch; `response`, `invert` and `max_events_per_step` may not."""


class Pixels:
    """The models of a chunk of recordings as one.

    Args:
        sensors: one a recording.
        num_pixels: height * width.
        like: a tensor of the dtype and device to compute in.
    Raises:
        ValueError: models that differ in more than `VARIABLE`.
    """

    def __init__(self, sensors: Sequence[SensorModel], num_pixels: int, like: torch.Tensor):
        self.sensors, self.num_pixels, self.like = sensors, num_pixels, like
        self.response, self.invert, self.max_events_per_step = fixed = _fixed(sensors[0])
        if any(_fixed(sensor) != fixed for sensor in sensors):
            raise ValueError("the sensors of one batch must agree in response, invert and max_events_per_step")
        self._known: dict[object, float | torch.Tensor] = {}
        self.refractory_us = self.each("refractory_us", lambda sensor: sensor.refractory_us)
        self.noise_slope = self.each("noise_slope", lambda sensor: sensor.shot_noise_bright - 1)

    def each(self, name: object, value: Callable[[SensorModel], float]) -> float | torch.Tensor:
        """A value of each model: a number where they agree, else (n,), one a pixel; remembered by name.

        It is computed as a Python number and rounded once, so that it is the same in either form.
        """
        if name not in self._known:
            values = [value(sensor) for sensor in self.sensors]
            same = values.count(values[0]) == len(values)
            column = torch.tensor([] if same else values, dtype=self.like.dtype).to(self.like.device)
            self._known[name] = values[0] if same else column.repeat_interleave(self.num_pixels)
        return self._known[name]

    def leak(self, duration: int) -> float | torch.Tensor:
        """Thresholds that the stored level drifts in some µs."""
        return self.each(("leak", duration), lambda sensor: sensor.leak_rate_hz * 1e-6 * duration)

    def passed(self, duration: int) -> float | torch.Tensor:
        """Share of a change of level that has passed the low-pass after some µs."""

        def share(sensor: SensorModel) -> float:
            rate = -2e-6 * math.pi * sensor.cutoff_hz
            return 1 - math.exp(rate * duration) if sensor.cutoff_hz else 1.0

        return self.each(("passed", duration), share)

    def level(self, brightness: torch.Tensor) -> torch.Tensor:
        """The level that the chunk's brightness (n,) settles to."""
        if self.response == "log":
            offset = self.each("log_offset", lambda sensor: sensor.log_offset)
            level = torch.log(brightness + offset)
            return -level if self.invert else level
        if len({sensor.gamma for sensor in self.sensors}) == 1:
            return self.sensors[0].level(brightness)
        parts = zip(self.sensors, brightness.split(self.num_pixels))
        return torch.cat([sensor.level(part) for sensor, part in parts])


def is_on(value: float | torch.Tensor) -> bool:
    """Whether a value of `Pixels.each` is other than 0 anywhere."""
    return isinstance(value, torch.Tensor) or value != 0


def light(sensors: Sequence[SensorModel], images: torch.Tensor) -> torch.Tensor:
    """Pictures (B, H0, W0) as the light that falls into the optics: what the log response's gamma is for."""
    gammas = [sensor.gamma if sensor.response == "log" else 1.0 for sensor in sensors]
    if all(gamma == 1 for gamma in gammas):
        return images
    return torch.stack([image**gamma for image, gamma in zip(images, gammas)])


def _fixed(sensor: SensorModel) -> tuple[str, bool, int]:
    return sensor.response, sensor.invert, sensor.max_events_per_step


class Noise(NamedTuple):
    """Candidate noise events of a chunk of recordings, sorted by (step, pixel, time)."""

    pixel: torch.Tensor
    """(M,) int64 index into the chunk's pixels."""
    t: torch.Tensor
    """(M,) float, µs after the begin of its step."""
    on: torch.Tensor
    """(M,) bool polarity."""
    rank: torch.Tensor
    """(M,) float, uniform: a candidate exists where the noise rate relative to the dark is above it."""
    edges: list[int]
    """Step s has the candidates edges[s]:edges[s + 1]."""

    def at(
        self, step: int, sensor: Pixels, brightness: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """pixel, t and on of one step's noise events, given the chunk's (n,) brightness."""
        here = slice(self.edges[step], self.edges[step + 1])
        pixel, t, on, rank = (v[here] for v in (self.pixel, self.t, self.on, self.rank))
        slope = sensor.noise_slope
        if len(pixel) == 0 or not is_on(slope):
            return pixel, t, on
        exists = rank < 1 + (slope[pixel] if isinstance(slope, torch.Tensor) else slope) * brightness[pixel]
        return pixel[exists], t[exists], on[exists]


class Draws(NamedTuple):
    """All that is random about a chunk of recordings, for its n = recordings * height * width pixels."""

    threshold_on: torch.Tensor
    """(n,) above 0."""
    threshold_off: torch.Tensor
    """(n,) below 0."""
    start: torch.Tensor
    """(n,) difference from the stored level at the start."""
    noise: Noise


def draw(
    sensor: SensorModel | Sequence[SensorModel],
    seeds: Sequence[int],
    t_us: torch.Tensor,
    num_pixels: int,
    *,
    like: torch.Tensor,
) -> Draws:
    """Draws what is random about some recordings; each depends on its own seed alone, on any device.

    Args:
        sensor: what to draw for, one for all or one a recording.
        seeds: one a recording.
        t_us: (S,) int64 µs, the path's times.
        num_pixels: height * width.
        like: a tensor of the dtype and device to give.
    """
    num, t_us = len(seeds), t_us.cpu() - int(t_us[0])
    sensors = [sensor] * num if isinstance(sensor, SensorModel) else sensor
    scale, start = torch.ones(num, 2, num_pixels), torch.zeros(num, num_pixels)
    candidates = [torch.zeros(4, 0, dtype=torch.float64)]
    generator = torch.Generator()
    for index, (seed, own) in enumerate(zip(seeds, sensors, strict=True)):
        generator.manual_seed(seed)
        if own.threshold_spread or own.threshold_mismatch:
            normal = torch.randn(2 * num_pixels + 1, generator=generator)
            mismatch = 1 + own.threshold_mismatch * normal[1:].view(2, -1)
            scale[index] = (1 + own.threshold_spread * normal[0]) * mismatch
        # Below a tenth of the nominal threshold a drawn pixel would do nothing but fire.
        scale[index].clamp_(min=0.1).mul_(own.threshold)
        scale[index, 1] *= own.off_ratio
        if own.initial_spread:
            start[index] = own.initial_spread * (2 * torch.rand(num_pixels, generator=generator) - 1)
        if own.shot_noise_hz:
            mean = own.shot_noise_hz * num_pixels * float(t_us[-1]) * 1e-6
            count = torch.poisson(torch.tensor(mean, dtype=torch.float64), generator=generator)
            uniform = torch.rand(4, int(count), generator=generator, dtype=torch.float64)
            uniform[0] = (uniform[0] * num_pixels).floor() + index * num_pixels
            uniform[2] = (uniform[2] < own.shot_noise_on).double()
            candidates.append(uniform)
    on, off = scale.to(like).unbind(1)
    start = start.to(like)
    start = start * torch.where(start > 0, on, off)

    pixel, time, polarity, rank = torch.cat(candidates, 1)
    time = time * float(t_us[-1])
    step = torch.searchsorted(t_us[1:].double(), time, right=True)
    order = torch.from_numpy(np.lexsort((time, pixel, step)))
    step = step[order]
    noise = Noise(
        pixel=pixel[order].long().to(like.device),
        t=(time[order] - t_us[step]).to(like),
        on=polarity[order].bool().to(like.device),
        rank=rank[order].to(like),
        edges=torch.searchsorted(step, torch.arange(len(t_us))).tolist(),
    )
    return Draws(on.flatten(), -off.flatten(), start.flatten(), noise)
