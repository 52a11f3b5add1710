"""Samples that are spans of a recording: what is read, rectified, paired and never mixed with its neighbours."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from gep.data.bad import BadSample
from gep.data.config import DataConfig
from gep.data.listing import Listing
from gep.data.mix import Mixed
from gep.data.paired import Clips, Recordings, collate, rectified
from gep.data.sequence import SequenceConfig, Sequences, collate_sequences
from gep.data.view import View, decode, encode_png
from gep.events.io.source import InMemory
from gep.events.types import Events

SIZE = (12, 16)
CANVAS = {"height": 12, "width": 16, "fit": "pad", "window_us": 100, "windows": 2}


def recording(seed: int) -> Events:
    """1,000 events, one a µs from 5,000 on: an event's time is its number."""
    rng = np.random.default_rng(seed)
    t = np.arange(5000, 6000)
    x, y, p = rng.integers(0, 16, 1000), rng.integers(0, 12, 1000), rng.integers(0, 2, 1000)
    return Events.from_arrays(t, x, y, p, height=12, width=16)


class Sources:
    """The recording of each sample; notes what was read."""

    def __init__(self, files):
        self.files, self.read = files, []

    def __call__(self, index):
        outer = self

        class Noted(InMemory):
            def by_time(self, t0, t1):
                outer.read.append((t0, t1))
                return super().by_time(t0, t1)

        return Noted(self.files[index], recording(int(self.files[index].stem)))


class Images:
    """Image k is of the grey value k."""

    def encoded(self, index):
        return encode_png(np.full((*SIZE, 3), index, np.uint8)), ".png"

    def view(self, index):
        return View(SIZE)

    def __call__(self, index):
        return self.view(index).apply(decode(self.encoded(index)[0], "image"))


def listing(**changes) -> Listing:
    """Two recordings with five images each, 200 µs apart from 5,200 on."""
    files = tuple(Path(f"{number}.x") for number in (0, 1) for _ in range(4))
    ends = np.tile(5200 + 200 * np.arange(1, 5), 2)
    keys, spans = tuple(f"{f}/{e}" for f, e in zip(files, ends)), np.stack([ends - 200, ends], axis=1)
    found = Listing("video", "train", keys, files, np.full(8, -1), (), SIZE, Images(), spans=spans, anchor="end",
                    recording=Sources(files))  # fmt: skip
    return dataclasses.replace(found, **changes)


def test_windows_end_at_the_image_and_only_they_are_read():
    whole = listing()
    sample = Recordings(whole, DataConfig(**CANVAS), paired=True).sample(1, None)
    assert sample["t_us"].tolist() == [[5400, 5500], [5500, 5600]]
    assert [window.t.tolist() for window in sample["events"]] == [list(range(5400, 5500)), list(range(5500, 5600))]
    assert whole.recording.read == [(5400, 5600)]
    assert (sample["image"] == 1).all() and sample["label"] == -1
    picked = DataConfig(**CANVAS, pick=1)
    drawn = {Recordings(whole, picked, paired=True).sample(1, np.random.default_rng(s))["t_us"][0, 0] for s in range(9)}
    assert drawn == {5400, 5500} and set(whole.recording.read[1:]) == {(5400, 5500), (5500, 5600)}


def test_a_sample_without_enough_past_is_left_out_and_none_left_is_an_error():
    config = DataConfig(**{**CANVAS, "windows": 4})
    # 300 µs before the last window: the first image of each recording (span from 5,200 on) has 200 of them.
    kept = Recordings(listing(), config, paired=True).listing
    assert [key for key in kept.keys] == [key for i, key in enumerate(listing().keys) if i % 4]
    with pytest.raises(ValueError, match="begin before the recording for all 8 samples"):
        Recordings(listing(), DataConfig(**{**CANVAS, "windows": 12}), paired=True)


def test_equal_parts_of_the_span_and_the_last_events_before_the_image():
    parts = Recordings(listing(), DataConfig(**{**CANVAS, "window_us": 0}), paired=True).sample(2, None)
    assert parts["t_us"].tolist() == [[5600, 5700], [5700, 5800]]
    last = Recordings(listing(), DataConfig(**{**CANVAS, "window_us": 0, "num_events": 30}), paired=True)
    assert [w.t.tolist() for w in last.sample(2, None)["events"]] == [list(range(5770, 5785)), list(range(5785, 5800))]
    start = dataclasses.replace(listing(), anchor="start")
    begin = Recordings(start, DataConfig(**{**CANVAS, "window_us": 50}), paired=True).sample(2, None)
    assert begin["t_us"].tolist() == [[5600, 5650], [5650, 5700]]


def test_rectified_events_go_to_the_nearest_pixel_and_leave_with_the_view():
    table = np.stack(np.meshgrid(np.arange(16), np.arange(12)), axis=-1).astype(np.float32)
    table[..., 0] += 3.4  # three columns to the right
    table[..., 1] -= 0.6  # one row up
    table[5, 5] = np.nan
    events = Events.from_arrays([1, 2, 3, 4], [0, 13, 4, 5], [3, 3, 0, 5], [1, 0, 1, 1], height=12, width=16)
    moved = rectified(events, table)
    assert (moved.t.tolist(), moved.x.tolist(), moved.y.tolist()) == ([1], [3], [2])
    with pytest.raises(ValueError, match="does not belong to a 12x16 sensor"):
        rectified(events, table[:-1])

    def map_of(index):
        return table

    sample = Recordings(listing(rectify=map_of), DataConfig(**CANVAS), paired=True).sample(1, None)
    raw = recording(0)[400:500]
    assert len(sample["events"][0]) == len(rectified(raw, table))
    off = Recordings(listing(rectify=map_of), DataConfig(**CANVAS, rectify=False), paired=False).sample(1, None)
    assert len(off["events"][0]) == 100


def test_targets_move_with_the_events():
    mask = np.arange(12 * 16, dtype=np.uint8).reshape(12, 16)
    depth = mask.astype(np.float32)
    depth[0, 0] = np.nan
    whole = listing(targets={"mask": lambda index: mask + np.uint8(index), "depth": lambda index: depth})
    config = DataConfig(**{**CANVAS, "height": 14, "width": 20})
    assert "mask" not in Recordings(whole, config, paired=False).sample(1, None)
    source = Recordings(whole, config, paired=False, targets=True)
    sample = source.sample(1, None)
    assert (sample["mask"][1:13, 2:18] == mask + 1).all() and (sample["mask"][0] == 255).all()
    assert np.isnan(sample["depth"][1, 2]) and sample["depth"][2, 2] == 16 and np.isnan(sample["depth"][0, 0])
    batch = collate([sample, source.sample(2, None)])
    assert batch["mask"].shape == batch["depth"].shape == (2, 14, 20)


def test_clips_pair_each_window_with_its_own_image_within_one_recording():
    config = DataConfig(**{**CANVAS, "windows": 3}, clip=True)
    clips = Recordings(listing(), config, paired=True)
    assert len(clips) == 4  # images 2 and 3 of each recording have two before them
    sample = clips.sample(2, None)  # the third image of the second recording
    assert [int(image[0, 0, 0]) for image in sample["images"]] == [4, 5, 6]
    assert sample["t_us"].tolist() == [[5200, 5400], [5400, 5600], [5600, 5800]]
    sequences = Sequences(clips, SequenceConfig(image_last=0, interleave=1))
    frames = sequences.sample(2, None)
    assert frames["modality"].tolist() == [0, 1] * 3 and frames["source"].tolist() == [0, 0, 1, 1, 2, 2]
    assert frames["frame_t_us"].tolist() == [5400, 5400, 5600, 5600, 5800, 5800]
    still = {**frames, "images": frames["images"][:1], "pair": np.zeros(3, np.int64)}
    assert collate_sequences([frames, still])["images"].shape == (2, 3, 3, *SIZE)
    with pytest.raises(ValueError, match="needs a video set"):
        Clips.of(dataclasses.replace(listing(), spans=None), 2)
    with pytest.raises(ValueError, match="no recording of video train has so many images"):
        Clips.of(listing(), 5)


def test_a_mixed_batch_keeps_every_sample_in_its_place():
    one, two = Recordings(listing(), DataConfig(**CANVAS), paired=True), Recordings(
        listing(), DataConfig(**{**CANVAS, "window_us": 50}), paired=True)  # fmt: skip
    mixed = Mixed({"a": one, "b": two}, {"a": 1, "b": 1})
    samples = [mixed.sample(index, None) for index in (9, 1, 2, 12)]
    assert [sample["origin"] for sample in samples] == [1, 0, 0, 1] and samples[0]["key"].startswith("b/")
    from gep.events.frames import frames
    from gep.events.represent import Histogram

    expected = [
        frames(Histogram(), collate([{k: v for k, v in s.items() if k != "origin"}])["events"]) for s in samples
    ]
    found = frames(Histogram(), collate(samples)["events"])
    assert np.array_equal(found.numpy(), np.concatenate([part.numpy() for part in expected]))
    assert found.sum(dim=(1, 2, 3)).tolist() == [50, 50, 100, 100, 100, 100, 50, 50]


def test_picked_windows_of_counted_events_and_subsets_and_jitter():
    config = DataConfig(**{**CANVAS, "window_us": 0, "num_events": 30}, pick=1)
    drawn = Recordings(listing(), config, paired=True).sample(2, np.random.default_rng(0))
    assert len(drawn["events"]) == 1 and len(drawn["events"][0]) == 15
    # A subset of what has its past keeps it, whatever its neighbours are.
    whole = Recordings(listing(), DataConfig(**{**CANVAS, "windows": 4}), paired=True)
    part = whole.subset([1, 4], "two")
    assert len(part) == 2 and part.sample(0, None)["key"] == whole.sample(1, None)["key"]
    # Jitter stays within what the split has of a recording: [5200, 6000) here.
    jittered = Recordings(listing(), DataConfig(**CANVAS, jitter_us=300, cache=True), paired=True)
    for index, seed in ((0, 1), (3, 2), (3, 3), (0, 4)):
        bounds = jittered.sample(index, np.random.default_rng(seed))["t_us"]
        assert bounds.min() >= 5200 and bounds.max() <= 6000
    plain = Recordings(listing(), DataConfig(**CANVAS), paired=True)
    assert [len(w) for w in jittered.sample(1, None)["events"]] == [len(w) for w in plain.sample(1, None)["events"]]
    for wrong in (
        {"clip": True, "num_events": 5, "window_us": 0},
        {"clip": True, "jitter_us": 5},
        {"window_us": 0, "jitter_us": 5},
    ):
        with pytest.raises(ValueError, match=r"data\.(clip|jitter_us)"):
            DataConfig(**{**CANVAS, **wrong})


def test_a_damaged_image_is_a_bad_sample():
    class Broken(Images):
        def __call__(self, index):
            raise ValueError("a.png: not a readable picture")

    with pytest.raises(BadSample, match=r"a\.png: not a readable"):
        Recordings(listing(image=Broken()), DataConfig(**CANVAS), paired=True).sample(0, None)


def many(key: str, root: str = "seq", **changes) -> Listing:
    """40 recordings of three spans each."""
    files = tuple(Path(f"{root}/{number:02d}.x") for number in range(40) for _ in range(3))
    spans = np.tile(np.arange(3)[:, None] * 10 + [0, 10], (40, 1))
    keys = tuple(key.format(file.name, 100 * (i % 3)) for i, file in enumerate(files))
    found = Listing("video", "train", keys, files, np.full(120, -1), (), SIZE, spans=spans)
    return dataclasses.replace(found, **changes)


FORMS = [
    ("a/{0}#im@{1}#x", "end"),
    ("a/{0}@{1}-200", "start"),
    ("{0}/{1}", "end"),
    ("t@b/{0}/{1}", "end"),
]


@pytest.mark.parametrize(("key", "anchor"), FORMS)
def test_hold_out_keeps_a_recording_on_one_side(key: str, anchor: str):
    whole = many(key, anchor=anchor)
    kept, held = whole.hold_out(0.3)
    assert not set(kept.files) & set(held.files) and len(kept) + len(held) == 120
    assert 12 <= len(held) <= 66  # 36 +- 3.5 standard deviations of whole recordings
    # Other recordings, and where the set lies, change nothing.
    elsewhere = many(key, "other/place", anchor=anchor).subset(np.arange(30, 75), "few")
    assert set(elsewhere.hold_out(0.3)[1].keys) == set(held.keys) & set(elsewhere.keys)
    # Nor does it matter that shards hold no files of the set's own.
    assert dataclasses.replace(whole, files=()).hold_out(0.3)[1].keys == held.keys


def test_hold_out_goes_by_groups_where_a_listing_has_them():
    groups = tuple(f"drive {i // 12}" for i in range(120))
    whole = many("{0}@{1}", spans=None, groups=groups)
    kept, held = whole.hold_out(0.4)
    assert not set(kept.groups) & set(held.groups) and set(kept.groups) | set(held.groups) == set(groups)
    assert held.subset([0], "one").groups == held.groups[:1]
    assert len(many("{0}@{1}", spans=None).hold_out(0.4)[1]) % 3, "without groups or spans each sample is its own"
