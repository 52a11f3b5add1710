"""Segmentation's configuration and what it says of itself: classes, colours, loss, metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from downstream.dense.config import DenseConfig
from downstream.metrics import confusion, segmentation_metrics
from downstream.segmentation.loss import segmentation_loss
from downstream.segmentation.palette import palette
from gep.data.layout import IGNORE
from gep.data.listing import Listing
from gep.data.sampler import Batch

Colour = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig(DenseConfig):
    """Everything that a segmentation run depends on."""

    run: str = "runs/segmentation"
    """folder of this run: config, metrics, results, checkpoints, best, export"""
    dice: float = 1.0
    """weight of the Dice loss beside the cross-entropy"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dice < 0:
            raise ValueError(f"dice={self.dice} is negative; 0 turns it off")


@dataclass(frozen=True)
class Segmentation:
    """One class a pixel; see `downstream.dense.task.Problem`."""

    name: ClassVar[Literal["segmentation"]] = "segmentation"
    target: ClassVar[Literal["mask"]] = "mask"
    score: ClassVar[str] = "miou"
    higher: ClassVar[bool] = True

    classes: tuple[str, ...]
    """Names in the order of the masks' ids."""
    palette: tuple[Colour, ...]
    """RGB of each class."""
    dice: float = 1.0
    """Weight of the Dice loss."""

    @classmethod
    def of(cls, listing: Listing, dice: float = 1.0) -> Segmentation:
        """The problem that a data set poses.

        Raises:
            ValueError: a set that names no classes, or classes of recordings and not of masks.
        """
        of_recordings = bool((listing.labels >= 0).any())
        if not listing.classes or of_recordings:
            fault = "classes of recordings, not of masks" if of_recordings else "no classes"
            raise ValueError(
                f"data.name={listing.name} names {fault}, so that its masks cannot be learned from; a folder of your "
                "own says in ROOT/classes.txt what the ids 0, 1, 2, … are called, a name a line"
            )
        found = listing.notes.get("colours", "").split()
        if bad := [colour for colour in found if not re.fullmatch("-|#[0-9a-fA-F]{6}", colour)]:
            raise ValueError(f"data.name={listing.name}: {bad[0]!r} is no colour of a class; colours are #rrggbb or -")
        given = [None if colour == "-" else (*bytes.fromhex(colour[1:]),) for colour in found]
        colours = palette(listing.classes, given).tolist()
        return cls(tuple(listing.classes), tuple((red, green, blue) for red, green, blue in colours), dice)

    @property
    def num_outputs(self) -> int:
        """A logit a class."""
        return len(self.classes)

    @property
    def task(self) -> dict[str, Any]:
        """Classes and colours, for the export."""
        return {"classes": list(self.classes), "palette": [list(colour) for colour in self.palette]}

    def loss(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy and Dice of logits (B, C, H, W)."""
        return segmentation_loss(output, batch["mask"], ignore=IGNORE, dice=self.dice)

    def rows(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """{"confusion": (B, C, C) int64}."""
        prediction, truth = output.argmax(dim=1), batch["mask"].long()
        return {"confusion": confusion(prediction, truth, len(self.classes), ignore=IGNORE)}

    def summary(self, rows: Mapping[str, Tensor], listing: Listing) -> dict[str, Any]:
        """mIoU, Acc and mAcc [%] of one confusion matrix over the whole set, and the IoU of each class."""
        return segmentation_metrics(rows["confusion"].sum(dim=0), self.classes)

    def table(self, summary: Mapping[str, Any]) -> str:
        """mIoU, Acc and mAcc, and a line a class."""
        lines = [f"mIoU {summary['miou']:.2f} %   Acc {summary['acc']:.2f} %   mAcc {summary['macc']:.2f} %", "IoU [%]"]
        width = max(map(len, self.classes))
        for name, iou in summary["iou"].items():
            lines.append(f"  {name:<{width}}  " + ("absent from the truth" if iou is None else f"{iou:6.2f}"))
        return "\n".join(lines)

    def merge(self, outputs: Sequence[Tensor]) -> Tensor:
        """Logarithm of the mean probability, (B, C, H, W)."""
        return torch.stack([output.float().softmax(dim=1) for output in outputs]).mean(dim=0).log()
