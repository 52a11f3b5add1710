"""How a picture becomes the view of a sensor: bytes as they are on disk, and a geometry that can be written as JSON."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from gep.events.simulate import render


@dataclass(frozen=True)
class View:
    """From a decoded picture to the sensor's view."""

    size: tuple[int, int]
    """(H, W) of the view [px]."""
    place: tuple[int, int] | None = None
    """(row, column) at which the picture is put, on black; None = see homography."""
    homography: tuple[tuple[float, float, float], ...] | None = None
    """3 × 3, pixel of the view -> pixel of the picture (centres at the integers), black outside; None and no place =
    the picture is resized to the view."""
    resized: tuple[int, int] | None = None
    """(h, w) that a picture with a place is resized to before it is put there; None = it is put there as it is."""

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """uint8 (h, w, 3) -> uint8 (3, H, W)."""
        height, width = self.size
        if self.place is not None:
            row, column = self.place
            if self.resized is not None and picture.shape[:2] != self.resized:
                picture = _resize(picture, self.resized)
            view = np.zeros((height, width, 3), np.uint8)
            view[row : row + picture.shape[0], column : column + picture.shape[1]] = picture
        elif self.homography is not None:
            planes = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1))).float()
            matrix = torch.tensor([self.homography] * 3, dtype=torch.float64)
            view = render(planes.double(), matrix, height=height, width=width).round().byte().numpy().transpose(1, 2, 0)
        elif picture.shape[:2] != self.size:
            view = _resize(picture, self.size)
        else:
            view = picture
        return np.ascontiguousarray(view.transpose(2, 0, 1))

    def to_json(self) -> dict[str, Any]:
        """A dict that JSON holds; `View.from_json` reads it back."""
        more = {} if self.resized is None else {"resized": list(self.resized)}
        return {"size": list(self.size), "place": self.place, "homography": self.homography, **more}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> View:
        """The view that `to_json` wrote."""
        place, homography, resized = (values.get(name) for name in ("place", "homography", "resized"))
        return cls(
            (int(values["size"][0]), int(values["size"][1])),
            None if place is None else (int(place[0]), int(place[1])),
            None if homography is None else tuple((float(a), float(b), float(c)) for a, b, c in homography),
            None if resized is None else (int(resized[0]), int(resized[1])),
        )


def _resize(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def decode(data: bytes, name: str) -> np.ndarray:
    """An image file's bytes -> uint8 (h, w, 3); greys become three equal channels.

    Raises:
        ValueError: no readable picture; the message begins with `name`.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: not a readable picture ({error})") from error


def encode_png(picture: np.ndarray) -> bytes:
    """uint8 (h, w) or (h, w, 3) -> the bytes of a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()
