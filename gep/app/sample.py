"""The page's built-in recordings: simulated when the page starts, the same for everybody, nothing downloaded."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gep.data.scene_textures import Thing, patterns
from gep.data.scenes import SceneConfig, draw_scenes
from gep.events.sensor import NATURAL_SENSOR
from gep.events.simulate import simulate_view
from gep.events.types import Events

_SIDE = 96
_LARGE = SceneConfig(
    height=144, width=192, focal_px=240.0, windows=30, objects=(3, 3), speed_m_s=(0.9, 1.0), turn_hz=(0.7, 1.2),
    contrast=(0.06, 0.07),
)  # fmt: skip
_SMALL = SceneConfig(windows=30, objects=(2, 2))


def large_scene() -> Events:
    """Cards with patterns and letters before a camera in motion: 192 columns, 144 rows, 1.2 s."""
    rng = np.random.default_rng(5)
    things = [Thing(each.name, _enlarged(each.texture)) for each in patterns(4, rng)]
    things.append(Thing("letters", _letters("GEP"), np.ones((1, _SIDE, _SIDE), np.float32)))
    return _recorded(things, _LARGE, 5)


def small_scene() -> Events:
    """The same on the 48 by 48 pixels that the models of `make demo` read."""
    return _recorded(patterns(40, np.random.default_rng(3)), _SMALL, 3)


def _recorded(things: list[Thing], config: SceneConfig, seed: int) -> Events:
    scene = draw_scenes(1, things, [], config, np.random.default_rng(seed))
    return simulate_view(scene.layers, sensor=NATURAL_SENSOR, seeds=[seed])[0]


def _enlarged(textures: np.ndarray) -> np.ndarray:
    """float32 (N, h, w) at the side of the letters."""
    pictures = (Image.fromarray(texture).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC) for texture in textures)
    return np.stack([np.asarray(picture) for picture in pictures]).clip(0, 1)


def _letters(text: str) -> np.ndarray:
    """float32 (1, _SIDE, _SIDE): bright letters on a dark card."""
    card = Image.new("L", (_SIDE, _SIDE), 40)
    font = ImageFont.load_default(44)
    ImageDraw.Draw(card).text((_SIDE // 2, _SIDE // 2), text, 235, font, anchor="mm")
    return np.asarray(card, np.float32)[None] / 255
