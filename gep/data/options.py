"""What some data sets let a user choose about their list of samples."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ListingOptions:
    """Choices that change which samples a data set has, or the view that they are in."""

    subsampling: Literal["none", "ess"] = "none"
    """dsec_semantic: every label, or those of ESS's loader (the first 6 skipped, then every second)"""
    rows: Literal["all", "labelled"] = "all"
    """dsec_semantic, ddd17: events of the whole sensor, or of the top rows alone that have labels (440 and 200)"""
    depth: Literal["rect", "raw"] = "rect"
    """mvsec: depth in the rectified view, to which events are moved, or in the raw one"""
    rectify: bool = True
    """move events to rectified pixels where the data set comes with a rectify map"""
    label_from: Literal["folder", "file"] = "folder"
    """folder: the class is the name of the recording's parent folder, or of the recording itself"""
    sample_us: int = 0
    """folder: cut each recording (without pictures) into samples of this length [µs]; 0 = whole"""
    sample_stride_us: int = 0
    """folder: from one sample's begin to the next one's [µs]; 0 = sample_us"""
    sensor_height: int = 0
    """folder: rows of the sensor, for files that do not say; 0 = as the file says"""
    sensor_width: int = 0
    """folder: columns of the sensor, likewise"""
    min_events: int = 0
    """folder: leave out samples with fewer events (each recording is read once to count them)"""

    def __post_init__(self) -> None:
        for name in ("sample_us", "sample_stride_us", "sensor_height", "sensor_width", "min_events"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name}={getattr(self, name)} is negative")
        if self.sample_stride_us and not self.sample_us:
            raise ValueError(
                f"data.sample_stride_us={self.sample_stride_us} has no effect without a length: set data.sample_us"
            )

        if bool(self.sensor_height) != bool(self.sensor_width):
            raise ValueError(
                f"data.sensor_height={self.sensor_height} and data.sensor_width={self.sensor_width}: set both or none"
            )

    @property
    def sensor(self) -> tuple[int, int] | None:
        """(height, width) that the user gave, or None."""
        return (self.sensor_height, self.sensor_width) if self.sensor_height else None

    @classmethod
    def of(cls, given: object | None) -> ListingOptions:
        """The options among the fields of a config, with defaults for those that it lacks."""
        if given is None or isinstance(given, cls):
            return cls() if given is None else given
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: getattr(given, name) for name in names if hasattr(given, name)})
