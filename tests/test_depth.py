"""Depth as a problem, by hand-computed cases, and the three published sets end to end by a user's commands."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import layouts_driving as drive
import numpy as np
import pytest
import torch

import downstream.depth.run as depth
from downstream.depth.scale import SCALES, DepthScale
from downstream.depth.task import Depth, DepthConfig, event_pixels, normalised, sequences_of
from gep import config
from gep.data.config import DataConfig
from gep.data.listing import Listing
from gep.events.represent import Histogram
from gep.events.types import EventBatch, Events
from gep.hub import GEPModel
from gep.models.backbone import Backbone
from gep.models.encoder import EventEncoder

ROOT = Path(__file__).resolve().parent.parent
YAML = ROOT / "configs" / "downstream" / "depth"
MVSEC = DepthScale(80.0, 3.70378)


def listing(keys: tuple[str, ...], name: str = "mvsec", **more: object) -> Listing:
    spans = np.array([[0, 10]] * len(keys), np.int64)
    return Listing(name, "test", keys, (), np.full(len(keys), -1), (), spans=spans, anchor="end", **more)


# ---- The problem ------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [1, 3])
def test_event_pixels_are_those_of_the_last_window(windows: int) -> None:
    rng = np.random.default_rng(0)
    samples, height, width = 4, 5, 7
    parts = []
    for number in range(samples * windows):
        count = 0 if number == 2 * windows - 1 else int(rng.integers(1, 9))  # one last window is empty
        t = np.sort(rng.integers(0, 100, count))
        x, y = rng.integers(0, width, count), rng.integers(0, height, count)
        parts.append(Events.from_arrays(t, x, y, rng.integers(0, 2, count), height=height, width=width))
    found = event_pixels(EventBatch.from_windows(parts, np.array([[0, 100]] * len(parts))), windows)
    wanted = np.zeros((samples, height, width), bool)
    for sample in range(samples):
        last = parts[(sample + 1) * windows - 1]
        for x, y in zip(last.x.tolist(), last.y.tolist()):
            wanted[sample, y, x] = True
    assert found.dtype == torch.bool and np.array_equal(found.numpy(), wanted) and not wanted[1].any()


def batch_of(truth: torch.Tensor, pixels: list[tuple[int, int, int]]) -> dict[str, object]:
    """A batch of one window a sample, with events at (sample, row, column)."""
    size, height, width = truth.shape
    windows = []
    for sample in range(size):
        own = [(y, x) for at, y, x in pixels if at == sample]
        y, x = (np.array([place[axis] for place in own], np.int64) for axis in (0, 1))
        windows.append(Events.from_arrays(np.arange(len(own)), x, y, np.ones(len(own)), height=height, width=width))
    events = EventBatch.from_windows(windows, np.array([[0, 100]] * size))
    return {"depth": truth, "events": events, "windows": 1}


def test_rows_are_in_metres_of_the_sigmoid() -> None:
    """Two pixels by hand: the output's sigmoid is log-normalised depth, and 50 m counts at 80 m alone."""
    predicted, truth = torch.tensor([[[20.0, 40.0]]]), torch.tensor([[[10.0, 50.0]]])
    output = (1 + (predicted / 80).log() / 3.70378).logit()[:, None]
    problem = Depth(MVSEC)
    assert torch.allclose(problem.scale.to_metres(normalised(output)), predicted, rtol=1e-5)
    rows = problem.rows(output, batch_of(truth, [(0, 0, 1)]))
    found = problem.summary(rows, listing(("outdoor_day1/000001",)))
    assert found["abs_rel"] == pytest.approx((10 / 10 + 10 / 50) / 2, rel=1e-4)
    assert found["rmse"] == pytest.approx(10, rel=1e-4) and found["delta1"] == 0.0
    assert found["cut-off 30 m"]["all"]["abs_rel"] == pytest.approx(1.0, rel=1e-4)
    assert found["cut-off 80 m"]["events"]["abs_rel"] == pytest.approx(0.2, rel=1e-4)
    assert found["cut-off 30 m"]["events"]["pixels"] == 0 and math.isnan(found["cut-off 30 m"]["events"]["abs_rel"])
    assert problem.score in found and found["score_of"] == "cut-off 80 m, all pixels"
    text = problem.table(found)
    assert text.count("cut-off 30 m") == 1 and text.count("cut-off 80 m") == 1 and "outdoor" not in text


def test_summary_by_sequence_and_options() -> None:
    """Frames with 1 and 3 pixels: the mean over frames, and over pixels; and by sequence."""
    truth = torch.full((2, 1, 3), torch.nan)
    truth[0, 0, 0], truth[1, 0] = 10.0, 20.0
    output = (1 + (torch.tensor([15.0, 22.0]) / 80).log() / 3.70378).logit()[:, None, None, None].expand(2, 1, 1, 3)
    keys = ("outdoor_day1/000001", "outdoor_night1/000001")
    batch = batch_of(truth, [(0, 0, 0), (1, 0, 0)])
    for averaging, wanted in (("frame", (0.5 + 0.1) / 2), ("pixel", (0.5 + 3 * 0.1) / 4)):
        problem = Depth(MVSEC, averaging=averaging)
        found = problem.summary(problem.rows(output, batch), listing(keys))
        # The keys' groups are their folders; here both are alone in theirs, so that there is one more of each.
        assert found["abs_rel"] == pytest.approx(wanted, rel=1e-4), averaging
    twice = listing((*keys, "outdoor_day1/000002"))
    problem = Depth(MVSEC, sq_rel="gt2")
    three = {name: torch.cat([row, row[:1]]) for name, row in problem.rows(output, batch).items()}
    found = problem.summary(three, twice)["cut-off 80 m"]
    assert set(found["sequences"]) == {"outdoor_day1", "outdoor_night1"} and found["sq_rel"] == "gt2"
    assert found["sequences"]["outdoor_day1"]["all"]["abs_rel"] == pytest.approx(0.5, rel=1e-4)
    assert found["sequences"]["outdoor_night1"]["all"]["sq_rel"] == pytest.approx(0.01, rel=1e-3)
    assert "outdoor_night1, events" in problem.table(problem.summary(three, twice))
    many = listing(tuple(f"drive{number}/1" for number in range(13)))
    rows = {name: row[:1].expand(13) for name, row in three.items()}
    found = problem.summary(rows, many)
    assert len(found["cut-off 80 m"]["sequences"]) == 13 and "drive" not in problem.table(found)


def test_no_depth_at_all_is_an_error_not_a_score() -> None:
    problem = Depth(MVSEC)
    rows = problem.rows(torch.zeros(2, 1, 2, 2), batch_of(torch.full((2, 2, 2), torch.nan), []))
    with pytest.raises(ValueError, match="none of 2 frames has depth within the cut-off 80 m"):
        problem.summary(rows, listing(("a/1", "a/2")))


def test_loss_is_of_log_depth_and_frames_without_any_cost_nothing() -> None:
    """One pixel has no neighbours, and its loss is (1 − balance) of its squared error in y."""
    output = torch.tensor([0.3, -0.2])[:, None, None, None].requires_grad_()
    truth = torch.tensor([20.0, torch.nan])[:, None, None]
    found = Depth(MVSEC, balance=0.25).loss(output, {"depth": truth})
    error = 1 / (1 + math.exp(-0.3)) - (1 + math.log(20 / 80) / 3.70378)
    assert found["loss"].item() == pytest.approx(0.75 * error**2 / 2, rel=1e-5)  # a mean over both frames
    found["loss"].backward()
    assert torch.isfinite(output.grad).all() and output.grad[0] != 0 and output.grad[1] == 0


def test_merged_outputs_are_the_mean_of_log_depth() -> None:
    outputs = [torch.randn(2, 1, 3, 4) for _ in range(2)]
    y = (outputs[0].sigmoid() + outputs[1].sigmoid()) / 2
    assert torch.allclose(Depth(MVSEC).merge(outputs).sigmoid(), y, atol=1e-6)


def test_sequences_of_a_listing() -> None:
    assert sequences_of(listing(("a/1", "a/2", "b/1"))) == ["a", "a", "b"]
    assert sequences_of(listing(("x/1", "x/2"), groups=("s", "s"))) == ["s", "s"]
    # Recordings that are each their own make no table of one-frame sequences.
    assert sequences_of(dataclasses.replace(listing(("1", "2")), spans=None)) == ["test", "test"]


def test_each_set_has_its_published_scale() -> None:
    for name, far, alpha in (("mvsec", 80, 3.70378), ("eventscape", 1000, 5.70378), ("dsec", 80, 3.70378)):
        assert Depth.of(listing(("a/1",), name), DepthConfig()).scale == SCALES[name] == DepthScale(far, alpha)
        assert Depth.of(listing(("a/1",), name), DepthConfig()).task == {
            **{"max_depth_m": far, "alpha": alpha, "cutoff_m": 80.0, "averaging": "frame"}
        }
    cfg = config.load(DepthConfig, ["scale.max_m=20", "scale.alpha=2", "cutoffs_m=[80,10]"])
    own = Depth.of(listing(("a/1",), "folder"), cfg)
    assert own.scale == DepthScale(20, 2) and own.cutoffs_m == (10, 80)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["scale.max_m=30"], r"scale\.max_m=30.* set both or none"),
        (["cutoffs_m=[]"], r"cutoffs_m=\[\]"),
        (["cutoffs_m=[30,30]"], "different distances"),
        (["cutoffs_m=[0,30]"], "above 0"),
        (["gradient=-1"], "gradient=-1"),
        (["balance=2"], r"balance=2.* not in \[0, 1\]"),
        (["data.eval_split=test"], "best step on the test set"),
    ],
)
def test_config_says_what_is_wrong(arguments: list[str], message: str) -> None:
    with pytest.raises(config.ConfigError, match=message):
        config.load(DepthConfig, arguments)


def test_problem_refuses_another_view_and_an_unknown_scale() -> None:
    rectified = dataclasses.replace(listing(("a/1",)), rectify=lambda index: np.zeros((2, 2, 2)))
    with pytest.raises(ValueError, match=r"data\.rectify=false .*rectified depth of mvsec"):
        Depth.of(rectified, DepthConfig(data=DataConfig(rectify=False)))
    with pytest.raises(ValueError, match=r"data\.name=folder: .*scale\.max_m"):
        Depth.of(listing(("a/1",), "folder"), DepthConfig())


# ---- End to end -------------------------------------------------------------------------------------


CANVAS = {"mvsec": (260, 346), "dsec": (480, 640), "eventscape": (256, 512)}
# A quarter, a third and a quarter; the tests of whole canvases, with thousands of tokens a frame, are slow ones.
SMALL = {"mvsec": (65, 86), "dsec": (160, 160), "eventscape": (64, 128)}


def small(name: str) -> tuple[str, ...]:
    return (f"data.height={SMALL[name][0]}", f"data.width={SMALL[name][1]}", "data.fit=resize")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny export with a backbone, for another canvas than any of the sets'."""
    torch.manual_seed(0)
    encoder = EventEncoder("nano", in_chans=2, img_size=(36, 36), head_dim=96)
    made = GEPModel.from_parts(encoder, Histogram(log1p=True), DataConfig(windows=1))
    made.backbone = Backbone(96, 32, 1, 2)
    return made.save_pretrained(tmp_path_factory.mktemp("model") / "export")


def arguments(name: str, model: Path, root: Path, run: Path, *more: str) -> list[str]:
    return [
        str(YAML / f"{name}.yaml"),
        f"model={model}",
        f"data.root={root}",
        f"run={run}",
        *("train.steps=2", "train.batch_size=2", "train.num_workers=0", "train.precision=no", "train.progress=false"),
        *("head.name=linear", "optim.warmup_steps=0", "optim.lr=1e-3", "data.windows=1"),
        *more,
    ]


def check_tables(found: dict, cutoffs: tuple[int, ...], sequences: set[str]) -> None:
    """Every number a table must have: per cut-off, at all and at event pixels, pooled and by sequence."""
    assert {key for key in found if key.startswith("cut-off")} == {f"cut-off {far} m" for far in cutoffs}
    for far in cutoffs:
        table = found[f"cut-off {far} m"]
        assert set(table["sequences"]) == sequences
        for numbers in (table, *table["sequences"].values()):
            for pixels in ("all", "events"):
                for metric in ("abs_rel", "rmse", "delta1"):
                    assert isinstance(numbers[pixels][metric], float), (far, pixels, metric)
            assert 0 < numbers["events"]["pixels"] < numbers["all"]["pixels"]
    far = found[f"cut-off {max(cutoffs)} m"]["all"]
    assert found["abs_rel"] == far["abs_rel"] and found["delta1"] == far["delta1"]


def write_mvsec(root: Path) -> None:
    """Day 2 with sparse truth: one map without any, the others with holes."""
    import h5py

    drive.write_mvsec(root, ("outdoor_day1", "outdoor_day2", "outdoor_night1"), frames=6, count=3000)
    with h5py.File(root / "outdoor_day2_gt.hdf5", "a") as file:
        maps = file["davis/left/depth_image_rect"]
        maps[2] = np.nan
        maps[:, :, ::3] = np.nan


def test_mvsec_end_to_end(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, run = tmp_path / "mvsec", tmp_path / "run"
    write_mvsec(root)
    first = depth.main(arguments("mvsec", model, root, run, *small("mvsec")))
    text = capsys.readouterr().out
    for title in ("cut-off 30 m", "cut-off 80 m", "outdoor_night1, events", "depth rect", "2 of 4"):
        assert title in text, title
    assert first == json.loads((run / "results_finetune.json").read_text())
    assert first["sets"]["train"]["samples"] == 4 and first["sets"]["validation"]["samples"] == 1
    assert first["sets"]["validation"]["split"] != first["sets"]["test"]["split"] == "test"
    check_tables(first["test"], (30, 80), {"outdoor_day1", "outdoor_night1"})
    assert first["backbone_sha256"]["before"] != first["backbone_sha256"]["after"]
    assert first["test"]["cut-off 80 m"]["all"]["frames"] == 10
    assert first["test"]["cut-off 80 m"]["all"]["pixels"] == 10 * 65 * 86
    # The finished run again: nothing is left to train, and the same weights give the same numbers.
    assert depth.main(arguments("mvsec", model, root, run, *small("mvsec"))) == first
    with pytest.raises(ValueError, match=r"data\.rectify=false"):
        depth.main(arguments("mvsec", model, root, tmp_path / "mixed", "data.rectify=false"))


def test_mvsec_raw_with_past_windows(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "mvsec"
    drive.write_mvsec(root, ("outdoor_day1", "outdoor_day2"), frames=9, count=2000)
    for path in root.glob("*_map.txt"):
        path.unlink()
    more = ("mode=probe", "data.depth=raw", "data.windows=2", "data.holdout=0.4")
    far = ("scale.max_m=200", "scale.alpha=4", "cutoffs_m=[80,200]")
    found = depth.main(arguments("mvsec", model, root, tmp_path / "run", *small("mvsec"), *more, *far))
    assert found["test"]["cut-off 80 m"]["all"]["pixels"] == 0  # raw depth is 103 m and more
    assert found["test"]["cut-off 200 m"]["all"]["frames"] == 7 == found["sets"]["test"]["samples"]
    assert found["backbone_sha256"]["before"] == found["backbone_sha256"]["after"]


def test_dsec_end_to_end(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "dsec"
    names = ("zurich_city_00_a", "zurich_city_06_a", "zurich_city_05_a", "zurich_city_07_a")
    drive.write_dsec(root, names, pictures=3, count=60_000)
    found = depth.main(
        arguments("dsec", model, root, tmp_path / "run", "mode=probe", "train.batch_size=1", *small("dsec"))
    )
    check_tables(found["test"], (30, 80), {"zurich_city_05_a", "zurich_city_07_a"})
    # Row 100 and every fourth column are seen: 330 / (d + 2 / 256) m of d = 3, 7, … 99.
    assert found["test"]["cut-off 80 m"]["all"]["pixels"] == 2 * 24
    assert found["test"]["cut-off 30 m"]["all"]["pixels"] == 2 * 23
    assert found["validation"]["cut-off 80 m"]["all"]["frames"] == 1
    with pytest.raises(ValueError, match=r"the train split 'train\[kept\]' has no targets"):
        more = ("data.train_split=train", "data.eval_split=", "test_split=")
        depth.main(arguments("dsec", model, root, tmp_path / "pictures", *more))


def test_eventscape_end_to_end(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "eventscape"
    for split in ("Town01-03_train", "Town05_val", "Town05_test"):
        drive.write_eventscape(root, split, sequences=2, files=2)
    found = depth.main(arguments("eventscape", model, root, tmp_path / "run", *small("eventscape")))
    check_tables(found["test"], (30, 80, 1000), {f"Town05_test/sequence_{number}" for number in (0, 1)})
    assert found["test"]["cut-off 1000 m"]["all"]["pixels"] == 4 * 64 * 128
    exported = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert exported["task"] == {"max_depth_m": 1000.0, "alpha": 5.70378, "cutoff_m": 1000.0, "averaging": "frame"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, pixels",
    [("mvsec", 10 * 258 * 346), ("dsec", 96), ("eventscape", 255 * 512)],  # without the rows that have none
)
def test_whole_canvas(name: str, pixels: int, model: Path, tmp_path: Path) -> None:
    """The published sizes, none of which is a multiple of the patch: every pixel with depth is counted once."""
    root = tmp_path / name
    if name == "mvsec":
        write_mvsec(root)
    elif name == "dsec":
        names = ("zurich_city_00_a", "zurich_city_06_a", "zurich_city_05_a")
        drive.write_dsec(root, names, pictures=3, count=60_000)
    else:
        for split in ("Town01-03_train", "Town05_val", "Town05_test"):
            drive.write_eventscape(root, split, files=1)
    found = depth.main(
        arguments(name, model, root, tmp_path / "run", "mode=probe", "train.steps=1", "train.batch_size=1")
    )
    assert (found["input"]["height"], found["input"]["width"]) == CANVAS[name]
    assert found["test"]["cut-off 80 m"]["all"]["pixels"] == pixels


@pytest.mark.parametrize("path", sorted(YAML.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs(path: Path) -> None:
    cfg = config.load(DepthConfig, [str(path)])
    assert len(path.read_text().splitlines()) <= 40
    if path.stem in CANVAS:
        assert (cfg.data.height, cfg.data.width) == CANVAS[path.stem] and cfg.data.fit == "pad"
        assert {30, 80} <= set(cfg.cutoffs_m) and cfg.test_split not in ("", cfg.data.eval_split, cfg.data.train_split)
