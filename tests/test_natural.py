"""`gep natural`, with a few steps of everything: it runs to the end, and wrong inputs end it before it begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gep.demo import natural
from gep.demo.natural import Natural, Size, table
from gep.events.io.bin import write_bin
from gep.events.io.npz import write_npz
from gep.events.types import Events


def picture(path: Path, value: int, size: tuple[int, int] = (8, 8)) -> None:
    """A grating, along the rows or the columns, so that a moving camera sees edges."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.zeros((*size, 3), np.uint8)
    image[value % 2 :: 2] = 90 + 10 * (value % 16)
    Image.fromarray(image if value % 3 else image.transpose(1, 0, 2)).save(path)


def events(seed: int, seconds: float, size: tuple[int, int] = (24, 32)) -> Events:
    rng = np.random.default_rng(seed)
    count = round(2000 * seconds)
    t = np.sort(rng.integers(0, round(seconds * 1e6), count))
    x = rng.integers(0, size[1] // (1 + seed % 2), count)  # one object is on the left
    return Events.from_arrays(t, x, rng.integers(0, size[0], count), rng.integers(0, 2, count),
                              height=size[0], width=size[1])  # fmt: skip


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Any]:
    """Two classes of pictures, photographs, recordings of two objects, and one with pictures."""
    for split, count in (("train", 33), ("test", 4)):
        for number in range(2 * count):
            picture(tmp_path / "cifar10" / split / "ab"[number % 2] / f"{number}.png", number)
    for number in range(6):
        picture(tmp_path / "photos" / f"{number}.png", number, (20, 20))
    (tmp_path / "objects").mkdir()
    # 6 s: 14 samples of 250 ms to learn from, and 7 to test on.
    write_npz(tmp_path / "objects" / "mug.npz", events(0, 6))
    write_npz(tmp_path / "objects" / "box.npz", events(1, 6))
    framed = tmp_path / "frames"
    for number in range(6):
        picture(framed / "images" / f"{number:06d}.png", number, (24, 32))
    exposures = [f"{100_000 * number + 20_000} {100_000 * number + 90_000}" for number in range(6)]
    (framed / "images" / "timestamps.txt").write_text("\n".join(exposures))
    write_npz(framed / "events.npz", events(3, 0.7))
    return {
        "cifar10": tmp_path / "cifar10",
        "photos": tmp_path / "photos",
        "objects": tmp_path / "objects",
        "frames": framed,
        "out": tmp_path / "out",
        "size": Size(2, 2, 4, 1),
        "options": ["data.mix.cifar10.holdout=0.3", "data.mix.photos.holdout=0.3", "train.batch_size=4"],
    }


@pytest.mark.slow
def test_it_runs_to_the_end(inputs: dict[str, Any]) -> None:
    results = Natural(**inputs).run()
    assert json.loads((inputs["out"] / "results.json").read_text()) == json.loads(json.dumps(results))
    assert 0 <= results["teacher"]["top1"] <= 100 and -1 <= results["stage1"]["token_cosine"] <= 1
    objects = results["objects"]
    assert "28 samples, 2 classes" in objects["train"] and "14 samples, 2 classes" in objects["test"]
    for name in ("stage1", "pixels 4x4", "pixels 72x72", "scratch"):
        assert [objects[name][shots] is None for shots in ("5", "20", "50")] == [False, True, True], name
    # Counting the events on the right tells the two apart.
    assert objects["pixels 4x4"]["5"][0] > 95
    assert results["frames"]["recordings"] == 6 and results["frames"]["mean_r5"] >= results["frames"]["mean_r1"]
    assert table(results).count("–") == 2 * 7


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained before every input was looked at")

    monkeypatch.setattr(natural, "train_classifier", never)


@pytest.mark.parametrize("name", ["cifar10", "photos", "objects", "frames"])
def test_a_mistyped_path_ends_it_before_any_training(name: str, inputs: dict[str, Any], untrained: None) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-place"):
        Natural(**{**inputs, name: inputs["out"] / "no-such-place"}).run()
    assert not inputs["out"].exists()


def test_inputs_of_another_kind_end_it_too(inputs: dict[str, Any], untrained: None) -> None:
    def fails(message: str, **changes: Any) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            Natural(**{**inputs, **changes}).run()

    for split in ("train", "test"):
        picture(inputs["cifar10"].parent / "loose" / split / "1.png", 1)
    fails("have no labels", cifar10=inputs["cifar10"].parent / "loose")
    fails("no pictures", frames=inputs["objects"])
    fails("--objects", objects=inputs["photos"])
    fails("at least 2", objects=_only(inputs["objects"], "mug.npz"))
    fails("nonsense", options=[*inputs["options"], "train.nonsense=1"])
    with pytest.raises(AssertionError, match="every input"):  # and nothing is wrong with these
        Natural(**inputs).run()


def _only(folder: Path, name: str) -> Path:
    out = folder.parent / "only"
    out.mkdir()
    (out / name).write_bytes((folder / name).read_bytes())
    return out


def test_stray_files_do_not_change_where_classes_come_from(tmp_path: Path) -> None:
    def label_from(root: Path) -> str:
        return Natural(tmp_path, tmp_path, root)._samples()["label_from"]

    for name in ("folders/mug/1.bin", "folders/box/1.bin", "files/mug.bin", "files/box.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_bin(tmp_path / name, events(0, 0.01))
    for root in ("folders", "files"):
        (tmp_path / root / "README.md").write_text("what these are")
        (tmp_path / root / "notes").mkdir()
        (tmp_path / root / "notes" / "a.md").write_text("of the day")
    assert label_from(tmp_path / "folders") == "folder" and label_from(tmp_path / "files") == "file"
    for name in ("mug", "box"):  # a folder each, with what belongs to the recording
        (tmp_path / "homes" / name).mkdir(parents=True)
        write_bin(tmp_path / "homes" / name / "events.bin", events(0, 0.01))
    assert label_from(tmp_path / "homes") == "file"
