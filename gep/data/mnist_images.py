"""The MNIST digits that N-MNIST's recordings were made of."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gep.data.view import View, encode_png

NMNIST_SENSOR = (34, 34)
MNIST_OFFSET = 3  # px: where the 28×28 digit sits in the 34×34 view of the sensor


@dataclass(frozen=True, eq=False)
class MnistImages:
    """28×28 digits, each placed where the sensor saw it."""

    digits: np.ndarray
    rows: np.ndarray

    def encoded(self, index: int) -> tuple[bytes, str]:
        return encode_png(self.digits[self.rows[index]]), ".png"

    def view(self, index: int) -> View:
        return View(NMNIST_SENSOR, place=(MNIST_OFFSET, MNIST_OFFSET))

    def __call__(self, index: int) -> np.ndarray:
        digit = self.digits[self.rows[index]]
        return self.view(index).apply(np.repeat(digit[..., None], 3, axis=2))


def mnist_images(root: Path, split: str, numbers: np.ndarray, files: tuple[Path, ...]) -> MnistImages | None:
    """The digits of recordings by their file numbers (MNIST index + 1); None where the root has no digits.

    Raises:
        ValueError: a damaged or incomplete file of digits.
    """
    stem = "train" if split == "train" else "t10k"
    npz = root / f"{'train' if split == 'train' else 'test'}_images.npz"
    idx = [root / f"{stem}-images{dot}idx3-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
    if npz.exists():
        source = npz
        try:
            with np.load(npz, allow_pickle=False) as archive:
                digits, index = archive["image"], archive["index"].astype(np.int64)
        except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{npz}: not an npz with `index` (N,) and `image` (N, 28, 28) ({error}); make it again, or move it away"
            ) from error
        if digits.ndim != 3 or digits.shape[1:] != (28, 28) or digits.dtype != np.uint8:
            raise ValueError(f"{npz}: image is {digits.dtype} {digits.shape}, expected uint8 (N, 28, 28)")
    elif found := [path for path in idx if path.exists()]:
        source, digits = found[0], _read_idx(found[0])
        index = np.arange(1, len(digits) + 1)
    else:
        return None
    if len(index) != len(digits):
        raise ValueError(f"{source}: {len(index)} indices for {len(digits)} images")
    row_of = {int(number): row for row, number in enumerate(index)}
    missing = [path for number, path in zip(numbers, files) if int(number) not in row_of]
    if missing:
        raise ValueError(
            f"{source}: {len(digits)} images for {len(files)} recordings, none for {len(missing)} of them "
            f"(the first is {missing[0]}); complete the file, or move it away to go on without images"
        )
    return MnistImages(digits, np.array([row_of[int(number)] for number in numbers], dtype=np.int64))


def _read_idx(path: Path) -> np.ndarray:
    """MNIST's IDX3 images: uint8 (N, 28, 28)."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            data = file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged ({error}); get it again") from error
    header = np.frombuffer(data[:16], dtype=">i4") if len(data) >= 16 else np.zeros(4)
    count, height, width = (int(v) for v in header[1:])
    if header[0] != 2051 or (height, width) != (28, 28) or len(data) != 16 + count * 784:
        raise ValueError(f"{path}: not a whole IDX3 file of 28×28 images; get train-images-idx3-ubyte again")
    return np.frombuffer(data, dtype=np.uint8, offset=16).reshape(count, 28, 28)
