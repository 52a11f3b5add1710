"""Which data a run reads and what becomes a sample of it, as it stands in YAML under `data`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from gep.data.images import ImagesConfig
from gep.data.options import ListingOptions
from gep.events.augment import AugmentConfig

Name = Literal[
    "scenes",
    "nmnist",
    "ncaltech101",
    "nimagenet",
    "ncars",
    "cifar10dvs",
    "dsec",
    "dsec_semantic",
    "ddd17",
    "mvsec",
    "eventscape",
    "folder",
    "shards",
    "images",
]
_CANVAS = ("height", "width", "windows", "pick", "max_bad_fraction")


@dataclass(frozen=True, kw_only=True)
class SourceConfig(ListingOptions):
    """One data set, and what of each of its recordings becomes a sample."""

    name: Name = "nmnist"
    """data set; decides the layout that is looked for below the root"""
    root: str = ""
    """folder that holds the data set in its published layout (shards: also pipe:, http(s):// or hf:// URLs)"""
    train_split: str = "train"
    """split to learn from"""
    eval_split: str = ""
    """split to evaluate on; empty = the part of the training split that `holdout` keeps apart"""
    holdout: float = 0.1
    """share of the training split kept apart for evaluation where there is no eval_split"""
    fit: Literal["pad", "resize"] = "pad"
    """how a sensor's view becomes the model's input: centred with a margin, or scaled"""
    window_us: int = 50_000
    """length of a window [µs], from the first event on, or back from the image's time; 0 = equal parts"""
    num_events: int = 0
    """cut so many events out first (training: at random; evaluation: the middle; before an image: the last); 0 = all"""
    jitter_us: int = 0
    """in training the first window begins up to this much earlier or later [µs]"""
    clip: bool = False
    """video sets: the windows are those of consecutive images, each paired with its own (stage 2)"""
    cache: bool = False
    """keep decoded recordings in memory (small sets)"""
    cache_dir: str = ""
    """folder in which recordings of slow formats are kept decoded, 13 bytes an event; empty = none"""
    images: ImagesConfig = field(default_factory=ImagesConfig)
    """name=images: pictures that become events"""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """changes drawn once a training sample for events and image alike"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip and (self.num_events or self.jitter_us):
            raise ValueError(
                f"data.clip=true: the images' times are the windows' bounds; unset data.num_events={self.num_events} "
                f"and data.jitter_us={self.jitter_us}"
            )
        if self.jitter_us and not self.window_us:
            raise ValueError(f"data.jitter_us={self.jitter_us} has no effect on equal parts; set data.window_us")
        if not self.eval_split and not 0 < self.holdout < 1:
            raise ValueError(f"data.holdout={self.holdout} is not in (0, 1); or name data.eval_split")
        for name in ("window_us", "num_events", "jitter_us"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name}={getattr(self, name)} is negative")
        if self.num_events and self.window_us:
            raise ValueError(
                f"data.num_events={self.num_events} cuts by count and data.window_us={self.window_us} by time; "
                "set one of them to 0"
            )


@dataclass(frozen=True, kw_only=True)
class MixedConfig(SourceConfig):
    """One of several sources that are mixed; canvas and number of windows are those of `data`."""

    weight: float = 1.0
    """share of the samples that come from this source, relative to the others' weights"""
    represent: dict[str, float] = field(default_factory=dict)
    """this source's own statistics in place of represent's: scale, percentile or tau_us"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weight > 0:
            raise ValueError(f"weight={self.weight} must be above 0; leave the source out of data.mix instead")
        unknown = set(self.represent) - {"scale", "percentile", "tau_us"}
        if unknown:
            raise ValueError(f"represent.{unknown.pop()} is no statistic; choose from scale, percentile, tau_us")


@dataclass(frozen=True, kw_only=True)
class DataConfig(SourceConfig):
    """What a run reads: one source, or several by weight."""

    height: int = 36
    """rows of the model's input [px]"""
    width: int = 36
    """columns of the model's input [px]"""
    windows: int = 6
    """windows that a recording is cut into"""
    pick: int = 0
    """windows a training sample keeps, drawn at random and in order; 0 = all of them"""
    max_bad_fraction: float = 0.01
    """unreadable training samples are named and replaced up to this share; more stop the run"""
    mix: dict[str, MixedConfig] = field(default_factory=dict)
    """sources to mix, name -> their settings and weight; the first one is evaluated on; empty = `data` is the source"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.windows < 1:
            raise ValueError(f"data.windows={self.windows} must be at least 1")
        if not 0 <= self.pick <= self.windows:
            raise ValueError(f"data.pick={self.pick} is not in 0..data.windows={self.windows}")
        if self.clip and self.pick:
            raise ValueError(
                f"data.clip=true keeps runs of windows, data.pick={self.pick} draws single ones: unset one"
            )
        crop = self.augment.grid_crop
        if crop[0] > self.height or crop[1] > self.width:
            raise ValueError(
                f"data.augment.grid_crop={list(crop)} is larger than data.height={self.height} data.width={self.width}"
            )
        if len(crops := {tuple(entry.augment.grid_crop) for entry in self.mix.values()}) > 1:
            raise ValueError(
                f"data.mix.*.augment.grid_crop={sorted(map(list, crops))}: samples of one batch are of one size; give "
                "all sources the same"
            )
        if not 0 <= self.max_bad_fraction < 1:
            raise ValueError(f"data.max_bad_fraction={self.max_bad_fraction} is not in [0, 1)")
        if self.mix:
            default = SourceConfig()
            names = [f.name for f in dataclasses.fields(SourceConfig)]
            idle = [name for name in names if getattr(self, name) != getattr(default, name)]
            if idle:
                raise ValueError(
                    f"data.{idle[0]}={getattr(self, idle[0])} has no effect beside data.mix; set it in each entry "
                    f"(data.mix.{next(iter(self.mix))}.{idle[0]})"
                )

    def sources(self) -> dict[str, DataConfig]:
        """The sources to read, each as a config of its own; one, under its data set's name, without a mix."""
        if not self.mix:
            return {self.name: self}
        canvas = {name: getattr(self, name) for name in _CANVAS}
        own = [f.name for f in dataclasses.fields(SourceConfig)]
        return {
            name: DataConfig(**canvas, **{key: getattr(entry, key) for key in own}) for name, entry in self.mix.items()
        }
