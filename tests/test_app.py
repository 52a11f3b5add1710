"""The page's recordings and views, without a browser or a server."""

from __future__ import annotations

import base64
import io
import itertools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from downstream.dense.pictures import viridis
from gep.app import models, recording, views
from gep.app.encoder_views import EncoderViews, PrincipalColours, signed
from gep.app.images import Images, read_images
from gep.app.recording import Library, Recording, Shown, read_recording, sensor_size
from gep.app.sample import small_scene
from gep.events.io import write_events
from gep.events.render import pictures
from gep.events.types import EventBatch, EventFormatError, Events
from tests import hub_models
from tests.clip_models import aligned, tiny_clip

MS = 1000


@pytest.fixture(scope="module")
def scene() -> Recording:
    return Recording("Small scene", small_scene())


def decoded(text: str) -> list[np.ndarray]:
    """The pictures in a piece of HTML."""
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in found]


def events_of(rows: list[tuple[int, int, int, int]], height: int = 4, width: int = 5) -> Events:
    t, x, y, p = np.array(rows).T
    return Events.from_arrays(t, x, y, p, height=height, width=width)


def test_the_built_in_recording_is_the_same_each_time_and_long_enough_to_play(scene):
    again = small_scene()
    assert all(np.array_equal(getattr(again, name), getattr(scene.events, name)) for name in "txyp")
    assert 20_000 < len(again) < 100_000 and 1.1e6 < again.duration_us < 1.3e6
    assert scene.window_ms() == 50  # 1.2 s in about 25


def test_windows_adjoin_and_hold_every_event_once(scene):
    for length in (40 * MS, 7 * MS, 5_000 * MS):
        bounds = [scene.bounds(index, length) for index in range(scene.count(length))]
        assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
        assert bounds[-1][0] < scene.span[1] <= bounds[-1][1]
        assert sum(len(scene.between(*each)) for each in bounds) == len(scene.events)
    shown = Shown(scene, *scene.bounds(2, 40 * MS))
    begin = scene.span[0]
    assert (shown.past(2) - begin).tolist() == [[40_000, 80_000], [80_000, 120_000]]
    assert len(shown.past(9)) == 3  # there are no more
    assert (shown.past(9, 50 * MS) - begin).tolist() == [[-30_000, 20_000], [20_000, 70_000], [70_000, 120_000]]


def test_rates_and_counts_are_those_of_a_plain_loop(scene):
    begin, end = scene.span
    expected, pixels = np.zeros((2, recording.BINS), int), np.zeros((48, 48), int)
    for t, x, y, p in zip(*(getattr(scene.events, name).tolist() for name in "txyp")):
        expected[p, (t - begin) * recording.BINS // (end - begin)] += 1
        pixels[y, x] += 1
    assert np.array_equal(scene.rates, expected) and np.array_equal(scene.counts, pixels)


def test_the_player_shows_the_windows_own_events(scene):
    t0, t1 = scene.bounds(7, 40 * MS)
    inside = (scene.events.t >= t0) & (scene.events.t < t1)
    rows = np.stack([getattr(scene.events, name)[inside] for name in "txyp"], axis=1)
    own = events_of(rows.tolist(), 48, 48)
    text = views.player(Shown(scene, t0, t1))
    assert np.array_equal(decoded(text)[0], pictures(EventBatch.from_windows([own], np.array([[t0, t1]])))[0])
    assert f"ON {np.count_nonzero(own.p):,}" in text and "0.280 to 0.320 s" in text


def test_a_hot_pixel_is_found_and_an_empty_window_drawn():
    rows = [(10 * i, i % 5, i // 5 % 4, i % 2) for i in range(20)] + [(1000 + i, 3, 2, 1) for i in range(40)]
    noisy = Recording("a <b>", events_of(rows))
    text = views.pixels(Shown(noisy, 0, 100))
    assert "<dt>Hot pixels</dt><dd>1</dd>" in text and "(3, 2): 41" in text
    for view in views.EVENT_VIEWS:
        assert "<figure" in view.draw(Shown(noisy, 500, 900))
    assert "41.7 %" not in views.statistics(noisy) and "83.3 %" in views.statistics(noisy)  # 50 of 60


def test_the_time_surface_is_the_age_of_the_last_event():
    text = views.surface(Shown(Recording("a", events_of([(0, 1, 2, 1), (60, 4, 0, 0), (99, 0, 0, 1)])), 0, 100))
    expected = np.zeros((4, 5))
    for t, x, y in ((0, 1, 2), (60, 4, 0), (99, 0, 0)):
        expected[y, x] = np.exp(-(100 - t) / 50)
    assert np.abs(decoded(text)[0].astype(int) - viridis(expected)).max() <= 4


def test_bad_files_are_told_by_name_without_their_place(tmp_path):
    (tmp_path / "empty.raw").touch()
    (tmp_path / "notes.pdf").write_bytes(b"%PDF-1.7 nothing of events")
    np.savez(tmp_path / "none.npz", t=np.zeros(0, int), x=np.zeros(0, int), y=np.zeros(0, int), p=np.zeros(0, int))
    for name, what in (("empty.raw", "empty"), ("notes.pdf", "unknown event format"), ("none.npz", "no events")):
        with pytest.raises(EventFormatError, match=what) as raised:
            read_recording(tmp_path / name, height=4, width=5)
        assert name in str(raised.value) and str(tmp_path) not in str(raised.value)


def test_an_archive_is_judged_before_it_is_unpacked(tmp_path, monkeypatch):
    t = np.zeros(100_000, np.int64)
    np.savez_compressed(tmp_path / "bomb.npz", t=t, x=t, y=t, p=t)
    assert len(read_recording(tmp_path / "bomb.npz", height=4, width=5).events) == len(t)
    monkeypatch.setattr(recording, "MOST_UNPACKED", 3_000_000)
    monkeypatch.setattr(recording, "open_events", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(EventFormatError, match=r"^bomb.npz: unpacks to 0.0 GB"):
        read_recording(tmp_path / "bomb.npz", height=4, width=5)


def test_a_sensors_size_is_columns_by_rows():
    for text in ("640 × 480", "640x480", " 640,480 ", "640 * 480", "640 480"):
        assert sensor_size(text) == (480, 640), text
    assert sensor_size("") == sensor_size("  ") == (None, None)
    for text in ("640", "a × b", "640 × 480 × 3", "-1 × 3"):
        with pytest.raises(ValueError, match="columns × rows"):
            sensor_size(text)


def test_of_a_long_recording_the_first_events_are_shown(tmp_path, scene, monkeypatch):
    write_events(tmp_path / "a.arrow", scene.events)
    assert len(read_recording(tmp_path / "a.arrow").events) == len(scene.events)
    monkeypatch.setattr(recording, "MOST_EVENTS", 1000)
    cut = read_recording(tmp_path / "a.arrow")
    assert np.array_equal(cut.events.t, scene.events.t[:1000])
    assert f"first 1,000 of {len(scene.events):,}" in views.statistics(cut)


def test_dropped_recordings_are_few_and_forgotten(scene):
    library = Library({"Scene": lambda: scene})
    keys = [library.add(Recording(str(i), scene.events)) for i in range(9)]
    assert len(set(keys)) == 9 and min(map(len, keys)) > 20
    with pytest.raises(KeyError):
        library.get(keys[0])
    assert library.get(keys[1]).name == "1"
    library.add(scene)  # the one looked at for longest goes, which is no longer the second
    assert library.get(keys[1]).name == "1"
    library.drop(keys[1])
    library.drop("Scene")
    with pytest.raises(KeyError):
        library.get(keys[1])
    assert library.get("Scene") is scene


def test_principal_colours_are_those_of_the_demos_pictures():
    figures = pytest.importorskip("gep.demo.figures", reason="matplotlib is not installed")
    tokens = np.random.default_rng(0).normal(size=(6, 9, 16)) * np.arange(1, 17)
    expected = figures.principal_colours({"a": tokens}, "a")["a"]
    own = PrincipalColours.of(tokens.reshape(-1, 16))
    assert np.abs(own(tokens) - expected).max() < 1e-9
    assert np.array_equal(own(tokens[2]), own(tokens)[2])  # a window's colours do not depend on the others shown
    assert np.isfinite(PrincipalColours.of(np.ones((2, 16)))(tokens)).all()


def test_tokens_have_colours_where_the_model_reads(scene):
    model = hub_models.gep()
    shown = Shown(scene, *scene.bounds(9, 50 * MS))
    (picture,) = decoded(EncoderViews(model).tokens(shown))
    assert picture.shape == (48, 48, 3)
    assert (picture[:6] == 222).all() and (picture[:, -6:] == 222).all()  # 36 of 48 pixels, in the middle
    bounds = np.array([scene.bounds(index, 50 * MS) for index in range(scene.count(50 * MS))])
    tokens = np.concatenate([model.encode(scene.between(*b), b[None]).tokens[0, 0].numpy() for b in bounds])
    expected = PrincipalColours.of(tokens)(tokens.reshape(len(bounds), -1, tokens.shape[-1])[9])
    rows, columns = model.encoder.grid(36, 36)
    grid = picture[6:-6, 6:-6].reshape(rows, 36 // rows, columns, 36 // columns, 3)
    assert (grid == grid[:, :1, :, :1]).all()
    assert np.abs(grid[:, 0, :, 0].reshape(-1, 3) / 255 - expected).max() < 0.01


def test_an_empty_window_has_no_tokens():
    gap = Recording("gap", events_of([(0, 1, 1, 1), (500_000, 2, 2, 0)], 36, 36))
    for view in EncoderViews(hub_models.gep()).views():
        assert "No events in this window" in view.draw(Shown(gap, 200_000, 250_000))
        assert "<figure" in view.draw(Shown(gap, 0, 250_000)) or view.title == "Similar windows"


def test_similar_windows_are_others_nearest_first(scene):
    model = hub_models.gep()
    shown = Shown(scene, *scene.bounds(4, 50 * MS))
    text = EncoderViews(model).similar(shown)
    bounds = [scene.bounds(index, 50 * MS) for index in range(scene.count(50 * MS))]
    vectors = torch.cat([model.encode(scene.between(*b), np.array([b])).pooled[0] for b in bounds])
    vectors = F.normalize(vectors - vectors.mean(dim=0), dim=-1)
    cosines = vectors @ vectors[4]
    cosines[4] = -2
    best = cosines.argsort(descending=True)[:6].tolist()
    assert re.findall(r"<figcaption>(\d\.\d+) s, cosine", text) == [f"{0.05 * index:.3f}" for index in best]


def test_the_nearest_image_is_the_one_with_the_windows_features(scene):
    model = hub_models.gep()
    bounds = [scene.bounds(index, 50 * MS) for index in range(scene.count(50 * MS))]
    vectors = torch.cat([model.encode(scene.between(*b), np.array([b])).pooled[0] for b in bounds])
    thumbnails = [np.full((4, 4, 3), index, np.uint8) for index in range(len(bounds))]
    images = Images([f"picture {index}" for index in range(len(bounds))], thumbnails, vectors, "a model")
    found = EncoderViews(model, images)
    assert "Nearest images" in [view.title for view in found.views()]
    for index in (0, 11):
        assert decoded(found.nearest(Shown(scene, *bounds[index])))[0][0, 0, 0] == index


def test_images_are_read_from_a_folder(tmp_path):
    model = hub_models.MODELS["image"]()
    model.save_pretrained(tmp_path / "teacher")
    teacher = models.FrozenVFM.from_spec(f"export:{tmp_path / 'teacher'}")
    with pytest.raises(FileNotFoundError, match="no images"):
        read_images(tmp_path / "teacher", teacher, (36, 36), width=96)
    (tmp_path / "images").mkdir()
    grey = np.random.default_rng(0).integers(0, 255, (300, 200, 3), np.uint8)
    Image.fromarray(grey).save(tmp_path / "images" / "a.png")
    images = read_images(tmp_path / "images", teacher, (36, 36), width=teacher.pooled_dim)
    assert images.names == ["a"] and images.thumbnails[0].shape == (128, 85, 3) and images.teacher != teacher.spec
    with pytest.raises(ValueError, match="--teacher"):
        read_images(tmp_path / "images", teacher, (36, 36), width=7)


def test_words_are_ordered_by_their_cosines(scene, monkeypatch):
    model = hub_models.gep()
    model.teacher = "open_clip:ViT-B-32/openai"
    shown = Shown(scene, *scene.bounds(3, 50 * MS), words="a cat, a <dog>,, a car")
    pooled = model.encode(scene.between(shown.t0, shown.t1), np.array([[shown.t0, shown.t1]])).pooled[0, 0]
    own, other = F.normalize(pooled, dim=0), torch.randn(len(pooled), generator=torch.Generator().manual_seed(0))
    across = F.normalize(other - (other @ own) * own, dim=0)
    vectors = torch.stack([0.6 * own + 0.8 * across, own, 0.28 * own + 0.96 * across])
    monkeypatch.setattr(type(model), "word_vectors", lambda self, words: vectors[: len(words)])
    found = EncoderViews(model)
    assert [view.title for view in found.views() if view.asks] == ["Words"]
    text = found.words(shown)
    assert re.findall(r"<span>(.*?)</span>", text) == ["a &lt;dog&gt;", "a cat", "a car"]
    assert re.findall(r"<em>(.*?)</em>", text) == ["1.000", "0.600", "0.280"]
    assert "Type some" in found.words(Shown(scene, shown.t0, shown.t1))


def test_words_are_those_of_zero_shot(tmp_path, scene):
    file, _ = tiny_clip(tmp_path)
    model = aligned(file, tmp_path / "model", windows=1)
    names = ["a cat", "a photo of a dog", "a paper plane"]
    shown = Shown(scene, *scene.bounds(9, 50 * MS), words=", ".join(names))
    (cosines,) = model.zero_shot(shown.events, names, file=file).tolist()
    (view,) = (each for each in EncoderViews(model).views() if each.asks)
    found = dict(zip(*(re.findall(f"<{tag}>(.*?)</{tag}>", view.draw(shown)) for tag in ("span", "em"))))
    assert found == {name: f"{cosine:.3f}" for name, cosine in zip(names, cosines)} and len(set(found.values())) == 3
    assert list(found) == sorted(names, key=lambda name: float(found[name]), reverse=True)


def test_dense_and_evrep_views_are_what_the_models_say(scene):
    shown = Shown(scene, *scene.bounds(6, 50 * MS))
    dense = hub_models.dense()
    drawn = models.dense_view(dense).draw(shown)
    own = scene.between(shown.t0, shown.t1)
    output = next(models.predictions(dense, scene.source, range(shown.t1, shown.t1 + 1)))
    (picture,) = decoded(drawn)
    colours = models.legend_of(dense).picture(output.values)
    quiet = np.ones((48, 48), bool)
    quiet[own.y, own.x] = False
    assert np.array_equal(picture[quiet], colours[quiet]) and np.array_equal(picture[~quiet], colours[~quiet] // 2)
    read = output.values[6:-6, 6:-6]  # shares are of what the model reads, and what it does not is named
    expected = [f"{name} {100 * np.mean(read == i):.0f} %" for i, name in enumerate("abc") if (read == i).any()]
    assert re.findall("</i>(.*?)</li>", drawn) == [*expected, "beyond what the model reads"]
    evrep = hub_models.evrep()
    (picture,) = decoded(models.evrep_view(evrep).draw(shown))
    expected = evrep.from_events(own, np.array([[shown.t0, shown.t1]]))[0].permute(1, 2, 0).numpy()
    assert np.abs(picture[6:-6, 6:-6] / 255 - expected).max() < 0.003 and (picture[:6] == 222).all()


def test_models_are_loaded_by_kind_and_told_apart(tmp_path, scene):
    for name in ("gep", "dense", "evrep", "classifier", "image"):
        hub_models.MODELS[name]().save_pretrained(tmp_path / name / "export")
    names = [str(tmp_path / name / "export") for name in ("gep", "dense", "evrep", "dense", "classifier")]
    loaded = models.load(names)
    assert [view.title for view in loaded.views] == [
        "Tokens", "Input", "Similar windows", "Segmentation · dense", "LLM-EvRep", "Segmentation · dense (2)",
        "Recognition",
    ]  # fmt: skip
    assert loaded.window_us == 50 * MS and loaded.rows == 36
    for view in loaded.views:
        assert "<figure" in view.draw(Shown(scene, *scene.bounds(6, 50 * MS)))
    with pytest.raises(ValueError, match="kind 'vfm'"):
        models.load([str(tmp_path / "image" / "export")])
    with pytest.raises(ValueError, match="needs an encoder"):
        models.load(names[1:], images=tmp_path)
    with pytest.raises(ValueError, match="--teacher"):
        models.load(names, images=tmp_path)


def test_signed_channels_are_white_at_zero():
    drawn = signed(np.array([[0.0, 2.0], [-1.0, 1.0]]))
    assert drawn[0, 0].tolist() == [255] * 3 and drawn[0, 1].tolist() == [255, 0, 0]
    assert drawn[1, 0, 2] == 255 and drawn[1, 0, 0] == drawn[1, 0, 1] and 120 < drawn[1, 0, 0] < 136
