"""Depth's configuration and what it says of itself: scale, loss, rows in metres, tables with their cut-offs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from downstream.dense.config import DenseConfig
from downstream.depth.loss import depth_loss
from downstream.depth.metrics import depth_rows, depth_summary, tables
from downstream.depth.scale import SCALES, DepthScale
from gep.data.listing import Listing
from gep.data.sampler import Batch
from gep.events.types import EventBatch

_PRINTED_SEQUENCES = 12  # more of them are in results.json alone


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """The log-normalised depth that is learned: y = 1 + ln(d / max_m) / alpha."""

    max_m: float = 0.0
    """farthest depth that can be predicted [m], y = 1; 0 = the data set's own (MVSEC, DSEC 80, EventScape 1000)"""
    alpha: float = 0.0
    """ln(farthest / nearest depth); 0 = the data set's own (MVSEC, DSEC 3.70378, EventScape 5.70378)"""

    def __post_init__(self) -> None:
        if bool(self.max_m) != bool(self.alpha):
            raise ValueError(f"scale.max_m={self.max_m} and scale.alpha={self.alpha} belong together: set both or none")


@dataclass(frozen=True, kw_only=True)
class DepthConfig(DenseConfig):
    """Everything that a depth run depends on."""

    run: str = "runs/depth"
    """folder of this run: config, metrics, results, checkpoints, best, export"""
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    gradient: float = 0.25
    """weight of the multi-scale gradient loss beside the scale-invariant one"""
    gradient_scales: int = 4
    """scales of the gradient loss: 1, 1/2, 1/4, …"""
    balance: float = 0.5
    """of the scale-invariant loss: 0 = plain squares of log depth, 1 = the absolute scale is free"""
    cutoffs_m: list[float] = field(default_factory=lambda: [30.0, 80.0])
    """truth beyond a cut-off [m] is left out of its table; the largest one's AbsRel chooses the best step"""
    sq_rel: Literal["gt", "gt2"] = "gt"
    """what SqRel is divided by: the truth, or its square (RAMNet)"""
    averaging: Literal["frame", "pixel"] = "frame"
    """mean of the frames' numbers (E2Depth, RAMNet), or as if all frames were one"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradient < 0 or self.gradient_scales < 1:
            raise ValueError(
                f"gradient={self.gradient} must not be negative, gradient_scales={self.gradient_scales} at least 1"
            )
        if not 0 <= self.balance <= 1:
            raise ValueError(f"balance={self.balance} is not in [0, 1]")
        if not self.cutoffs_m or len(set(self.cutoffs_m)) < len(self.cutoffs_m) or not min(self.cutoffs_m) > 0:
            raise ValueError(f"cutoffs_m={self.cutoffs_m} must be different distances above 0, such as [30, 80]")


@dataclass(frozen=True)
class Depth:
    """Metres a pixel; see `downstream.dense.task.Problem`."""

    name: ClassVar[Literal["depth"]] = "depth"
    target: ClassVar[Literal["depth"]] = "depth"
    score: ClassVar[str] = "abs_rel"
    higher: ClassVar[bool] = False
    num_outputs: ClassVar[int] = 1

    scale: DepthScale
    """Between metres and the sigmoid of the output."""
    cutoffs_m: tuple[float, ...] = (30.0, 80.0)
    """Of the tables."""
    gradient: float = 0.25
    """Weight of the gradient loss."""
    gradient_scales: int = 4
    """Its scales."""
    balance: float = 0.5
    """Of the scale-invariant loss."""
    sq_rel: Literal["gt", "gt2"] = "gt"
    """What SqRel is divided by."""
    averaging: Literal["frame", "pixel"] = "frame"
    """What the means are of."""

    @classmethod
    def of(cls, listing: Listing, cfg: DepthConfig) -> Depth:
        """The problem that a data set poses.

        Raises:
            ValueError: events in another view than the depth, or a data set whose scale is not known.
        """
        if listing.rectify is not None and not cfg.data.rectify:
            raise ValueError(
                f"data.rectify=false would leave events raw beside the rectified depth of {listing.name}; unset it"
            )
        if not cfg.scale.max_m and listing.name not in SCALES:
            raise ValueError(
                f"data.name={listing.name}: its depths have no customary scale; set scale.max_m to the farthest depth "
                "[m] and scale.alpha to ln(farthest / nearest)"
            )
        scale = DepthScale(cfg.scale.max_m, cfg.scale.alpha) if cfg.scale.max_m else SCALES[listing.name]
        return cls(
            scale,
            tuple(sorted(cfg.cutoffs_m)),
            cfg.gradient,
            cfg.gradient_scales,
            cfg.balance,
            cfg.sq_rel,
            cfg.averaging,
        )

    @property
    def task(self) -> dict[str, Any]:
        """The scale and what the numbers of its evaluation are of, for the export."""
        scale = {"max_depth_m": self.scale.max_m, "alpha": self.scale.alpha}
        return {**scale, "cutoff_m": self.cutoffs_m[-1], "averaging": self.averaging}

    def loss(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Scale-invariant log loss and gradients of an output (B, 1, H, W)."""
        truth = self.scale.to_target(batch["depth"])
        weights: dict[str, Any] = {"gradient": self.gradient, "scales": self.gradient_scales, "balance": self.balance}
        return depth_loss(normalised(output), truth, **weights)

    def rows(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Every metric of every frame, at all pixels and at those of the last window's events."""
        events = event_pixels(batch["events"], batch["windows"])
        return depth_rows(self.scale.to_metres(normalised(output)), batch["depth"], events, self.cutoffs_m)

    def summary(self, rows: Mapping[str, Tensor], listing: Listing) -> dict[str, Any]:
        """AbsRel, RMSE and δ1 at all pixels within the largest cut-off, and the tables of all cut-offs.

        Raises:
            ValueError: no pixel has depth within the largest cut-off.
        """
        table = depth_summary(dict(rows), sequences_of(listing), sq_rel=self.sq_rel, averaging=self.averaging)
        far = f"cut-off {self.cutoffs_m[-1]:g} m"
        score = {name: table[far]["all"][name] for name in ("abs_rel", "rmse", "delta1")}
        if math.isnan(score["abs_rel"]):
            raise ValueError(
                f"{listing.name} {listing.split}: none of {len(listing)} frames has depth within the {far}; nothing "
                "can be scored (raise cutoffs_m, or complete the data set)"
            )
        return {**score, "score_of": f"{far}, all pixels", **table}

    def table(self, summary: Mapping[str, Any]) -> str:
        """The tables of a summary as text, each with its cut-off in its header; those of few sequences one by one."""
        found = {name: dict(values) for name, values in summary.items() if isinstance(values, Mapping)}
        for values in found.values():
            values["sequences"] = values["sequences"] if len(values["sequences"]) <= _PRINTED_SEQUENCES else {}
        return tables(found)

    def merge(self, outputs: Sequence[Tensor]) -> Tensor:
        """The output (B, 1, H, W) whose log depth is the mean of the predictions'."""
        return torch.stack([normalised(output)[:, None] for output in outputs]).mean(dim=0).logit()


def normalised(output: Tensor) -> Tensor:
    """y in [0, 1] (B, H, W) float32 of an output (B, 1, H, W)."""
    return output[:, 0].float().sigmoid()


def event_pixels(events: EventBatch, windows: int) -> Tensor:
    """Where each sample's last window has at least one event, of either polarity.

    Args:
        events: B · windows windows, sample by sample, on the canvas.
        windows: of a sample.
    Returns:
        bool (B, H, W) on the events' device.
    """
    assert not events.rectified, "events of sub-pixel places belong to no single pixel"
    window = torch.repeat_interleave(torch.arange(len(events), device=events.device), events.offsets.diff())
    last = window % windows == windows - 1
    place = ((window[last] // windows) * events.height + events.y[last].long()) * events.width + events.x[last].long()
    found = torch.zeros(len(events) // windows * events.height * events.width, dtype=torch.bool, device=events.device)
    found[place] = True
    return found.view(-1, events.height, events.width)


def sequences_of(listing: Listing) -> list[str]:
    """The sequence of each sample; one for all where every sample is a recording of its own."""
    if listing.groups:
        return list(listing.groups)
    return [listing.split if listing.spans is None else listing._group(key) for key in listing.keys]
