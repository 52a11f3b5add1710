"""Camera paths: how a still image moves over the sensor while it is being recorded."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

import numpy as np
import torch

Size = tuple[int, int]
Range = tuple[float, float]


@dataclass(frozen=True, eq=False)
class CameraPath:
    """Where every output pixel looks in the source image, at S times, for B recordings.

    `homography[b, s]` takes the output pixel (x, y, 1) to source image pixel coordinates (x', y', w'), which
    are divided by w'. Pixel centres are the integers in both. Between two times a simulator takes the
    brightness of a pixel to change linearly, so the steps should move the image by a pixel or less.
    """

    t_us: torch.Tensor
    """(S,) int64 µs, strictly ascending, S >= 2; the recording spans [t_us[0], t_us[-1])."""
    homography: torch.Tensor
    """(B, S, 3, 3) float32 or float64, output pixel -> source image pixel."""

    def __post_init__(self) -> None:
        t, matrix = self.t_us, self.homography
        if t.ndim != 1 or t.dtype != torch.int64 or len(t) < 2:
            raise ValueError(f"t_us must be int64 (S,) with S >= 2, got {t.dtype} {tuple(t.shape)}")
        if not bool((t[1:] > t[:-1]).all()):
            raise ValueError("t_us must ascend strictly; drop repeated times")
        if matrix.ndim != 4 or matrix.shape[1:] != (len(t), 3, 3) or not matrix.is_floating_point():
            raise ValueError(
                f"homography must be float (B, {len(t)}, 3, 3) for the {len(t)} times, "
                f"got {matrix.dtype} {tuple(matrix.shape)}"
            )
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError("homography holds NaN or infinity")

    def __len__(self) -> int:
        """Number of recordings B."""
        return len(self.homography)

    def __getitem__(self, index: slice) -> CameraPath:
        """The paths of a slice of the recordings."""
        return CameraPath(self.t_us, self.homography[index])

    @classmethod
    def from_shifts(
        cls, t_us: torch.Tensor, shift_px: torch.Tensor, *, image_size: Size, sensor_size: Size
    ) -> CameraPath:
        """Paths of pure translation at one source pixel per output pixel.

        Args:
            t_us: (S,) int64 µs.
            shift_px: (B, S, 2) float, position (x, y) of the image's centre from the sensor's centre, px.
            image_size: source (height, width).
            sensor_size: output (height, width).
        """
        if shift_px.ndim != 3 or shift_px.shape[1:] != (len(t_us), 2):
            raise ValueError(f"shift_px must be (B, {len(t_us)}, 2), got {tuple(shift_px.shape)}")
        matrix = torch.eye(3, dtype=shift_px.dtype, device=shift_px.device).repeat(*shift_px.shape[:2], 1, 1)
        for axis, (image, sensor) in enumerate(zip(reversed(image_size), reversed(sensor_size), strict=True)):
            matrix[..., axis, 2] = (image - sensor) / 2 - shift_px[..., axis]
        return cls(t_us, matrix)


@cache
def _saccades() -> tuple[tuple[float, ...], ...]:
    """Columns t_us, x_px, y_px of the table; measured from real recordings every 5 ms."""
    text = resources.files("gep.events").joinpath("nmnist_saccades.csv").read_text(encoding="utf-8")
    rows = [(1000 * float(t), float(x), float(y)) for t, x, y in list(csv.reader(text.splitlines()))[1:]]
    return tuple(zip(*rows, strict=True))


def nmnist_saccades(
    batch: int,
    *,
    image_size: Size,
    sensor_size: Size,
    step_us: int = 5000,
    offset_px: float = 0.1,
    generator: torch.Generator | None = None,
) -> CameraPath:
    """The three saccades of N-MNIST, as measured: bell-shaped speed, near rest at 80-115 and 185-225 ms.

    Args:
        batch: number of recordings B.
        image_size: source (height, width), (28, 28) for MNIST.
        sensor_size: output (height, width), (34, 34) for N-MNIST.
        step_us: time between two points in µs; the table's 5 ms are interpolated linearly.
        offset_px: standard deviation of a constant shift drawn for each recording, px.
        generator: CPU generator of the offsets.

    Returns:
        Path over 0-310 ms with 310000 // step_us + 1 points.

    Source: Orchard et al. 2015 for the apparatus; the table was fitted to recordings.
    """
    t, x, y = (torch.tensor(column, dtype=torch.float64) for column in _saccades())
    if not 0 < step_us <= int(t[-1]):
        raise ValueError(f"step_us = {step_us} must be in 1..{int(t[-1])}")
    t_us = torch.arange(0, int(t[-1]) + 1, step_us)
    left = (torch.searchsorted(t, t_us.double(), right=True) - 1).clamp(0, len(t) - 2)
    weight = (t_us - t[left]) / (t[left + 1] - t[left])
    position = torch.stack([torch.lerp(v[left], v[left + 1], weight) for v in (x, y)], -1).float()
    offset = offset_px * torch.randn(batch, 1, 2, generator=generator)
    return CameraPath.from_shifts(t_us, position + offset, image_size=image_size, sensor_size=sensor_size)


def smooth_random(
    batch: int,
    *,
    image_size: Size,
    sensor_size: Size,
    duration_us: int,
    steps: int,
    max_shift_px: float,
    max_rotation_rad: float = 0.0,
    max_scale: float = 0.0,
    max_shear: float = 0.0,
    max_perspective: float = 0.0,
    fit: Literal["none", "contain", "cover"] = "none",
    generator: torch.Generator | None = None,
) -> CameraPath:
    """Smooth random motion in which the translation never comes to rest.

    Each quantity is a sum of a few random low-frequency sinusoids. The two translations are built together
    as circular motions of which the first is always the fastest, so that the speed stays above
    max_shift_px per duration_us.

    Args:
        batch: number of recordings B.
        image_size: source (height, width).
        sensor_size: output (height, width).
        duration_us: time from first to last point, µs.
        steps: number of intervals; the path has steps + 1 points.
        max_shift_px: bound of the translation, output px.
        max_rotation_rad: bound of the rotation.
        max_scale: bound of the natural logarithm of the magnification.
        max_shear: bound of the shear (x per y).
        max_perspective: bound of how far w' departs from 1 at the sensor's border, along x and y; < 0.25.
        fit: "none" keeps one source pixel per output pixel; "contain" and "cover" zoom so that the whole
            image, or nothing but the image, fills the sensor at rest.
        generator: CPU generator.

    Returns:
        Path over [0, duration_us].
    """
    if fit not in ("none", "contain", "cover"):
        raise ValueError(f"fit = {fit!r} is not one of none, contain, cover")
    if steps < 1 or duration_us < steps:
        raise ValueError(f"steps = {steps} must be in 1..duration_us ({duration_us})")
    if not 0 <= max_perspective < 0.25:
        raise ValueError(f"max_perspective = {max_perspective} must be in [0, 0.25), beyond it w' may reach 0")
    t_us = torch.arange(steps + 1) * duration_us // steps
    phase = 2 * math.pi * t_us.double() / duration_us

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def wave() -> torch.Tensor:
        weight, frequency = uniform(batch, 3, 1) + 0.1, 0.3 + 1.2 * uniform(batch, 3, 1)
        weight = weight / weight.sum(1, keepdim=True)
        return (weight * torch.sin(frequency * phase + 2 * math.pi * uniform(batch, 3, 1))).sum(1)

    # Speeds are weight * frequency: at least 0.7 * 0.7 against at most 0.2 * 1 + 0.1 * 0.9.
    weights = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)[:, None]
    frequency = torch.stack([0.7 + 0.5 * uniform(batch), uniform(batch), 0.9 * uniform(batch)], 1)[..., None]
    sense = torch.sign(uniform(batch, 3, 1) - 0.5 + 1e-12)
    angle = sense * (frequency * phase) + 2 * math.pi * uniform(batch, 3, 1)
    shift_x, shift_y = (max_shift_px * (weights * turn(angle)).sum(1) for turn in (torch.cos, torch.sin))
    rotation, shear = max_rotation_rad * wave(), max_shear * wave()
    zoom = torch.exp(-max_scale * wave())
    if fit != "none":
        ratios = [image / sensor for image, sensor in zip(image_size, sensor_size, strict=True)]
        zoom = zoom * (max(ratios) if fit == "contain" else min(ratios))

    (image_y, image_x), (sensor_y, sensor_x) = ([(side - 1) / 2 for side in size] for size in (image_size, sensor_size))
    cos, sin = torch.cos(rotation), torch.sin(rotation)
    matrix = torch.zeros(batch, steps + 1, 3, 3, dtype=torch.float64)
    matrix[..., 0, 0], matrix[..., 0, 1] = zoom * cos, zoom * (shear * cos - sin)
    matrix[..., 1, 0], matrix[..., 1, 1] = zoom * sin, zoom * (shear * sin + cos)
    matrix[..., 2, 0] = max_perspective * wave() / max(sensor_x, 1)
    matrix[..., 2, 1] = max_perspective * wave() / max(sensor_y, 1)
    matrix[..., 2, 2] = 1
    # Acts about the centres: sensor centre + shift goes to the image's centre.
    to_centre = torch.eye(3, dtype=torch.float64).repeat(batch, steps + 1, 1, 1)
    to_centre[..., 0, 2], to_centre[..., 1, 2] = -sensor_x - shift_x, -sensor_y - shift_y
    from_centre = torch.eye(3, dtype=torch.float64)
    from_centre[0, 2], from_centre[1, 2] = image_x, image_y
    return CameraPath(t_us, (from_centre @ matrix @ to_centre).float())


@dataclass(frozen=True, eq=False)
class Wander:
    """Smooth random motion without an end, of a camera held in a hand: sums of sinusoids, known at any time.

    Unlike `smooth_random`, its pace does not depend on how long it is watched, so that single windows of a long
    recording can be made by themselves.
    """

    waves: np.ndarray
    """(4, K, 3) float64: for x [px], y [px], rotation [rad] and log magnification, K waves of amplitude, angular
    frequency [rad/s] and phase."""

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        *,
        speed_px_s: Range,
        turn_hz: Range,
        rotation_rad_s: float = 0.0,
        zoom_s: float = 0.0,
        max_shift_px: float = math.inf,
        num_waves: int = 3,
    ) -> Wander:
        """A random motion.

        Args:
            rng: where from.
            speed_px_s: range of a recording's typical (root mean square) speed, log-uniform, px/s.
            turn_hz: range of the waves' frequencies, log-uniform, Hz.
            rotation_rad_s: largest typical rate of rotation; uniform from 0, rad/s.
            zoom_s: largest typical rate of the log magnification; uniform from 0, 1/s.
            max_shift_px: bound of the shift along x and y; where it binds, the camera turns more often instead.
            num_waves: K.
        """
        (slow, fast), (rare, often) = speed_px_s, turn_hz
        speed = math.exp(rng.uniform(math.log(slow), math.log(fast))) if slow > 0 else rng.uniform(slow, fast)
        typical = np.array([speed / math.sqrt(2)] * 2 + [rotation_rad_s * rng.random(), zoom_s * rng.random()])
        pace = 2 * math.pi * np.exp(rng.uniform(math.log(rare), math.log(often), (4, num_waves)))
        share = 0.1 + rng.random((4, num_waves))
        # The mean square of a sum of waves is the sum of theirs: rate = amplitude * pace / sqrt(2) each.
        share /= np.sqrt((share**2).sum(1, keepdims=True))
        amplitude = math.sqrt(2) * typical[:, None] * share / pace
        excess = np.maximum(amplitude[:2].sum(1, keepdims=True) / max_shift_px, 1)
        amplitude[:2], pace[:2] = amplitude[:2] / excess, pace[:2] * excess
        return cls(np.stack([amplitude, pace, rng.uniform(0, 2 * math.pi, (4, num_waves))], -1))

    def homography(self, t_us: np.ndarray, *, image_size: Size, sensor_size: Size) -> np.ndarray:
        """Output pixel -> source pixel at any times, at one source pixel per output pixel but for the zoom.

        Args:
            t_us: (...) µs.
            image_size: source (height, width).
            sensor_size: output (height, width).

        Returns:
            (..., 3, 3) float32.
        """
        amplitude, pace, phase = self.waves[..., 0], self.waves[..., 1], self.waves[..., 2]
        seconds = np.asarray(t_us, np.float64)[..., None, None] * 1e-6
        x, y, rotation, zoom = np.moveaxis((amplitude * np.sin(pace * seconds + phase)).sum(-1), -1, 0)
        (image_y, image_x), (sensor_y, sensor_x) = ([(side - 1) / 2 for side in s] for s in (image_size, sensor_size))
        cos, sin = np.cos(rotation) * np.exp(-zoom), np.sin(rotation) * np.exp(-zoom)
        matrix = np.zeros((*x.shape, 3, 3))
        matrix[..., 0, 0], matrix[..., 0, 1] = cos, -sin
        matrix[..., 1, 0], matrix[..., 1, 1] = sin, cos
        # The pixel at the sensor's centre + (x, y) sees the image's centre.
        matrix[..., 0, 2] = image_x - cos * (sensor_x + x) + sin * (sensor_y + y)
        matrix[..., 1, 2] = image_y - sin * (sensor_x + x) - cos * (sensor_y + y)
        matrix[..., 2, 2] = 1
        return matrix.astype(np.float32)
