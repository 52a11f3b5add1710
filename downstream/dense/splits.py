"""The three sets of a dense run: training, validation, which chooses the best step, and test."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from downstream.dense.config import DenseConfig
from downstream.dense.fractions import nested_share
from gep.data import ddd17, mvsec
from gep.data.build import check_classes
from gep.data.config import DataConfig
from gep.data.dsec_layout import DEPTH_SPLITS, SEMANTIC_TEST, TEST
from gep.data.listing import Listing
from gep.data.paired import Recordings
from gep.data.registry import list_recordings

_TEST_SEQUENCES = {
    "dsec": (*TEST, *DEPTH_SPLITS["depth_test"]),
    "dsec_semantic": SEMANTIC_TEST,
    "ddd17": ddd17.SPLITS["test"],
    "mvsec": mvsec.SPLITS["test"],
}
"""By the name of the set; in its keys they stand first."""


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
        """A line a set, for people, and a note where the test set is not whole."""
        lines = [f"{name}: {source.describe()}{self._left_out(name)}" for name, source in self.sets.items()]
        if "test" in self.sets and (left := self.listed["test"] - len(self.sets["test"])):
            lines.append(
                f"NOTE: {left} of {self.listed['test']} test samples are left out, so that these numbers are of other "
                "samples than those of another data.windows; to see what the past adds, compare with "
                "use_backbone=false at equal data.windows"
            )
        return "\n".join(lines)

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
            share samples; an empty one; a validation set of test sequences.
    """

    def listed(split: str) -> Listing:
        return list_recordings(data.name, data.root, split, data)

    train = listed(data.train_split)
    if data.eval_split:
        held = listed(data.eval_split)
        _refuse_test(held)
    elif cfg.holdout_by == "time":
        train, held = hold_out_ends(train, data.holdout)
    else:
        try:
            train, held = train.hold_out(data.holdout)
        except ValueError as error:
            raise ValueError(f"{error}; or hold the end of it out, holdout_by=time") from error
    found = {"train": train, "validation": held}
    if cfg.test_split:
        found["test"] = listed(cfg.test_split)
    _check(found)
    sets = {}
    for name, listing in found.items():
        try:
            sets[name] = Recordings(listing, data, paired=False, targets=True)
        except ValueError as error:
            if name != "validation" or data.eval_split:
                raise
            raise ValueError(f"{error}; or hold more of the recordings out (data.holdout={data.holdout:g})") from error
    counts = {name: len(listing) for name, listing in found.items()}
    if cfg.holdout_by == "time" and not data.eval_split:
        sets["validation"] = after(train, sets["validation"])
    if cfg.fraction < 1:
        chosen = nested_share(sets["train"].listing.keys, cfg.fraction, cfg.fraction_seed)
        title = f"{train.split}[{100 * cfg.fraction:g} %, seed {cfg.fraction_seed}]"
        sets["train"] = sets["train"].subset(chosen, title)
        counts["train"] = len(chosen)
    return Splits(sets, counts)


def hold_out_ends(listing: Listing, fraction: float) -> tuple[Listing, Listing]:
    """Splits into (kept, held out): the last samples of each recording, for sets with too few recordings.

    Args:
        listing: spans of recordings.
        fraction: held out of each recording, of which the first sample is always kept; samples whose span reaches
            over the cut are in neither.
    Raises:
        ValueError: samples that are no spans of longer recordings, or of which nothing could be kept.
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
        cut = min(len(own) - 1, max(1, len(own) - max(1, round(fraction * len(own)))))
        kept += own[:cut].tolist()
        before = listing.spans[own[cut - 1], 1] if cut else -np.inf
        held += [int(i) for i in own[cut:] if listing.spans[i, 0] >= before]
    if not kept:
        raise ValueError(
            f"holdout_by=time: each recording of {listing.name} {listing.split} has a single sample, and none is left "
            f"to learn from with data.holdout={fraction:g}; use holdout_by=recording, or name data.eval_split"
        )
    return (
        listing.subset(sorted(kept), f"{listing.split}[kept]"),
        listing.subset(sorted(held), f"{listing.split}[last {fraction:g} of each recording]"),
    )


def after(kept: Listing, held: Recordings) -> Recordings:
    """The held out samples whose windows all begin after the last kept sample of their recording.

    Args:
        kept, held: of `hold_out_ends`. A clip's windows are spans of held samples alone, and so are parts of a span.
    Raises:
        ValueError: there is none.
    """
    listing, data = held.listing, held.config
    if held.clips is not None or not data.window_us or listing.anchor == "start":
        return held
    assert kept.spans is not None and listing.spans is not None
    last: dict[Path, int] = {}
    for file, end in zip(kept.files, kept.spans[:, 1].tolist()):
        last[file] = max(end, last.get(file, end))
    begins = (listing.spans[:, 1] - data.windows * data.window_us).tolist()
    clear = [i for i, begin in enumerate(begins) if begin >= last.get(listing.files[i], begin)]
    if not clear:
        raise ValueError(
            f"holdout_by=time: the {data.windows} windows of {data.window_us} µs of all {len(held)} samples of "
            f"{listing.name} {listing.split} reach back into the training part; raise data.holdout={data.holdout:g}, "
            "or take fewer or shorter windows"
        )
    return held.subset(clear, listing.split)


def _refuse_test(held: Listing) -> None:
    known = set(_TEST_SEQUENCES.get(held.name, ()))
    found = sorted(known & {key.split("/")[0] for key in held.keys})
    if found:
        raise ValueError(
            f"data.eval_split={held.split}: {', '.join(found[:4])} of {held.name} is in its test split, on which the "
            "best step would be chosen; leave it empty to hold a part of the training split out (data.holdout)"
        )


def _check(found: dict[str, Listing]) -> None:
    for name, listing in found.items():
        if len(listing) == 0:
            raise ValueError(
                f"data: the {name} set ({listing.name} {listing.split}) is empty; change data.holdout, or name another "
                "data.eval_split"
            )
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
