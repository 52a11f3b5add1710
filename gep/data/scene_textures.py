"""What the objects of scenes look like: cards with a picture on them, procedural ones among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SIDE = 36
"""Texels of a side of an object's texture."""
_MARGIN = 2.0  # of the patterns' contrast: their edges are a texel or two wide


@dataclass(frozen=True, eq=False)
class Thing:
    """A class of objects: pictures of it."""

    name: str
    texture: np.ndarray
    """(N, h, w) float32 in [0, 1]."""
    alpha: np.ndarray | None = None
    """(N, h, w) float32 in [0, 1]; None = a shape is drawn for each object."""


def patterns(count: int, rng: np.random.Generator) -> list[Thing]:
    """The procedural classes, `count` textures each: checks, rings, stripes of any direction, pitch, contrast."""
    return [
        Thing("checks", _pattern(count, rng, lambda u, v: 1.5 * np.sin(u) * np.sin(v))),
        Thing("rings", _pattern(count, rng, lambda u, v: np.sin(np.hypot(u, v)))),
        Thing("stripes", _pattern(count, rng, lambda u, v: np.sin(u))),
    ]


def _pattern(count: int, rng: np.random.Generator, field: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """(count, SIDE, SIDE) float32: a field of two phases [rad], 7 to 13 texels a period, between two greys."""

    def drawn(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, (count, 1, 1))

    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    angle, pace = drawn(0, np.pi), 2 * np.pi / drawn(7, 13)
    u = (x * np.cos(angle) + y * np.sin(angle)) * pace + drawn(0, 2 * np.pi)
    v = (y * np.cos(angle) - x * np.sin(angle)) * pace + drawn(0, 2 * np.pi)
    dark, bright = drawn(0, 0.3), drawn(0.7, 1)
    return (dark + (bright - dark) * (_MARGIN * field(u, v) + 0.5).clip(0, 1)).astype(np.float32)


def noise(side: int, rng: np.random.Generator) -> np.ndarray:
    """(side, side) float32 in [0, 1]: a random texture between cloudy and grainy (power spectrum 1/f to 1/f^3)."""
    y, x = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)
    pitch = np.hypot(y, x)
    pitch[0, 0] = 1
    spectrum = pitch ** -rng.uniform(0.8, 1.6) * np.exp(-((pitch / 0.25) ** 2))
    spectrum[0, 0] = 0
    phases = np.exp(2j * np.pi * rng.random(pitch.shape))
    field = np.fft.irfft2(spectrum * phases, (side, side))
    return (0.5 + 0.2 * field / max(field.std(), 1e-9)).clip(0, 1).astype(np.float32)


def card(side: int, rng: np.random.Generator) -> np.ndarray:
    """(side, side) float32 opacity of a card: a superellipse between a disc and a square, its edge one texel soft."""
    axis = (np.arange(side) + 0.5) / side * 2 - 1
    power = np.exp(rng.uniform(np.log(2), np.log(12)))
    radius = (np.abs(axis[:, None]) ** power + np.abs(axis) ** power) ** (1 / power)
    return ((0.97 - radius) * side / 2 + 0.5).clip(0, 1).astype(np.float32)
