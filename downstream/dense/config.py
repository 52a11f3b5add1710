"""Everything that a dense run depends on, whatever its task."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

from gep.data.config import DataConfig
from gep.engine import TrainConfig
from gep.events.augment import AugmentConfig
from gep.optim import OptimConfig

Mode = Literal["probe", "finetune", "scratch", "histogram"]


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What turns maps of tokens into a value a pixel; its sizes follow from the encoder."""

    name: Literal["linear", "upernet", "dpt"] = "linear"
    """1x1 convolution, UPerNet-style pyramid, or DPT-style fusion"""
    num_levels: int = 4
    """depths of the encoder that the head reads, spread evenly; 1 = the last only"""
    encoder_maps: bool = True
    """with a backbone: read the encoder's maps beside its states; false = its states alone (few labels, linear head)"""
    width: int = 256
    """channels inside upernet and dpt"""

    def __post_init__(self) -> None:
        for name in ("num_levels", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """Everything that a dense run depends on; a task adds its own fields.

    Samples without a past of `data.windows` windows are left out, of the test set too: runs with other `data.windows`
    are scored on other samples. What the past adds is use_backbone=true against false at equal `data.windows`.
    """

    run: str = "runs/dense"
    """folder of this run: config, metrics, results, checkpoints, best, export"""
    model: str = "runs/stage2/export"
    """exported model (a folder or a Hub id); its input is taken over, but for the data.* that are set here"""
    mode: Literal["probe", "finetune", "scratch", "histogram"] = "probe"
    """frozen model, fine-tuning, the same architecture from random weights, or a head on the raw frames alone"""
    fraction: float = 1.0
    """share of the labelled training samples to learn from; smaller shares are part of larger ones"""
    fraction_seed: int = 0
    """of the choice of that share"""
    head: HeadConfig = field(default_factory=HeadConfig)
    use_backbone: bool = True
    """false = the encoder on the last window alone; what the past adds is seen so, at equal data.windows"""
    data: DataConfig = field(default_factory=DataConfig)
    test_split: str = ""
    """split to report on after training; empty = none. The best step is chosen on data.eval_split or the hold-out"""
    holdout_by: Literal["recording", "time"] = "recording"
    """what data.holdout keeps apart: whole recordings, or the end of each (for sets with a single one)"""
    encoder_lr: float = 0.1
    """the encoder's learning rate as a share of optim.lr; 0 freezes it"""
    backbone_lr: float = 0.3
    """the backbone's learning rate as a share of optim.lr; 0 freezes it"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tta: bool = False
    """test-time augmentation in the final evaluation: the mean with the mirrored input's prediction"""
    cache_features: bool = False
    """probe and histogram: keep the training set's maps in memory, computed once, without augmentation"""

    def __post_init__(self) -> None:
        for name in ("encoder_lr", "backbone_lr"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction} is not in (0, 1]; 0.05 means 5 %")
        self._check_splits()
        self._check_data()
        if self.cache_features and not self.frozen:
            raise ValueError(f"cache_features=true: mode={self.mode} changes the features; use it with mode=probe")
        if self.cache_features and self.data.augment != AugmentConfig():
            raise ValueError(
                "cache_features=true computes each map once, so that data.augment has no effect; unset one"
            )

    @property
    def frozen(self) -> bool:
        """Whether the head alone is trained."""
        return self.mode in ("probe", "histogram")

    def without_effect(self) -> list[str]:
        """The fields that were changed from their defaults to no effect, as "name=value (because of what)"."""
        alike = f"mode={self.mode}" if self.frozen or self.mode == "scratch" else ""
        raw = f"mode={self.mode}" if self.mode == "histogram" else ""
        why = {
            **dict.fromkeys(("encoder_lr", "backbone_lr", "optim.layer_decay"), alike),
            **dict.fromkeys(("head.num_levels", "head.encoder_maps", "use_backbone"), raw),
            "head.width": "head.name=linear" if self.head.name == "linear" else "",
            "holdout_by": f"data.eval_split={self.data.eval_split}" if self.data.eval_split else "",
        }
        default = DenseConfig()
        changed = {name: attrgetter(name)(self) for name in why}
        return [
            f"{name}={value} ({why[name]})"
            for name, value in changed.items()
            if why[name] and value != attrgetter(name)(default)
        ]

    def _check_splits(self) -> None:
        if self.test_split and self.test_split in (self.data.train_split, self.data.eval_split):
            raise ValueError(
                f"test_split={self.test_split} is also data.train_split or data.eval_split: the best step would be "
                "chosen on the test set; leave data.eval_split empty to hold a part of the training split out"
            )
        if "test" in self.data.eval_split.lower():
            raise ValueError(
                f"data.eval_split={self.data.eval_split} would choose the best step on the test set; leave it empty to "
                f"hold a part of the training split out (data.holdout), and set test_split={self.data.eval_split}"
            )

    def _check_data(self) -> None:
        if self.data.mix:
            raise ValueError("data.mix: one class would mean several things; a dense task reads a single data set")
        if self.data.name == "images" or self.data.images.streaming:
            raise ValueError("data.name=images: pictures have no masks and no depth; name a set of recordings")
        if self.data.pick or self.data.jitter_us or self.data.augment.reverse_time:
            raise ValueError(
                f"data.pick={self.data.pick}, data.jitter_us={self.data.jitter_us} and data.augment.reverse_time="
                f"{self.data.augment.reverse_time} would part the target from the end of the last window; set them to 0"
            )
