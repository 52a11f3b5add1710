"""A small image model trained on an image set's labels: the stand-in where no foundation model can be downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gep.data.image_list import list_images
from gep.data.listing import Listing
from gep.data.sampler import Batches, Sample
from gep.engine import TrainConfig, fit, make_accelerator
from gep.evaluate import collect
from gep.models.teacher import ImageModel
from gep.optim import OptimConfig

CANVAS = 36
_MEAN, _STD = 0.48, 0.24


class Pictures:
    """The luminance of every picture of a listing, in memory; in training with the draws that it is warped by."""

    def __init__(self, listing: Listing):
        self.listing = listing
        weights = np.array([0.299, 0.587, 0.114], np.float32)
        assert listing.image is not None
        views = (np.tensordot(weights, listing.image(index), axes=1) for index in range(len(listing)))
        self.grey = np.stack([view.round().astype(np.uint8) for view in views])

    def __len__(self) -> int:
        return len(self.listing)

    def sample(self, index: int, rng: np.random.Generator | None) -> Sample:
        draws = np.full(8, 0.5) if rng is None else rng.random(8)
        plain = float(rng is None)
        return {
            "key": self.listing.keys[index],
            "image": self.grey[index],
            "theta": _affine(draws, plain),
            "contrast": np.float32(1 + (1 - plain) * (0.8 * draws[6] - 0.4)),
            "shift": np.float32((1 - plain) * (0.4 * draws[7] - 0.2)),
            "label": int(self.listing.labels[index]),
        }


def collate_pictures(samples: Sequence[Sample]) -> dict[str, Any]:
    """Samples of `Pictures` -> batch of stacked tensors."""
    names = ("image", "theta", "contrast", "shift")
    batch: dict[str, Any] = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in names}
    batch["key"] = [sample["key"] for sample in samples]
    batch["label"] = torch.tensor([sample["label"] for sample in samples])
    return batch


def _affine(draws: np.ndarray, plain: float) -> np.ndarray:
    """grid_sample's theta float32 (2, 3): a crop, a mirror, a small rotation."""
    if plain:
        return np.eye(2, 3, dtype=np.float32)
    scale, aspect, angle = 0.6 + 0.5 * draws[0], np.exp(0.4 * draws[1] - 0.2), 0.4 * draws[2] - 0.2
    sides = np.array([scale * aspect, scale / aspect])
    cos, sin, mirror = np.cos(angle), np.sin(angle), 1.0 if draws[3] < 0.5 else -1.0
    matrix = np.array([[mirror * cos, -sin], [mirror * sin, cos]]) * sides
    place = (2 * draws[4:6] - 1) * np.abs(1 - sides)
    return np.concatenate([matrix, place[:, None]], axis=1).astype(np.float32)


class PictureTask(nn.Module):
    """Classification by the mean token: all the supervision that the stand-in has."""

    def __init__(self, model: ImageModel, label_smoothing: float = 0.1):
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing

    def logits(self, batch: dict[str, Any]) -> Tensor:
        """(B, K) of the warped pictures."""
        image = batch["image"][:, None].float() / 255
        grid = F.affine_grid(batch["theta"], list(image.shape), align_corners=False)
        image = F.grid_sample(image, grid, padding_mode="reflection", align_corners=False)
        contrast, shift = (batch[name][:, None, None, None] for name in ("contrast", "shift"))
        image = ((image - _MEAN) * contrast + _MEAN + shift).clamp(0, 1)
        return self.model(image.expand(-1, 3, -1, -1))

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """{"loss", "accuracy"} of a batch."""
        logits = self.logits(batch)
        loss = F.cross_entropy(logits, batch["label"], label_smoothing=self.label_smoothing)
        return {"loss": loss, "accuracy": (logits.argmax(dim=-1) == batch["label"]).float().mean().detach()}


def train_classifier(path: str, out: Path, *, steps: int, seed: int) -> float:
    """Trains the stand-in on an image set and exports it.

    Args:
        path: as data.images.path, with the splits train and test.
        out: the export.
    Returns:
        Top-1 on the test split in percent.
    """
    train, test = (Pictures(list_images(path, split, (CANVAS, CANVAS))) for split in ("train", "test"))
    encoder = {"arch": "nano", "in_chans": 3, "img_size": (CANVAS, CANVAS), "mean": [_MEAN] * 3, "std": [_STD] * 3}
    torch.manual_seed(seed)
    task = PictureTask(ImageModel(encoder, train.listing.classes))
    settings = TrainConfig(steps=steps, batch_size=64, seed=seed, log_every=10, save_every=0)
    accelerator = make_accelerator(settings, out.parent)

    def evaluate(_: nn.Module, step: int) -> dict[str, float]:
        rows = collect(
            lambda batch: {"right": (task.logits(batch).argmax(dim=1) == batch["label"]).float()},
            test,
            collate=collate_pictures,
            batch_size=250,
            accelerator=accelerator,
        )
        return {"top1": 100 * rows["right"].mean().item()}

    metrics = fit(
        task,
        Batches.of_run(train, collate_pictures, settings),
        train=settings,
        optim=OptimConfig(lr=2e-3, weight_decay=0.05, warmup_steps=100),
        accelerator=accelerator,
        run_dir=out.parent,
        evaluate=evaluate,
    )
    task.model.save(out, metrics=metrics)
    return metrics["eval/top1"]
