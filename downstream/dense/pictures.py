"""Sheets of panels for people: events, prediction and truth side by side, with a legend; drawn with Pillow alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from downstream.segmentation.palette import IGNORE, colourise
from gep.events.render import magnified

INK = (36, 41, 47)
NONE = (222, 226, 230)
"""Of pixels without a depth: light grey."""
_WHITE = (255, 255, 255)
_PANEL = 256  # px: the least width of a panel, so that its title fits and a pixel of a tiny sensor is seen

# Every 15th of matplotlib's 256 colours; straight lines between them are within 5 of 255.
# Source: viridis (van der Walt and Smith 2015, CC0).
_VIRIDIS = np.array([
    (68, 1, 84), (72, 23, 105), (71, 42, 122), (67, 61, 132), (61, 78, 138), (53, 94, 141), (46, 109, 142),
    (41, 123, 142), (35, 137, 142), (31, 151, 139), (33, 165, 133), (46, 179, 124), (70, 192, 111), (101, 203, 94),
    (137, 213, 72), (176, 221, 47), (216, 226, 25), (253, 231, 37),
])  # fmt: skip


def viridis(values: np.ndarray) -> np.ndarray:
    """Perceptually uniform colours, from dark violet to light yellow.

    Args:
        values: (…) float, clipped to [0, 1].
    Returns:
        uint8 (…, 3).
    """
    at = np.clip(values, 0, 1) * (len(_VIRIDIS) - 1)
    channels = [np.interp(at, np.arange(len(_VIRIDIS)), _VIRIDIS[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


class Legend(Protocol):
    """What a value looks like, and how a reader learns it."""

    def picture(self, values: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) of a map of values (H, W)."""

    @property
    def colours(self) -> np.ndarray:
        """uint8 (K, 3): all that `picture` may use."""

    def draw(self, width: int, size: int) -> Image.Image:
        """The key to them, `width` pixels wide, in letters of `size` pixels."""


class ClassLegend:
    """Class ids, each with a colour.

    Args:
        classes: C names, in the order of the ids.
        colours: uint8 (C, 3).
    """

    def __init__(self, classes: Sequence[str], colours: np.ndarray):
        if len(classes) != len(colours):
            raise ValueError(f"{len(colours)} colours for {len(classes)} classes; give each class one")
        self.classes, self.own = tuple(classes), np.asarray(colours, np.uint8)

    def picture(self, values: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) of class ids (H, W)."""
        return colourise(values, self.own)

    @property
    def colours(self) -> np.ndarray:
        """uint8 (C + 1, 3), the last of pixels without a label."""
        return np.concatenate([self.own, np.array([IGNORE], np.uint8)])

    def draw(self, width: int, size: int) -> Image.Image:
        """Squares with names beside them, in as many lines as they need."""
        line, gap, box = round(1.6 * size), size, round(1.1 * size)
        placed, x, row = [], 0, 0
        for name, colour in zip((*self.classes, "no label"), self.colours):
            text = shortened(name, size, width - box - gap // 2)
            needed = box + gap // 2 + text_width(text, size)
            if x and x + needed > width:
                x, row = 0, row + 1
            placed.append((x, row, text, colour))
            x += needed + gap
        key = Image.new("RGB", (width, (row + 1) * line), _WHITE)
        draw = ImageDraw.Draw(key)
        for x, row, text, colour in placed:
            top = row * line + (line - box) // 2
            draw.rectangle((x, top, x + box - 1, top + box - 1), fill=tuple(colour.tolist()), outline=INK)
            draw.text((x + box + gap // 2, row * line + line // 2), text, INK, font(size), anchor="lm")
        return key


class DepthLegend:
    """Metres, spread by their logarithm; near is light.

    Args:
        near_m, far_m: ends of the bar; what is nearer or farther looks like its end.
    """

    def __init__(self, near_m: float, far_m: float):
        if not 0 < near_m < far_m:
            raise ValueError(f"depth from {near_m} m to {far_m} m is no range; choose 0 < near < far")
        self.near_m, self.far_m = near_m, far_m

    def place(self, depth_m: Any) -> np.ndarray:
        """1 at near_m, 0 at far_m, straight in the logarithm; NaN where there is no depth."""
        depth = np.asarray(depth_m, float)
        depth = np.where(depth > 0, depth, np.nan)
        return np.log(self.far_m / depth) / np.log(self.far_m / self.near_m)

    def picture(self, values: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) of metres (H, W); NaN, 0 and below = none."""
        place = self.place(values)
        return np.where(np.isnan(place)[..., None], np.array(NONE, np.uint8), viridis(np.nan_to_num(place)))

    @property
    def colours(self) -> np.ndarray:
        """uint8 (129, 3): the bar in 128 steps, and that of no depth."""
        return np.concatenate([viridis(np.linspace(0, 1, 128)), np.array([NONE], np.uint8)])

    def ticks(self) -> list[float]:
        """Round metres on the bar, from near to far: 1, 2 and 5 times powers of ten, and both ends of the range."""
        powers = 10.0 ** np.arange(np.floor(np.log10(self.near_m)), np.ceil(np.log10(self.far_m)) + 1)
        inner = [float(value) for power in powers for value in power * np.array([1, 2, 5])]
        return [self.near_m, *(value for value in inner if self.near_m < value < self.far_m), self.far_m]

    def draw(self, width: int, size: int) -> Image.Image:
        """A bar with metres below it, and the colour of no depth beside it."""
        bar, side = round(0.9 * size), round(0.8 * size) + text_width("none", size)
        right = width - side - 2 * size - 1
        left = text_width(metres_text(self.near_m), size) // 2 + 1
        key = Image.new("RGB", (width, round(2.6 * size)), _WHITE)
        draw = ImageDraw.Draw(key)
        ramp = viridis(np.linspace(1, 0, right - left))
        key.paste(Image.fromarray(np.repeat(ramp[None], bar, axis=0)), (left, 0))
        draw.rectangle((left - 1, 0, right, bar), outline=INK)
        # The ends first, then from far to near what still has room.
        ticks = self.ticks()
        taken: list[tuple[float, float]] = []
        for metres in (ticks[0], ticks[-1], *ticks[-2:0:-1]):
            x = left + (1 - float(self.place(metres))) * (right - 1 - left)
            half = text_width(metres_text(metres), size) / 2
            if any(x + half + size / 2 > a and x - half - size / 2 < b for a, b in taken):
                continue
            taken.append((x - half, x + half))
            draw.line((x, bar, x, bar + size // 4), fill=INK)
            draw.text((x, bar + size // 3), metres_text(metres), INK, font(size), anchor="mt")
        box = round(0.9 * size)
        start = width - side - size // 2
        draw.rectangle((start, 0, start + box, bar), fill=NONE, outline=INK)
        draw.text((start + box + size // 3, bar // 2), "none", INK, font(size), anchor="lm")
        return key


def metres_text(value: float) -> str:
    """Metres in two digits."""
    return f"{float(f'{value:.2g}'):g} m"


class Sheet:
    """The layout of panels of one sensor beside each other: titles above, the key below, a line of text on top.

    Args:
        sensor: (height, width) of every panel [px]; small ones are magnified by a whole number.
        titles: of the panels, from left to right.
        legend: of the values.
    """

    def __init__(self, sensor: tuple[int, int], titles: Sequence[str], legend: Legend):
        self.titles, self.legend = tuple(titles), legend
        self.zoom = max(1, -(-_PANEL // sensor[1]))
        self.panel = (sensor[0] * self.zoom, sensor[1] * self.zoom)
        self.size = int(np.clip(self.panel[1] // 22, 12, 24))
        self._line, self._gap = round(1.6 * self.size), self.size // 2
        inner = len(titles) * self.panel[1] + (len(titles) - 1) * self._gap
        key = legend.draw(inner, self.size)
        self._top = self._gap + 2 * self._line
        self.shape = (self._top + self.panel[0] + self._gap + key.height + self._gap, inner + 2 * self._gap)
        self._page = Image.new("RGB", self.shape[::-1], _WHITE)
        self._page.paste(key, (self._gap, self._top + self.panel[0] + self._gap))
        draw = ImageDraw.Draw(self._page)
        for number, title in enumerate(self.titles):
            middle = self._left(number) + self.panel[1] // 2
            text = shortened(title, self.size, self.panel[1])
            draw.text((middle, self._gap + 1.5 * self._line), text, INK, font(self.size), anchor="mm")

    def draw(self, pictures: Sequence[np.ndarray], left: str = "", right: str = "") -> np.ndarray:
        """One page.

        Args:
            pictures: uint8 (h, w, 3) in the sensor's size, one a title.
            left, right: texts on the top line; the left one is shortened where both do not fit.
        Returns:
            uint8 of `shape` and 3 channels.
        """
        page = self._page.copy()
        draw = ImageDraw.Draw(page)
        for number, picture in enumerate(pictures):
            x = self._left(number)
            page.paste(Image.fromarray(magnified(picture, self.zoom)), (x, self._top))
            frame = (x - 1, self._top - 1, x + self.panel[1], self._top + self.panel[0])
            draw.rectangle(frame, outline=NONE)
        middle = self._gap + self._line // 2
        width = self.shape[1] - 2 * self._gap
        right = shortened(right, self.size, width)
        draw.text((self.shape[1] - self._gap, middle), right, INK, font(self.size), anchor="rm")
        room = width - text_width(right, self.size) - self.size
        draw.text((self._gap, middle), shortened(left, self.size, room), INK, font(self.size), anchor="lm")
        return np.asarray(page)

    @property
    def palette(self) -> np.ndarray:
        """uint8 (K, 3), K <= 256: what a page consists of, for a GIF; the inks of events in steps."""
        own = self.legend.colours
        grey = np.linspace(INK, _WHITE, 12).round().astype(np.uint8)
        steps = int(np.clip((256 - len(own) - len(grey) - 1) // 2, 2, 52))
        ramp = np.linspace(255, 0, steps).round().astype(np.uint8)
        full = np.full_like(ramp, 255)
        inks = [np.stack([full, ramp, ramp], axis=1), np.stack([ramp, ramp, full], axis=1)]
        return np.concatenate([own, np.array([NONE], np.uint8), grey, *inks])[:256]

    def _left(self, number: int) -> int:
        return self._gap + number * (self.panel[1] + self._gap)


@functools.lru_cache(maxsize=16)
def font(size: int) -> Any:
    """The font that comes with Pillow."""
    return ImageFont.load_default(size)


def text_width(text: str, size: int) -> int:
    """Pixels that a text is wide."""
    return int(np.ceil(font(size).getlength(text)))


def shortened(text: str, size: int, width: int) -> str:
    """The text, or as much of it as fits into `width` pixels, with dots for the rest."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(f"{text}...", size) > width:
        text = text[:-1]
    return f"{text}..." if text else ""
