"""Segmentation by the commands a user would type, on tiny DSEC-Semantic and DDD17 sets in their exact layouts."""

from __future__ import annotations

import json
from pathlib import Path

import layouts_driving as drive
import numpy as np
import pytest
import torch
from dense_fixtures import write_boxes, write_exports

import downstream.segmentation.run as segmentation
from downstream.dense.model import DenseModel
from downstream.segmentation.task import Segmentation
from gep import config
from gep.data.config import DataConfig
from gep.data.listing import Listing
from gep.data.paired import Recordings, collate
from gep.data.registry import list_recordings

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "downstream" / "segmentation"
SMALL = (
    "data.fit=resize",
    "head.width=16",
    "train.steps=2",
    "train.batch_size=4",
    "train.eval_every=1",
    "train.num_workers=0",
    "train.precision=no",
    "train.progress=false",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("world")
    drive.write_dsec_semantic(folder / "dsec", ("zurich_city_00_a", "zurich_city_01_a", "zurich_city_13_a"))
    write_boxes(folder / "ddd17")
    return {"dsec": folder / "dsec", "ddd17": folder / "ddd17", **write_exports(folder)}


def run(world: dict[str, Path], folder: Path, name: str, stage: str, *more: str) -> dict:
    size = ("data.height=50", "data.width=64") if name == "dsec" else ("data.height=52", "data.width=70")
    return segmentation.main(
        [
            str(CONFIGS / f"{name}.yaml"),
            f"run={folder}",
            f"model={world[stage]}",
            f"data.root={world[name]}",
            *size,
            *SMALL,
            *more,
        ]
    )


def miou_by_hand(folder: Path, root: Path, data: DataConfig) -> tuple[float, float, str]:
    """mIoU and Acc [%] of an export on a test split, counted pixel by pixel in NumPy, and the list's hash."""
    model = DenseModel.from_pretrained(folder / "export")
    source = Recordings(list_recordings(data.name, root, "test", data), data, paired=False, targets=True)
    table = np.zeros((len(model.task["classes"]),) * 2, np.int64)
    for index in range(len(source)):
        batch = collate([source.sample(index, None)])
        with torch.no_grad():
            found = model(batch)[0].argmax(0).numpy()
        truth = batch["mask"][0].numpy()
        np.add.at(table, (truth[truth != 255], found[truth != 255]), 1)
    ious = [
        table[c, c] / (table[c].sum() + table[:, c].sum() - table[c, c]) for c in range(len(table)) if table[c].sum()
    ]
    return 100 * float(np.mean(ious)), 100 * np.trace(table) / table.sum(), source.listing.hash


@pytest.mark.parametrize(
    "name, stage, windows", [("dsec", "stage2", 2), ("ddd17", "stage2", 1), ("ddd17", "stage1", 2)]
)
def test_trains_and_evaluates_end_to_end(
    world: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, stage: str, windows: int
) -> None:
    found = run(world, tmp_path, name, stage, f"data.windows={windows}", "data.augment.flip_x=0")
    assert json.loads((tmp_path / "results_finetune.json").read_text()) == found
    assert found["input"] | {"windows": windows, "window_us": 50_000, "fit": "resize"} == found["input"]
    found_name = "dsec_semantic" if name == "dsec" else name
    data = DataConfig(
        name=found_name,
        rows="labelled",
        height=50 if name == "dsec" else 52,
        width=64 if name == "dsec" else 70,
        fit="resize",
        windows=windows,
        window_us=50_000,
    )
    # What was reported is what the export gives, sample by sample.
    miou, acc, list_hash = miou_by_hand(tmp_path, world[name], data)
    assert (found["test"]["miou"], found["test"]["acc"]) == pytest.approx((miou, acc))
    assert found["sets"]["test"]["list"] == list_hash
    assert set(found["test"]["iou"]) == set(list_recordings(found_name, world[name], "test").classes)
    printed = capsys.readouterr().out
    assert f"mIoU {found['test']['miou']:.2f} %" in printed and "test-time augmentation off" in printed
    assert found["sets"]["train"]["list"] in printed and found["sets"]["validation"]["list"] in printed
    assert "absent from the truth" in printed and found["test"]["absent"]


def test_learns_what_the_events_show(world: dict[str, Path], tmp_path: Path) -> None:
    """A box of events is the vehicle: mask, events, windows and mirror images lie on each other."""
    more = ("mode=histogram", "head.name=linear", "train.steps=60", "train.eval_every=20", "optim.lr=0.05")
    found = run(world, tmp_path, "ddd17", "stage1", *more, "optim.warmup_steps=5", "data.windows=1", "train.ema=0.5")
    assert found["test"]["miou"] > 80 and found["test"]["absent"] == ["background", "object", "vegetation", "human"]
    assert found["best"]["miou"] == found["validation"]["miou"]
    again = run(world, tmp_path, "ddd17", "stage1", *more, "optim.warmup_steps=5", "data.windows=1", "train.ema=0.5",
                "tta=true")  # fmt: skip
    assert again["tta"] and again["test"]["tta"] and again["test"]["miou"] > 80
    assert again["test"] != found["test"] | {"tta": True}, "the mirrored input takes part"
    assert (tmp_path / "results_histogram_tta.json").is_file() and (tmp_path / "results_histogram.json").is_file()


def test_esss_subsampling_is_named_beside_the_result(
    world: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("mode=probe", "head.name=linear", "data.windows=1", "data.subsampling=ess", "train.batch_size=2")
    found = run(world, tmp_path, "dsec", "stage1", *more)
    assert found["sets"]["test"]["notes"]["subsampling"].startswith("ESS")
    assert found["sets"]["test"]["samples"] == 2  # labels 6 and 8 of 10
    assert "subsampling ESS (first 6 skipped, every second)" in capsys.readouterr().out


def test_merging_averages_probabilities() -> None:
    problem = Segmentation(("a", "b"), ((0, 0, 0), (1, 1, 1)))
    one = torch.tensor([0.9, 0.1]).log()[None, :, None, None]
    two = torch.tensor([0.2, 0.8]).log()[None, :, None, None] + 3
    assert torch.allclose(problem.merge([one, two]).exp().flatten(), torch.tensor([0.55, 0.45]))


def test_colours_and_classes() -> None:
    from gep.data import ddd17, dsec

    for name, classes in (("dsec_semantic", dsec.CLASSES), ("ddd17", ddd17.CLASSES), ("scenes", tuple("abcdefgh"))):
        listing = Listing(name, "train", (), (), np.zeros(0, np.int64), classes)
        problem = Segmentation.of(listing)
        assert problem.num_outputs == len(classes) and len(set(problem.palette)) == len(classes)
        assert json.loads(json.dumps(problem.task)) == problem.task
    with pytest.raises(ValueError, match="names no classes"):
        Segmentation.of(Listing("mvsec", "train", (), (), np.zeros(0, np.int64), ()))
    of_recordings = Listing("folder", "train", ("a",), (), np.zeros(1, np.int64), ("street",))
    with pytest.raises(ValueError, match=r"classes of recordings, not of masks.*classes\.txt"):
        Segmentation.of(of_recordings)
    notes = {"colours": "- #010203 #9731cc"}
    own = Segmentation.of(
        Listing("folder", "train", (), (), np.zeros(0, np.int64), ("road", "mud", "car"), notes=notes)
    )
    usual = Segmentation.of(Listing("x", "train", (), (), np.zeros(0, np.int64), ("road", "mud", "car")))
    assert own.palette == (usual.palette[0], (1, 2, 3), (151, 49, 204)) and own.palette[1] != usual.palette[1]


def test_messages(world: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(config.ConfigError, match="dice=-1"):
        run(world, tmp_path, "ddd17", "stage1", "dice=-1")
    with pytest.raises(ValueError, match="data.name=dsec names no classes"):
        segmentation.main(
            [f"run={tmp_path / 'x'}", f"model={world['stage1']}", f"data.root={world['dsec']}", "data.name=dsec"]
            + ["data.train_split=all"]
        )
