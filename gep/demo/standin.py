"""A small image model trained on the spot, in the place of a vision foundation model that needs a download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gep.data.mnist_images import MNIST_OFFSET, NMNIST_SENSOR
from gep.data.sampler import Sample
from gep.demo.digits import Digits
from gep.models.teacher import ImageModel

CANVAS = 36
MEAN, STD = 0.13, 0.31  # of MNIST on the canvas, for all three channels


class DigitImages:
    """Digits on the model's canvas, each with the affine map that a training sample is warped by."""

    def __init__(self, digits: Digits):
        self.digits = digits
        self.canvas = on_canvas(digits.image)

    def __len__(self) -> int:
        return len(self.digits)

    def sample(self, index: int, rng: np.random.Generator | None) -> Sample:
        theta = np.eye(2, 3, dtype=np.float32) if rng is None else random_affine(rng)
        return {
            "key": f"digit {index}",
            "image": self.canvas[index],
            "theta": theta,
            "label": int(self.digits.label[index]),
        }


def collate_digits(samples: Sequence[Sample]) -> dict[str, Any]:
    """Samples of `DigitImages` -> batch: image uint8 (B, 36, 36), theta float32 (B, 2, 3), label (B,)."""
    return {
        "key": [sample["key"] for sample in samples],
        "image": torch.from_numpy(np.stack([sample["image"] for sample in samples])),
        "theta": torch.from_numpy(np.stack([sample["theta"] for sample in samples])),
        "label": torch.tensor([sample["label"] for sample in samples]),
    }


def on_canvas(images: np.ndarray) -> np.ndarray:
    """uint8 (N, 28, 28) -> (N, 36, 36), where the sensor sees the digit at rest and centred."""
    margin = (CANVAS - NMNIST_SENSOR[0]) // 2 + MNIST_OFFSET
    canvas = np.zeros((len(images), CANVAS, CANVAS), dtype=np.uint8)
    canvas[:, margin : margin + 28, margin : margin + 28] = images
    return canvas


def random_affine(rng: np.random.Generator) -> np.ndarray:
    """A small rotation, scaling, shear and shift, as grid_sample's theta float32 (2, 3) (RECIPE's ranges)."""
    angle, shear = rng.normal(0, 0.15), rng.normal(0, 0.15)
    scale = np.exp(rng.normal(0, 0.1, size=2))
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, shear], [0, 1]]) @ np.diag(scale)
    shift = rng.normal(0, 1.0, size=(2, 1)) * 2 / CANVAS
    return np.concatenate([matrix, shift], axis=1).astype(np.float32)


def warp(images: Tensor, theta: Tensor) -> Tensor:
    """(B, H, W) uint8 or float, (B, 2, 3) -> (B, H, W) float in the images' range; black outside."""
    grid = F.affine_grid(theta, [len(images), 1, *images.shape[-2:]], align_corners=False)
    return F.grid_sample(images[:, None].float(), grid, align_corners=False)[:, 0]


class StandInTask(nn.Module):
    """Digit classification by the mean token: the stand-in's only supervision.

    Args:
        model: three-channel image encoder with a class head.
        label_smoothing: of the cross-entropy.
    """

    def __init__(self, model: ImageModel, label_smoothing: float = 0.05):
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    def logits(self, batch: dict[str, Any]) -> Tensor:
        """(B, 10) of the warped images."""
        image = warp(batch["image"], batch["theta"]) / 255
        return self.model(image[:, None].expand(-1, 3, -1, -1))

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """{"loss", "accuracy"} of a batch."""
        logits = self.logits(batch)
        loss = F.cross_entropy(logits, batch["label"], label_smoothing=self.label_smoothing)
        accuracy = (logits.argmax(dim=-1) == batch["label"]).float().mean()
        return {"loss": loss, "accuracy": accuracy.detach()}


def build_model() -> ImageModel:
    """An untrained stand-in: the `nano` encoder on three channels, with ten classes."""
    encoder = {
        "arch": "nano",
        "in_chans": 3,
        "img_size": (CANVAS, CANVAS),
        "mean": [MEAN] * 3,
        "std": [STD] * 3,
    }
    return ImageModel(encoder, [str(digit) for digit in range(10)])
