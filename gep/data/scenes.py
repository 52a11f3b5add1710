"""Scenes with ground truth and no download: textured objects at several depths before a background, a camera in motion.

Every object is a plane, so that parallax, occlusion, masks and metric depth are exact at any time, and events come from
the simulator. `gep.data.scene_files` puts them on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gep.data.scene_textures import Thing, card, noise
from gep.events.layers import Layer, Layers

BACKGROUND = "background"
"""Name of class 0 of every mask."""
Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class SceneConfig:
    """What scenes look like; lengths in metres, with the camera at the origin at the end of the recording."""

    height: int = 48
    """sensor rows"""
    width: int = 48
    """sensor columns"""
    focal_px: float = 60.0
    """focal length [px]; 60 px for 48 columns is a field of view of 44 degrees"""
    windows: int = 4
    """windows a recording lasts, each with ground truth at its end"""
    window_us: int = 40_000
    """length of a window [µs]"""
    step_us: int = 5_000
    """the camera's path is followed in steps of this length [µs]"""
    objects: tuple[int, int] = (1, 3)
    """least and most objects in a scene"""
    size_m: Range = (1.1, 1.3)
    """sides of the objects' textures"""
    depth_m: Range = (1.6, 3.6)
    """depths of the objects' centres"""
    background_m: Range = (5.5, 6.5)
    """depth of the background where the optical axis meets it"""
    tilt_rad: float = 0.3
    """largest tilt of objects and background about the two axes of the picture"""
    roll_rad: float = 0.15
    """largest rotation of an object in its plane"""
    speed_m_s: Range = (2.0, 4.0)
    """typical speed of the camera, log-uniform"""
    turn_hz: Range = (2.5, 6.0)
    """frequencies of the waves that its path is made of, log-uniform"""
    forward: float = 0.3
    """speed along the optical axis as a share of that across it"""
    rotation_rad_s: float = 0.25
    """typical rate of rotation about each axis, uniform from 0"""
    contrast: Range = (0.1, 0.35)
    """of the background: standard deviation of its texture"""
    haze: float = 0.3
    """extinction of the air [1/m]: contrast falls with distance, as in fog"""
    airlight: float = 0.6
    """brightness of the air"""

    def __post_init__(self) -> None:
        for name in ("height", "width", "focal_px", "windows", "window_us", "step_us"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} of a scene must be above 0")
        if self.window_us % self.step_us:
            raise ValueError(f"window_us={self.window_us} must be a multiple of step_us={self.step_us}")
        if not 1 <= self.objects[0] <= self.objects[1]:
            raise ValueError(f"objects={self.objects}: give the least and the most, at least one")
        if self.depth_m[1] + 0.5 > self.background_m[0]:
            raise ValueError(f"background_m={self.background_m} must lie 0.5 m behind depth_m={self.depth_m}")

    @property
    def gap_m(self) -> float:
        """Least distance in depth between two objects, so that tilted ones do not cut each other.

        Nearly: twice as much would rule it out; as it is, two opposite corners do in fewer than 1 of 3,000 scenes.
        """
        return self.size_m[1] * np.sin(self.tilt_rad) * 1.1


@dataclass(frozen=True, eq=False)
class Scenes:
    """B scenes: what there is, to be watched and measured at any time of the camera's path."""

    layers: Layers
    labels: np.ndarray
    """(B, K) int64: class of each layer; layer 0 is the background of class 0."""
    classes: tuple[str, ...]

    def masks(self, step: int) -> np.ndarray:
        """(B, H, W) uint8 classes at a time of the path."""
        return self._mask(self.layers.truth(step).layer)

    def _mask(self, layer: torch.Tensor) -> np.ndarray:
        labels = torch.from_numpy(self.labels)
        return labels.gather(1, layer.flatten(1)).view_as(layer).byte().numpy()

    def truth(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(mask uint8 (B, H, W), depth float32 (B, H, W) metres) at a time of the path."""
        truth = self.layers.truth(step)
        return self._mask(truth.layer), truth.depth.float().numpy()


def draw_scenes(
    count: int,
    things: Sequence[Thing],
    backgrounds: Sequence[np.ndarray],
    config: SceneConfig,
    rng: np.random.Generator,
) -> Scenes:
    """Random scenes.

    Args:
        count: B.
        things: the classes 1 … of the masks, in this order.
        backgrounds: pictures float32 (h, w) in [0, 1] to cut backgrounds from; half of them are noise instead.
        config: sizes, depths, motion.
        rng: where from.
    """
    steps = config.windows * config.window_us // config.step_us
    t_us = torch.arange(steps + 1) * config.step_us
    rotation, position = _motion(count, t_us.numpy(), config, rng)
    most = config.objects[1]
    side = things[0].texture.shape[1]
    num = rng.integers(config.objects[0], most + 1, size=count)
    depth = np.sort(_apart(count, most, config, rng), axis=1)[:, ::-1]
    labels = np.zeros((count, most + 1), np.int64)
    layers = [_background(count, backgrounds, rotation, position, config, rng)]
    for slot in range(most):
        texture = np.zeros((count, side, side), np.float32)
        alpha = np.zeros_like(texture)
        for scene in np.flatnonzero(slot < num):
            label = int(rng.integers(len(things)))
            thing = things[label]
            pick = int(rng.integers(len(thing.texture)))
            labels[scene, slot + 1] = label + 1
            texture[scene] = thing.texture[pick]
            alpha[scene] = card(side, rng) if thing.alpha is None else thing.alpha[pick]
        z = depth[:, slot]
        centre = rng.uniform(0.12, 0.88, (count, 2)) * (config.width, config.height)
        size = rng.uniform(*config.size_m, count)
        matrix = _plane(centre, z, size / side, (side, side), rotation, position, config, rng, roll=config.roll_rad)
        layers.append(Layer(torch.from_numpy(texture), torch.from_numpy(alpha), torch.from_numpy(matrix)))
    names = (BACKGROUND, *(thing.name for thing in things))
    seen = Layers(tuple(layers), t_us, config.height, config.width, config.haze, config.airlight)
    return Scenes(seen, labels, names)


def _apart(count: int, most: int, config: SceneConfig, rng: np.random.Generator) -> np.ndarray:
    """(count, most) depths at least `gap_m` apart."""
    low, high = config.depth_m
    free = high - low - (most - 1) * config.gap_m
    if free < 0:
        raise ValueError(f"depth_m={config.depth_m} has no room for {most} objects {config.gap_m:.2f} m apart")
    return low + np.sort(rng.uniform(0, free, (count, most)), axis=1) + config.gap_m * np.arange(most)


def _background(
    count: int,
    pictures: Sequence[np.ndarray],
    rotation: np.ndarray,
    position: np.ndarray,
    config: SceneConfig,
    rng: np.random.Generator,
) -> Layer:
    side = 2 * max(config.height, config.width)
    texture = np.empty((count, side, side), np.float32)
    for scene in range(count):
        if len(pictures) and rng.random() < 0.5:
            picture = pictures[int(rng.integers(len(pictures)))]
            missing = [(0, max(0, side - size)) for size in picture.shape]
            picture = np.pad(picture, missing, mode="symmetric") if max(max(missing)) else picture
            y, x = (int(rng.integers(size - side + 1)) for size in picture.shape)
            cut = picture[y : y + side, x : x + side]
        else:
            cut = noise(side, rng)
        deviation = max(float(cut.std()), 1e-3)
        cut = (cut - cut.mean()) / deviation * rng.uniform(*config.contrast) + rng.uniform(0.3, 0.6)
        texture[scene] = cut.clip(0, 1)
    z = rng.uniform(*config.background_m, count)
    centre = np.tile([(config.width - 1) / 2, (config.height - 1) / 2], (count, 1))
    matrix = _plane(centre, z, z / config.focal_px, (side, side), rotation, position, config, rng, roll=np.pi)
    return Layer(torch.from_numpy(texture), None, torch.from_numpy(matrix))


def _plane(
    centre: np.ndarray,
    z: np.ndarray,
    texel_m: np.ndarray,
    texture: tuple[int, int],
    rotation: np.ndarray,
    position: np.ndarray,
    config: SceneConfig,
    rng: np.random.Generator,
    *,
    roll: float,
) -> np.ndarray:
    """float32 (B, S, 3, 3): sensor pixel -> texture pixel / Z of planes, as `Layer.homography` wants it.

    A texture pixel (u, v) is the point P = O + u a + v b in space; the camera at C with rotation R sees it at
    K R (P - C) = K R [a b O-C] (u, v, 1) = Z (x, y, 1), so that the inverse maps (x, y, 1) to (u, v, 1) / Z.
    """
    count = len(z)
    tilt = rng.uniform(-config.tilt_rad, config.tilt_rad, (2, count))
    axes = turn(tilt[0], tilt[1], rng.uniform(-roll, roll, count))  # columns: the plane's axes in space
    camera = np.array(
        [[config.focal_px, 0, (config.width - 1) / 2], [0, config.focal_px, (config.height - 1) / 2], [0, 0, 1]]
    )
    ray = np.concatenate([centre, np.ones((count, 1))], axis=1) @ np.linalg.inv(camera).T
    a, b = axes[:, :, 0] * texel_m[:, None], axes[:, :, 1] * texel_m[:, None]
    rows, columns = texture
    origin = ray * z[:, None] - (columns - 1) / 2 * a - (rows - 1) / 2 * b
    steps = position.shape[1]
    plane = np.stack(
        [*(np.broadcast_to(axis[:, None], (count, steps, 3)) for axis in (a, b)), origin[:, None] - position], axis=-1
    )
    return np.linalg.inv(camera @ rotation @ plane).astype(np.float32)


def turn(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """(..., 3, 3) rotations about z, then y, then x [rad]."""
    x, y, z = np.broadcast_arrays(x, y, z)
    one, zero = np.ones_like(x), np.zeros_like(x)

    def matrix(*cells: np.ndarray) -> np.ndarray:
        return np.stack(cells, axis=-1).reshape(*x.shape, 3, 3)

    about_x = matrix(one, zero, zero, zero, np.cos(x), -np.sin(x), zero, np.sin(x), np.cos(x))
    about_y = matrix(np.cos(y), zero, np.sin(y), zero, one, zero, -np.sin(y), zero, np.cos(y))
    about_z = matrix(np.cos(z), -np.sin(z), zero, np.sin(z), np.cos(z), zero, zero, zero, one)
    return about_x @ about_y @ about_z


def _motion(
    count: int, t_us: np.ndarray, config: SceneConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The camera: rotation (B, S, 3, 3) and position (B, S, 3) m, at the origin and unturned at the last time."""
    (slow, fast), (rare, often) = config.speed_m_s, config.turn_hz
    speed = np.exp(rng.uniform(np.log(slow), np.log(fast), (count, 1))) / np.sqrt(2)
    typical = np.concatenate(
        [speed, speed, speed * config.forward, config.rotation_rad_s * rng.random((count, 3))], axis=1
    )
    waves = 3
    pace = 2 * np.pi * np.exp(rng.uniform(np.log(rare), np.log(often), (count, 6, waves)))
    share = 0.1 + rng.random((count, 6, waves))
    share /= np.sqrt((share**2).sum(-1, keepdims=True))
    amplitude = np.sqrt(2) * typical[..., None] * share / pace
    phase = rng.uniform(0, 2 * np.pi, (count, 6, waves))
    seconds = (t_us * 1e-6)[:, None, None, None]
    path = (amplitude * np.sin(pace * seconds + phase)).sum(-1)  # (S, B, 6)
    path = (path - path[-1]).transpose(1, 0, 2)
    return turn(path[..., 3], path[..., 4], path[..., 5]), path[..., :3]
