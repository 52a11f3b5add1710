"""The three sets of a dense run: training, validation, which chooses the best step, and test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from downstream.dense.config import DenseConfig
from downstream.dense.fractions import nested_share
from gep.data.build import check_classes
from gep.data.config import DataConfig
from gep.data.listing import Listing
from gep.data.paired import Recordings
from gep.data.registry import list_recordings


@dataclass(frozen=True)
class Splits:
    """Disjoint sets with targets, by name: "train", "validation" and, where one was named, "test"."""

    sets: dict[str, Recordings]
    listed: dict[str, int]
    """Samples of each before those were left out whose windows would begin before their recording."""

    @property
    def train(self) -> Recordings:
        """What the head learns from."""
        return self.sets["train"]

    @property
    def validation(self) -> Recordings:
        """What chooses the best step."""
        return self.sets["validation"]

    @property
    def reported(self) -> dict[str, Recordings]:
        """The sets that the trained model is evaluated on."""
        return {name: source for name, source in self.sets.items() if name != "train"}

    def describe(self) -> str:
        """A line a set, for people."""
        return "\n".join(f"{name}: {source.describe()}{self._left_out(name)}" for name, source in self.sets.items())

    def require(self, target: str) -> None:
        """Raises ValueError where a set lacks the target ("mask", "depth")."""
        for name, source in self.sets.items():
            listing = source.listing
            if target not in listing.targets:
                has = ", ".join(sorted(listing.targets)) or "no targets"
                raise ValueError(
                    f"data.name={listing.name}: the {name} split {listing.split!r} has {has}, and this task needs "
                    f"{target}; choose another data set or split"
                )

    def record(self) -> dict[str, dict[str, Any]]:
        """What results.json says of each set."""
        return {
            name: {
                "split": source.listing.split,
                "list": source.listing.hash,
                "samples": len(source),
                "left_out": self.listed[name] - len(source),
                **({"notes": dict(source.listing.notes)} if source.listing.notes else {}),
            }
            for name, source in self.sets.items()
        }

    def _left_out(self, name: str) -> str:
        left = self.listed[name] - len(self.sets[name])
        return f" ({left} samples without a past of {self.sets[name].config.windows} windows left out)" if left else ""


def open_splits(cfg: DenseConfig, data: DataConfig) -> Splits:
    """Lists the sets of a run.

    Args:
        cfg: of the run.
        data: its data config after the export's input settings were taken over.
    Raises:
        FileNotFoundError, ValueError: see `list_recordings`, `Listing.hold_out` and `Recordings`; splits that
            share samples; an empty one.
    """

    def listed(split: str) -> Listing:
        return list_recordings(data.name, data.root, split, data)

    train = listed(data.train_split)
    if data.eval_split:
        held = listed(data.eval_split)
    elif cfg.holdout_by == "time":
        train, held = hold_out_ends(train, data.holdout, data.windows * data.window_us)
    else:
        try:
            train, held = train.hold_out(data.holdout)
        except ValueError as error:
            raise ValueError(f"{error}; or hold the end of it out, holdout_by=time") from error
    found = {"train": train, "validation": held}
    if cfg.test_split:
        found["test"] = listed(cfg.test_split)
    _check(found)
    sets = {name: Recordings(listing, data, paired=False, targets=True) for name, listing in found.items()}
    counts = {name: len(listing) for name, listing in found.items()}
    if cfg.fraction < 1:
        chosen = nested_share(sets["train"].listing.keys, cfg.fraction, cfg.fraction_seed)
        title = f"{train.split}[{100 * cfg.fraction:g} %, seed {cfg.fraction_seed}]"
        sets["train"] = sets["train"].subset(chosen, title)
        counts["train"] = len(chosen)
    return Splits(sets, counts)


def hold_out_ends(listing: Listing, fraction: float, past_us: int) -> tuple[Listing, Listing]:
    """Splits into (kept, held out): the last samples of each recording, for sets with too few recordings.

    Args:
        listing: spans of recordings.
        fraction: held out of each recording.
        past_us: how far windows reach back from a sample's end [µs]; those that reach over the cut are in neither.
    Raises:
        ValueError: samples that are no spans of longer recordings.
    """
    if listing.spans is None or not listing.files:
        raise ValueError(
            f"holdout_by=time: the samples of {listing.name} are whole recordings; use holdout_by=recording"
        )
    kept: list[int] = []
    held: list[int] = []
    files = np.array([str(file) for file in listing.files])
    for file in np.unique(files):
        own = np.flatnonzero(files == file)
        own = own[np.argsort(listing.spans[own, 1], kind="stable")]
        cut = len(own) - max(1, round(fraction * len(own)))
        kept += own[:cut].tolist()
        before = listing.spans[own[cut - 1], 1] if cut else -np.inf
        held += [int(i) for i in own[cut:] if listing.spans[i, 1] - past_us >= before]
    return (
        listing.subset(sorted(kept), f"{listing.split}[kept]"),
        listing.subset(sorted(held), f"{listing.split}[last {fraction:g} of each recording]"),
    )


def _check(found: dict[str, Listing]) -> None:
    for name, listing in found.items():
        if len(listing) == 0:
            raise ValueError(f"data: the {name} set ({listing.name} {listing.split}) is empty")
        check_classes(found["train"], listing)
    names = list(found)
    for place, name in enumerate(names):
        for other in names[:place]:
            both = set(found[name].keys) & set(found[other].keys)
            if both:
                raise ValueError(
                    f"data: the {name} split {found[name].split!r} and the {other} split {found[other].split!r} share "
                    f"{len(both)} samples ({min(both)}, …); name disjoint splits"
                )
