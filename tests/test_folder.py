"""A user's own folder: every layout, cutting, ranges of time, pictures by their stamps; and `gep info`.

One file: the layouts are variants of one folder that is written here.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import layouts
import numpy as np
import pytest
from PIL import Image

from gep.data.bad import BadSample
from gep.data.build import build
from gep.data.config import DataConfig
from gep.data.describe import describe_path, facts
from gep.data.options import ListingOptions
from gep.data.paired import Recordings
from gep.data.registry import list_recordings
from gep.data.shard_write import write_shards
from gep.events.io import opened
from gep.events.io.bin import write_bin
from gep.events.io.dat import write_dat
from gep.events.io.npz import write_npz
from gep.events.io.source import InMemory
from gep.events.types import Events


def listed(root: Path, split: str = "all", **options):
    return list_recordings("folder", root, split, ListingOptions(**options))


def test_classes_are_folders_in_sorted_order(tmp_path: Path) -> None:
    written = layouts.write_folder(tmp_path, ("mug/b.bin", "mug/a.bin", "box/z.bin"))
    listing = listed(tmp_path)
    assert listing.classes == ("box", "mug") and listing.keys == ("box/z.bin", "mug/a.bin", "mug/b.bin")
    assert listing.labels.tolist() == [0, 1, 1] and listing.spans is None and listing.image is None
    assert np.array_equal(listing.source(2).read().t, written["mug/b.bin"].t)
    assert listed(tmp_path, "train").hash == listing.hash  # without splits on disk, train is everything
    assert pickle.loads(pickle.dumps(listing)).keys == listing.keys


def test_flat_recordings(tmp_path: Path) -> None:
    layouts.write_folder(tmp_path, ("mug.bin", "box.bin"))
    layouts.write_text(tmp_path / "readme.txt", ["not events"])
    listing = listed(tmp_path)
    assert listing.classes == () and listing.labels.tolist() == [-1, -1]
    listing = listed(tmp_path, label_from="file")
    assert listing.classes == ("box", "mug") and listing.labels.tolist() == [0, 1]


def test_split_folders_share_their_classes(tmp_path: Path) -> None:
    layouts.write_folder(tmp_path, ("train/a/1.bin", "train/b/1.bin", "train/c/1.bin", "test/c/2.bin"))
    train, test = listed(tmp_path, "train"), listed(tmp_path, "test")
    assert train.classes == test.classes == ("a", "b", "c")
    assert test.labels.tolist() == [2] and test.keys == ("test/c/2.bin",)
    assert len(listed(tmp_path)) == 4
    with pytest.raises(FileNotFoundError, match="no split 'val'; the folder has train, test"):
        listed(tmp_path, "val")


def test_split_lists(tmp_path: Path) -> None:
    layouts.write_folder(tmp_path, ("a/1.bin", "a/2.bin", "b/1.bin"))
    layouts.write_text(tmp_path / "train.txt", ["b/1.bin", "", "a/2.bin  # the good one"])
    layouts.write_text(tmp_path / "test.txt", ["a/1.bin"])
    listing = listed(tmp_path, "train")
    assert listing.keys == ("b/1.bin", "a/2.bin") and listing.labels.tolist() == [1, 0]
    assert listed(tmp_path, "test").classes == ("a", "b")
    layouts.write_text(tmp_path / "val.txt", ["a/1.bin", "a/7.bin"])
    with pytest.raises(FileNotFoundError, match=r"val\.txt: line 2: a/7\.bin"):
        listed(tmp_path, "val")


def test_cut_into_samples(tmp_path: Path) -> None:
    events = layouts.write_folder(tmp_path, ("a/1.bin",), duration=1_000_000)["a/1.bin"]
    first, end = int(events.t[0]), int(events.t[-1]) + 1
    listing = listed(tmp_path, sample_us=300_000)
    assert (listing.spans - first).tolist() == [[0, 300_000], [300_000, 600_000], [600_000, 900_000]]
    assert listing.keys == ("a/1.bin@0", "a/1.bin@300000", "a/1.bin@600000") and listing.anchor == "start"
    assert listing.sensor == (34, 34) and "300 ms" in listing.notes["samples"]
    t0, t1 = listing.spans[1]
    assert len(listing.source(1).by_time(t0, t1)) == ((events.t >= t0) & (events.t < t1)).sum()
    overlapping = listed(tmp_path, sample_us=300_000, sample_stride_us=100_000)
    assert np.diff(overlapping.spans[:, 0]).tolist() == [100_000] * (len(overlapping) - 1)
    assert overlapping.spans[-1, 1] <= end < overlapping.spans[-1, 1] + 100_000


def test_samples_of_one_recording_are_held_out_together(tmp_path: Path) -> None:
    names = tuple(f"{'ab'[k % 2]}/{k}.bin" for k in range(8))
    layouts.write_folder(tmp_path, names, duration=1_000_000)
    before = listed(tmp_path, sample_us=250_000)
    kept, held = before.hold_out(0.5)
    assert not set(kept.files) & set(held.files) and len(kept) and len(held)
    layouts.write_folder(tmp_path, ("0/new.bin",), duration=1_000_000)
    again = listed(tmp_path, sample_us=250_000)
    assert len(again) > len(before) and set(again.hold_out(0.5)[1].keys) & set(before.keys) == set(held.keys)
    # A class that is there alone is named as it is among others.
    layouts.write_folder(tmp_path / "few", names[1::2], duration=1_000_000)
    few = listed(tmp_path / "few", sample_us=250_000)
    held = set(before.hold_out(0.3)[1].keys) & set(few.keys)  # some of them: of all, one would be kept
    assert held and set(few.hold_out(0.3)[1].keys) == held


def test_recordings_stay_open_while_they_are_few(tmp_path: Path) -> None:
    for k in range(10):
        write_npz(tmp_path / f"{k}.npz", layouts.random_events(k, 20, 1000, 24, 32))
    for k in range(66):
        write_dat(tmp_path / f"{k}.dat", layouts.random_events(k, 20, 1000, 24, 32))
    mapped = [opened(tmp_path / f"{k}.dat") for k in range(64)]
    whole = [opened(tmp_path / f"{k}.npz") for k in range(10)]
    assert all(isinstance(source, InMemory) for source in whole) and not isinstance(mapped[0], InMemory)
    # The one kind does not push the other out; of each the oldest go first.
    assert all(opened(tmp_path / f"{k}.dat") is mapped[k] for k in range(64))
    same = [opened(tmp_path / f"{k}.npz") is whole[k] for k in range(9, -1, -1)]
    assert same == [True] * 8 + [False] * 2
    assert opened(tmp_path / "5.npz", height=34, width=34) is not whole[5], "another sensor size"
    opened(tmp_path / "64.dat")
    assert opened(tmp_path / "1.dat") is mapped[1] and opened(tmp_path / "0.dat") is not mapped[0]
    write_dat(tmp_path / "63.dat", layouts.random_events(1, 30, 1000, 24, 32))
    assert len(opened(tmp_path / "63.dat")) == 30 and len(mapped[63]) == 20


def test_images_are_no_recordings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.name=images data\.images\.path="):
        list_recordings("images", tmp_path, "train")


def test_ranges_are_disjoint_and_nothing_straddles_a_border(tmp_path: Path) -> None:
    written = layouts.write_folder(tmp_path, ("a/1.bin", "b/2.bin"), duration=1_000_000)
    early = listed(tmp_path, "0-60%", sample_us=70_000, sample_stride_us=10_000)
    late = listed(tmp_path, "70-100%", sample_us=70_000, sample_stride_us=10_000)
    for name, events in written.items():
        first, end = int(events.t[0]), int(events.t[-1]) + 1
        for listing, low, high in ((early, 0.0, 0.6), (late, 0.7, 1.0)):
            spans = listing.spans[[key.startswith(name) for key in listing.keys]]
            assert spans[:, 0].min() == first + round(low * (end - first))
            assert spans[:, 1].max() <= first + round(high * (end - first)) < spans[:, 1].max() + 10_000
    whole = listed(tmp_path, "0-60%")
    assert len(whole) == 2 and (whole.spans[:, 1] - whole.spans[:, 0]).tolist() == [
        round(0.6 * (int(events.t[-1]) + 1 - int(events.t[0]))) for events in written.values()
    ]
    for wrong in ("60-0%", "0-120%", "half%"):
        with pytest.raises(ValueError, match="range"):
            listed(tmp_path, wrong)
    with pytest.raises(ValueError, match=r"no sample is left.*sample_us=2000000"):
        listed(tmp_path, "0-60%", sample_us=2_000_000)


def test_min_events(tmp_path: Path) -> None:
    events = layouts.write_folder(tmp_path, ("a/1.bin",), duration=1_000_000, count=200)["a/1.bin"]
    everything = listed(tmp_path, sample_us=50_000)
    listing = listed(tmp_path, sample_us=50_000, min_events=11)
    counts = [((events.t >= t0) & (events.t < t1)).sum() for t0, t1 in everything.spans]
    assert listing.keys == tuple(key for key, count in zip(everything.keys, counts) if count >= 11)
    assert 0 < len(listing) < len(everything)


def test_sensor_size_by_the_user(tmp_path: Path) -> None:
    written = layouts.write_folder(tmp_path, ("a.bin",))
    assert listed(tmp_path).sensor is None
    listing = listed(tmp_path, sensor_height=100, sensor_width=90)
    assert listing.sensor == (100, 90) and (listing.source(0).height, listing.source(0).width) == (100, 90)
    assert np.array_equal(listing.source(0).read().x, written["a.bin"].x)
    assert listed(tmp_path, sensor_height=100, sensor_width=90, sample_us=100_000).sensor == (100, 90)
    with pytest.raises(ValueError, match="set both or none"):
        listed(tmp_path, sensor_height=100)
    assert "100 × 90" in describe_path(tmp_path / "a.bin", height=100, width=90)


def paired(root: Path, name: str, *, exposures: bool = False, pictures: int = 4) -> None:
    """A recording folder with pictures, masks and depth; picture k holds 10 k."""
    home = root / name
    home.mkdir(parents=True)
    write_bin(home / "events.bin", layouts.random_events(1, 2000, 1_000_000, 34, 34))
    stamps = [100_000 * (k + 1) for k in range(pictures)]
    layouts.write_text(home / "images" / "timestamps.txt", [f"{t - 30_000} {t}" if exposures else t for t in stamps])
    for k in range(pictures):
        layouts.save(home / "images" / f"{k:06d}.png", np.full((34, 34), 10 * k, np.uint8))
        layouts.save(home / "masks" / f"{k:06d}.png", np.full((30, 34), k, np.uint8))
        (home / "depth").mkdir(exist_ok=True)
        np.save(home / "depth" / f"{k:06d}.npy", np.where(np.eye(34) > 0, 0, k + 0.5).astype(np.float32))


def test_pictures_with_times(tmp_path: Path) -> None:
    paired(tmp_path, "street/one")
    listing = listed(tmp_path)
    assert listing.classes == ("street",) and listing.anchor == "end"
    assert listing.keys == tuple(f"street/one#{k:06d}" for k in (1, 2, 3))  # nothing is known of before the first
    assert listing.spans.tolist() == [[100_000, 200_000], [200_000, 300_000], [300_000, 400_000]]
    assert (listing.image(1) == 20).all() and listing.image(1).shape == (3, 34, 34)
    mask, depth = listing.targets["mask"](2), listing.targets["depth"](2)
    assert (mask[:30] == 3).all() and (mask[30:] == 255).all()
    assert np.isnan(np.diag(depth)).all() and depth[0, 1] == 3.5
    with pytest.raises(ValueError, match=r"data\.sample_us=40000 cuts recordings without pictures"):
        listed(tmp_path, sample_us=40_000)
    early = listed(tmp_path, "0-35%")
    assert [key[-1] for key in early.keys] == ["1", "2"]
    part = pickle.loads(pickle.dumps(listing.subset([2, 0], "part")))
    assert (part.image(0) == 30).all() and part.targets["mask"](1)[0, 0] == 1


def test_pictures_with_exposures(tmp_path: Path) -> None:
    paired(tmp_path, "one", exposures=True)
    paired(tmp_path, "two", exposures=True)
    listing = listed(tmp_path)
    assert len(listing) == 8 and listing.classes == () and listing.keys[4] == "two#000000"
    assert listing.spans[:2].tolist() == [[70_000, 100_001], [170_000, 200_001]]  # the end of an exposure belongs to it
    assert (listing.image(7) == 30).all()
    with pytest.raises(ValueError, match=r"data\.sample_us=1000 cuts recordings without pictures"):
        listed(tmp_path, sample_us=1000)


def test_exposures_in_the_archive(tmp_path: Path) -> None:
    t = np.arange(0, 1000, 10)
    frames = {
        "frame_index": [3, 12],
        "frame_exposure_start_us": [100, 500],
        "frame_exposure_end_us": [200, 600],
    }
    np.savez(tmp_path / "events.npz", x=t % 20, y=t % 10, t_us=t, p=t % 2, height=10, width=20, **frames)
    for number in (3, 4, 12):
        layouts.save(tmp_path / "images" / f"{number:06d}.png", np.full((10, 20), number, np.uint8))
    listing = listed(tmp_path)
    assert listing.keys == ("events.npz#000003", "events.npz#000012") and listing.sensor == (10, 20)
    # The event at the end of the exposure, at 200 µs, belongs to it.
    assert listing.source(0).by_time(*listing.spans[0]).t.tolist() == list(range(100, 201, 10))
    assert (listing.image(1) == 12).all()
    (tmp_path / "images" / "000012.png").unlink()
    with pytest.raises(FileNotFoundError, match="no picture 000012"):
        listed(tmp_path)


def test_masks_ids_are_named_by_classes_txt(tmp_path: Path) -> None:
    paired(tmp_path, "street/one")
    names = layouts.write_text(tmp_path / "classes.txt", ["road #736e92", "", "  traffic sign ", "sky\t#94C8EA", "car"])
    listing = listed(tmp_path)
    assert listing.classes == ("road", "traffic sign", "sky", "car") and (listing.labels == -1).all()
    assert listing.notes["colours"] == "#736e92 - #94C8EA -" and (listing.targets["mask"](2)[:30] == 3).all()
    layouts.write_text(names, ["road", "car"])
    listing = listed(tmp_path)
    assert (listing.targets["mask"](0)[:30] == 1).all() and "colours" not in listing.notes
    with pytest.raises(ValueError, match=r"000002\.png: class id 2, where 2 classes are named.*classes\.txt"):
        listing.targets["mask"](1)
    with pytest.raises(BadSample, match=r"000002\.png: class id 2"):
        Recordings(listing, DataConfig(windows=1), paired=False, targets=True).sample(1, None)
    for lines, message in ((["a", "b", "a"], "names a twice"), ([], "0 names"), (range(256), "256 names")):
        layouts.write_text(names, list(lines))
        with pytest.raises(ValueError, match=message):
            listed(tmp_path)
    names.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        listed(tmp_path)
    layouts.write_text(names, ["mug"])
    layouts.write_folder(tmp_path / "bare", ("mug/a.bin",))
    layouts.write_text(tmp_path / "bare" / "classes.txt", ["mug"])
    with pytest.warns(UserWarning, match=r"classes\.txt has no effect"):
        assert listed(tmp_path / "bare").classes == ("mug",)


def test_names_and_colours_of_masks_stay_in_shards(tmp_path: Path) -> None:
    paired(tmp_path / "own", "one")
    layouts.write_text(tmp_path / "own" / "classes.txt", ["a", "b #010203", "c", "d"])
    write_shards(listed(tmp_path / "own"), tmp_path / "shards")
    found = list_recordings("shards", tmp_path / "shards", "all")
    assert found.classes == ("a", "b", "c", "d") and found.notes["colours"] == "- #010203 - -"


def test_one_recording_cannot_be_held_out(tmp_path: Path) -> None:
    layouts.write_folder(tmp_path, ("a.bin",), duration=1_000_000)
    with pytest.raises(ValueError, match=r"data\.train_split=0-80% data\.eval_split=80-100%.*or add recordings"):
        listed(tmp_path, sample_us=100_000).hold_out(0.1)


def test_a_held_out_side_without_samples_says_what_to_do(tmp_path: Path) -> None:
    paired(tmp_path, "one", pictures=8)
    paired(tmp_path, "two", pictures=3)
    short = "one" if any(key.startswith("one") for key in listed(tmp_path).hold_out(0.1)[1].keys) else "two"
    if short == "one":
        (tmp_path / "one").rename(tmp_path / "x"), (tmp_path / "two").rename(tmp_path / "one")
        (tmp_path / "x").rename(tmp_path / "two")
    data = DataConfig(name="folder", root=str(tmp_path), clip=True, windows=5, window_us=0)
    with pytest.raises(ValueError, match=r"held out 0\.1\] has so many images; or hold more .*data\.holdout=0\.1"):
        build(data, paired=True)


def test_faulty_pictures(tmp_path: Path) -> None:
    paired(tmp_path, "one")
    (tmp_path / "one" / "masks" / "000002.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"masks: no file 000002"):
        listed(tmp_path)
    (tmp_path / "one" / "images" / "000003.png").unlink()
    with pytest.raises(ValueError, match="3 files for 4 time stamps"):
        listed(tmp_path)
    (tmp_path / "one" / "images" / "timestamps.txt").unlink()
    with pytest.raises(ValueError, match=r"timestamps\.txt is missing"):
        listed(tmp_path)
    paired(tmp_path / "b", "one")
    layouts.write_folder(tmp_path / "b", ("bare.bin",))
    with pytest.raises(ValueError, match="has no stamped pictures"):
        listed(tmp_path / "b")


def test_layouts_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no recording found; the folder should hold one of"):
        listed(tmp_path)
    layouts.write_folder(tmp_path, ("mug/a.bin", "b.bin"))
    with pytest.raises(ValueError, match="side by side"):
        listed(tmp_path)


def test_real_objects_by_the_files_names(real_data: Path) -> None:
    """Six recordings of one session: the first 60 % to learn from, the last 30 % to test."""
    root = real_data / "dvs128_objects"
    train = listed(root, "0-60%", label_from="file", sample_us=250_000)
    test = listed(root, "70-100%", label_from="file", sample_us=250_000)
    assert train.classes == test.classes and len(train.classes) == 6 and train.sensor == (128, 128)
    assert train.classes == tuple(sorted(path.stem for path in root.glob("*.aedat")))
    assert not set(train.keys) & set(test.keys)
    for label in range(6):
        mine, theirs = train.spans[train.labels == label], test.spans[test.labels == label]
        # 33 s each: 60 % are some 79 windows of 250 ms, 30 % some 39; and a tenth lies between them.
        assert 60 < len(mine) < 100 and 25 < len(theirs) < 50 and mine.max() + 2_000_000 < theirs.min()
        assert (np.diff(mine, axis=1) == 250_000).all()
    assert sum(len(train.source(i).by_time(*train.spans[i])) > 0 for i in range(0, len(train), 20)) >= len(train) // 25


def test_real_frames_with_their_exposures(real_data: Path) -> None:
    listing = listed(real_data / "davis346")
    assert listing.keys == tuple(f"events.npz#{k:06d}" for k in (13, 17, 18, 29, 30, 34, 35))
    with np.load(real_data / "davis346" / "events.npz") as archive:
        assert listing.spans[:, 0].tolist() == archive["frame_exposure_start_us"].tolist()
        counts = [int((archive["frame_of_event"] == k).sum()) for k in archive["frame_index"]]
    assert [len(listing.source(i).by_time(*listing.spans[i])) for i in range(7)] == counts
    assert listing.sensor == (260, 346) and listing.image(3).shape == (3, 260, 346)
    with Image.open(real_data / "davis346" / "images" / "000029.png") as picture:
        assert np.array_equal(listing.image(3)[1], np.asarray(picture))
    assert len(listed(real_data / "davis346", "0-60%")) == 3


# ---- gep info ---------------------------------------------------------------------------------------


def test_info_of_a_recording(tmp_path: Path) -> None:
    t = np.array([0, 10, 999, 1000, 1500, 1999, 2_000, 1_000_000])
    events = Events.from_arrays(t, t % 34, t % 34, [1, 1, 1, 0, 1, 1, 0, 1], height=34, width=34)
    write_bin(tmp_path / "a.bin", events)
    text = describe_path(tmp_path / "a.bin")
    for part in ("bin", "34 × 34", "8", "6 (75.0 %), 2 (25.0 %)", "0 to 1,000,000 µs (1.000000 s)", "8 events/s"):
        assert part in text, text
    assert "3 events in one ms" in text


def test_peak_does_not_depend_on_chunks(tmp_path: Path) -> None:
    class Chunked(InMemory):
        size = 1 << 20

        def chunks(self, count: int = 0):
            return super().chunks(self.size)

    source = Chunked(tmp_path, layouts.random_events(3, 5000, 300_000, 34, 34))
    whole = facts(source)
    assert f"{np.bincount((source.events.t - source.events.t[0]) // 1000).max()} events in one ms" in whole[-1]
    source.size = 7
    assert facts(source) == whole


def test_info_of_folders(tmp_path: Path) -> None:
    layouts.write_folder(tmp_path / "own", ("mug/a.bin", "box/z.bin"))
    text = describe_path(tmp_path / "own")
    assert "data.name=folder" in text and "box (1), mug (1)" in text and text.count("list ") == 1
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text(json.dumps({"kind": "encoder"}))
    assert '"kind": "encoder"' in describe_path(tmp_path / "export")
    (tmp_path / "export" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        describe_path(tmp_path / "export")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="no recording, data set, shards or exported model"):
        describe_path(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="there is nothing at"):
        describe_path(tmp_path / "nowhere")
