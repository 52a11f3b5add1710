"""A folder of images as an image model sees them, for windows to be compared with."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gep.data.view import View, decode
from gep.models.teacher import FrozenVFM

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_MOST, _AT_ONCE, _THUMB = 2000, 8, 128


class Images(NamedTuple):
    """What is kept of the images: nothing of their files."""

    names: list[str]
    thumbnails: list[np.ndarray]
    """uint8 (h, w, 3), at most 128 px a side."""
    vectors: Tensor
    """(M, P) float32, the model's pooled features."""
    teacher: str
    """Name of the model, without a place on this machine."""


def read_images(folder: Path, teacher: FrozenVFM, size: tuple[int, int], *, width: int) -> Images:
    """Reads and embeds the images of a folder and of those in it.

    Args:
        folder: at most 2,000 are taken, by name.
        teacher: the model that the encoder was aligned with.
        size: (height, width) that images are resized to where the model does not say [px].
        width: features of the encoder's vectors.
    Raises:
        FileNotFoundError: no such folder, or no images in it.
        ValueError: a file that is no image, or a model of another width.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--images {folder}: no such folder")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)[:_MOST]
    if not paths:
        raise FileNotFoundError(f"--images {folder}: holds no images ({', '.join(_SUFFIXES)})")
    if teacher.pooled_dim != width:
        raise ValueError(
            f"--teacher {teacher.spec} has {teacher.pooled_dim} features, the encoder's vectors {width}: name the "
            "model that it was aligned with"
        )
    view = View(teacher.image_size or teacher.native_size or size)
    thumbnails, vectors = [], []
    for start in range(0, len(paths), _AT_ONCE):
        read = [decode(path.read_bytes(), path.name) for path in paths[start : start + _AT_ONCE]]
        vectors.append(teacher.features(torch.from_numpy(np.stack([view.apply(each) for each in read])))[1].cpu())
        thumbnails += [_thumbnail(each) for each in read]
    kind, _, name = teacher.spec.partition(":")
    return Images(
        [path.stem for path in paths],
        thumbnails,
        torch.cat(vectors).float(),
        "the given image model" if kind == "export" else name,
    )


def _thumbnail(picture: np.ndarray) -> np.ndarray:
    image = Image.fromarray(picture)
    image.thumbnail((_THUMB, _THUMB))
    return np.asarray(image)
