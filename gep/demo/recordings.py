"""N-MNIST-like recordings of given digits, written in N-MNIST's own layout beside their images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from gep.data.mnist_images import NMNIST_SENSOR
from gep.demo.digits import Digits
from gep.demo.standin import random_affine, warp
from gep.events.camera import nmnist_saccades
from gep.events.io.bin import write_bin
from gep.events.simulate import NMNIST_SENSOR as PIXEL
from gep.events.simulate import simulate_events

_BATCH = 250


def simulate_digits(digits: Digits, root: Path, *, split: str, copies: int, seed: int) -> int:
    """Simulates `copies` recordings of each digit; the first shows it as it is, the others a warped version.

    Args:
        digits: to be shown.
        root: folder that becomes an N-MNIST root: `Train/<digit>/%05d.bin` and `train_images.npz`, or Test.
        split: "train" or "test".
        copies: recordings a digit, >= 1.
        seed: of warps, camera jitter and sensor.
    Returns:
        Number of recordings.
    """
    folder = root / split.capitalize()
    for digit in range(10):
        (folder / str(digit)).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, copies])
    generator = torch.Generator().manual_seed(seed)
    images = np.concatenate([digits.image] + [_warped(digits.image, rng) for _ in range(copies - 1)])
    labels = np.tile(digits.label, copies)
    for start in tqdm(range(0, len(images), _BATCH), desc=f"simulate {split}", leave=False, disable=None):
        batch = torch.from_numpy(images[start : start + _BATCH]).float() / 255
        path = nmnist_saccades(len(batch), image_size=images.shape[1:], sensor_size=NMNIST_SENSOR, generator=generator)
        recordings = simulate_events(
            batch, path, sensor=PIXEL, height=NMNIST_SENSOR[0], width=NMNIST_SENSOR[1], generator=generator
        )
        for offset, events in enumerate(recordings):
            number = start + offset + 1
            write_bin(folder / str(labels[number - 1]) / f"{number:05d}.bin", events)
    np.savez(
        root / f"{split}_images.npz",
        index=np.arange(1, len(images) + 1),
        label=labels.astype(np.uint8),
        image=images,
    )
    return len(images)


def _warped(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    theta = torch.from_numpy(np.stack([random_affine(rng) for _ in images]))
    return warp(torch.from_numpy(images), theta).round().clamp(0, 255).byte().numpy()
