"""The driving sets, read from tiny copies of their layouts: spans, views, depth, masks and events by value.

One file: the sets share the tiny copies that are written here.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import layouts
import layouts_driving as drive
import numpy as np
import pytest

from gep.data.describe import describe_path
from gep.data.dsec_calibration import homography_to_picture, load_calibration
from gep.data.listing import Listing
from gep.data.mvsec import _inverse
from gep.data.options import ListingOptions
from gep.data.registry import list_recordings, recognise
from gep.data.shard_write import write_shards
from gep.data.shards import open_shards
from gep.events.types import Events

pytest.importorskip("h5py")
pytest.importorskip("hdf5plugin")


def between(events: Events, t0: int, t1: int) -> Events:
    begin, end = np.searchsorted(events.t, [t0, t1])
    return events[int(begin) : int(end)]


def check_events(listing: Listing, index: int, whole: Events) -> None:
    """The span's events are those of the recording, however the file stores them."""
    t0, t1 = listing.spans[index].tolist()
    found, wanted = listing.source(index).by_time(t0, t1), between(whole, t0, t1)
    assert len(wanted) > 0
    for name in "txyp":
        assert np.array_equal(getattr(found, name), getattr(wanted, name)), name


# ---- DSEC -------------------------------------------------------------------------------------------


def test_homography_is_the_way_of_a_far_point(tmp_path: Path) -> None:
    """Independent reference: a ray of a rectified event pixel, turned camera by camera, falls on the picture."""
    drive.write_calibration(tmp_path / "cam_to_cam.yaml")
    matrix = np.array(homography_to_picture(load_calibration(tmp_path / "cam_to_cam.yaml"), "file"))
    c = drive.CALIBRATION
    (fx0, fy0, cx0, cy0), (fx1, fy1, cx1, cy1) = c["camRect0"], c["camRect1"]
    for u, v in ((0, 0), (639, 0), (320, 240), (12, 471), (600, 100)):
        rect0 = np.array([(u - cx0) / fx0, (v - cy0) / fy0, 1.0])
        event_camera = c["R_rect0"].T @ rect0  # R_rect0 takes camera 0 to its rectified self
        picture_camera = c["T_10"] @ event_camera  # T_10 takes camera 0 to camera 1
        rect1 = c["R_rect1"] @ picture_camera
        wanted = fx1 * rect1[0] / rect1[2] + cx1, fy1 * rect1[1] / rect1[2] + cy1
        found = matrix @ (u, v, 1.0)
        assert np.allclose(found[:2] / found[2], wanted, atol=1e-9)
    assert abs(np.linalg.norm(matrix - np.eye(3))) > 1  # and the test's rotation is none that changes nothing
    # PROTOCOLS writes the map the other way round, from the picture to the view.
    k0 = np.array([[fx0, 0, cx0], [0, fy0, cy0], [0, 0, 1]])
    k1 = np.array([[fx1, 0, cx1], [0, fy1, cy1], [0, 0, 1]])
    turn = c["R_rect1"] @ c["T_10"] @ np.linalg.inv(c["R_rect0"])
    back = np.linalg.inv(k1 @ turn @ np.linalg.inv(k0))
    assert np.allclose(np.linalg.inv(matrix) / np.linalg.inv(matrix)[2, 2], back / back[2, 2])


def test_dsec_pictures_in_the_event_view(tmp_path: Path) -> None:
    written = drive.write_dsec(tmp_path, ("zurich_city_00_a", "zurich_city_12_a"))
    listing = list_recordings("dsec", tmp_path, "train")
    assert listing.keys == tuple(f"zurich_city_00_a/{number:06d}" for number in range(1, 5))
    assert listing.sensor == (480, 640) and listing.anchor == "end" and listing.notes == {"sequences": "1 of 41"}
    # Sample k is picture k + 1, and spans the 50 ms before it.
    assert (listing.spans[1] - drive.DSEC_T0).tolist() == [110_000, 160_000]
    for index in range(len(listing)):
        check_events(listing, index, written["zurich_city_00_a"])
    # The picture's red says a column, its green a row: at every pixel of the view they are where the map points.
    view = listing.image(2)
    assert view.shape == (3, 480, 640)
    matrix = np.array(listing.image.view(2).homography)
    checked = 0
    for v in range(5, 480, 61):
        for u in range(5, 640, 53):
            x, y = (matrix @ (u, v, 1.0))[:2] / (matrix @ (u, v, 1.0))[2]
            if 2 < x < 284 and 2 < y < 212:
                assert abs(float(view[0, v, u]) - (x / 2 - 0.25)) < 0.8 and abs(float(view[1, v, u]) - y) < 0.51
                assert view[2, v, u] == 3
                checked += 1
    assert checked > 20
    # Rectified places of raw pixels: everything moves by (2, −3).
    assert listing.rectify(0).shape == (480, 640, 2) and listing.rectify(0)[100, 200].tolist() == [202.0, 97.0]


def test_dsec_depth(tmp_path: Path) -> None:
    written = drive.write_dsec(tmp_path)
    listing = list_recordings("dsec", tmp_path, "train_depth")
    assert listing.keys == ("zurich_city_00_a/000002", "zurich_city_00_a/000004")
    assert (listing.spans - drive.DSEC_T0).tolist() == [[60_000, 160_000], [160_000, 260_000]]
    check_events(listing, 1, written["zurich_city_00_a"])
    depth = listing.targets["depth"](0)
    assert depth.dtype == np.float32 and np.isnan(depth).sum() == 480 * 640 - 100
    # Map 2 stores 256 d + 2: depth = focal · baseline / (d + 2 / 256).
    disparity = np.arange(1, 101) + 2 / 256
    assert np.allclose(depth[100, 200:300], 550.0 * 0.6 / disparity, rtol=1e-6)
    assert listing.image(0)[2, 240, 320] == 2  # its picture is the one of the same time
    with pytest.raises(ValueError, match=r"data\.rectify=false"):
        list_recordings("dsec", tmp_path, "train_depth", ListingOptions(rectify=False))


def test_dsec_raw_events_have_no_pictures(tmp_path: Path) -> None:
    drive.write_dsec(tmp_path)
    listing = list_recordings("dsec", tmp_path, "train", ListingOptions(rectify=False))
    assert listing.image is None and listing.rectify is None and len(listing) == 4


def test_dsec_in_the_archives_own_folders(tmp_path: Path) -> None:
    drive.write_dsec(tmp_path / "flat")
    for part in ("events", "images", "disparity", "calibration"):
        (tmp_path / "zips" / f"train_{part}" / "zurich_city_00_a").mkdir(parents=True)
        home = tmp_path / "flat" / "zurich_city_00_a" / part
        home.rename(tmp_path / "zips" / f"train_{part}" / "zurich_city_00_a" / part)
    listing = list_recordings("dsec", tmp_path / "zips", "train")
    assert len(listing) == 4 and listing.image(0)[2, 240, 320] == 1
    assert len(list_recordings("dsec", tmp_path / "zips", "train_depth")) == 2


@pytest.mark.parametrize(
    "gone, message",
    [
        ("images/timestamps.txt", r"timestamps\.txt is missing"),
        ("calibration/cam_to_cam.yaml", r"cam_to_cam\.yaml is missing"),
        ("events/left/rectify_map.h5", r"rectify_map\.h5 is missing"),
    ],
)
def test_dsec_missing_files(tmp_path: Path, gone: str, message: str) -> None:
    drive.write_dsec(tmp_path, pictures=3)
    (tmp_path / "zurich_city_00_a" / gone).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        list_recordings("dsec", tmp_path, "train")


def test_dsec_faults(tmp_path: Path) -> None:
    drive.write_dsec(tmp_path, pictures=3)
    home = tmp_path / "zurich_city_00_a"
    with pytest.raises(FileNotFoundError, match="no sequence of 'test'.*here are zurich_city_00_a"):
        list_recordings("dsec", tmp_path, "test")
    layouts.write_text(home / "images" / "timestamps.txt", [100, 200])
    with pytest.raises(ValueError, match="3 files for 2 time stamps"):
        list_recordings("dsec", tmp_path, "train")
    layouts.write_text(home / "images" / "timestamps.txt", [100, 300, 200])
    with pytest.raises(ValueError, match="line 3: the time 200"):
        list_recordings("dsec", tmp_path, "train")
    layouts.write_text(home / "images" / "timestamps.txt", [100, "soon", 300])
    with pytest.raises(ValueError, match="line 2: 'soon'"):
        list_recordings("dsec", tmp_path, "train")
    layouts.write_text(home / "images" / "timestamps.txt", [100, 200, 300])
    (home / "calibration" / "cam_to_cam.yaml").write_text("intrinsics: {}")
    with pytest.raises(ValueError, match=r"cam_to_cam\.yaml: holds no extrinsics/R_rect1"):
        list_recordings("dsec", tmp_path, "train")


def test_dsec_semantic(tmp_path: Path) -> None:
    written = drive.write_dsec_semantic(tmp_path, ("zurich_city_00_a", "zurich_city_13_a"))
    listing = list_recordings("dsec_semantic", tmp_path, "train")
    assert len(listing) == 10 and len(listing.classes) == 11 and listing.notes["subsampling"] == "none"
    assert (listing.spans[:2] - drive.DSEC_T0).tolist() == [[10_000, 60_000], [60_000, 110_000]]
    check_events(listing, 4, written["zurich_city_00_a"])
    mask = listing.targets["mask"](7)
    assert mask.shape == (480, 640) and mask.dtype == np.uint8
    assert (mask[7] == 7).all() and mask[:439].sum() == 7 * 640
    assert (mask[439:] == 255).all()  # a row that is ignored in the file, and the 40 rows that the file has not
    assert listing.image(7)[2, 240, 320] == 7
    ess = list_recordings("dsec_semantic", tmp_path, "train", ListingOptions(subsampling="ess"))
    assert ess.keys == ("zurich_city_00_a/000006", "zurich_city_00_a/000008")
    assert "ESS" in ess.notes["subsampling"] and "ESS" in ess.describe()
    # The spans of the subset are still those since the label before, not since the one that was kept.
    assert (ess.spans - drive.DSEC_T0).tolist() == [[310_000, 360_000], [410_000, 460_000]]
    assert ess.targets["mask"](1)[8, 0] == 8
    test = list_recordings("dsec_semantic", tmp_path, "test")
    assert test.keys[0] == "zurich_city_13_a/000000" and test.notes["sequences"] == "1 of 3"


def test_dsec_semantic_of_other_releases(tmp_path: Path) -> None:
    drive.write_dsec_semantic(tmp_path, maps=3)
    home = tmp_path / "zurich_city_00_a"
    (home / "semantic" / "left" / "11classes").rename(home / "data")
    (home / "11classes").mkdir()
    (home / "data").rename(home / "11classes" / "data")
    (home / "semantic" / "timestamps.txt").rename(home / "zurich_city_00_a_semantic_timestamps.txt")
    listing = list_recordings("dsec_semantic", tmp_path, "train")
    assert len(listing) == 3 and listing.targets["mask"](2)[2, 0] == 2


# ---- DDD17 ------------------------------------------------------------------------------------------


def test_ddd17(tmp_path: Path) -> None:
    written = drive.write_ddd17(tmp_path)
    listing = list_recordings("ddd17", tmp_path, "train")
    assert listing.keys == tuple(f"dir0/segmentation_{number:08d}" for number in (2, 4, 6))
    # Frame k lies in row k − 1 of the index, at 40 ms · (k + 1); the window is the 50 ms before it.
    assert listing.spans.tolist() == [[70_000, 120_000], [150_000, 200_000], [230_000, 280_000]]
    for index in range(3):
        check_events(listing, index, written[0])
    mask = listing.targets["mask"](1)
    assert mask.shape == (260, 346) and (mask[:200] == 4).all() and (mask[200:] == 255).all()
    assert (listing.image(1) == 40).all() and listing.image(1).shape == (3, 260, 346)
    assert listing.notes == {"sequences": "1 of 5"} and len(listing.classes) == 6
    test = list_recordings("ddd17", tmp_path, "test")
    assert test.keys[0].startswith("dir1/") and test.notes == {"sequences": "1 of 1"}
    check_events(test, 0, written[1])


def test_ddd17_tolerates_and_refuses(tmp_path: Path) -> None:
    drive.write_ddd17(tmp_path / "data", (0,))
    home = tmp_path / "data" / "dir0"
    (home / "index" / "index_50ms.npy").unlink()  # the others tell the same times
    for path in (home / "imgs").iterdir():  # some folders count with ten digits
        path.rename(path.with_name(f"img_{int(path.stem[4:]):010d}.png"))
    # Pictures that show the labelled rows alone lie at the top of the view.
    for path in (home / "imgs").iterdir():
        layouts.save(path, np.full((200, 346), 9, np.uint8))
    listing = list_recordings("ddd17", tmp_path, "train")
    assert listing.spans[0].tolist() == [70_000, 120_000]
    assert (listing.image(0)[:, :200] == 9).all() and (listing.image(0)[:, 200:] == 0).all()
    (home / "segmentation_masks" / "segmentation_00000099.png").write_bytes(b"")
    with pytest.raises(ValueError, match="frame 99 is not in the index, which has frames 1 to 6"):
        list_recordings("ddd17", tmp_path, "train")
    (home / "events.dat.xyp").unlink()
    with pytest.raises(FileNotFoundError, match=r"events\.dat\.xyp is missing"):
        list_recordings("ddd17", tmp_path, "train")


# ---- MVSEC ------------------------------------------------------------------------------------------


def test_mvsec_rectified(tmp_path: Path) -> None:
    written = drive.write_mvsec(tmp_path)
    listing = list_recordings("mvsec", tmp_path, "train")
    start = round(drive.UNIX_S * 1e6)
    assert (listing.spans - start).tolist() == [[50_000 * k, 50_000 * (k + 1)] for k in range(4)]
    # float64 seconds of today resolve 0.24 µs: the round trip through them is exact.
    check_events(listing, 2, written["outdoor_day2"])
    depth = listing.targets["depth"](1)
    assert np.isnan(depth[:2]).all() and (depth[2:] == 5).all()  # NaN and 0 are none
    x, y = drive.mvsec_maps()
    assert np.allclose(listing.rectify(0)[100, 50], (x[100, 50], y[100, 50]), atol=1e-5)
    assert listing.notes == {"sequences": "1 of 1", "depth": "rect"}


def test_mvsec_frames_are_rectified_too(tmp_path: Path) -> None:
    drive.write_mvsec(tmp_path)
    listing = list_recordings("mvsec", tmp_path, "train")
    # The inverse by hand: the map is affine here.
    matrix = np.array([[1.02, 0.01], [-0.012, 1.03]])
    raw = _inverse(tmp_path / "outdoor_day_left_x_map.txt", tmp_path / "outdoor_day_left_y_map.txt")
    for v, u in ((20, 30), (130, 170), (240, 330)):
        assert np.allclose(raw[v, u], np.linalg.solve(matrix, np.array([u + 4.0, v - 2.0])), atol=1e-4)
    assert np.isnan(raw[0, 0]).all()  # outside of what the camera saw
    view = listing.image(1)  # depth map 2, frame 2: 20 + column // 4
    for v, u in ((20, 30), (130, 170), (240, 300)):
        assert abs(int(view[0, v, u]) - (20 + raw[v, u, 0] / 4)) <= 1
    assert view[0, 0, 0] == 0


def test_mvsec_raw_and_the_mixture_that_is_refused(tmp_path: Path) -> None:
    drive.write_mvsec(tmp_path)
    raw = list_recordings("mvsec", tmp_path, "train", ListingOptions(depth="raw"))
    assert raw.rectify is None and raw.targets["depth"](0)[50, 50] == 104 and raw.image(0)[0, 0, 40] == 20
    with pytest.raises(ValueError, match=r"data\.rectify=false .*data\.depth=rect"):
        list_recordings("mvsec", tmp_path, "train", ListingOptions(rectify=False))
    (tmp_path / "outdoor_day_left_y_map.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"outdoor_day_left_y_map\.txt is missing"):
        list_recordings("mvsec", tmp_path, "train")


def test_mvsec_splits(tmp_path: Path) -> None:
    drive.write_mvsec(tmp_path / "outdoor_night", ("outdoor_night1", "outdoor_night3"), frames=3, count=300)
    listing = list_recordings("mvsec", tmp_path, "test")
    assert listing.notes["sequences"] == "2 of 4" and len(listing) == 4
    alone = list_recordings("mvsec", tmp_path, "outdoor_night3")
    assert alone.keys == ("outdoor_night3/000001", "outdoor_night3/000002")
    with pytest.raises(FileNotFoundError, match=r"outdoor_day2_data\.hdf5 is missing"):
        list_recordings("mvsec", tmp_path, "train")
    with pytest.raises(ValueError, match="no split 'val'"):
        list_recordings("mvsec", tmp_path, "val")


# ---- EventScape -------------------------------------------------------------------------------------


def test_eventscape(tmp_path: Path) -> None:
    layouts_root = tmp_path / "a"
    drive.write_eventscape(layouts_root)
    listing = list_recordings("eventscape", layouts_root, "val")
    assert listing.keys[1] == "Town05_val/sequence_0/events/data/05_000_0001_events.npz" and len(listing) == 3
    found, wanted = listing.source(1).read(), layouts.random_events(1, 500, 40_000, 256, 512, start=40_000)
    for name in "txyp":  # ns in the file
        assert np.array_equal(getattr(found, name), getattr(wanted, name)), name
    depth = listing.targets["depth"](2)
    assert np.isnan(depth[0]).all() and (depth[1:] == 3).all()
    assert (listing.image(2) == 40).all()
    # The layout of PROTOCOLS: a folder between the split and the sequence; CARLA's depth in three channels.
    (tmp_path / "b" / "test").mkdir(parents=True)
    (layouts_root / "Town05_val").rename(tmp_path / "b" / "test" / "cluster_3")
    home = tmp_path / "b" / "test" / "cluster_3" / "sequence_0" / "depth" / "data"
    for path in sorted(home.iterdir()):
        path.unlink()
        packed = np.zeros((256, 512, 3), np.uint8)
        packed[..., 1] = 100
        layouts.save(path.with_suffix(".png"), packed)
    listing = list_recordings("eventscape", tmp_path / "b", "test")
    assert np.allclose(listing.targets["depth"](0), 25_600 / (2**24 - 1) * 1000, rtol=1e-6)
    (home.parent.parent / "rgb" / "data" / "05_000_0001_image.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no 05_000_0001_\*"):
        list_recordings("eventscape", tmp_path / "b", "test")


def test_eventscape_holds_out_whole_sequences_and_so_do_its_shards(tmp_path: Path) -> None:
    drive.write_eventscape(tmp_path / "set", sequences=6, files=2, count=20)
    listing = list_recordings("eventscape", tmp_path / "set", "val")
    assert listing.groups[:3] == ("Town05_val/sequence_0",) * 2 + ("Town05_val/sequence_1",)
    kept, held = listing.hold_out(0.3)
    assert not set(kept.groups) & set(held.groups) and len(kept) and len(held)
    write_shards(listing, tmp_path / "shards", samples_per_shard=5)
    again = open_shards(tmp_path / "shards", "val").hold_out(0.3)
    assert [part.keys for part in again] == [kept.keys, held.keys]


@pytest.mark.parametrize("name", ["dsec", "mvsec"])
def test_video_sets_hold_out_whole_sequences(name: str, tmp_path: Path) -> None:
    if name == "dsec":
        drive.write_dsec(tmp_path, ("zurich_city_00_a", "zurich_city_12_a"), pictures=3)
        listing = list_recordings(name, tmp_path, "all")
    else:
        drive.write_mvsec(tmp_path / "n", ("outdoor_night1", "outdoor_night3"), frames=3, count=300)
        listing = list_recordings(name, tmp_path, "test")
    assert len(set(listing.files)) == 2
    for fraction in np.linspace(0.05, 0.95, 19):
        kept, held = listing.hold_out(float(fraction))
        assert not set(kept.files) & set(held.files)


# ---- all of them ------------------------------------------------------------------------------------

WRITERS = {
    "dsec": (drive.write_dsec, "train_depth"),
    "dsec_semantic": (drive.write_dsec_semantic, "train"),
    "ddd17": (drive.write_ddd17, "train"),
    "mvsec": (drive.write_mvsec, "train"),
    "eventscape": (drive.write_eventscape, "val"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_described_pickled_and_without_open_handles(name: str, tmp_path: Path) -> None:
    write, split = WRITERS[name]
    write(tmp_path)
    assert name in recognise(tmp_path)
    listing = list_recordings(name, tmp_path, split)
    assert f"list {listing.hash}" in describe_path(tmp_path)
    copy = pickle.loads(pickle.dumps(listing.subset([1], "part")))
    assert np.array_equal(copy.image(0), listing.image(1))
    for target in listing.targets:
        assert np.array_equal(copy.targets[target](0), listing.targets[target](1), equal_nan=True)
    if listing.rectify is not None:
        assert np.array_equal(copy.rectify(0), listing.rectify(1))
    data, suffix = copy.image.encoded(0)
    assert suffix in (".png", ".jpg") and len(data) > 100
