"""Scenes on disk: every sample's truth is that of its window's end; whole or not there; what ships; `gep scenes`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from gep import cli
from gep.data import scene_files
from gep.data.config import DataConfig
from gep.data.describe import describe_path
from gep.data.options import ListingOptions
from gep.data.paired import Recordings, collate
from gep.data.registry import list_recordings, recognise
from gep.data.scene_files import Textures, write_scenes
from gep.data.scene_textures import SIDE, Thing, patterns
from gep.data.scenes import SceneConfig, Scenes
from gep.events.io import read_events

SMALL = SceneConfig(height=20, width=24, focal_px=28.0, windows=3, window_us=20_000)
NAMES = ("background", "checks", "rings", "stripes")


def things(count: int = 5, seed: int = 0) -> list[Thing]:
    return patterns(count, np.random.default_rng(seed))


def textures() -> dict[str, Textures]:
    return {name: Textures(things(3, seed), []) for seed, name in enumerate(("train", "val", "test"))}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A small data set on disk, and the scenes that were written."""
    kept: list[Scenes] = []
    make = scene_files.draw_scenes

    def keep(*arguments):
        kept.append(make(*arguments))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scene_files, "draw_scenes", keep)
        patch.setattr(scene_files, "_CHUNK", 2)
        root = tmp_path_factory.mktemp("scenes") / "set"
        counts = {"train": 3, "val": 1, "test": 2}
        assert write_scenes(root, counts, textures(), config=SMALL, seed=4, progress=False) == root
    return root, {"train": kept[:2], "val": kept[2:3], "test": kept[3:]}


def data(**changes) -> DataConfig:
    return DataConfig(name="scenes", height=20, width=24, window_us=SMALL.window_us, **changes)


def of_key(scenes: list[Scenes], key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mask, depth, picture in 0..255) that a sample's key names, from the scenes themselves."""
    name, frame = key.split("#")
    number, step = int(name.split("/")[1]), 4 * int(frame)
    chunk, row = scenes[number // 2], number % 2
    mask, depth = chunk.truth(step)
    return mask[row], depth[row], 255 * chunk.layers.watch()(step)[row].numpy()


@pytest.mark.parametrize(
    "settings, frames",
    [({"windows": 1}, (1, 2, 3)), ({"windows": 3}, (3,)), ({"windows": 2, "clip": True}, (2, 3))],
    ids=["one window", "all windows", "clip"],
)
def test_samples_hold_the_truth_of_their_windows_end(written, settings, frames):
    root, scenes = written
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        listing = list_recordings("scenes", root, split)
        config = data(**settings)
        recordings = Recordings(listing, config, paired=True, targets=True)
        wanted = [f"{split}/{number:05d}#{frame:03d}" for number in range(count) for frame in frames]
        samples = [recordings.sample(index, None) for index in range(len(recordings))]
        assert [sample["key"] for sample in samples] == wanted
        for sample in samples:
            mask, depth, picture = of_key(scenes[split], sample["key"])
            end = int(sample["key"][-3:]) * SMALL.window_us
            edges = end - SMALL.window_us * np.arange(config.windows, -1, -1)
            assert sample["t_us"].tolist() == np.stack([edges[:-1], edges[1:]], axis=1).tolist()
            assert sample["mask"].dtype == np.uint8 and np.array_equal(sample["mask"], mask)
            assert sample["depth"].dtype == np.float32 and np.array_equal(sample["depth"], depth)
            image = sample["images"][-1] if config.clip else sample["image"]
            assert image.shape == (3, 20, 24) and np.abs(image - picture).max() <= 0.5 + 1e-4
            whole = read_events(root / sample["key"].split("#")[0] / "events.arrow")
            for events, (t0, t1) in zip(sample["events"], sample["t_us"].tolist(), strict=True):
                assert len(events) == ((whole.t >= t0) & (whole.t < t1)).sum()
        batch = collate(samples)
        assert batch["mask"].dtype == torch.uint8 and batch["depth"].dtype == torch.float32
        assert batch["depth"].shape == (len(wanted), 20, 24) and torch.isfinite(batch["depth"]).all()


def test_files(written):
    root, scenes = written
    home = root / "train" / "00002"
    stamps = (home / "images" / "timestamps.txt").read_text().split()
    assert stamps == ["0", "20000", "40000", "60000"]
    for frame in range(4):
        mask, depth, picture = of_key(scenes["train"], f"train/00002#{frame:03d}")
        assert np.array_equal(np.load(home / "depth" / f"{frame:03d}.npy"), depth)
        assert np.array_equal(np.asarray(Image.open(home / "masks" / f"{frame:03d}.png")), mask)
        assert np.array_equal(np.asarray(Image.open(home / "images" / f"{frame:03d}.png")), picture.round())
    events = read_events(home / "events.arrow")
    assert (events.height, events.width) == (20, 24) and len(events) > 50 and events.t.max() < 60_000
    index = json.loads((root / "scenes.json").read_text())
    assert index["classes"] == list(NAMES) and index["counts"] == {"train": 3, "val": 1, "test": 2}
    assert index["config"]["focal_px"] == 28.0 and index["seed"] == 4 and index["sensor"]["gamma"] == 1.6
    assert [path.name for path in root.parent.iterdir()] == ["set"]


def test_listing(written):
    root, _ = written
    listing = list_recordings("scenes", root, "train")
    assert listing.name == "scenes" and listing.classes == NAMES and listing.sensor == (20, 24)
    assert (listing.labels == -1).all() and sorted(listing.targets) == ["depth", "mask"] and len(listing) == 9
    assert len(list_recordings("scenes", root, "all")) == 18
    kept, held = listing.hold_out(0.3)
    assert not {key.split("#")[0] for key in kept.keys} & {key.split("#")[0] for key in held.keys}
    with pytest.raises(FileNotFoundError, match="no split 'depth_val'"):
        list_recordings("scenes", root, "depth_val")
    with pytest.raises(ValueError, match="label_from"):
        list_recordings("scenes", root, "train", ListingOptions(label_from="file"))


def test_info_recognises_scenes(written):
    root, _ = written
    assert recognise(root) == ["scenes"]
    lines = describe_path(root)
    assert "data.name=scenes" in lines and "scenes train: 9 samples, 4 classes, with images, depth, mask" in lines
    assert "scenes test: 6" in lines and "classes background, checks, rings, stripes" in lines


def test_seeds(tmp_path, written):
    root, _ = written
    for seed in (4, 5):
        write_scenes(tmp_path / str(seed), {"train": 2}, textures(), config=SMALL, seed=seed, progress=False)
    first = [read_events(base / "train/00000/events.arrow") for base in (root, tmp_path / "4", tmp_path / "5")]
    assert not np.array_equal(first[1].t, first[2].t)
    again = tmp_path / "again"
    write_scenes(again, {"train": 2}, textures(), config=SMALL, seed=4, progress=False)
    for path in sorted((tmp_path / "4").rglob("*.*")):
        assert path.read_bytes() == (again / path.relative_to(tmp_path / "4")).read_bytes()


def test_refused_folders(tmp_path, written):
    root, _ = written
    with pytest.raises(FileExistsError, match="holds something already"):
        write_scenes(root, {"train": 1}, textures(), config=SMALL)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something already"):
        write_scenes(tmp_path / "file", {"train": 1}, textures(), config=SMALL)
    (tmp_path / "empty").mkdir()
    write_scenes(tmp_path / "empty", {"train": 1}, textures(), config=SMALL, progress=False)
    assert (tmp_path / "empty" / "scenes.json").is_file() and (tmp_path / "file").read_text() == "mine"
    for counts in ({}, {"train": 0}, {"train": 2, "val": -1}):
        with pytest.raises(ValueError, match="at least one scene"):
            write_scenes(tmp_path / "none", counts, textures(), config=SMALL)
    other = textures() | {"test": Textures(things(2)[:2], [])}
    with pytest.raises(ValueError, match="classes differ"):
        write_scenes(tmp_path / "none", {"train": 1, "test": 1}, other, config=SMALL)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("fault", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, fault):
    calls = []
    write = scene_files.write_events

    def failing(path, events):
        calls.append(path)
        if len(calls) == 2:
            raise fault
        write(path, events)

    monkeypatch.setattr(scene_files, "write_events", failing)
    (tmp_path / "set.partial").mkdir()  # somebody else's
    with pytest.raises(type(fault)):
        write_scenes(tmp_path / "set", {"train": 3}, textures(), config=SMALL, progress=False)
    assert len(calls) == 2 and [path.name for path in tmp_path.iterdir()] == ["set.partial"]


def test_no_index_or_a_broken_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"scenes\.json is missing.*gep scenes"):
        list_recordings("scenes", tmp_path, "train")
    for text in ("{", "[]", "{}", '{"classes": 3}'):
        (tmp_path / "scenes.json").write_text(text)
        with pytest.raises(ValueError, match=r"scenes\.json: not an index of scenes"):
            list_recordings("scenes", tmp_path, "train")


# ---- what ships in the demo extra -------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    pytest.importorskip("mlxtend")
    pytest.importorskip("sklearn")
    from gep.demo.textures import scene_textures

    return scene_textures()


def test_classes_are_the_same_in_all_splits(shipped):
    names = ["checks", "digit", "photograph", "rings", "stripes"]
    assert all([thing.name for thing in split.things] == names for split in shipped.values())
    for thing in shipped["train"].things:
        assert thing.texture.shape[1:] == (SIDE, SIDE) and thing.texture.min() >= 0 and thing.texture.max() <= 1


def full(images: np.ndarray) -> np.ndarray:
    """Each image stretched to 0..1, float64 (N, pixels)."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    low, high = (pick(flat, axis=1, keepdims=True) for pick in (np.min, np.max))
    return (flat - low) / (high - low)


def test_digits_and_photographs_of_the_test_split_are_new(shipped):
    from gep.demo.digits import RESERVED, load_digits
    from gep.demo.textures import _loaded

    digits = load_digits()
    known = full(digits.image)
    for split in ("train", "test"):
        thing = shipped[split].things[1]
        ink = full(thing.texture[:, 4:32, 4:32])
        nearest = ((known**2).sum(axis=1) - 2 * ink @ known.T).argmin(axis=1)
        np.testing.assert_allclose(ink, known[nearest], atol=1e-5)
        assert len(set(nearest)) == 400
        assert ((digits.rank[nearest] < RESERVED) == (split == "test")).all()
    parts = (shipped[split].backgrounds for split in ("train", "test"))
    for whole, train, test in zip(_loaded(), *parts, strict=True):
        # The left part and the right one, without a column in common.
        assert np.array_equal(np.concatenate([train, test], axis=1), whole)
        assert 0.3 < test.shape[1] / whole.shape[1] < 0.4


def test_panels_are_cut_from_the_splits_own_part(monkeypatch):
    """Every texture of a split's photographs, traced by what only one part of the picture holds."""
    pytest.importorskip("mlxtend")
    from gep.demo import textures as demo_textures

    # Left of the border the picture is vertical stripes, right of it horizontal ones.
    whole = np.zeros((300, 700), np.float32)
    border = round(0.65 * 700)
    whole[:, :border] = (np.arange(border) // 9 % 2)[None]
    whole[:, border:] = (np.arange(300) // 9 % 2)[:, None]
    monkeypatch.setattr(demo_textures, "_loaded", lambda: (whole,))
    monkeypatch.setattr(demo_textures, "_PER_CLASS", 30)
    found = demo_textures.scene_textures()
    for split, axis in (("train", 1), ("test", 2)):
        panels = found[split].things[2].texture
        assert panels.std(axis=3 - axis).max() > 0.05
        assert panels.std(axis=axis).max() < 1e-5


# ---- the command ------------------------------------------------------------------------------------


def test_gep_scenes(tmp_path, capsys):
    pytest.importorskip("mlxtend")
    out = tmp_path / "set"
    cli.main(["scenes", str(out), "--train", "2", "--val", "0", "--test", "1", "--size", "24", "--windows", "2"])
    assert f"{out}: 2 train, 1 test" in capsys.readouterr().out
    cli.main(["info", str(out)])
    told = capsys.readouterr().out
    assert "data.name=scenes" in told and "scenes train: 4 samples, 6 classes" in told and "24 × 24" in told
    config = json.loads((out / "scenes.json").read_text())["config"]
    assert (config["height"], config["width"], config["windows"], config["focal_px"]) == (24, 24, 2, 30.0)
    recordings = Recordings(
        list_recordings("scenes", out, "train"),
        DataConfig(name="scenes", window_us=config["window_us"], windows=2, height=24, width=24),
        paired=False,
        targets=True,
    )
    assert len(recordings) == 2 and recordings.sample(0, None)["mask"].max() > 0
    for wrong, message in (
        ([str(out), "--train", "1"], "holds something already"),
        ([str(tmp_path / "new"), "--train", "0", "--val", "0", "--test", "0"], "at least one scene"),
        ([str(tmp_path / "new"), "--size", "0"], "height=0"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["scenes", *wrong])
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_sensor_larger_than_the_photographs(tmp_path):
    """Of the test split's photographs 224 columns are left; a background of 128 pixels wants 256."""
    pytest.importorskip("mlxtend")
    out = tmp_path / "set"
    cli.main(["scenes", str(out), "--train", "0", "--val", "0", "--test", "6", "--size", "128", "--windows", "1"])
    assert len(list_recordings("scenes", out, "test")) == 6
