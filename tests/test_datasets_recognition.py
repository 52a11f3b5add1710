"""The recognition sets, read from tiny copies of their layouts: which recordings, labels, splits and values."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import layouts
import numpy as np
import pytest

from gep.data.config import DataConfig
from gep.data.describe import describe_path
from gep.data.options import ListingOptions
from gep.data.paired import Recordings
from gep.data.registry import DATASETS, list_recordings, recognise
from gep.events.types import Events


def same(found: Events, wanted: Events) -> bool:
    return all(np.array_equal(getattr(found, name), getattr(wanted, name)) for name in "txyp")


def test_ncaltech101_original(tmp_path: Path) -> None:
    layouts.write_ncaltech101(tmp_path)
    listing = list_recordings("ncaltech101", tmp_path, "all")
    assert listing.classes == ("BACKGROUND_Google", "ant", "chair") and listing.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert listing.sensor == (180, 240) and listing.keys[2] == "Caltech101/ant/image_0001.bin"
    # "ant" is the second class that was written.
    assert same(listing.source(2).read(), layouts.random_events(11, 500, 300_000, 180, 240))
    with pytest.raises(FileNotFoundError, match="has only 'all'"):
        list_recordings("ncaltech101", tmp_path, "test")


def test_ncaltech101_est(tmp_path: Path) -> None:
    layouts.write_ncaltech101_est(tmp_path)
    listing = list_recordings("ncaltech101", tmp_path, "val")
    assert listing.classes == ("ant", "chair") and listing.keys[0] == "validation/ant/ant_0.npy"
    wanted = layouts.random_events(10, 300, 300_000, 180, 240)
    found = listing.source(0).read()
    assert np.array_equal(found.x, wanted.x) and np.array_equal(found.p, wanted.p)
    assert np.abs(found.t - wanted.t).max() <= 1  # float32 seconds


def test_ncaltech101_pictures(tmp_path: Path) -> None:
    layouts.write_ncaltech101(tmp_path)
    layouts.write_caltech101(tmp_path)
    listing = list_recordings("ncaltech101", tmp_path, "all")
    # Keys: BACKGROUND_Google 1 and 2 (written third), ant, chair (written first).
    reds = [80 + 10, 80 + 20, 40 + 10, 40 + 20, 10, 20]
    for index, (red, rows) in enumerate(zip(reds, [91, 92] * 3)):
        picture = listing.image(index)
        width = round(60 * 180 / rows)  # as high as the view, its own ratio of sides
        assert picture.shape == (3, 180, 240)
        assert abs(picture[0, :, : width - 1].astype(int) - red).max() <= 3, "JPEG"
        assert (picture[:, :, width:] == 0).all()
    again = pickle.loads(pickle.dumps(listing.subset([4], "part").image))
    assert np.array_equal(again(0), listing.image(4))
    view = again.view(0)
    assert view == type(view).from_json(json.loads(json.dumps(view.to_json()))) and view.resized == (180, 119)
    # Both on one canvas.
    config = DataConfig(name="ncaltech101", fit="resize", height=90, width=120, windows=1, window_us=0)
    sample = Recordings(listing, config, paired=True).sample(5, None)
    assert sample["image"].shape == (3, 90, 120) and sample["events"][0].height == 90
    (tmp_path / "101_ObjectCategories" / "ant" / "image_0002.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"image_0002\.jpg: not a readable picture"):
        listing.image(3)
    (tmp_path / "101_ObjectCategories" / "ant" / "image_0002.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 6 recordings have no picture.*ant/image_0002\.jpg"):
        list_recordings("ncaltech101", tmp_path, "all")


def test_ncaltech101_classes_in_the_root_are_those_with_recordings(tmp_path: Path) -> None:
    layouts.write_ncaltech101(tmp_path)
    layouts.write_caltech101(tmp_path)
    for folder in (tmp_path / "Caltech101").iterdir():
        folder.rename(tmp_path / folder.name)
    (tmp_path / "Caltech101").rmdir()
    listing = list_recordings("ncaltech101", tmp_path, "all")
    assert listing.classes == ("BACKGROUND_Google", "ant", "chair") and listing.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert listing.keys[2] == "ant/image_0001.bin" and abs(int(listing.image(2)[0, 90, 50]) - 50) <= 3


def test_ncaltech101_est_is_paired_by_a_table_alone(tmp_path: Path) -> None:
    layouts.write_ncaltech101_est(tmp_path)
    layouts.write_caltech101(tmp_path)
    listing = list_recordings("ncaltech101", tmp_path, "test")
    assert listing.image is None and "ant_0.npy does not say which one" in listing.describe()
    lines = [f"testing/{name}/{name}_{number}.npy {name}/image_{2 - number:04d}.jpg" for name in ("ant", "chair")
             for number in range(2)]  # fmt: skip
    layouts.write_text(tmp_path / "images.txt", lines)
    listing = list_recordings("ncaltech101", tmp_path, "test")
    assert [int(listing.image(k)[0, 90, 50]) for k in range(4)] == pytest.approx([60, 50, 20, 10], abs=3)
    layouts.write_text(tmp_path / "images.txt", lines[1:])
    with pytest.raises(FileNotFoundError, match=r"testing/ant/ant_0\.npy; complete .*images\.txt"):
        list_recordings("ncaltech101", tmp_path, "test")
    layouts.write_text(tmp_path / "images.txt", ["testing/ant/ant_0.npy"])
    with pytest.raises(ValueError, match=r"images\.txt: line 1"):
        list_recordings("ncaltech101", tmp_path, "test")


def test_nimagenet_variants(tmp_path: Path) -> None:
    layouts.write_nimagenet(tmp_path)
    layouts.write_nimagenet(tmp_path / "N_Imagenet_cam", folder="extracted_val_mode_1", images=False)
    layouts.write_nimagenet(tmp_path, folder="extracted_val_mode_brightness_4", images=False)
    layouts.write_nimagenet(tmp_path, folder="extracted_val_brightness_5", images=False)
    for split, key in (
        ("val", "extracted_val/n01/n01_0.npz"),
        ("val_mode_1", "N_Imagenet_cam/extracted_val_mode_1/n01/n01_0.npz"),
        ("val_brightness_4", "extracted_val_mode_brightness_4/n01/n01_0.npz"),
        ("val_brightness_5", "extracted_val_brightness_5/n01/n01_0.npz"),
    ):
        listing = list_recordings("nimagenet", tmp_path, split)
        assert listing.keys[0] == key and listing.classes == ("n01", "n02") and listing.labels.tolist() == [0, 1]
        # n01 was written second: pictures go by name, not by place.
        assert abs(int(listing.image(0)[2, 200, 300]) - 40) <= 3 and abs(int(listing.image(1)[2, 200, 300]) - 30) <= 3
        assert same(listing.source(1).read(), layouts.random_events(0, 5, 50_000, 480, 640))
    with pytest.raises(FileNotFoundError, match="extracted_val_mode_3"):
        list_recordings("nimagenet", tmp_path, "val_mode_3")


def test_mini_nimagenet(tmp_path: Path) -> None:
    synsets = tuple(f"n{number:04d}" for number in range(103))
    layouts.write_nimagenet(tmp_path, synsets, count=2, images=False)
    listing = list_recordings("nimagenet", tmp_path, "mini_val")
    assert listing.classes == synsets[:100] and len(listing) == 100
    assert listing.notes == {"classes": "the first 100 synsets"}
    layouts.write_text(tmp_path / "mini_classes.txt", ["n0102 radio", "n0007"])
    listing = list_recordings("nimagenet", tmp_path, "mini_val")
    assert listing.classes == ("n0007", "n0102") and listing.labels.tolist() == [0, 1]
    layouts.write_text(tmp_path / "mini_classes.txt", ["n0007", "n9999"])
    with pytest.raises(FileNotFoundError, match="n9999"):
        list_recordings("nimagenet", tmp_path, "mini_val")


def test_ncars(tmp_path: Path) -> None:
    layouts.write_ncars(tmp_path)
    listing = list_recordings("ncars", tmp_path, "test")
    assert listing.classes == ("background", "cars") and listing.labels.tolist() == [0, 0, 1, 1]
    assert listing.keys[2] == "n-cars_test/cars/obj_000000_td.dat" and listing.sensor == (100, 120)
    found = listing.source(2).read()
    assert (found.height, found.width) == (100, 120)
    assert same(found, layouts.random_events(0, 200, 100_000, 100, 120))
    with pytest.raises(ValueError, match="no split 'val'; choose one of test, train"):
        list_recordings("ncars", tmp_path, "val")


def test_ncars_real_recording_fits_the_sensor(real_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "n-cars_train" / "cars"
    folder.mkdir(parents=True)
    (folder / "a.dat").write_bytes((real_data / "recordings" / "ncars.dat").read_bytes())
    events = list_recordings("ncars", tmp_path, "train").source(0).read()
    assert len(events) == 2009 and events.duration_us <= 100_000


def test_cifar10dvs_split_is_disjoint_complete_and_the_same_for_every_release(tmp_path: Path) -> None:
    layouts.write_cifar10dvs(tmp_path / "a")
    parts = {split: list_recordings("cifar10dvs", tmp_path / "a", split) for split in ("train", "test", "all")}
    assert parts["all"].classes == layouts.CIFAR10
    assert (
        np.bincount(parts["train"].labels).tolist() == [8] * 10
        and np.bincount(parts["test"].labels).tolist() == [2] * 10
    )
    assert set(parts["train"].keys) | set(parts["test"].keys) == set(parts["all"].keys)
    assert not set(parts["train"].keys) & set(parts["test"].keys)
    assert parts["train"].hash != parts["test"].hash
    # Frozen: a change of the draw would change everybody's test set. The draw by hand, for one class:
    import hashlib

    draws = {k: hashlib.sha256(f"123/frog/cifar10_frog_{k}".encode()).hexdigest() for k in range(10)}
    lowest = sorted(sorted(draws, key=draws.get)[:2])
    frogs = [key for key, label in zip(parts["test"].keys, parts["test"].labels) if label == 6]
    assert frogs == [f"frog/cifar10_frog_{k}.aedat" for k in lowest]
    for path in (tmp_path / "a").rglob("*.aedat"):  # the re-release has other files of the same names
        path.rename(path.with_suffix(".aedat4"))
    again = list_recordings("cifar10dvs", tmp_path / "a", "test")
    assert [key.removesuffix("4") for key in again.keys] == list(parts["test"].keys)


def test_cifar10dvs_values(tmp_path: Path) -> None:
    layouts.write_cifar10dvs(tmp_path, each=1)
    listing = list_recordings("cifar10dvs", tmp_path, "all")
    found, wanted = listing.source(3).read(), layouts.random_events(300, 100, 200_000, 128, 128)
    assert np.array_equal(found.t, wanted.t) and np.array_equal(found.p, wanted.p) and len(set(found.x)) > 30


WRITERS = {
    "nmnist": layouts.write_nmnist,
    "ncaltech101": layouts.write_ncaltech101,
    "nimagenet": layouts.write_nimagenet,
    "ncars": layouts.write_ncars,
    "cifar10dvs": layouts.write_cifar10dvs,
}


@pytest.mark.parametrize("name", WRITERS)
def test_recognised_described_and_pickled(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    assert recognise(tmp_path) == [name]
    text = describe_path(tmp_path)
    assert f"data.name={name}" in text
    listings = []
    for split in DATASETS[name].splits:
        try:
            listings.append(list_recordings(name, tmp_path, split))
        except FileNotFoundError:
            continue
    assert listings
    for listing in listings:
        assert f"list {listing.hash}" in text and f"{len(listing)} recordings" in text
        copy = pickle.loads(pickle.dumps(listing))
        assert copy.keys == listing.keys and len(copy.source(0)) > 0


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"shards", "folder"}))
def test_empty_roots_say_what_is_missing(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        list_recordings(name, tmp_path, "train")
    assert str(tmp_path) in str(caught.value) and "should hold" in str(caught.value)


def test_options_come_from_any_config() -> None:
    class Config:
        sample_us = 250_000
        root = "elsewhere"

    assert ListingOptions.of(Config()) == ListingOptions(sample_us=250_000)
    assert ListingOptions.of(None) == ListingOptions()
    with pytest.raises(ValueError, match=r"data\.min_events=-1"):
        ListingOptions(min_events=-1)
    with pytest.raises(ValueError, match="no effect"):
        ListingOptions(sample_stride_us=5)
