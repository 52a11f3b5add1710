"""Representations by name: each pure function with its parameters bound, a registry, and the config for YAML.

The functions, their formulas and conventions are in `represent_functions`; this is the module to import from.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch

from gep.events.represent_functions import check_percentile, check_positive
from gep.events.represent_functions import event_image as event_image
from gep.events.represent_functions import histogram as histogram
from gep.events.represent_functions import latest_timestamp as latest_timestamp
from gep.events.represent_functions import stacked_histogram as stacked_histogram
from gep.events.represent_functions import tencode as tencode
from gep.events.represent_functions import time_surface as time_surface
from gep.events.represent_functions import voxel_grid as voxel_grid
from gep.events.types import EventBatch


class Representation(Protocol):
    """What a representation offers: its channels, and the image of a batch; it is a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def channels(self) -> int:
        """Channels C of the (B, C, H, W) result."""

    def __call__(self, batch: EventBatch, out: torch.Tensor | None = None) -> torch.Tensor:
        """(B, C, H, W) float32 on the batch's device, written into `out` where given."""


@dataclass(frozen=True)
class Histogram:
    """`histogram` with its parameters bound."""

    log1p: bool = False
    scale: float = 1.0

    @property
    def channels(self) -> int:
        """Channels C of the (B, C, H, W) result."""
        return 2

    def __call__(self, batch: EventBatch, out: torch.Tensor | None = None) -> torch.Tensor:
        return histogram(batch, log1p=self.log1p, scale=self.scale, out=out)


@dataclass(frozen=True)
class StackedHistogram:
    """`stacked_histogram` with its parameters bound."""

    bins: int = 5
    log1p: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_positive("bins", self.bins)

    @property
    def channels(self) -> int:
        """Channels C of the (B, C, H, W) result."""
        return 2 * self.bins

    def __call__(self, batch: EventBatch, out: torch.Tensor | None = None) -> torch.Tensor:
        return stacked_histogram(batch, self.bins, log1p=self.log1p, scale=self.scale, out=out)


@dataclass(frozen=True)
class VoxelGrid:
    """`voxel_grid` with its parameters bound."""

    bins: int = 5
    split_polarity: bool = False

    def __post_init__(self) -> None:
        check_positive("bins", self.bins)

    @property
    def channels(self) -> int:
        """Channels C of the (B, C, H, W) result."""
        return 2 * self.bins if self.split_polarity else self.bins

    def __call__(self, batch: EventBatch, out: torch.Tensor | None = None) -> torch.Tensor:
        return voxel_grid(batch, self.bins, split_polarity=self.split_polarity, out=out)


@dataclass(frozen=True)
class TimeSurface:
    """`time_surface` with its parameters bound."""

    tau_us: float = 50_000.0

    def __post_init__(self) -> None:
        check_positive("tau_us", self.tau_us)

    @property
    def channels(self) -> int:
        """Channels C of the (B, C, H, W) result."""
        return 2

    def __call__(self, batch: EventBatch, out: torch.Tensor | None = None) -> torch.Tensor:
        return time_surface(batch, self.tau_us, out=out)


@dataclass(frozen=True)
class LatestTimestamp:
    """`latest_timestamp`, which has no parameters."""

    @property
    def channels(self) -> int:
        """Channels C of the (B, C, H, W) result."""
        return 2

    def __call__(self, batch: EventBatch, out: torch.Tensor | None = None) -> torch.Tensor:
        return latest_timestamp(batch, out=out)


@dataclass(frozen=True)
class Tencode:
    """`tencode`, which has no parameters."""

    @property
    def channels(self) -> int:
        """Channels C of the (B, C, H, W) result."""
        return 3

    def __call__(self, batch: EventBatch, out: torch.Tensor | None = None) -> torch.Tensor:
        return tencode(batch, out=out)


@dataclass(frozen=True)
class EventImage:
    """`event_image` with its parameters bound."""

    percentile: float = 99.0

    def __post_init__(self) -> None:
        check_percentile(self.percentile)

    @property
    def channels(self) -> int:
        """Channels C of the (B, C, H, W) result."""
        return 3

    def __call__(self, batch: EventBatch, out: torch.Tensor | None = None) -> torch.Tensor:
        return event_image(batch, percentile=self.percentile, out=out)


REPRESENTATIONS: dict[str, type] = {
    "histogram": Histogram,
    "stacked_histogram": StackedHistogram,
    "voxel_grid": VoxelGrid,
    "time_surface": TimeSurface,
    "latest_timestamp": LatestTimestamp,
    "tencode": Tencode,
    "event_image": EventImage,
}


def build(name: str, params: Mapping[str, Any] | None = None) -> Representation:
    """The representation of a name with the given parameters, as `describe` returns them.

    Raises:
        ValueError: unknown name or parameter (the valid ones are listed), or a value out of range.
    """
    if name not in REPRESENTATIONS:
        raise ValueError(f"unknown representation '{name}'; choose one of {', '.join(REPRESENTATIONS)}")
    params = dict(params or {})
    valid = [field.name for field in dataclasses.fields(REPRESENTATIONS[name])]
    unknown = sorted(set(params) - set(valid))
    if unknown:
        raise ValueError(f"{name} has no parameter {', '.join(unknown)}; it takes {', '.join(valid) or 'none'}")
    return REPRESENTATIONS[name](**params)


def describe(representation: Representation) -> dict[str, Any]:
    """{"name": ..., "params": {...}} of plain values, from which `build(**described)` makes an equal one.

    Raises:
        ValueError: not one of REPRESENTATIONS.
    """
    for name, kind in REPRESENTATIONS.items():
        if type(representation) is kind:
            return {"name": name, "params": dataclasses.asdict(representation)}
    raise ValueError(f"{type(representation).__name__} is not in REPRESENTATIONS: {', '.join(REPRESENTATIONS)}")


@dataclass(frozen=True, kw_only=True)
class RepresentConfig:
    """A representation as a config section; `build()` uses the fields that the named one has."""

    name: Literal[
        "histogram",
        "stacked_histogram",
        "voxel_grid",
        "time_surface",
        "latest_timestamp",
        "tencode",
        "event_image",
    ] = "histogram"
    """How events become an image."""
    bins: int = 5
    """Temporal bins of stacked_histogram and voxel_grid."""
    split_polarity: bool = False
    """Whether voxel_grid keeps OFF and ON apart."""
    tau_us: float = 50_000.0
    """Decay time of time_surface, µs."""
    percentile: float = 99.0
    """Percentile of the nonzero counts that event_image paints fully, in (0, 100]."""
    log1p: bool = False
    """Whether histogram and stacked_histogram take log(1 + count)."""
    scale: float = 1.0
    """Factor on histogram and stacked_histogram."""

    def __post_init__(self) -> None:
        check_positive("bins", self.bins)
        check_positive("tau_us", self.tau_us)
        check_percentile(self.percentile)

    def build(self) -> Representation:
        """The representation; warns of a field that was set and that it does not have."""
        if self.name not in REPRESENTATIONS:
            return build(self.name)
        used = {field.name for field in dataclasses.fields(REPRESENTATIONS[self.name])}
        rest = [field for field in dataclasses.fields(self) if field.name not in used | {"name"}]
        idle = [field.name for field in rest if getattr(self, field.name) != field.default]
        if idle:
            warnings.warn(f"{self.name} does not use {', '.join(idle)}", stacklevel=2)
        return build(self.name, {name: getattr(self, name) for name in used})
