"""What a dense model keeps of its data: the numbers of its evaluation again, and recordings seen in the same view."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import layouts_driving as drive
import numpy as np
import pytest
from dense_fixtures import write_exports
from layouts import random_events

import downstream.depth.run as depth
import downstream.segmentation.run as segmentation
from downstream.dense.model import DenseModel
from downstream.dense.predict import predict_data, predict_recording
from downstream.dense.settings import data_of, input_settings
from downstream.dense.streaming import ends_of, predictions
from downstream.dense.view import view_of
from gep import cli
from gep.data.config import DataConfig
from gep.data.dsec import RectifyMaps
from gep.data.paired import Recordings
from gep.data.registry import list_recordings
from gep.events.io import open_events
from gep.events.io.arrow import write_arrow
from gep.events.io.source import InMemory

TRAIN = ("train.steps=2", "train.batch_size=2", "train.progress=false", "optim.lr=1e-3", "head.num_levels=1")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_exports(tmp_path_factory.mktemp("exports"))


@pytest.fixture(scope="module")
def mvsec(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict]:
    """Root of MVSEC with uneven intervals, and the run of a model that reads raw clips of it, with its results."""
    import h5py

    folder = tmp_path_factory.mktemp("mvsec")
    drive.write_mvsec(folder / "set", ("outdoor_day1", "outdoor_day2"), frames=9, count=4000)
    with h5py.File(folder / "set" / "outdoor_day1_gt.hdf5", "a") as file:
        for kind in ("rect", "raw"):
            file[f"davis/left/depth_image_{kind}_ts"][3:6] += np.array([0.011, -0.007, 0.02])
    found = depth.main(
        [
            *(f"run={folder / 'run'}", f"model={exports['stage2']}", f"data.root={folder / 'set'}", "data.name=mvsec"),
            *("data.depth=raw", "data.clip=true", "data.windows=2", "data.height=65", "data.width=87"),
            *("data.fit=resize", "data.holdout=0.4", "holdout_by=time", "test_split=test", "averaging=pixel"),
            *("scale.max_m=200", "scale.alpha=4", "cutoffs_m=[80,150]", *TRAIN),
        ]
    )
    return folder / "set", folder / "run", found


def test_the_numbers_of_the_evaluation_come_again(mvsec: tuple[Path, Path, dict], tmp_path: Path, capsys) -> None:
    """Raw depth, clips of uneven windows, a cut-off beyond 80 m and means over pixels, all from the export."""
    root, run, results = mvsec
    model = DenseModel.from_pretrained(run / "export")
    data = data_of(model, {"name": "mvsec", "root": str(root)})
    assert data.clip and data.depth == "raw" and data.windows == 2
    found = predict_data(model, list_recordings("mvsec", root, "test", data), tmp_path / "out", data=data, npz=True)
    assert found["samples"] == results["sets"]["test"]["samples"] == 7 and found["cutoff_m"] == 150
    for name in ("abs_rel", "rmse", "delta1"):
        assert found[name] == pytest.approx(results["test"][name], rel=1e-5)
    with np.load(tmp_path / "out" / "predictions.npz") as maps:
        samples = Recordings(list_recordings("mvsec", root, "test", data), data, paired=False)
        assert tuple(maps["key"].tolist()) == samples.listing.keys and len(maps["t_us"]) == 7
    # Fixed windows are other ones, and so are the numbers: the clip matters here.
    fixed = data_of(model, {"name": "mvsec", "clip": False})
    off = predict_data(model, list_recordings("mvsec", root, "test", fixed), tmp_path / "off", data=fixed)
    assert off["abs_rel"] != pytest.approx(found["abs_rel"], rel=1e-6)
    command = ["predict", str(run / "export"), str(root), "-o", str(tmp_path / "cli"), "--data", "mvsec"]
    capsys.readouterr()
    cli.main(command)
    assert f'"abs_rel": {found["abs_rel"]}'[:20] in capsys.readouterr().out
    for wrong, message in (
        ("depth=rect", "the model was trained with depth=raw"),
        ("--raw", "no effect with --data"),
    ):
        with pytest.raises(SystemExit):
            cli.main([*command, wrong])
        assert message in capsys.readouterr().err


def test_segmentation_keeps_its_labels_and_rows(exports: dict[str, Path], tmp_path: Path) -> None:
    names = ("zurich_city_00_a", "zurich_city_01_a", "zurich_city_13_a")
    drive.write_dsec_semantic(tmp_path / "set", names, maps=10)
    found = segmentation.main(
        [
            *(f"run={tmp_path / 'run'}", f"model={exports['stage1']}", f"data.root={tmp_path / 'set'}"),
            *("data.name=dsec_semantic", "data.rows=labelled", "data.subsampling=ess", "data.height=60"),
            *("data.width=80", "data.fit=resize", "data.window_us=50000", "test_split=test", *TRAIN),
        ]
    )
    model = DenseModel.from_pretrained(tmp_path / "run" / "export")
    settings = model.input_settings
    assert settings["rectified"] and settings["top_rows"] == 440 and settings["sensor"] == [480, 640]
    data = data_of(model)
    listing = list_recordings("dsec_semantic", tmp_path / "set", "test", data)
    again = predict_data(model, listing, tmp_path / "out")
    assert again["samples"] == found["sets"]["test"]["samples"] == 2
    assert again["acc"] == pytest.approx(found["test"]["acc"], abs=1e-3)
    with pytest.raises(ValueError, match="rectify=False: the model was trained with rectify=True"):
        data_of(model, {"rectify": False})
    with pytest.raises(ValueError, match="depth=raw"):
        data_of(model, {"depth": "raw"})
    # A plain recording, with the map that lies beside it, is seen as the samples of the set are.
    path = tmp_path / "set" / "zurich_city_13_a" / "events" / "left" / "events.h5"
    samples = Recordings(listing, replace(data, height=480, width=640), paired=False)
    with open_events(path) as source:
        view = view_of(settings, source)
        for index in range(len(samples)):
            sample = samples.sample(index, None)
            (window,) = sample["events"]
            seen = view(source.by_time(*sample["t_us"][0].tolist()))
            assert len(seen) > 100 and seen.y.max() < 440
            for name in ("t", "x", "y", "p"):
                assert np.array_equal(getattr(seen, name), getattr(window, name)), name
        end = int(sample["t_us"][0, 1])
        (one,) = predictions(model, source, range(end, end + 1), view)
        assert len(one.events) == len(seen) and np.array_equal(one.events.y, seen.y)
        assert predict_recording(model, source, tmp_path / "film", progress=False) == len(ends_of(source, settings))


def test_without_a_map_a_rectified_model_refuses_and_names_the_fix(tmp_path: Path, capsys) -> None:
    drive.write_dsec_events(tmp_path / "dsec", random_events(0, 500, 200_000, 480, 640, start=drive.DSEC_T0))
    shutil.move(tmp_path / "dsec" / "rectify_map.h5", tmp_path / "map.h5")
    settings = {"rectified": True, "top_rows": 440, "sensor": [480, 640]}
    source = InMemory(tmp_path / "dsec" / "events.h5", random_events(1, 3000, 200_000, 480, 640))
    with pytest.raises(ValueError, match=r"events.h5: .*rectified events, and .*--rectify-map FILE.*--raw"):
        view_of(settings, source)
    table = RectifyMaps((tmp_path / "map.h5",))(0)
    given = view_of(settings, source, rectify_map=tmp_path / "map.h5")
    assert np.array_equal(given.table, table) and given.rows == 440
    raw = view_of(settings, source, raw=True)(source.events)
    assert np.array_equal(raw.t, source.events.t[source.events.y < 440]) and 0 < len(raw) < len(source.events)
    # MVSEC's maps are two tables.
    davis = InMemory(Path("made"), random_events(2, 3000, 200_000, *drive.DAVIS))
    for axis, values in zip("xy", drive.mvsec_maps()):
        np.savetxt(tmp_path / f"outdoor_day_left_{axis}_map.txt", values, fmt="%.9f")
    plain = {"rectified": True}
    found = view_of(plain, davis, rectify_map=tmp_path / "outdoor_day_left_x_map.txt").table
    np.testing.assert_allclose(found, np.stack(drive.mvsec_maps(), axis=-1), rtol=1e-6)
    for more, error, message in (
        ({"rectify_map": tmp_path / "no.h5"}, FileNotFoundError, "no.h5: no such file"),
        ({"rectify_map": tmp_path / "map.h5", "raw": True}, ValueError, "asks for raw events"),
        ({"rectify_map": tmp_path / "map.h5"}, ValueError, "480x640 pixels does not belong to the 260x346 sensor"),
        ({"rectify_map": tmp_path / "outdoor_day_left_y_map.txt"}, FileNotFoundError, "_x_map.txt"),
    ):
        with pytest.raises(error, match=message):
            view_of(plain, davis, **more)
    with pytest.raises(ValueError, match="trained on events as they are"):
        view_of({"rectified": False}, source, rectify_map=tmp_path / "map.h5")


def test_rows_are_cut_on_the_trained_sensor_alone(tmp_path: Path) -> None:
    drive.write_ddd17(tmp_path / "set", dirs=(1,))
    data = DataConfig(name="ddd17", root=str(tmp_path / "set"), rows="labelled", height=260, width=346, windows=1)
    settings = input_settings(data, list_recordings("ddd17", data.root, "test", data))
    assert not settings["rectified"] and (settings["top_rows"], settings["sensor"]) == (200, [260, 346])
    source = InMemory(Path("made"), random_events(0, 2000, 50_000, *drive.DAVIS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = view_of(settings, source)(source.events)
    assert seen.y.max() == 199 and len(seen) == (source.events.y < 200).sum()
    small = InMemory(Path("made"), random_events(0, 2000, 50_000, 300, 300))
    with pytest.warns(UserWarning, match="top 200 rows of a 260x346 sensor; this one has 300x300"):
        assert len(view_of(settings, small)(small.events)) == 2000
    everything = input_settings(replace(data, rows="all"), list_recordings("ddd17", data.root, "test"))
    assert everything["top_rows"] == 0 and view_of(everything, source)(source.events) is source.events


def test_the_command_line_takes_a_map_or_raw(
    mvsec: tuple[Path, Path, dict], exports: dict[str, Path], tmp_path: Path, capsys
) -> None:
    model = DenseModel.from_pretrained(mvsec[1] / "export")
    model.input_settings |= {"rectified": True}
    model.save_pretrained(tmp_path / "model")
    write_arrow(tmp_path / "a.arrow", random_events(0, 4000, 200_000, *drive.DAVIS))
    command = ["predict", str(tmp_path / "model"), str(tmp_path / "a.arrow"), "-o", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        cli.main(command)
    assert "--rectify-map FILE" in capsys.readouterr().err
    cli.main([*command, "--raw"])
    cli.main([*command, "--rectify-map", str(mvsec[0] / "outdoor_day_left_x_map.txt")])
    assert capsys.readouterr().out.count("predictions") == 2
