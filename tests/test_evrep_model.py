"""EvRep: the same bits after loading, the same image by every way of reading a recording, drawn by `gep render`."""

import json

import numpy as np
import pytest
import torch
from layouts import random_events, write_dat
from PIL import Image
from safetensors.torch import load_file, save_file

from downstream.llm_evrep.generator import build_generator
from downstream.llm_evrep.gep_init import GEPGenerator
from downstream.llm_evrep.model import EvRep
from downstream.llm_evrep.render import draw_film, draw_strip
from gep import cli, export
from gep.data.paired import collate
from gep.events.frames import PerSource
from gep.events.io import open_events
from gep.events.represent import EventImage, Histogram, Tencode
from gep.events.types import EventBatch, Events
from gep.models import EventEncoder

INPUT = {"height": 36, "width": 36, "fit": "pad", "windows": 2, "window_us": 0, "num_events": 0, "rectified": False}


def make(kind: str = "unet", represent=None, **settings) -> EvRep:
    torch.manual_seed(0)
    settings, represent = INPUT | settings, represent or Tencode()
    channels = settings["windows"] * represent.channels
    generator = build_generator("nano", in_chans=channels)
    if kind == "gep":
        generator = GEPGenerator(
            EventEncoder("nano", represent.channels, (36, 36), mean=[9.0] * represent.channels),
            windows=settings["windows"],
            widths=(8, 16, 24),
            frame_scale=255.0,
        )
    # Far from grey, so that pictures differ.
    torch.nn.init.normal_(generator.to_image.conv.weight, std=1.0)
    return EvRep(represent, generator, input_settings=settings, reader="tagger:none").eval()


def sample(number: int, events: Events) -> dict:
    middle = (int(events.t[0]) + int(events.t[-1]) + 1) // 2
    bounds = np.array([[events.t[0], middle], [middle, events.t[-1] + 1]], np.int64)
    cut = int(np.searchsorted(events.t, middle))
    return {"key": str(number), "events": [events[:cut], events[cut:]], "t_us": bounds, "label": 0}


def test_frames_are_the_windows_side_by_side_and_tencode_in_unit_range():
    recordings = [random_events(seed, 400, 100_000, 36, 36) for seed in (0, 1)]
    batch = collate([sample(number, events) for number, events in enumerate(recordings)])
    frames = make().frames(batch)
    assert frames.shape == (2, 6, 36, 36) and frames.dtype == torch.float32
    for row, events in enumerate(recordings):
        bounds = sample(0, events)["t_us"]
        expected = np.zeros((2, 3, 36, 36))
        for t, x, y, p in zip(events.t.tolist(), events.x, events.y, events.p):
            window = int(t >= bounds[1, 0])
            t0, t1 = bounds[window].tolist()
            green = 255 * (t1 - t) // (t1 - t0)
            expected[window, :, y, x] = np.array([255, green, 0] if p else [0, green, 255]) / 255
        assert np.allclose(frames[row].numpy(), expected.reshape(6, 36, 36), atol=1e-6)
    histogram = make(represent=Histogram()).frames(batch)
    assert histogram.shape == (2, 4, 36, 36) and histogram.sum() == 800  # counts stay as they are


@pytest.mark.parametrize("kind", ["unet", "gep"])
def test_a_loaded_export_gives_the_same_bits(tmp_path, kind):
    model = make(kind)
    folder = model.save_pretrained(tmp_path / "export", metrics={"jaccard": float("nan")}, data={"name": "nmnist"})
    loaded = EvRep.from_pretrained(folder)
    frames = torch.rand(2, 6, 33, 40, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model.images(frames), loaded.images(frames))
    assert not loaded.training and loaded.reader == "tagger:none"
    assert loaded.config == model.config == json.loads(json.dumps(model.config))
    written = json.loads((folder / "config.json").read_text())
    assert written["kind"] == "llm_evrep" and written["metrics"] == {"jaccard": None}
    assert written["input"] == INPUT and written["generator"] == model.generator.config
    assert "EvRep.from_pretrained" in (folder / "README.md").read_text()


def test_a_damaged_export_is_refused(tmp_path, monkeypatch):
    folder = make().save_pretrained(tmp_path / "export")
    state, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    save_file({key: value for key, value in state.items() if "stem.0" not in key}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: generator\.stem\.0\.weight"):
        EvRep.from_pretrained(folder)
    for change, word in (
        ({"kind": "dense"}, "'dense'"),
        ({"generator": {"name": "vae"}}, "unet, gep"),
        ({"generator": {"name": "unet", "in_chans": 6}}, "does not describe an EvRep"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=word):
            EvRep.from_pretrained(folder)
    whole = make().save_pretrained(tmp_path / "whole")
    asked = []
    monkeypatch.setattr(export, "snapshot_download", lambda name, **rest: asked.append((name, rest)) or str(whole))
    assert EvRep.from_pretrained("someone/evrep", revision="v1").input_settings == INPUT
    assert asked[0][0] == "someone/evrep" and asked[0][1]["revision"] == "v1"


def test_what_does_not_fit_is_named():
    generator = build_generator("nano", in_chans=3)
    with pytest.raises(ValueError, match="in_chans=6"):
        EvRep(Tencode(), generator, input_settings=INPUT)
    with pytest.raises(ValueError, match="fit"):
        EvRep(Tencode(), generator, input_settings={key: value for key, value in INPUT.items() if key != "fit"})


def test_of_a_mix_the_first_representation_is_exported(tmp_path):
    mixed = PerSource((EventImage(percentile=90), EventImage(percentile=50)))
    folder = make(represent=mixed).save_pretrained(tmp_path / "export")
    assert EvRep.from_pretrained(folder).represent == EventImage(percentile=90)


def test_a_plain_recording_gives_the_image_of_its_batch():
    model = make().train()
    recordings = [random_events(seed, 400, 100_000, 36, 36) for seed in (0, 1)]
    images = model.from_events(recordings)
    assert images.shape == (2, 3, 36, 36) and not images.requires_grad and model.training
    assert images.std() > 0.05 and 0 <= images.min() and images.max() <= 1
    batch = collate([sample(number, events) for number, events in enumerate(recordings)])
    assert torch.equal(images, model(batch).detach())
    assert torch.equal(model.from_events(recordings[0]), model.from_events(recordings[:1]))
    bounds = np.array([[0, 20_000], [50_000, 60_000]])
    windows = [recordings[0][slice(*np.searchsorted(recordings[0].t, edges))] for edges in bounds]
    expected = model.from_events(EventBatch.from_windows(windows, bounds))
    assert torch.equal(model.from_events(recordings[0], bounds), expected)


def recording(folder, height: int = 36, width: int = 36, count: int = 4000, duration_us: int = 200_000) -> Events:
    events = random_events(3, count, duration_us, height, width)
    write_dat(folder / "a.dat", events)
    return events


def lower_panel(picture: Image.Image, height: int, number: int = 0, width: int = 36) -> np.ndarray:
    """The image below the events of column `number`, a pixel of the sensor once."""
    zoom = -(-160 // max(height, width))
    left = number * (width * zoom + 4)
    return np.asarray(picture)[height * zoom + 4 :: zoom, left : left + width * zoom : zoom]


def as_bytes(images: torch.Tensor) -> np.ndarray:
    return (255 * images[0]).round().byte().permute(1, 2, 0).numpy()


def test_a_strip_shows_the_models_images(tmp_path):
    events = recording(tmp_path)
    with open_events(tmp_path / "a.dat", height=36, width=36) as source:
        # A model of parts: the whole recording, as in training.
        model = make()
        assert np.array_equal(lower_panel(draw_strip(model, source), 36), as_bytes(model.from_events(events)))
        begin, stop = source.span
        middle = (begin + stop) // 2
        second = events[int(np.searchsorted(events.t, middle)) :]
        quarters = np.array([middle, (middle + stop) // 2, stop])
        picture = draw_strip(model, source, windows=2)
        expected = model.from_events(second, np.stack([quarters[:-1], quarters[1:]], axis=1))
        assert np.array_equal(lower_panel(picture, 36, 1), as_bytes(expected))
        # One of windows with a length: the last two of them before the end of each part.
        model = make(window_us=10_000)
        picture = draw_strip(model, source, windows=3)
        end = begin + 2 * (stop - begin) // 3
        bounds = np.array([[end - 20_000, end - 10_000], [end - 10_000, end]])
        assert np.array_equal(lower_panel(picture, 36, 1), as_bytes(model.from_events(events, bounds)))
        assert draw_strip(model, source).width == 6 * (36 * 5 + 4) - 4
        # One of a number of events: the last so many.
        model = make(num_events=500)
        expected = model.from_events(events[-500:])
        assert np.array_equal(lower_panel(draw_strip(model, source, windows=1), 36), as_bytes(expected))
        with pytest.raises(ValueError, match="windows=0"):
            draw_strip(model, source, windows=0)


def test_images_lie_where_their_events_do(tmp_path):
    events = recording(tmp_path, 40, 30)
    model = make()
    with open_events(tmp_path / "a.dat", height=40, width=30) as source:
        panel = lower_panel(draw_strip(model, source), 40, width=30)
    assert (panel[:2] == 222).all() and (panel[38:] == 222).all()  # beyond the canvas
    assert np.array_equal(panel[2:38], as_bytes(model.from_events(events))[:, 3:33])


def test_films_and_the_command(tmp_path, capsys):
    recording(tmp_path, count=2000)
    exports = {"parts": make(), "length": make(window_us=20_000, windows=1)}
    for name, model in exports.items():
        model.save_pretrained(tmp_path / name)
    common = ["render", str(tmp_path / "a.dat"), "--height", "36", "--width", "36"]
    beside = [*common, "--with", "llm_evrep", "--model"]
    out = tmp_path / "a.png"
    cli.main([*beside, str(tmp_path / "length"), "-o", str(out), "--windows", "2"])
    assert Image.open(out).size == (2 * 180 + 4, 2 * 180 + 4)
    film = tmp_path / "a.gif"
    cli.main([*beside, str(tmp_path / "length"), "-o", str(film), "--fps", "20"])
    with Image.open(film) as frames:
        assert frames.n_frames == 4 and frames.size == (2 * 180 + 4, 180)
        frames.seek(3)
        shown = np.asarray(frames.convert("RGB"))[::5, 184::5].astype(int)
    with open_events(tmp_path / "a.dat", height=36, width=36) as source:
        begin, model = source.span[0], exports["length"]
        image = model.from_events(source.read(), np.array([[begin + 180_000, begin + 200_000]]))
    assert np.abs(shown - as_bytes(image)).max() < 50  # the palette of a GIF
    capsys.readouterr()
    for arguments, message in (
        ([*beside, str(tmp_path / "parts"), "-o", str(film)], "--window-ms"),
        ([*beside, str(tmp_path / "length"), "-o", str(film), "--window-ms", "5"], "no effect"),
        ([*common, "--with", "llm_evrep", "-o", str(out)], "--model"),
        ([*common, "--model", "x", "-o", str(out)], "--with llm_evrep"),
        ([*beside, str(tmp_path / "none"), "-o", str(out)], "no export"),
    ):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        assert message in capsys.readouterr().err
    with open_events(tmp_path / "a.dat", height=36, width=36) as source:
        frames = draw_film(exports["parts"], source, tmp_path / "b.gif", fps=10, window_us=50_000, progress=False)
    assert frames == 2
