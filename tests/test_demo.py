"""The demo's own parts: no digit leaks, recordings in the data set's layout, a self-contained report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gep.data.listing import Listing
from gep.data.registry import list_recordings
from gep.demo import report
from gep.demo.digits import RESERVED, load_digits, rank_range, shown_in, training_digits
from gep.demo.evrep import EvRepDemo, EvRepSize
from gep.demo.pipeline import Demo, real_recordings
from gep.demo.recordings import simulate_digits
from gep.demo.scenes import METHODS
from gep.demo.standin import DigitImages, collate_digits, on_canvas, warp
from gep.events.io import read_events
from gep.events.io.bin import write_bin
from gep.events.types import Events

pytest.importorskip("mlxtend", reason="the demo extra is not installed")


def listing(numbers: list[int], labels: list[int], image=None) -> Listing:
    files = tuple(Path(f"Train/{label}/{number:05d}.bin") for number, label in zip(numbers, labels))
    keys = tuple(path.as_posix() for path in files)
    return Listing("nmnist", "train", keys, files, np.array(labels), tuple("0123456789"), (34, 34), image)


def test_reserved_digits_are_never_trained_on() -> None:
    train, reserved = training_digits([])
    assert len(train) == 10 * (500 - RESERVED) and len(reserved) == 10 * RESERVED
    assert train.rank.min() == RESERVED and reserved.rank.max() == RESERVED - 1
    assert not {d.tobytes() for d in train.image} & {d.tobytes() for d in reserved.image}


def test_recordings_beyond_the_reserved_ones_take_their_digits_away() -> None:
    digits = load_digits()
    low, high = rank_range(3000, 7)
    assert low < 3000 * 6265 / 60000 < high and high - low < 180
    train, _ = training_digits([listing([3000], [7])])
    left = train.rank[train.label == 7]
    assert not ((left >= low) & (left <= high)).any() and len(train) == 3800 - (high - low + 1)
    # With its image the one digit alone goes.
    row = int(np.flatnonzero((digits.label == 7) & (digits.rank == 300))[0])
    view = np.zeros((3, 34, 34), np.uint8)
    view[:, 3:31, 3:31] = digits.image[row]
    shown = shown_in(digits, [listing([3000], [7], lambda _: view)])
    assert shown.sum() == 1 and shown[row]
    with pytest.raises(ValueError, match="train_images.npz"):
        training_digits([listing(list(range(1100, 5200, 100)), [3] * 41)])


def test_the_real_recordings_digits_are_all_reserved(real_data: Path) -> None:
    with np.load(real_data / "nmnist" / "train_images.npz") as archive:
        index, label, image = archive["index"], archive["label"], archive["image"]
    train, reserved = training_digits(real_recordings(real_data / "nmnist"))
    known = {digit.tobytes(): rank for digit, rank in zip(reserved.image, reserved.rank)}
    assert all(digit.tobytes() in known for digit in image)
    assert not {digit.tobytes() for digit in image} & {digit.tobytes() for digit in train.image}
    for number, digit_label, digit in zip(index, label, image):
        low, high = rank_range(int(number), int(digit_label))
        assert low <= known[digit.tobytes()] <= high


def test_simulated_recordings_are_an_nmnist_root(tmp_path: Path) -> None:
    digits = load_digits()
    few = digits.subset(np.array([0, 700, 4100]))
    assert simulate_digits(few, tmp_path, split="train", copies=2, seed=3) == 6
    found = list_recordings("nmnist", tmp_path, "train")
    assert len(found) == 6 and sorted(found.labels.tolist()) == [0, 0, 1, 1, 8, 8]
    first = found.keys.index("Train/0/00001.bin")
    assert np.array_equal(found.image(first)[0, 3:31, 3:31], few.image[0])
    events = read_events(found.files[first], height=34, width=34)
    assert 1000 < len(events) < 12_000 and events.t[-1] < 310_000
    before = found.files[first].read_bytes()
    simulate_digits(few, tmp_path, split="train", copies=2, seed=3)
    assert found.files[first].read_bytes() == before
    with pytest.raises(FileNotFoundError, match="neither Train/ nor Test/"):
        real_recordings(tmp_path / "Train")


def test_the_demo_clears_only_what_a_demo_made(tmp_path: Path) -> None:
    (tmp_path / "stage1").mkdir()
    with pytest.raises(FileExistsError, match="stage1"):
        Demo(tmp_path).run()
    with pytest.raises(ValueError, match="lies inside"):
        real = tmp_path / "other" / "data"
        (real / "Train" / "3").mkdir(parents=True)
        write_bin(real / "Train" / "3" / "00007.bin", Events.from_arrays([5], [1], [2], [1], height=34, width=34))
        Demo(tmp_path / "other", nmnist=real).run()
    assert (tmp_path / "stage1").is_dir() and (real / "Train" / "3" / "00007.bin").exists()


def test_digits_stand_where_the_sensor_sees_them() -> None:
    image = np.zeros((1, 28, 28), np.uint8)
    image[0, 2, 5] = 200
    assert on_canvas(image)[0, 6, 9] == 200
    source = DigitImages(load_digits().subset(np.arange(3)))
    batch = collate_digits([source.sample(0, None), source.sample(1, np.random.default_rng(0))])
    plain = warp(batch["image"], batch["theta"])
    assert np.allclose(plain[0].numpy(), source.canvas[0], atol=1e-2)
    assert not np.allclose(plain[1].numpy(), source.canvas[1], atol=5)


def test_report_is_one_file_with_the_numbers(tmp_path: Path) -> None:
    for stage in ("teacher", "stage1", "stage2"):
        (tmp_path / stage).mkdir()
        lines = [{"step": step, "loss": 1 / step, "next": 0.5, "regression": 0.2} for step in (1, 2)]
        (tmp_path / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = {str(k): [50.0 + k, 1.0] for k in (1, 2, 5, 20)} | {"50": None}
    results = {
        "recognition": {
            "source": "simulated recordings", "num_test": 7, "list": "abc", "pixels": table, "scratch": table,
            "stage1": {"all": table, "last": table}, "stage2": {"all": table, "last": table},
            "early": {"stage1": [50.0] * 6, "stage2": [60.0] * 6}, "zero_shot": {"stage1": 12.3, "stage2": 45.6},
        },
        "stage1": {"r1": 1.0, "r5": 2.0, "token_cosine": 0.5},
        "stage2": {"loss": 0.1, "copy_previous": 0.2, "mean_token": 0.3, "predicted_image_r1": 9.0},
        "seconds": {"teacher": 1.0},
        "segmentation": {method: {"miou": [31.25, 1.5], "acc": [80.0, 0.0]} for method in METHODS},
        "depth": {method: {"abs_rel": [0.25, 0.01], "rmse": [1.5, 0.1], "delta1": [0.7, 0.02]} for method in METHODS},
        "scenes": {"labelled": 25, "test": 150, "seeds": 3, "window_ms": 40.0},
        "llm_evrep_details": {
            reader: {
                "tencode": {"accuracy": [8.5, 0.0], "each": [8.5], "sobel_error": [1.25, 0.0]},
                "rgb": {"accuracy": [97.125, 0.0], "each": [97.125], "sobel_error": None},
                "fidelity + semantic": {"accuracy": [96.5, 0.75], "each": [96.0, 97.0], "sobel_error": [0.1, 0.02]},
            }
            for reader in ("trained with", "second reader")
        },
    }  # fmt: skip
    rng = np.random.default_rng(0)
    pictures = {
        "labels": ["1", "2"], "events": rng.random((2, 36, 36, 3)), "events_all": rng.random((2, 36, 36, 3)),
        "grid": (6, 6), "window_ms": 40.0, "tokens": {"stage 1,\nmean": rng.normal(size=(2, 36, 96))},
    }  # fmt: skip
    maps = {method: rng.integers(0, 3, (2, 12, 12)) for method in METHODS}
    scenes = {
        "image": rng.random((2, 12, 12)), "events": rng.random((2, 12, 12, 3)), "classes": ("background", "a", "b"),
        "true_mask": maps["scratch"], "true_depth": rng.uniform(1, 6, (2, 12, 12)),
        "segmentation": maps, "depth": {method: 1.0 + ids for method, ids in maps.items()},
    }  # fmt: skip
    Image.new("RGB", (4, 4)).save(tmp_path / "gallery.png")
    path = report.write(
        tmp_path, results, pictures, scenes, (tmp_path / "gallery.png").read_bytes(), teacher_accuracy=98.7
    )
    page = path.read_text()
    assert not re.search(r'(src|href)="(?!data:)', page) and page.count("data:image/png;base64,") == len(
        list((tmp_path / "pictures").glob("*.png"))
    )
    for text in (
        "98.7%",
        "12.3%",
        "45.6%",
        "55.0 ± 1.0",
        "–",
        "copy the previous frame",
        "31.2 ± 1.5",
        "0.250 ± 0.010",
        "96.5 ± 0.8",
        "0.100 ± 0.020",
        "over 2 generators",
    ):
        assert text in page


def test_rows_of_the_readers_table_are_means_over_generators(tmp_path: Path) -> None:
    demo = EvRepDemo(tmp_path, tmp_path, tmp_path, tmp_path, None, tmp_path, 8, EvRepSize(1, 1, 2), 0, None)
    values = {"tencode": 10.0, "fidelity only 1": 90.0, "fidelity only 2": 10.0, "fidelity + semantic 1": 96.0}
    found = {source: {"accuracy": value, "sobel_error": value / 100} for source, value in values.items()}
    table = demo._by_row(found)
    assert list(table) == ["tencode", "fidelity only", "fidelity + semantic"]
    assert table["fidelity only"]["accuracy"][0] == 50 and table["fidelity only"]["each"] == [90.0, 10.0]
    assert table["fidelity only"]["accuracy"][1] == pytest.approx(np.std([90, 10], ddof=1))
    found["tencode"]["sobel_error"] = None
    assert demo._by_row(found)["tencode"]["sobel_error"] is None
