"""What image sources need of a batch's windows: one window over all of them, or voxel grids of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gep.events.frames import AnyEvents, Grouped, Part, frames
from gep.events.represent import voxel_grid
from gep.events.stills import StillBatch
from gep.events.types import EventBatch


def whole(batch: Mapping[str, Any]) -> AnyEvents:
    """The events of a batch with one window a sample, from its first window's begin to its last one's end.

    Args:
        batch: of `gep.data.paired.collate`, T windows a sample in time order.
    Returns:
        B windows.
    """
    return _merged(batch["events"], int(batch["windows"]))


def _merged(events: AnyEvents, windows: int) -> Grouped | EventBatch:
    if isinstance(events, Grouped):
        parts = tuple(_merged_part(part, windows) for part in events.parts)
        return dataclasses.replace(events, parts=parts, windows=1)
    return _merged_part(events, windows)


def _merged_part(part: Part, windows: int) -> EventBatch:
    events = part.events() if isinstance(part, StillBatch) else part
    if windows == 1:
        return events
    # Windows of a sample follow each other in memory as in time: joining them only drops the bounds between.
    t0 = events.t0.unflatten(0, (-1, windows)).amin(dim=1)
    t1 = events.t1.unflatten(0, (-1, windows)).amax(dim=1)
    return dataclasses.replace(events, offsets=events.offsets[::windows].contiguous(), t0=t0, t1=t1)


@dataclass(frozen=True)
class SpanVoxels:
    """`voxel_grid` from each window's first event to its last, as the networks that make videos have it.

    The last event counts as 1 µs before the end, so that its weight differs by that share of the span from theirs.
    """

    bins: int = 5

    @property
    def channels(self) -> int:
        """Channels C of the (B, C, H, W) result."""
        return self.bins

    def __call__(self, batch: EventBatch, out: Tensor | None = None) -> Tensor:
        first, stop = batch.offsets[:-1], batch.offsets[1:]
        some = stop > first
        t0, t1 = batch.t0.clone(), batch.t1.clone()
        t0[some] = batch.t[first[some]]
        t1[some] = batch.t[stop[some] - 1] + 1
        return voxel_grid(dataclasses.replace(batch, t0=t0, t1=t1), self.bins, out=out)


def voxels(batch: Mapping[str, Any], bins: int = 5) -> Tensor:
    """Voxel grids of all windows.

    Args:
        batch: of `gep.data.paired.collate`, T windows a sample.
        bins: temporal bins.
    Returns:
        (B, T, bins, H, W) float32, ON counting +1 and OFF -1.
    """
    return frames(SpanVoxels(bins), batch["events"]).unflatten(0, (-1, int(batch["windows"])))


def robust_range(values: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Two percentiles of each sample.

    Args:
        values: (B, ...) float.
        low, high: in [0, 100], linearly interpolated.
    Returns:
        (B,) and (B,).
    """
    share = torch.tensor([low / 100, high / 100], device=values.device, dtype=values.dtype)
    found = torch.stack([torch.quantile(sample.flatten(), share) for sample in values])
    return found[:, 0], found[:, 1]


def ceiling(values: Tensor, percentile: float) -> Tensor:
    """A percentile of each sample's nonzero magnitudes; 1 where all are zero.

    Args:
        values: (B, C, H, W) float.
        percentile: in (0, 100], linearly interpolated.
    Returns:
        (B, 1, 1, 1), above 0.
    """
    found = [sample[sample != 0].abs() for sample in values]
    tops = [torch.quantile(own, percentile / 100) if len(own) else own.new_ones(()) for own in found]
    return torch.stack(tops).view(-1, 1, 1, 1)
