"""Listings, pairing, windows, few-shot draws: values, on tiny data sets in the published layouts."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gep.data.build import build
from gep.data.config import DataConfig
from gep.data.fewshot import draw_shots
from gep.data.paired import Recordings, collate
from gep.data.registry import list_recordings
from gep.events.io.bin import write_bin
from gep.events.slicing import cut_windows
from gep.events.types import EventFormatError, Events


def recording(seed: int, count: int = 400, duration: int = 300_000) -> Events:
    rng = np.random.default_rng(seed)
    t = np.sort(rng.integers(0, duration, count))
    return Events.from_arrays(
        t,
        rng.integers(0, 34, count),
        rng.integers(0, 34, count),
        rng.integers(0, 2, count),
        height=34,
        width=34,
    )


@pytest.fixture
def nmnist(tmp_path: Path) -> Path:
    """Six recordings of the digits 1 and 7, with images; the file order is not the class order."""
    for number, digit in enumerate([7, 1, 7, 1, 1, 7], start=1):
        folder = tmp_path / "Train" / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        write_bin(folder / f"{number:05d}.bin", recording(number))
    images = np.zeros((6, 28, 28), np.uint8)
    images[np.arange(6), 3, 5] = np.arange(1, 7)
    np.savez(tmp_path / "train_images.npz", index=np.arange(1, 7), label=np.array([7, 1, 7, 1, 1, 7]), image=images)
    return tmp_path


def test_nmnist_listing_and_pairs(nmnist: Path) -> None:
    listing = list_recordings("nmnist", nmnist, "train")
    assert listing.keys == tuple(
        f"Train/{digit}/{number:05d}.bin" for digit, number in [(1, 2), (1, 4), (1, 5), (7, 1), (7, 3), (7, 6)]
    )
    assert listing.labels.tolist() == [1, 1, 1, 7, 7, 7] and listing.classes == tuple("0123456789")
    # The image of file number n holds the value n, at (3, 5) of the digit and so at (6, 8) of the sensor's view.
    for index, number in enumerate([2, 4, 5, 1, 3, 6]):
        view = listing.image(index)
        assert view.shape == (3, 34, 34) and view[:, 6, 8].tolist() == [number] * 3 and view.sum() == 3 * number


def test_idx_images(nmnist: Path) -> None:
    with np.load(nmnist / "train_images.npz") as archive:
        digits = archive["image"]
    (nmnist / "train_images.npz").unlink()
    header = np.array([2051, 6, 28, 28], dtype=">i4").tobytes()
    with gzip.open(nmnist / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(header + digits.tobytes())
    assert list_recordings("nmnist", nmnist, "train").image(0)[0, 6, 8] == 2
    with gzip.open(nmnist / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(header + digits.tobytes()[:-1])
    with pytest.raises(ValueError, match="not a whole IDX3 file"):
        list_recordings("nmnist", nmnist, "train")


def test_hash_names_the_list_and_not_the_place(nmnist: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    listing = list_recordings("nmnist", nmnist, "train")
    moved = tmp_path_factory.mktemp("moved") / "set"
    nmnist.rename(moved)
    assert list_recordings("nmnist", moved, "train").hash == listing.hash
    assert listing.subset([0, 1], "part").hash != listing.hash


def test_hold_out_is_disjoint_and_stable(nmnist: Path) -> None:
    listing = list_recordings("nmnist", nmnist, "train")
    kept, held = listing.hold_out(0.5)
    assert sorted(kept.keys + held.keys) == sorted(listing.keys) and 0 < len(held) < 6
    # A file more moves none of the others.
    write_bin(nmnist / "Train" / "1" / "00099.bin", recording(99))
    (nmnist / "train_images.npz").unlink()
    more = list_recordings("nmnist", nmnist, "train").hold_out(0.5)[1]
    assert set(held.keys) <= set(more.keys) and len(more) - len(held) in (0, 1)


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda root: (root / "train_images.npz").write_bytes(b"no zip"), "train_images.npz"),
        (lambda root: _fewer_images(root), "4 images for 6 recordings, none for 2"),
        (
            lambda root: (root / "Train" / "1" / "00002.bin").rename(root / "Train" / "1" / "two.bin"),
            "named by a number",
        ),
    ],
)
def test_faulty_sets_are_named(nmnist: Path, break_it, message: str) -> None:
    break_it(nmnist)
    with pytest.raises(ValueError, match=message):
        list_recordings("nmnist", nmnist, "train")


def _fewer_images(root: Path) -> None:
    with np.load(root / "train_images.npz") as archive:
        arrays = {name: archive[name][:4] for name in archive}
    np.savez(root / "train_images.npz", **arrays)


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.root is not set"):
        list_recordings("nmnist", "", "train")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        list_recordings("nmnist", tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match="Train or"):
        list_recordings("nmnist", tmp_path, "train")
    (tmp_path / "Train" / "3").mkdir(parents=True)
    with pytest.raises(ValueError, match="no recording found"):
        list_recordings("nmnist", tmp_path, "train")
    with pytest.raises(ValueError, match="choose one of cifar10dvs, .*nmnist, scenes, shards"):
        list_recordings("mnist", tmp_path, "train")
    with pytest.raises(ValueError, match="no split 'val'"):
        list_recordings("nmnist", tmp_path, "val")


def test_damaged_recording_names_its_file(nmnist: Path) -> None:
    path = nmnist / "Train" / "1" / "00002.bin"
    path.write_bytes(b"\xff" * 50)
    recordings = Recordings(list_recordings("nmnist", nmnist, "train"), DataConfig(), paired=True)
    with pytest.raises(EventFormatError, match="00002.bin"):
        recordings.sample(0, None)


def test_nimagenet_and_est_layouts(tmp_path: Path) -> None:
    synsets = ("n02", "n01")
    for place, synset in enumerate(synsets):
        folder = tmp_path / "extracted_val" / synset
        folder.mkdir(parents=True)
        events = np.zeros(5, dtype=[("x", "<u2"), ("y", "<u2"), ("t", "<i8"), ("p", "?")])
        events["x"], events["t"], events["p"] = 600 + place, np.arange(5) * 10, [0, 1, 0, 1, 1]
        np.savez(folder / "a.npz", event_data=events)
        photo = tmp_path / "imagenet_val" / synset
        photo.mkdir(parents=True)
        Image.new("RGB", (50, 40), (10, 20, 30 + place)).save(photo / "a.JPEG", quality=100)
    listing = list_recordings("nimagenet", tmp_path, "val")
    # Sorted synsets, whatever order the folder lists them in.
    assert listing.classes == ("n01", "n02") and listing.labels.tolist() == [0, 1]
    assert listing.image(0).shape == (3, 480, 640) and abs(int(listing.image(0)[2, 100, 100]) - 31) <= 3
    config = DataConfig(name="nimagenet", fit="resize", height=224, width=224, windows=1, window_us=0)
    sample = Recordings(listing, config, paired=True).sample(0, None)
    # Column 601 of 640 lies in column floor(601.5 · 224 / 640) of the canvas.
    assert sample["events"][0].x.tolist() == [210] * 5 and sample["events"][0].p.tolist() == [0, 1, 0, 1, 1]
    assert sample["image"].shape == (3, 224, 224)
    (tmp_path / "imagenet_val" / "n01" / "a.JPEG").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 recordings have no image"):
        list_recordings("nimagenet", tmp_path, "val")

    est = tmp_path / "est" / "testing" / "chair"
    est.mkdir(parents=True)
    np.save(est / "x.npy", np.array([[3, 4, 0.001, -1], [5, 6, 0.002, 1]], dtype=np.float32))
    listing = list_recordings("ncaltech101", tmp_path / "est", "test")
    config = DataConfig(name="ncaltech101", fit="resize", height=224, width=224, windows=1, window_us=0)
    events = Recordings(listing, config, paired=False).sample(0, None)["events"][0]
    assert len(events) == 2 and events.t.tolist() == [1000, 2000]


def test_windows_start_at_the_first_event() -> None:
    events = Events.from_arrays([100, 149, 150, 260], [0, 1, 2, 3], [0] * 4, [1] * 4, height=4, width=4)
    windows = cut_windows(events, 3, 50)
    assert windows.bounds.tolist() == [[100, 150], [150, 200], [200, 250]]
    assert [w.x.tolist() for w in windows.events] == [[0, 1], [2], []]
    assert [len(w) for w in cut_windows(Events.empty(4, 4), 3, 50).events] == [0, 0, 0]


def test_sample_is_padded_and_deterministic(nmnist: Path) -> None:
    config = DataConfig(root=str(nmnist), holdout=0.5, pick=2, cache=True)
    train, held = build(config, paired=True)
    assert len(train) + len(held) == 6
    source = Recordings(list_recordings("nmnist", nmnist, "train"), config, paired=True)
    sample = source.sample(0, None)
    original = recording(2)
    whole = np.concatenate([window.x for window in sample["events"]])
    kept = original.t < original.t[0] + 300_000
    assert np.array_equal(whole, original.x[kept] + 1) and len(sample["events"]) == 6
    assert sample["image"].shape == (3, 36, 36) and sample["image"][0, 7, 9] == 2
    first, again = (source.sample(3, np.random.default_rng(5)) for _ in range(2))
    assert len(first["events"]) == 2 and first["t_us"].tolist() == again["t_us"].tolist()
    batch = collate([source.sample(i, None) for i in range(3)])
    assert len(batch["events"]) == 18 and batch["t_us"].shape == (3, 6, 2) and batch["image"].shape == (3, 3, 36, 36)
    assert batch["label"].tolist() == [1, 1, 1] and batch["windows"] == 6


def test_pairs_are_demanded_where_needed(nmnist: Path) -> None:
    (nmnist / "train_images.npz").unlink()
    listing = list_recordings("nmnist", nmnist, "train")
    assert "image" not in Recordings(listing, DataConfig(), paired=False).sample(0, None)
    with pytest.raises(ValueError, match="no images to pair"):
        Recordings(listing, DataConfig(), paired=True)


def test_draws_are_nested_disjoint_and_seeded() -> None:
    labels = np.array([0, 1, 2] * 6)
    one, rest = draw_shots(labels, 1, seed=3, draw=0)
    two, _ = draw_shots(labels, 2, seed=3, draw=0)
    assert np.bincount(labels[two]).tolist() == [2, 2, 2] and set(one) <= set(two)
    assert sorted([*one, *rest]) == list(range(18))
    assert not np.array_equal(one, draw_shots(labels, 1, seed=3, draw=1)[0])
    with pytest.raises(ValueError, match="class 0 has 6 samples"):
        draw_shots(labels, 6, seed=0, draw=0)
