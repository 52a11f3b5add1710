"""Image data sets as samples: parquet, folders, loose files; geometry by hand.

One file: the same pictures in each way that they can lie on disk.
"""

from __future__ import annotations

import io
import itertools
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gep.data import image_list
from gep.data.bad import BadSample
from gep.data.boxes import lay_out
from gep.data.config import DataConfig
from gep.data.image_list import list_images
from gep.data.image_stream import StillStream
from gep.data.images import ImagesConfig, StillImages, collate_stills, film, vary
from gep.data.paired import collate
from gep.data.sampler import Batches
from gep.data.sequence import EVENT, IMAGE, SequenceConfig, Sequences, collate_sequences
from gep.events.augment import AugmentConfig
from gep.events.camera import Wander
from gep.events.represent import Histogram
from gep.events.sensor import NATURAL_SENSOR

datasets = pytest.importorskip("datasets")
pq = pytest.importorskip("pyarrow.parquet")
CLASSES = ["bird", "cat", "dog"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    # `datasets` waits this long for pyarrow's threads at the end of every pass over parquet files.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    datasets.disable_progress_bars()


def picture(seed: int, height: int = 40, width: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def parquet(
    path: Path,
    seeds: range | list[int],
    *,
    bad: tuple[int, ...] = (),
    cells: dict[int, dict | None] | None = None,
    kind: str = "",
) -> Path:
    """A file of the Hub's layout: `img` (bytes, path; some seeds' cells as given) and `label`."""
    pictures = [
        (cells or {}).get(seed, {"bytes": b"no picture" if seed in bad else png(picture(seed)), "path": None})
        for seed in seeds
    ]
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.Value(kind) if kind else datasets.ClassLabel(names=CLASSES)}
    )
    labels = [str(seed % 3) if kind == "string" else seed % 3 for seed in seeds]
    rows = datasets.Dataset.from_dict({"img": pictures, "label": labels}, features=features)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows.data.table, path)  # `to_parquet` would read the files that cells name
    return path


def config(path: Path | str, *, size: int = 16, images: dict | None = None, **data) -> DataConfig:
    chosen = ImagesConfig(path=str(path), margin=4, **(images or {}))
    given = {"height": size, "width": size, "windows": 3, "window_us": 10_000, "holdout": 0.3, **data}
    return DataConfig(name="images", images=chosen, **given)


# ---- listings -----------------------------------------------------------------------------------------------


def test_parquet_files_by_split(tmp_path: Path) -> None:
    parquet(tmp_path / "data/train-00000-of-00002.parquet", range(5))
    parquet(tmp_path / "data/train-00001-of-00002.parquet", range(5, 9))
    parquet(tmp_path / "data/test-00000-of-00001.parquet", range(20, 23))
    train, held = StillImages.split(config(tmp_path, eval_split="test", size=40))
    assert (len(train), len(held)) == (9, 3) and train.listing.classes == tuple(CLASSES)
    assert train.listing.labels.tolist() == [seed % 3 for seed in range(9)] and held.listing.keys[1] == "test/00000001"
    for index, seed in ((0, 0), (7, 7)):
        assert np.array_equal(train.listing.image(index).transpose(1, 2, 0), picture(seed))
    # A glob, and one file, mean the same rows.
    for path in (tmp_path / "data/train-*.parquet", tmp_path / "data/train-00001-of-00002.parquet"):
        rows = list_images(str(path), "train", (40, 40))
        assert np.array_equal(rows.image(len(rows) - 1).transpose(1, 2, 0), picture(8))
        with pytest.raises(ValueError, match=r"no parquet file of split 'test' \(found: train\)"):
            list_images(str(path), "test", (40, 40))
    with pytest.raises(ValueError, match=r"image_column=foo: .* has the columns img, label"):
        list_images(str(tmp_path), "train", (40, 40), image_column="foo")
    with pytest.raises(FileNotFoundError, match="no such file"):
        list_images(str(tmp_path / "none.parquet"), "train", (40, 40))


def test_labels_without_names(tmp_path: Path) -> None:
    rows = list_images(str(parquet(tmp_path / "rows.parquet", [7, 2, 1], kind="int64")), "train", (16, 16))
    assert rows.classes == ("1", "2") and rows.labels.tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="cannot be loaded"):
        (tmp_path / "broken.parquet").write_bytes(b"PAR1 not at all")
        list_images(str(tmp_path / "broken.parquet"), "train", (16, 16))


def test_folders_of_classes_and_splits(tmp_path: Path) -> None:
    names = {"train/dog/b.png": 1, "train/dog/a.png": 2, "train/cat/a.png": 3, "val/cat/z.png": 4, "val/dog/y.png": 5}
    for name, seed in names.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(picture(seed)))
    (tmp_path / "train/dog/notes.txt").write_text("no picture")
    train, held = StillImages.split(config(tmp_path, eval_split="validation", size=40))
    assert train.listing.keys == ("train/cat/a.png", "train/dog/a.png", "train/dog/b.png")
    assert train.listing.classes == ("cat", "dog") and train.listing.labels.tolist() == [0, 1, 1]
    assert np.array_equal(held.listing.image(1).transpose(1, 2, 0), picture(5)) and held.listing.labels.tolist() == [
        0,
        1,
    ]
    assert "images train: 3" in train.describe() and train.listing.hash in train.describe()
    with pytest.raises(FileNotFoundError, match=r"no split 'test' \(train, val\)"):
        list_images(str(tmp_path), "test", (16, 16))
    (tmp_path / "val/dog/y.png").unlink()
    with pytest.raises(ValueError, match="do not hold the same classes"):
        StillImages.split(config(tmp_path, eval_split="val"))


def test_loose_pictures(tmp_path: Path) -> None:
    for number, name in enumerate(("n00000002_fish.png", "n00000001_bird.png", "n00000002_shark.png")):
        (tmp_path / name).write_bytes(png(picture(number)))
    rows = list_images(str(tmp_path), "train", (16, 16))
    assert rows.classes == ("n00000001", "n00000002") and rows.labels.tolist() == [0, 1, 1]
    (tmp_path / "other.png").write_bytes(png(picture(9)[..., 0]))  # grey
    rows = list_images(str(tmp_path), "train", (40, 40))
    assert rows.classes == () and set(rows.labels.tolist()) == {-1} and len(rows) == 4
    assert np.array_equal(rows.image(3), np.stack([picture(9)[..., 0]] * 3))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        list_images(str(tmp_path / "nowhere"), "train", (16, 16))
    with pytest.raises(ValueError, match="path is empty"):
        list_images("", "train", (16, 16))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mistyped_path_never_goes_to_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    asked = []

    def hub(path: str, **options: object) -> None:
        asked.append(path)
        raise datasets.exceptions.DatasetNotFoundError("nobody has it")

    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.png").write_bytes(png(picture(0)))
    paths = [
        "./a",
        "../a/b",
        "/a",
        "/a/b",
        "~/a",
        "a/b/c",
        "pictures/",
        r"data\a",
        "a*",
        "a b",
        "a/b/*.jpg",
        "a/x.parquet",
    ]
    for path in paths:
        with pytest.raises(FileNotFoundError, match="no such file"):
            StillImages.split(config(path, images={"streaming": streaming}))
    for path in ("one.png", "*.png", str(tmp_path / "one.png")):
        with pytest.raises(ValueError, match="neither a folder nor parquet"):
            StillImages.split(config(path, images={"streaming": streaming}))
    assert asked == []
    for path in ("mnist", "uoft-cs/cifar10", "a_b/c.d-e"):
        with pytest.raises(FileNotFoundError, match="nobody has it"):
            StillImages.split(config(path, images={"streaming": streaming}))
    assert asked == ["mnist", "uoft-cs/cifar10", "a_b/c.d-e"]


def test_home_in_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    parquet(tmp_path / "rows/train-0.parquet", range(6))
    (tmp_path / "own").mkdir()
    (tmp_path / "own/a.png").write_bytes(png(picture(0)))
    assert len(list_images("~/rows", "train", (16, 16))) == len(list_images("~/rows/*.parquet", "train", (16, 16))) == 6
    own = list_images("~/own", "train", (16, 16))
    assert own.keys == ("a.png",) and own.notes["from"] == "own"
    train, _ = StillStream.split(config("~/rows", images={"streaming": True}, holdout=0.5))
    assert train.length == 6 and len(list(train.one_pass())) == 6


def test_a_picture_is_read_and_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list_images(str(parquet(tmp_path / "x.parquet", range(3))), "train", (20, 10))
    expected = rows.image.view(1).apply(picture(1))
    calls = []
    for name in ("decode", "as_bytes"):
        original = getattr(image_list, name)
        monkeypatch.setattr(image_list, name, lambda *args, _n=name, _f=original: (calls.append(_n), _f(*args))[1])
    assert np.array_equal(rows.image(1), expected) and calls == ["as_bytes", "decode"]


# ---- samples ------------------------------------------------------------------------------------------------


def test_samples_are_reproducible_and_grey_pictures_work(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png(picture(number)[..., 0] if number == 2 else picture(number)))
    train = StillImages(list_images(str(tmp_path), "train", (16, 16)), config(tmp_path))
    held = pickle.loads(pickle.dumps(train))
    for index in range(4):
        for seed in (None, 7):
            first, again = (
                source.sample(index, None if seed is None else np.random.default_rng(seed)) for source in (train, held)
            )
            assert all(np.array_equal(first[name], again[name]) for name in first)
    other = train.sample(0, np.random.default_rng(8))
    assert not np.array_equal(other["image"], train.sample(0, np.random.default_rng(7))["image"])
    grey = train.sample(2, None)["still"]
    assert grey.shape == (3, 24, 24) and np.array_equal(grey[0], grey[2])
    samples = [train.sample(index, np.random.default_rng(index)) for index in range(4)]
    batch = collate(samples)
    assert batch["windows"] == 3 and len(batch["events"]) == 12 and batch["image"].shape == (4, 3, 16, 16)
    assert torch.equal(batch["t_us"][0], torch.tensor([[0, 10_000], [10_000, 20_000], [20_000, 30_000]]))
    counts = batch["events"].counts()
    assert torch.equal(counts, Histogram()(batch["events"].events())) and counts.sum() > 200
    alone = collate_stills(samples[2:3]).counts()
    assert torch.equal(alone, counts[6:9]) and len({s["sensor"] for s in samples}) == 4


def test_only_picked_windows_are_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    motion = Wander.draw(np.random.default_rng(0), speed_px_s=(50, 50), turn_hz=(1, 2), rotation_rad_s=0.2)
    monkeypatch.setattr(Wander, "draw", lambda *args, **kwargs: motion)
    cfg = config("unused", windows=6, pick=2)
    sample = film(picture(0), cfg, key="a", label=0, number=0, rng=np.random.default_rng(3))
    first, second = sample["t_us"][:, 0].tolist()
    assert (sample["t_us"][:, 1] - sample["t_us"][:, 0] == 10_000).all() and first < second
    assert sample["bounds_us"].tolist() == [[0, 10_000]] and sample["path_us"].tolist() == [0, 5000, 10_000]
    for run, begin in enumerate((first, second)):
        at = motion.homography(begin + np.array([0, 5000, 10_000]), image_size=(24, 24), sensor_size=(16, 16))
        assert np.array_equal(sample["homography"][run], at)
    batch = collate_stills([sample, sample])
    assert len(batch) == 4 and len(batch.homography) == 4 and batch.t_us[-1] == 10_000
    whole = film(picture(0), cfg, key="a", label=0, number=0, rng=None)
    assert whole["t_us"].shape == (6, 2) and whole["homography"].shape == (1, 13, 3, 3)


def bilinear(still: np.ndarray, matrix: np.ndarray, row: int, column: int) -> np.ndarray:
    """(3,) float64, the picture seen by one canvas pixel; by hand, border repeated."""
    x, y, w = matrix.astype(np.float64) @ [column, row, 1]
    x, y = np.clip(x / w, 0, still.shape[2] - 1), np.clip(y / w, 0, still.shape[1] - 1)
    x0, y0 = min(int(x), still.shape[2] - 2), min(int(y), still.shape[1] - 2)
    left, right = still[:, y0 : y0 + 2, x0].astype(np.float64), still[:, y0 : y0 + 2, x0 + 1].astype(np.float64)
    upper, lower = (left + (x - x0) * (right - left)).T
    return upper + (y - y0) * (lower - upper)


@pytest.mark.parametrize("target", ["window", "rest"])
def test_the_image_is_what_the_camera_sees_at_that_time(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    motion = Wander.draw(
        np.random.default_rng(1), speed_px_s=(80, 80), turn_hz=(1, 2), rotation_rad_s=1.0, max_shift_px=4
    )
    monkeypatch.setattr(Wander, "draw", lambda *args, **kwargs: motion)
    cfg = config("unused", windows=6, pick=1, images={"target": target})
    sample = film(picture(5), cfg, key="a", label=0, number=0, rng=np.random.default_rng(3))
    matrix = np.array([[1, 0, 4], [0, 1, 4], [0, 0, 1]])  # rest: the middle of the still
    if target == "window":
        middle = sample["t_us"].mean()
        matrix = motion.homography(middle, image_size=(24, 24), sensor_size=(16, 16))
        assert np.abs(matrix - np.array([[1, 0, 4], [0, 1, 4], [0, 0, 1]])).max() > 0.5
    for row, column in itertools.product((0, 3, 8, 15), (0, 7, 15)):
        expected = bilinear(sample["still"], matrix, row, column)
        np.testing.assert_allclose(sample["image"][:, row, column], expected, atol=0.51)


def test_margin_and_what_lies_beyond() -> None:
    array = picture(1, 30, 50)
    # At one picture pixel per canvas pixel the still is the picture itself, mirrored where it ends.
    still = lay_out(array, (10.0, 5.0, 20.0, 20.0), (20, 20), 8, "reflection").transpose(1, 2, 0)
    assert np.array_equal(still, np.pad(array, ((3, 3), (0, 0), (0, 0)), mode="symmetric")[:, 2:38])
    black = lay_out(array, (10.0, 5.0, 20.0, 20.0), (20, 20), 8, "zeros").transpose(1, 2, 0)
    assert (black[:3] == 0).all() and np.array_equal(black[3:33], array[:, 2:38])
    # A box larger than the picture: it stands small in the middle.
    small = lay_out(np.full((10, 10, 3), 200, np.uint8), (-5.0, -5.0, 20.0, 20.0), (20, 20), 2, "zeros")
    assert (small[:, 7:17, 7:17] == 200).all() and small.sum() == 3 * 100 * 200
    # A smooth picture keeps its place when resampled: canvas cell k covers box[k / n].
    ramp = np.repeat(np.arange(0, 200, dtype=np.uint8)[None, :, None], 60, 0).repeat(3, 2)
    still = lay_out(ramp, (40.0, 10.0, 40.0, 40.0), (20, 20), 5, "border")[0, 10].astype(float)
    np.testing.assert_allclose(still, 40 + 2 * (np.arange(-5, 25) + 0.5) - 0.5, atol=1.0)


def test_crops_and_sensors_vary_within_bounds() -> None:
    rng = np.random.default_rng(0)
    drawn = [vary(NATURAL_SENSOR, {"threshold": 1.5, "shot_noise_on": 4.0}, rng) for _ in range(300)]
    ratio = np.array([s.threshold for s in drawn]) / NATURAL_SENSOR.threshold
    assert 1 / 1.5 <= ratio.min() < 0.7 and 1.4 < ratio.max() <= 1.5 and max(s.shot_noise_on for s in drawn) == 1
    cfg = config("unused", images={"crop": (0.25, 0.25), "crop_aspect": 1.0, "flip": 0.0})
    seen = []
    ramp = np.stack(np.meshgrid(np.arange(160), np.arange(160)), -1).astype(np.uint8)
    for seed in range(60):
        still = film(np.concatenate([ramp, ramp[..., :1]], -1), cfg, key="", label=0, number=0,
                     rng=np.random.default_rng(seed))["still"]  # fmt: skip
        seen.append(still[:2, 4:20, 4:20].reshape(2, -1)[:, [0, -1]])
    corners = np.array(seen, float)  # (60, x or y, first or last)
    np.testing.assert_allclose(corners[..., 1] - corners[..., 0], 75, atol=2)  # half a side: 80 - 5 px of pitch
    assert corners[:, :, 0].min() < 12 and corners[:, :, 0].max() > 70 and corners.max() <= 159


def test_an_unreadable_picture_is_named(tmp_path: Path) -> None:
    source = StillImages(list_images(str(parquet(tmp_path / "x.parquet", range(4), bad=(2,))), "train", (16, 16)),
                         config(tmp_path))  # fmt: skip
    with pytest.raises(BadSample, match="train/00000002") as caught:
        source.sample(2, None)
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.key == "train/00000002" and "not a readable picture" in again.reason
    with pytest.warns(UserWarning, match="train/00000002"):
        batch = next(Batches(source, collate=collate, batch_size=4, max_bad=0.1)(0))[0]
    assert len(batch["events"]) == 12


def test_windows_need_a_length(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(picture(0)))
    with pytest.raises(ValueError, match="give windows a length"):
        StillImages(list_images(str(tmp_path), "train", (16, 16)), config(tmp_path, window_us=0))


def test_settings_without_effect(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", range(9))
    augment = AugmentConfig(flip_x=0.5)
    with pytest.warns(UserWarning) as caught:
        StillImages.split(config(path, cache=True, jitter_us=5, augment=augment))
    ours = [str(w.message) for w in caught if "name=images" in str(w.message)]
    assert len(ours) == 1 and ours[0].startswith("data.cache=True, data.jitter_us=5, data.augment.flip_x=0.5 has no")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StillImages.split(config(path))
    with pytest.raises(ValueError, match="data.clip=true needs a video set"):
        StillImages.split(config(path, clip=True))


def test_whole_holds_nothing_back(tmp_path: Path) -> None:
    cfg = config(parquet(tmp_path / "x.parquet", range(20)))
    train, held = StillImages.split(cfg, paired=False)
    whole = StillImages.whole(cfg, paired=False)
    assert 0 < len(held) < 20 and sorted(train.listing.keys + held.listing.keys) == sorted(whole.listing.keys)
    part = whole.subset([7, 3], "part")
    assert part.listing.keys == ("train/00000007", "train/00000003") and len(whole) == 20
    for source in (train, held, whole, part):
        assert "image" not in source.sample(0, None)
    with pytest.raises(ValueError, match="a stream cannot be mixed"):
        StillImages.whole(config(tmp_path / "x.parquet", images={"streaming": True}))


@pytest.mark.parametrize(("layout", "frames"), [("image_last", "EEEI"), ("interleave", "EIEIEI"), ("events", "EEE")])
@pytest.mark.parametrize("paired", [True, False])
def test_sequences_of_pictures(tmp_path: Path, layout: str, frames: str, paired: bool) -> None:
    cfg = config(parquet(tmp_path / "x.parquet", range(6)), width=20)
    source = StillImages.whole(cfg, paired=paired)
    sequences = Sequences(source, SequenceConfig(**{"image_last": 0.0, layout: 1.0}))
    for rng in (None, np.random.default_rng(0)):
        batch = collate_sequences([sequences.sample(index, rng) for index in (1, 4)])
        assert batch["modality"].tolist() == [[{"E": EVENT, "I": IMAGE}[frame] for frame in frames]] * 2
        assert batch["events"].counts().shape == (6, 2, 16, 20) and batch["valid"].all()
        assert ("images" in batch) == paired and "image" not in batch
    if paired:
        batch = collate_sequences([sequences.sample(index, None) for index in (1, 4)])
        expected = np.stack([source.sample(index, None)["image"][None] for index in (1, 4)])
        assert np.array_equal(batch["images"], expected) and expected.shape == (2, 1, 3, 16, 20)


def test_pictures_of_other_canvases_do_not_mix() -> None:
    samples = [film(picture(0), config("unused", size=size), key="a", label=0, number=0, rng=None) for size in (16, 20)]
    with pytest.raises(ValueError, match="differ in canvas"):
        collate_stills(samples)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vary": {"threshhold": 2.0}}, "vary.threshhold: no such parameter"),
        ({"vary": {"threshold": 0.5}}, "must be at least 1"),
        ({"speed": (50.0, 10.0)}, "speed=.*ascend"),
        ({"step_us": 0}, "step_us=0"),
        ({"flip": 2.0}, "flip=2.0"),
    ],
)
def test_config_refuses(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImagesConfig(**change)


def test_data_workers_give_the_same_batches(tmp_path: Path) -> None:
    source, _ = StillImages.split(config(parquet(tmp_path / "x.parquet", range(12)), pick=1))
    here, there = (
        [
            part
            for step in itertools.islice(
                Batches(source, collate=collate, batch_size=4, accumulate=2, num_workers=n)(1), 2
            )
            for part in step
        ]
        for n in (0, 1)
    )
    for a, b in zip(here, there):
        assert a["key"] == b["key"] and torch.equal(a["image"], b["image"])
        assert torch.equal(a["events"].images, b["events"].images) and torch.equal(a["events"].seeds, b["events"].seeds)


@pytest.mark.parametrize("name", ["images", "cifar10"])
def test_real_pictures(real_data: Path, name: str) -> None:
    train, held = StillImages.split(config(real_data / name, size=32, pick=1, holdout=0.1))
    assert len(train.listing.classes) == (900 if name == "images" else 10) and len(held) > 50
    counts = collate([train.sample(i, np.random.default_rng(i)) for i in range(8)])["events"].counts()
    rate = counts.sum() / (8 * 32 * 32 * 0.01)
    assert 1 < rate < 100  # events a pixel and second, as real cameras in motion have
