"""A dense run's sets: shares of the labels, what is held out, and that the test set chooses nothing."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dense_fixtures import write_boxes
from layouts_driving import write_mvsec

from downstream.dense.config import DenseConfig
from downstream.dense.fractions import nested_share
from downstream.dense.splits import after, hold_out_ends, open_splits
from downstream.depth.task import DepthConfig
from downstream.segmentation.task import SegmentationConfig
from gep import config
from gep.data.config import DataConfig
from gep.data.listing import Listing
from gep.data.paired import Recordings


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
    # And one is kept: the last that a larger fraction would take.
    assert [len(part) for part in listing.hold_out(0.999999)] == [5, 10]
    assert set(listing.hold_out(1 - 1e-9)[1].files) >= set(listing.hold_out(0.9)[1].files)
    with pytest.raises(
        ValueError, match=r"all 5 samples are of one recording \(a\).*data.holdout=0.1.*data.eval_split"
    ):
        listing_of(["a"]).hold_out(0.1)


def test_ends_of_recordings_are_held_out_without_a_window_over_the_cut() -> None:
    listing = listing_of(["a", "b"], each=10)
    kept, held = hold_out_ends(listing, 0.4)
    # Samples 0 … 5 are kept, which ends at 60 µs; with two windows sample 6 would read from 50 µs on, 7 from 60.
    assert kept.keys == tuple(f"{g}/{n}" for g in "ab" for n in range(6))
    assert held.keys == tuple(f"{g}/{n}" for g in "ab" for n in (6, 7, 8, 9))

    def left(windows: int, window_us: int, **more) -> list[int]:
        config = DataConfig(windows=windows, window_us=window_us, **more)
        found = after(kept, Recordings(held, config, paired=False)).listing.keys
        assert [key[0] for key in found] == sorted("ab" * (len(found) // 2))
        return [int(key[2:]) for key in found if key[0] == "a"]

    assert left(1, 10) == [6, 7, 8, 9] and left(2, 10) == [7, 8, 9] and left(3, 10) == [8, 9]
    assert left(2, 0) == left(2, 0, num_events=5) == [6, 7, 8, 9]  # parts of a sample's own span
    assert left(3, 10, clip=True) == [8, 9]  # the first three held out images are one clip: nothing is lost twice
    with pytest.raises(ValueError, match=r"the 4 windows of 11 µs of all 2 samples.*raise data.holdout=0.1"):
        left(4, 11)
    # Spans of 25 µs that end every 10 µs reach over the cut, whatever the windows are.
    wide = replace(listing, spans=listing.spans - np.array([15, 0]))
    kept, held = hold_out_ends(wide, 0.4)
    assert held.keys == tuple(f"{g}/{n}" for g in "ab" for n in (8, 9)) and len(kept) == 12
    # The first sample is always kept.
    assert [len(part) for part in hold_out_ends(listing, 0.99)] == [2, 18]
    with pytest.raises(ValueError, match=r"single sample.*data.holdout=0.5.*data.eval_split"):
        hold_out_ends(listing_of(["a", "b"], each=1), 0.5)


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
    with pytest.raises(ValueError, match="begin before the recording for all 1 samples.*data.holdout=0.1"):
        short = replace(single, windows=3)
        open_splits(DenseConfig(data=short, holdout_by="time"), short)
    assert len(by_time.train) == 5 and len(by_time.validation) == 1
    # A past of several windows: those samples without it are left out and counted.
    long = replace(data, windows=4)
    opened = open_splits(DenseConfig(data=long, test_split="test"), long)
    counted = opened.record()
    assert counted["test"]["left_out"] > 0 and counted["test"]["samples"] + counted["test"]["left_out"] == 6
    assert f"NOTE: {counted['test']['left_out']} of 6 test samples are left out" in opened.describe()
    assert "use_backbone=false" in opened.describe() and "NOTE" not in found.describe()


def test_the_test_set_chooses_nothing_under_another_name(tmp_path: Path) -> None:
    write_mvsec(tmp_path, ("outdoor_day1", "outdoor_day2"))
    data = DataConfig(name="mvsec", root=str(tmp_path), windows=1, eval_split="outdoor_day1")
    with pytest.raises(ValueError, match="data.eval_split=outdoor_day1: outdoor_day1 of mvsec is in its test split"):
        open_splits(DenseConfig(data=data), data)
    swapped = replace(data, train_split="outdoor_day1", eval_split="outdoor_day2")
    assert len(open_splits(DenseConfig(data=swapped), swapped).validation) == 4


CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "downstream"


def test_fields_without_effect_are_named_and_defaults_are_not() -> None:
    def idle(*given: str, schema: type = SegmentationConfig) -> list[str]:
        return [text.split("=")[0] for text in config.load(schema, list(given)).without_effect()]

    for mode in ("probe", "finetune", "scratch", "histogram"):
        assert idle(f"mode={mode}", "data.eval_split=val") == []
    for task, schema in (("segmentation", SegmentationConfig), ("depth", DepthConfig)):
        for path in sorted((CONFIGS / task).glob("*.yaml")):
            assert idle(str(path), schema=schema) == [], path
    rates = ["encoder_lr=0.2", "backbone_lr=0.2", "optim.layer_decay=0.7"]
    names = ["encoder_lr", "backbone_lr", "optim.layer_decay"]
    assert idle(*rates, "mode=finetune") == [] and idle(*rates) == idle(*rates, "mode=scratch") == names
    assert idle("mode=scratch", "encoder_lr=0") == ["encoder_lr"]  # which scratch does not read: nothing is frozen
    head = ["head.num_levels=2", "use_backbone=false", "head.width=64"]
    assert idle(*head) == ["head.width"] and idle(*head, "head.name=dpt") == []
    assert idle(*head, *rates, "mode=histogram") == [*names, "head.num_levels", "use_backbone", "head.width"]
    assert idle("holdout_by=time") == [] and idle("holdout_by=time", "data.eval_split=val") == ["holdout_by"]
    (text,) = SegmentationConfig(backbone_lr=0.5).without_effect()
    assert text == "backbone_lr=0.5 (mode=probe)"


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.eval_split=test", "would choose the best step on the test set"),
        ("data.eval_split=depth_Test", "eval_split=depth_Test would choose the best step on the test set"),
        ("test_split=train", "is also data.train_split"),
        ("fraction=0", r"fraction=0.* not in \(0, 1\]"),
        ("data.pick=1", "would part the target"),
        ("data.augment.reverse_time=0.5", "would part the target"),
        ("data.jitter_us=100", "would part the target"),
        ("encoder_lr=-1", "encoder_lr=-1"),
        ("head.width=0", "width=0"),
        ("cache_features=true mode=finetune", "mode=finetune changes the features"),
        ("cache_features=true data.augment.flip_x=0.5", "has no effect"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(config.ConfigError, match=message):
        config.load(SegmentationConfig, override.split())
