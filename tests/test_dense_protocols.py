"""What masks and depth are laid over: views, windows, splits and units of the sets with targets, by value."""

from __future__ import annotations

from pathlib import Path

import layouts_driving as drive
import numpy as np
import pytest
import yaml

from downstream.dense.splits import hold_out_ends
from gep.data.config import DataConfig
from gep.data.dsec_layout import DEPTH_SPLITS, TRAIN
from gep.data.listing import Listing
from gep.data.options import ListingOptions
from gep.data.paired import Recordings
from gep.data.registry import list_recordings
from gep.data.shard_write import write_shards
from gep.events.augment import AugmentConfig, draw, fit
from gep.events.types import Events

pytest.importorskip("h5py")
pytest.importorskip("hdf5plugin")


def rows_of(events: Events) -> np.ndarray:
    return np.stack([events.t, events.x.astype(np.int64), events.y.astype(np.int64), events.p.astype(np.int64)], axis=1)


def canvas(sensor: tuple[int, int], **more: object) -> DataConfig:
    return DataConfig(height=sensor[0], width=sensor[1], **{"windows": 1, "window_us": 0, **more})


def check_windows(source: Recordings, listing: Listing, whole: dict[str, Events], name_of: object) -> None:
    """Each window holds exactly the raw events of its bounds, of its own sequence and none else."""
    for index, key in enumerate(source.listing.keys):
        sample, events = source.sample(index, None), whole[name_of(key)]
        assert sample["t_us"][-1, 1] == listing.spans[listing.keys.index(key), 1]
        for window, (t0, t1) in zip(sample["events"], sample["t_us"].tolist()):
            begin, end = np.searchsorted(events.t, [t0, t1])
            assert len(window) > 0 and np.array_equal(rows_of(window), rows_of(events[int(begin) : int(end)]))


# ---- MVSEC: one view for events and depth -----------------------------------------------------------


def write_maps(root: Path, scene: str, shift: float) -> None:
    y, x = np.meshgrid(np.arange(260.0), np.arange(346.0), indexing="ij")
    np.savetxt(root / f"{scene}_left_x_map.txt", x + shift, fmt="%.3f")
    np.savetxt(root / f"{scene}_left_y_map.txt", y - shift, fmt="%.3f")


def test_mvsec_rectified_events_lie_under_rectified_depth(tmp_path: Path) -> None:
    written = drive.write_mvsec(tmp_path, ("outdoor_day1", "outdoor_night1"), frames=3)
    write_maps(tmp_path, "outdoor_night", 7.0)
    listing = list_recordings("mvsec", tmp_path, "test")
    source = Recordings(listing, canvas(drive.DAVIS), paired=False, targets=True)
    day_x, day_y = drive.mvsec_maps()
    for index, key in enumerate(listing.keys):
        name = key.split("/")[0]
        t0, t1 = listing.spans[index].tolist()
        wanted = []
        for t, x, y, p in rows_of(written[name]).tolist():
            if t0 <= t < t1:  # one event at a time: by the tables of its own scene, to the nearest pixel
                to = (day_x[y, x], day_y[y, x]) if name == "outdoor_day1" else (x + 7.0, y - 7.0)
                column, row = (round(float(np.float32(value))) for value in to)
                if 0 <= column < 346 and 0 <= row < 260:
                    wanted.append((t, column, row, p))
        sample = source.sample(index, None)
        assert sample["t_us"].tolist() == [[t0, t1]] and t1 - t0 == 50_000
        assert len(wanted) > 100 and np.array_equal(rows_of(sample["events"][0]), np.array(wanted))
        depth = sample["depth"]
        assert depth.dtype == np.float32 and np.isnan(depth[:2]).all()
        assert (depth[2:] == 3 + int(key.split("/")[1])).all()  # the map at the window's end, of the rect group


def test_mvsec_raw_events_lie_under_raw_depth(tmp_path: Path) -> None:
    import h5py

    written = drive.write_mvsec(tmp_path, frames=4)
    for path in tmp_path.glob("*_map.txt"):
        path.unlink()  # raw needs none
    with h5py.File(tmp_path / "outdoor_day2_gt.hdf5", "a") as file:  # the raw group has stamps of its own
        file["davis/left/depth_image_raw_ts"][...] += 0.007
    config = canvas(drive.DAVIS, depth="raw")
    listing = list_recordings("mvsec", tmp_path, "train", config)
    assert listing.rectify is None and "depth raw" in listing.describe()
    assert (listing.spans - round(drive.UNIX_S * 1e6))[0].tolist() == [7_000, 57_000]
    source = Recordings(listing, config, paired=False, targets=True)
    check_windows(source, listing, written, lambda key: key.split("/")[0])
    assert (source.sample(0, None)["depth"][2:] == 104).all()


def test_mvsec_never_mixes_the_views(tmp_path: Path) -> None:
    drive.write_mvsec(tmp_path, ("outdoor_day1", "outdoor_night1"), frames=3, count=300)
    with pytest.raises(ValueError, match=r"data\.rectify=false leaves events raw beside data\.depth=rect"):
        list_recordings("mvsec", tmp_path, "test", canvas(drive.DAVIS, rectify=False))
    (tmp_path / "outdoor_night_left_x_map.txt").unlink()
    # The day's tables are there, and are no substitute.
    with pytest.raises(FileNotFoundError, match=r"outdoor_night_left_x_map\.txt is missing.*data\.depth=raw"):
        list_recordings("mvsec", tmp_path, "test")
    assert len(list_recordings("mvsec", tmp_path, "outdoor_day1")) == 2


def test_mvsec_windows_of_the_past_end_at_depth_maps(tmp_path: Path) -> None:
    """clip: each of T windows lies between two consecutive maps, however unevenly these were taken."""
    import h5py

    drive.write_mvsec(tmp_path, ("outdoor_day1", "outdoor_night1"), frames=6)
    for name in ("outdoor_day1", "outdoor_night1"):
        with h5py.File(tmp_path / f"{name}_gt.hdf5", "a") as file:
            file["davis/left/depth_image_rect_ts"][2] += 0.011
    config = canvas(drive.DAVIS, windows=3, clip=True, window_us=50_000)
    listing = list_recordings("mvsec", tmp_path, "test", config)
    source = Recordings(listing, config, paired=False, targets=True)
    # Of 6 maps the first ends no window, and the next two have no two windows before theirs.
    assert source.listing.keys == tuple(f"outdoor_{n}/{k:06d}" for n in ("day1", "night1") for k in (3, 4, 5))
    start = round(drive.UNIX_S * 1e6)
    stamps = start + np.array([0, 50, 111, 150, 200, 250]) * 1000
    for index in range(6):
        last = 3 + index % 3
        wanted = [[stamps[k - 1], stamps[k]] for k in (last - 2, last - 1, last)]
        assert source.sample(index, None)["t_us"].tolist() == wanted


def test_mvsec_holds_out_the_end_of_its_one_training_sequence(tmp_path: Path) -> None:
    drive.write_mvsec(tmp_path, frames=21, count=4000)
    listing = list_recordings("mvsec", tmp_path, "train")
    kept, held = hold_out_ends(listing, 0.25)
    assert len(kept) == 15 and len(held) == 5 and not set(kept.keys) & set(held.keys)
    assert kept.spans[:, 1].max() <= held.spans[:, 0].min()


# ---- DSEC: metres from disparity --------------------------------------------------------------------


def test_dsec_depth_is_the_reprojection_of_its_disparity(tmp_path: Path) -> None:
    """Independent reference: Q of cams_03 on (x, y, disparity, 1), Z / W, also where Q has an offset."""
    drive.write_dsec(tmp_path)
    path = tmp_path / "zurich_city_00_a" / "calibration" / "cam_to_cam.yaml"
    calibration = yaml.safe_load(path.read_text())
    for offset in (0.0, 0.01):
        calibration["disparity_to_depth"]["cams_03"][3][3] = offset
        path.write_text(yaml.safe_dump(calibration))
        q = np.array(calibration["disparity_to_depth"]["cams_03"])
        depth = list_recordings("dsec", tmp_path, "train_depth").targets["depth"](0)
        for x in range(200, 300):
            point = q @ (x, 100, (256 * (x - 199) + 2) / 256, 1.0)
            assert depth[100, x] == pytest.approx(point[2] / point[3], rel=1e-6)
        assert np.isfinite(depth).sum() == 100 and np.isnan(depth[99]).all()  # 0 = none, not infinitely far


def test_dsec_depth_splits_are_disjoint_and_whole(tmp_path: Path) -> None:
    names = [name for split in DEPTH_SPLITS.values() for name in split]
    assert sorted(names) == sorted(TRAIN) and len(set(names)) == 41
    drives_of = [{name.rpartition("_")[0] for name in split} for split in DEPTH_SPLITS.values()]
    assert not (drives_of[0] & drives_of[1] or drives_of[0] & drives_of[2] or drives_of[1] & drives_of[2])
    drive.write_dsec(tmp_path, ("zurich_city_00_a", "zurich_city_06_a"), pictures=3)
    train, held = (list_recordings("dsec", tmp_path, split) for split in ("depth_train", "depth_val"))
    assert train.keys == ("zurich_city_00_a/000002",) and held.keys == ("zurich_city_06_a/000002",)
    assert train.notes["sequences"] == "1 of 32" and held.notes["sequences"] == "1 of 3"
    with pytest.raises(FileNotFoundError, match="depth_test: none of thun_00_a, .*where there are zurich_city_00_a"):
        list_recordings("dsec", tmp_path, "depth_test")
    with pytest.raises(ValueError, match="no split 'test_depth'; choose one of .*depth_test"):
        list_recordings("dsec", tmp_path, "test_depth")
    with pytest.raises(ValueError, match=r"data\.rectify=false"):
        list_recordings("dsec", tmp_path, "depth_val", ListingOptions(rectify=False))


@pytest.mark.parametrize("windows", [1, 2])
def test_windows_never_leave_their_sequence(windows: int, tmp_path: Path) -> None:
    """Both sequences cover the same times, so that events of the other one would be found in any window."""
    written = drive.write_dsec(tmp_path, ("zurich_city_00_a", "zurich_city_01_a"), pictures=7)
    for name in written:  # a map that moves nothing: events can be compared as they are
        folder = tmp_path / name / "events" / "left"
        drive.write_dsec_events(folder, written[name], shift=(0.0, 0.0))
    config = canvas(drive.DSEC_SENSOR, windows=windows, window_us=100_000)
    listing = list_recordings("dsec", tmp_path, "train_depth", config)
    source = Recordings(listing, config, paired=False, targets=True)
    check_windows(source, listing, written, lambda key: key.split("/")[0])
    # The first sample of a sequence has 100 ms before its map and no more.
    assert len(listing) == 6 and len(source) == (6 if windows == 1 else 4)


# ---- Depth on the canvas ----------------------------------------------------------------------------


def numbered(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Every pixel its own depth, half of them NaN."""
    rng = np.random.default_rng(seed)
    depth = np.arange(1, height * width + 1, dtype=np.float32).reshape(height, width)
    depth[rng.random((height, width)) < 0.5] = np.nan
    return depth


@pytest.mark.parametrize(
    "size, how", [((50, 70), "pad"), ((30, 40), "pad"), ((80, 30), "resize"), ((20, 31), "resize")]
)
def test_depth_on_a_canvas_is_never_mixed(size: tuple[int, int], how: str) -> None:
    depth = numbered(40, 60)
    found = fit((40, 60), size, how).apply_depth(depth)
    assert found.dtype == np.float32 and found.shape == size
    for row in range(size[0]):
        for column in range(size[1]):
            if how == "pad":
                y, x = row - int((size[0] - 40) / 2), column - int((size[1] - 60) / 2)
            else:  # the pixel under the centre
                y, x = int((row + 0.5) * 40 / size[0]), int((column + 0.5) * 60 / size[1])
            inside = 0 <= y < 40 and 0 <= x < 60
            wanted = depth[y, x] if inside else np.float32(np.nan)
            assert found[row, column] == wanted or (np.isnan(wanted) and np.isnan(found[row, column]))


def test_augmented_depth_holds_only_values_of_the_map() -> None:
    depth = numbered(40, 60)
    config = AugmentConfig(crop_area_min=0.3, crop_aspect_max=1.5, max_rotation_deg=20, max_scale=0.3, flip_x=0.5)
    for seed in range(10):
        found = draw(config, np.random.default_rng(seed), (40, 60), (35, 52)).apply_depth(depth)
        known = found[np.isfinite(found)]
        assert len(known) > 100 and np.isnan(found).sum() > 100 and np.isin(known, depth[np.isfinite(depth)]).all()


# ---- EventScape, shards -----------------------------------------------------------------------------


def test_eventscape_windows_are_its_files(tmp_path: Path) -> None:
    drive.write_eventscape(tmp_path, sequences=2)
    config = canvas((256, 512))
    listing = list_recordings("eventscape", tmp_path, "val", config)
    source = Recordings(listing, config, paired=False, targets=True)
    for index in range(len(source)):
        sample, events = source.sample(index, None), listing.source(index).read()
        assert np.array_equal(rows_of(sample["events"][0]), rows_of(events))
        assert sample["t_us"].tolist() == [[events.t[0], events.t[-1] + 1]]
        assert np.isnan(sample["depth"][0]).all() and (sample["depth"][1:] == index % 3 + 1).all()  # ∞ = none


def test_depth_survives_shards(tmp_path: Path) -> None:
    drive.write_mvsec(tmp_path / "set", frames=4)
    listing = list_recordings("mvsec", tmp_path / "set", "train")
    write_shards(listing, tmp_path / "shards", samples_per_shard=2)
    again = list_recordings("shards", tmp_path / "shards", "train")
    for config in (canvas(drive.DAVIS), canvas(drive.DAVIS, rectify=False)):  # they were moved when written
        first = Recordings(listing, canvas(drive.DAVIS), paired=False, targets=True)
        second = Recordings(again, config, paired=False, targets=True)
        for index in range(len(listing)):
            one, two = first.sample(index, None), second.sample(index, None)
            assert np.array_equal(one["depth"], two["depth"], equal_nan=True)
            assert np.array_equal(rows_of(one["events"][0]), rows_of(two["events"][0]))


# ---- Masks ------------------------------------------------------------------------------------------


def test_dsec_semantic_says_which_labels_it_took(tmp_path: Path) -> None:
    drive.write_dsec_semantic(tmp_path)
    for option, count, words in (("none", 10, "subsampling none"), ("ess", 2, "subsampling ESS (first 6 skipped,")):
        config = canvas(drive.DSEC_SENSOR, subsampling=option)
        source = Recordings(list_recordings("dsec_semantic", tmp_path, "train", config), config, paired=False)
        assert len(source) == count and words in source.describe()


@pytest.mark.parametrize("name", ["dsec_semantic", "ddd17"])
def test_rows_without_labels_can_be_left_out(name: str, tmp_path: Path) -> None:
    if name == "ddd17":
        written, sensor, rows = drive.write_ddd17(tmp_path), drive.DAVIS, 200
        shift = 0
    else:
        written, sensor, rows = drive.write_dsec_semantic(tmp_path, maps=4), drive.DSEC_SENSOR, 440
        shift = -3
    found = {}
    for option in ("all", "labelled"):
        config = canvas(sensor, rows=option)
        listing = list_recordings(name, tmp_path, "train", config)
        assert ("events of the top" in listing.describe()) == (option == "labelled")
        source = Recordings(listing, config, paired=False, targets=True)
        found[option] = rows_of(source.sample(1, None)["events"][0])
        mask = source.sample(1, None)["mask"]
        assert (mask[rows:] == 255).all() and (mask[: rows - 1] != 255).all()
    below = found["all"][:, 2] >= rows
    assert below.sum() > 10 and np.array_equal(found["labelled"], found["all"][~below])
    t0, t1 = listing.spans[1].tolist()
    events = next(iter(written.values()))
    inside = (events.t >= t0) & (events.t < t1)
    kept = (events.y[inside].astype(int) + shift >= 0) & (
        events.x[inside].astype(int) + (2 if shift else 0) < sensor[1]
    )
    assert len(found["all"]) == kept.sum()


def test_left_out_rows_need_rectify(tmp_path: Path) -> None:
    drive.write_ddd17(tmp_path)
    with pytest.raises(ValueError, match=r"data\.rows=labelled has no effect"):
        list_recordings("ddd17", tmp_path, "train", ListingOptions(rows="labelled", rectify=False))


def test_ddd17_windows_stay_in_their_folder(tmp_path: Path) -> None:
    written = drive.write_ddd17(tmp_path, (0, 3))
    config = canvas(drive.DAVIS)
    listing = list_recordings("ddd17", tmp_path, "train", config)
    source = Recordings(listing, config, paired=False, targets=True)
    assert len(source) == 6
    check_windows(source, listing, {f"dir{n}": events for n, events in written.items()}, lambda key: key.split("/")[0])
