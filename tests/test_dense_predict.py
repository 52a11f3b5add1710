"""Prediction on recordings and labelled sets: equal to a prediction by itself, bounded, whole or not there."""

from __future__ import annotations

import gc
import tracemalloc
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from layouts import random_events
from layouts_driving import DAVIS, write_ddd17, write_mvsec
from PIL import Image

from downstream.dense import predict as predicting
from downstream.dense.features import DenseFeatures, HistogramFeatures
from downstream.dense.heads import build_head
from downstream.dense.model import DenseModel
from downstream.dense.output import map_writer
from downstream.dense.predict import data_of, predict_data, predict_recording
from downstream.dense.streaming import ends_of, on_sensor, predictions, values_of
from gep import cli
from gep.data.ddd17 import CLASSES
from gep.data.paired import Recordings, collate
from gep.data.registry import list_recordings
from gep.events import augment
from gep.events.io import open_events
from gep.events.io.arrow import write_arrow
from gep.events.io.source import InMemory
from gep.events.represent import Histogram
from gep.events.slicing import by_bounds, into_windows
from gep.events.types import EventBatch, Events
from gep.hub import GEPModel
from gep.models import Backbone, EventEncoder

SENSOR = (30, 44)


def make(
    features: str = "backbone",
    kind: str = "segmentation",
    canvas: tuple[int, int] = SENSOR,
    classes: tuple[str, ...] = CLASSES,
    **settings,
) -> DenseModel:
    torch.manual_seed(0)
    given = {"height": 36, "width": 36, "fit": "pad", "windows": 3, "window_us": 10_000, "num_events": 0}
    encoder = EventEncoder("nano", 2, (36, 36))
    backbone = Backbone(encoder.embed_dim, width=48, depth=2, heads=2)
    whole = GEPModel.from_parts(encoder, Histogram(), SimpleNamespace(**given), backbone=backbone)
    if features == "histogram":
        read: DenseFeatures | HistogramFeatures = HistogramFeatures(whole, windows=3)
    else:
        read = DenseFeatures(whole, num_levels=2, use_backbone=features != "encoder", encoder_maps=features != "states")
    head = build_head("linear", read.channels, 1 if kind == "depth" else len(classes))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # outputs that differ from pixel to pixel
    task = {"max_depth_m": 80.0, "alpha": 3.70378} if kind == "depth" else {"classes": list(classes)}
    given |= {"height": canvas[0], "width": canvas[1], **settings}
    return DenseModel(read, head, kind=kind, input_settings=given, task=task).eval()


def recording(length_us: int = 95_000, count: int = 9000) -> InMemory:
    return InMemory(Path("made"), random_events(3, count, length_us, *SENSOR, start=1_000_000))


@torch.no_grad()
def alone(model: DenseModel, windows: list[Events], bounds: np.ndarray) -> torch.Tensor:
    """The output for windows of the sensor, with nothing remembered."""
    settings = model.input_settings
    fit = augment.fit(SENSOR, (settings["height"], settings["width"]), settings["fit"])
    batch = EventBatch.from_windows(*fit.apply_events(windows, bounds))
    t_us = torch.from_numpy(bounds[None].copy())
    return model({"events": batch, "windows": len(windows), "t_us": t_us})


@pytest.mark.parametrize("features", ["backbone", "states", "encoder", "histogram"])
@pytest.mark.parametrize("canvas, fit", [(SENSOR, "pad"), ((20, 50), "pad"), ((25, 31), "resize")])
@pytest.mark.parametrize("step_us", [10_000, 20_000, 7_000])
def test_streaming_equals_each_prediction_by_itself(features, canvas, fit, step_us):
    model, source = make(features, canvas=canvas, fit=fit), recording()
    ends = ends_of(source, model.input_settings, step_us=step_us)
    found = list(predictions(model, source, ends))
    assert [one.t_us for one in found] == list(ends) and len(found) >= 3
    for one in found:
        edges = one.t_us - 10_000 * np.arange(3, -1, -1)
        bounds = np.stack([edges[:-1], edges[1:]], axis=1)
        cut = by_bounds(source.events, bounds)
        assert np.array_equal(one.events.t, cut.events[-1].t) and len(one.events) > 500
        output = alone(model, cut.events, bounds)
        assert (one.output - output).abs().max() < 1e-5
        assert np.mean(one.values == values_of(model, output, SENSOR)) > 0.999
    assert len(np.unique(found[0].values)) > 2 and not np.array_equal(found[0].values, found[1].values)


def test_windows_by_number_of_events_and_as_parts_of_the_step():
    source = recording()
    model = make(window_us=0, num_events=2000)
    found = list(predictions(model, source, ends_of(source, model.input_settings, step_us=20_000)))
    assert found[0].t_us - source.events.t[0] == 40_000  # 2000 of 9000 events in 95 ms are there after 21 ms
    for one in found:
        stop = int(np.searchsorted(source.events.t, one.t_us))
        cut = into_windows(source.events[stop - 2000 : stop], 3)
        assert (one.output - alone(model, cut.events, cut.bounds)).abs().max() < 1e-5
    model = make(window_us=0)
    with pytest.raises(ValueError, match="--step-ms"):
        ends_of(source, model.input_settings)
    for one in predictions(model, source, ends_of(source, model.input_settings, step_us=31_000)):
        edges = one.t_us - 31_000 + np.array([0, 10_333, 20_666, 31_000])
        bounds = np.stack([edges[:-1], edges[1:]], axis=1)
        assert (one.output - alone(model, by_bounds(source.events, bounds).events, bounds)).abs().max() < 1e-5


def test_when_to_predict():
    settings, source = make().input_settings, recording(95_000)
    begin = source.span[0]
    at = [t - begin for t in ends_of(source, settings)]
    assert at == [30_000, 40_000, 50_000, 60_000, 70_000, 80_000, 90_000]  # three windows of 10 ms first
    assert [t - begin for t in ends_of(source, settings, start_us=55_000, stop_us=80_000)] == [65_000, 75_000]
    assert [t - begin for t in ends_of(source, settings, start_us=1_000, step_us=40_000)] == [41_000, 81_000]
    short = recording(15_000)
    with pytest.warns(UserWarning, match="earliest windows are empty"):
        assert list(ends_of(short, settings)) == [short.span[1]]
    for given, message in (({"start_us": 95_000_000}, "nothing to predict"), ({"step_us": -1}, "negative")):
        with pytest.raises(ValueError, match=message):
            ends_of(source, settings, **given)
    nothing = InMemory(Path("made"), source.events[:0])
    with pytest.raises(ValueError, match="no events"):
        ends_of(nothing, settings)


@pytest.mark.parametrize("features", ["backbone", "histogram"])
def test_a_recording_ten_times_as_long_takes_no_more_memory(tmp_path, features):
    model, peaks, encoded, asked = make(features), {}, [], []
    if features == "backbone":
        inner = model.features.frames
        model.features.frames = lambda batch: (encoded.append(len(batch["events"])), inner(batch))[1]
    for times in (1, 10):
        events = random_events(1, 50_000 * times, 80_000 * times, *SENSOR)
        # Of a packed file the reader keeps some chunks.
        write_arrow(tmp_path / f"{times}.arrow", events, compression="none")
        del events
        with open_events(tmp_path / f"{times}.arrow") as source:
            read = source.by_time
            source.by_time = lambda t0, t1, read=read: (asked.append(t1 - t0), read(t0, t1))[1]
            predict_recording(model, source, tmp_path / "warm", stop_us=60_000, progress=False)
            gc.collect()
            encoded.clear()
            tracemalloc.start()
            held: list[int] = []
            ends = ends_of(source, model.input_settings)
            for number, _ in enumerate(predictions(model, source, ends)):
                if number % (2 * times) == times:
                    held.append(sum(type(one) is torch.Tensor for one in gc.get_objects()))
            assert predict_recording(model, source, tmp_path / f"out{times}", npz=True, progress=False) == len(ends)
            peaks[times] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert len(held) >= 2 and len(set(held)) == 1  # the tensors alive stay the same number
        if features == "backbone":
            assert len(encoded) == 2 * (len(ends) + 2)  # each window once a run, not three times
    assert peaks[10] < 1.1 * peaks[1] and max(asked) == 10_000
    with np.load(tmp_path / "out10" / "predictions.npz") as found:
        assert found["prediction"].shape == (len(ends), *SENSOR) and found["prediction"].dtype == np.uint8
        assert found["t_us"].tolist() == list(ends) and 70 < len(ends) < 80
        assert found["classes"].tolist() == list(CLASSES)
    assert len(list((tmp_path / "out10").glob("*.png"))) == len(ends)


def test_the_canvas_is_brought_back_to_the_sensor():
    maps = torch.arange(2 * 6 * 8, dtype=torch.float32).view(2, 6, 8)
    inside = on_sensor(maps, (9, 4), "pad")  # rows: 1 above and 2 below are missing; columns: 2 of each side are cut
    assert torch.equal(inside[:, 1:7], maps[:, :, 2:6])
    assert inside[:, [0, 7, 8]].isnan().all() and not inside[:, 1:7].isnan().any()
    assert torch.equal(on_sensor(maps, (6, 8), "resize"), maps)
    up = on_sensor(maps, (12, 16), "resize")
    assert torch.equal(up[:, 0, 0], maps[:, 0, 0]) and torch.allclose(up.mean((1, 2)), maps.mean((1, 2)))
    # Where an event lands is where its prediction comes from.
    for canvas, sensor in (((7, 9), (4, 12)), ((5, 5), (5, 5)), ((3, 20), (8, 9))):
        rows, columns = (table.ravel() for table in np.indices(sensor))
        events = Events.from_arrays(np.arange(len(rows)), columns, rows, rows % 2, height=sensor[0], width=sensor[1])
        (moved,), _ = augment.fit(sensor, canvas, "pad").apply_events([events], np.array([[0, len(rows)]]))
        places = torch.arange(canvas[0] * canvas[1], dtype=torch.float32).view(1, *canvas)
        back = on_sensor(places, sensor, "pad")[0]
        known = back[~back.isnan()]
        assert known.tolist() == (moved.y.astype(int) * canvas[1] + moved.x).tolist()


def test_depth_is_in_metres_and_nan_beyond_the_canvas():
    model = make(kind="depth", canvas=(20, 50))
    (one, *_) = predictions(model, recording(), ends_of(recording(), model.input_settings))
    assert one.values.dtype == np.float32 and np.isnan(one.values[:5]).all() and np.isnan(one.values[25:]).all()
    y = 1 / (1 + np.exp(-one.output[0, 0, :, 3:47].double().numpy()))
    assert np.allclose(one.values[5:25], 80 * np.exp(-3.70378 * (1 - y)), rtol=1e-5)
    assert on_sensor(torch.zeros(1, 20, 50), SENSOR, "pad")[0, 5:25].eq(0).all()


def test_predictions_are_whole_or_not_there(tmp_path, monkeypatch):
    model, source = make(), recording()
    assert predict_recording(model, source, tmp_path / "a", npz=True, progress=False) == 7
    assert len(list((tmp_path / "a").iterdir())) == 8
    assert predict_recording(model, source, tmp_path / "a", stop_us=40_000, progress=False) == 2
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["000000.png", "000001.png"]
    predict_recording(model, source, tmp_path / "a.gif", npz=True, progress=False, fps=10)
    with Image.open(tmp_path / "a.gif") as film, np.load(tmp_path / "a.npz") as maps:
        assert film.info["duration"] == 100 and len(maps["t_us"]) == 7
        expected = [one.values for one in predictions(model, source, ends_of(source, model.input_settings))]
        assert np.array_equal(maps["prediction"], expected)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    drawn = []

    def fails(*given):
        drawn.append(1)
        if len(drawn) > 2:
            raise ValueError("broken")
        return values_of(*given)

    monkeypatch.setattr("downstream.dense.streaming.values_of", fails)
    films = ("b.mp4",) if find_spec("cv2") else ()  # the video extra
    for out in ("a", "a.gif", "b", "b.gif", *films):
        drawn.clear()
        with pytest.raises(ValueError, match="broken"):
            predict_recording(model, source, tmp_path / out, npz=True, progress=False)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="notes.txt"):
        predict_recording(model, source, tmp_path / "a", progress=False)
    with pytest.raises(ValueError, match="without suffix"):
        predict_recording(model, source, tmp_path / "a.avi", progress=False)
    with pytest.raises(FileNotFoundError, match="no/such"):
        predict_recording(model, source, tmp_path / "no" / "such", progress=False)


def test_maps_are_an_npz_as_numpys_own(tmp_path):
    rng = np.random.default_rng(0)
    maps = rng.random((5, 3, 4)).astype(np.float32)
    with map_writer(tmp_path / "a.npz", 5, {"key": np.array(["x", "y"])}) as writer:
        for number, one in enumerate(maps):
            writer.add(one, 2**40 + number)
    with np.load(tmp_path / "a.npz") as found:
        assert np.array_equal(found["prediction"], maps) and found["key"].tolist() == ["x", "y"]
        assert found["t_us"].tolist() == [2**40 + number for number in range(5)]


@pytest.mark.parametrize("canvas, fit", [((66, 85), "pad"), ((65, 87), "resize")])
def test_labelled_samples_are_predicted_and_scored_as_in_evaluation(tmp_path, monkeypatch, canvas, fit):
    write_ddd17(tmp_path / "set", dirs=(1,))
    model = make(canvas=canvas, fit=fit, window_us=40_000, windows=2)
    listing = list_recordings("ddd17", tmp_path / "set", "test")
    pages = []
    monkeypatch.setattr(
        predicting.Sheet, "draw", lambda sheet, *given: pages.append(given) or np.zeros((9, 9, 3), "u1")
    )
    found = predict_data(model, listing, tmp_path / "out", npz=True, progress=False)
    samples = Recordings(listing, data_of(model), paired=False, targets=True)
    right, total = 0, 0
    with np.load(tmp_path / "out" / "predictions.npz") as archive:
        maps = archive["prediction"]
    assert len(samples) == len(maps) == found["samples"] == len(pages) >= 2 and maps.shape[1:] == DAVIS
    for index, values in enumerate(maps):
        batch = collate([samples.sample(index, None)])
        with torch.no_grad():
            output = model(batch)
        assert np.array_equal(values, values_of(model, output, DAVIS))
        truth, guess = batch["mask"][0].numpy(), output[0].argmax(dim=0).numpy()
        right, total = right + (guess == truth)[truth != 255].sum(), total + (truth != 255).sum()
        own = 100 * (guess == truth)[truth != 255].mean()
        panels, key, text = pages[index]
        assert key == samples.listing.keys[index] and text.endswith(f"accuracy {own:.1f} %")
        # The truth is shown in the sensor's view: 200 labelled rows, dark grey below.
        assert (panels[2][200:] == 64).all() and len(np.unique(panels[2][:200].reshape(-1, 3), axis=0)) == 1
    assert found["acc"] == pytest.approx(100 * right / total)


def test_depth_of_a_labelled_set(tmp_path):
    write_mvsec(tmp_path / "set", ("outdoor_day1",))
    model = make(kind="depth", canvas=(65, 87), fit="resize", window_us=40_000, windows=2)
    listing = list_recordings("mvsec", tmp_path / "set", "test")
    found = predict_data(model, listing, tmp_path / "a.gif", progress=False)
    samples, errors = Recordings(listing, data_of(model), paired=False, targets=True), []
    for index in range(len(samples)):
        batch = collate([samples.sample(index, None)])
        with torch.no_grad():
            y = 1 / (1 + np.exp(-model(batch)[0, 0].double().numpy()))
        truth = batch["depth"][0].double().numpy()
        known = truth > 0
        errors.append((np.abs(80 * np.exp(-3.70378 * (1 - y)) - truth)[known] / truth[known]).mean())
    assert found["abs_rel"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert found["samples"] == len(samples) == 4 and found["cutoff_m"] == 80
    with Image.open(tmp_path / "a.gif") as film:
        assert film.size[0] > 3 * 346
    with pytest.raises(ValueError, match="has no mask"):
        predict_data(make(), listing, tmp_path / "b.gif")


def test_the_command_line(tmp_path, capsys):
    model = make(window_us=40_000, canvas=(65, 87), fit="resize")
    model.save_pretrained(tmp_path / "model")
    write_arrow(tmp_path / "a.arrow", random_events(0, 4000, 300_000, 50, 60))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cli.main(["predict", str(tmp_path / "model"), str(tmp_path / "a.arrow"), "-o", str(tmp_path / "out"),
                  "--start-ms", "100", "--stop-ms", "250", "--step-ms", "50", "--npz"])  # fmt: skip
    assert "3 predictions" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "000000.png", "000001.png", "000002.png", "predictions.npz",
    ]  # fmt: skip
    write_ddd17(tmp_path / "set", dirs=(1,))
    common = ["predict", str(tmp_path / "model"), str(tmp_path / "set"), "-o", str(tmp_path / "set.gif")]
    cli.main([*common, "--data", "ddd17", "rows=labelled", "--fps", "5"])
    out = capsys.readouterr().out
    assert "ddd17 test: 3 samples" in out and '"miou"' in out and "top 200 rows" in out
    for wrong, message in (
        (["--data", "ddd17", "--step-ms", "5"], "no effect with --data"),
        (["rows=labelled"], "no effect on a recording"),
        (["--data", "ddd17", "row=labelled"], "row"),
        (["--data", "nothing"], "nothing"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*common, *wrong])
        assert stopped.value.code == 2 and message in capsys.readouterr().err
