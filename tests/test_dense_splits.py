"""A dense run's sets: shares of the labels, what is held out, and that the test set chooses nothing."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dense_fixtures import write_boxes

from downstream.dense.config import DenseConfig
from downstream.dense.fractions import nested_share
from downstream.dense.splits import hold_out_ends, open_splits
from downstream.segmentation.task import SegmentationConfig
from gep import config
from gep.data.config import DataConfig
from gep.data.listing import Listing


def test_shares_are_nested_seeded_and_of_the_keys_alone() -> None:
    keys = [f"drive/{number:04d}" for number in range(200)]
    shares = {fraction: nested_share(keys, fraction, 0) for fraction in (0.001, 0.01, 0.05, 0.1, 0.2, 1.0)}
    assert [len(share) for share in shares.values()] == [1, 2, 10, 20, 40, 200]
    sets = [set(share.tolist()) for share in shares.values()]
    assert all(small < large for small, large in itertools.pairwise(sets))
    order = np.random.default_rng(0).permutation(200)
    moved = nested_share([keys[i] for i in order], 0.1, 0)
    assert {keys[order[i]] for i in moved} == {keys[i] for i in shares[0.1]}
    assert set(nested_share(keys, 0.1, 1).tolist()) != sets[3]


def listing_of(groups: list[str], each: int = 5) -> Listing:
    keys = tuple(f"{group}/{number}" for group in groups for number in range(each))
    spans = np.array([(10 * n, 10 * n + 10) for _ in groups for n in range(each)])
    files = tuple(Path(group) for group in groups for _ in range(each))
    return Listing("x", "train", keys, files, np.full(len(keys), -1), (), spans=spans, anchor="end")


def test_of_few_recordings_one_is_held_out_and_a_single_one_is_an_error() -> None:
    listing = listing_of(["a", "b", "c"])
    for fraction in (1e-6, 0.1, 0.3):
        kept, held = listing.hold_out(fraction)
        assert len(kept) and len(held) and not set(kept.files) & set(held.files)
    # The one that comes over is the first that a larger fraction would take.
    few = set(listing.hold_out(1e-6)[1].files)
    assert len(few) == 1 and all(few <= set(listing.hold_out(f)[1].files) for f in np.linspace(0, 1, 30))
    with pytest.raises(ValueError, match=r"all 5 samples are of one recording \(a\).*data.eval_split"):
        listing_of(["a"]).hold_out(0.1)


def test_ends_of_recordings_are_held_out_without_a_window_over_the_cut() -> None:
    kept, held = hold_out_ends(listing_of(["a", "b"], each=10), 0.4, past_us=20)
    # Samples 0 … 5 are kept, which ends at 60 µs; sample 6 would read from 50 µs on, 7 from 60.
    assert kept.keys == tuple(f"{g}/{n}" for g in "ab" for n in range(6))
    assert held.keys == tuple(f"{g}/{n}" for g in "ab" for n in (7, 8, 9))


def test_splits_are_disjoint_and_the_test_set_chooses_nothing(tmp_path: Path) -> None:
    write_boxes(tmp_path, frames=12)
    data = DataConfig(name="ddd17", root=str(tmp_path), windows=1, window_us=50_000)
    found = open_splits(DenseConfig(data=data, test_split="test"), data)
    keys = [set(source.listing.keys) for source in found.sets.values()]
    assert len(keys) == 3 and not (keys[0] & keys[1] or keys[0] & keys[2] or keys[1] & keys[2])
    part = open_splits(DenseConfig(data=data, test_split="test", fraction=0.5), data)
    assert set(part.train.listing.keys) < keys[0] and part.train.listing.hash != found.train.listing.hash
    assert part.train.listing.hash in part.describe() and "[50 %, seed 0]" in part.describe()
    with pytest.raises(ValueError, match="the test split 'all' and the train split"):
        open_splits(DenseConfig(data=data, test_split="all"), data)
    with pytest.raises(ValueError, match="has mask, and this task needs depth"):
        found.require("depth")
    # dir1 alone: one recording, of which the end can be held out.
    single = replace(data, train_split="test")
    with pytest.raises(ValueError, match="of one recording.*holdout_by=time"):
        open_splits(DenseConfig(data=single), single)
    by_time = open_splits(DenseConfig(data=single, holdout_by="time"), single)
    assert len(by_time.train) == 5 and len(by_time.validation) == 1
    # A past of several windows: those samples without it are left out and counted.
    long = replace(data, windows=4)
    counted = open_splits(DenseConfig(data=long, test_split="test"), long).record()
    assert counted["test"]["left_out"] > 0 and counted["test"]["samples"] + counted["test"]["left_out"] == 6


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.eval_split=test", "would choose the best step on the test set"),
        ("test_split=train", "is also data.train_split"),
        ("fraction=0", r"fraction=0.* not in \(0, 1\]"),
        ("data.pick=1", "would part the target"),
        ("data.augment.reverse_time=0.5", "would part the target"),
        ("data.jitter_us=100", "would part the target"),
        ("encoder_lr=-1", "encoder_lr=-1"),
        ("head.width=0", "width=0"),
        ("cache_features=true mode=finetune", "mode=finetune changes the features"),
        ("cache_features=true data.augment.flip_x=0.5", "has no effect"),
        ("mode=scratch encoder_lr=0", "untrained"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(config.ConfigError, match=message):
        config.load(SegmentationConfig, override.split())
