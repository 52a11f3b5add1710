"""Plain image sources of LLM-EvRep: pictures computed by hand from lists of events."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from downstream.llm_evrep.generator import build_generator
from downstream.llm_evrep.model import EvRep
from downstream.llm_evrep.sources import build_source, split_spec
from downstream.llm_evrep.sources.windows import voxels, whole
from gep.data.config import DataConfig
from gep.data.images import ImagesConfig, StillImages
from gep.data.paired import collate
from gep.events.frames import Grouped
from gep.events.prepare import INPUT_KEYS
from gep.events.represent import Tencode
from gep.events.stills import StillBatch
from gep.events.types import EventBatch, Events

HEIGHT, WIDTH, T = 5, 7, 3


def make_sample(seed: int, num: int = 120) -> dict:
    """A sample of T windows of 100 µs from a seed-dependent time on, the middle one empty."""
    rng = np.random.default_rng(seed)
    start = 1000 * seed
    windows, bounds = [], []
    for number in range(T):
        begin = start + 100 * number
        count = 0 if number == 1 else num
        t = np.sort(rng.integers(begin, begin + 100, count))
        windows.append(
            Events.from_arrays(
                t,
                rng.integers(0, WIDTH, count),
                rng.integers(0, HEIGHT, count),
                rng.integers(0, 2, count),
                height=HEIGHT,
                width=WIDTH,
            )
        )
        bounds.append((begin, begin + 100))
    image = rng.integers(0, 256, (3, HEIGHT, WIDTH)).astype(np.uint8)
    return {"key": str(seed), "events": windows, "t_us": np.array(bounds), "label": seed, "image": image}


def joined(sample: dict) -> list[tuple[int, int, int, int]]:
    """(t, x, y, p) of all windows, in order."""
    return [event for window in sample["events"] for event in zip(window.t, window.x, window.y, window.p)]


@pytest.fixture
def samples() -> list[dict]:
    return [make_sample(1), make_sample(2, num=9)]


def images_of(spec: str, batch: dict) -> np.ndarray:
    source = build_source(spec, data=DataConfig(windows=T))
    images = source.images(batch)
    assert images.shape == (len(batch["key"]), 3, HEIGHT, WIDTH) and images.dtype == torch.float32
    assert not images.requires_grad and images.min() >= 0 and images.max() <= 1
    return images.double().numpy()


def test_tencode_takes_the_whole_span(samples: list[dict]) -> None:
    got = images_of("tencode", collate(samples))
    for row, sample in enumerate(samples):
        expected = np.zeros((3, HEIGHT, WIDTH))
        begin, end = sample["t_us"][0, 0], sample["t_us"][-1, 1]
        for t, x, y, p in joined(sample):  # the last of a pixel stays
            green = 255 * (end - t) // (end - begin)
            expected[:, y, x] = np.array([255 * p, green, 255 * (1 - p)]) / 255
        np.testing.assert_allclose(got[row], expected, atol=1e-6)


def test_histogram_is_counts_over_their_99th_percentile(samples: list[dict]) -> None:
    got = images_of("histogram", collate(samples))
    for row, sample in enumerate(samples):
        counts = np.zeros((HEIGHT, WIDTH))
        for _, x, y, _ in joined(sample):
            counts[y, x] += 1
        expected = np.minimum(counts / np.percentile(counts[counts > 0], 99), 1)
        np.testing.assert_allclose(got[row], np.broadcast_to(expected, (3, HEIGHT, WIDTH)), atol=1e-6)
    assert 0 < got[0].max() == 1


def test_voxel_preview_is_three_instants(samples: list[dict]) -> None:
    got = images_of("voxel", collate(samples))
    for row, sample in enumerate(samples):
        grid = np.zeros((3, HEIGHT, WIDTH))
        begin, end = sample["t_us"][0, 0], sample["t_us"][-1, 1]
        for t, x, y, p in joined(sample):
            place = 2 * (t - begin) / (end - begin)
            for instant in range(3):
                grid[instant, y, x] += (1 if p else -1) * max(0.0, 1 - abs(instant - place))
        top = np.percentile(np.abs(grid[np.abs(grid) > 1e-9]), 99)
        np.testing.assert_allclose(got[row], 0.5 + 0.5 * np.clip(grid / top, -1, 1), atol=1e-5)


def test_event_image_paints_the_polarity_with_more_events(samples: list[dict]) -> None:
    got = images_of("event_image", collate(samples))
    for row, sample in enumerate(samples):
        counts = np.zeros((2, HEIGHT, WIDTH))
        for _, x, y, p in joined(sample):
            counts[p, y, x] += 1
        tops = [np.percentile(own[own > 0], 99) if own.any() else 1 for own in counts]
        ink = [np.minimum(own, top) / top for own, top in zip(counts, tops)]
        on = counts[1] >= counts[0]
        expected = 1 - np.stack([np.where(on, 0, ink[0]), np.where(on, ink[1], ink[0]), np.where(on, ink[1], 0)])
        np.testing.assert_allclose(got[row], expected, atol=1e-6)


def test_a_sample_without_events_is_blank() -> None:
    sample = make_sample(3)
    sample["events"] = [Events.empty(HEIGHT, WIDTH)] * T
    batch = collate([sample, make_sample(4)])
    for spec, blank in (("tencode", 0), ("histogram", 0), ("voxel", 0.5), ("event_image", 1)):
        assert (images_of(spec, batch)[0] == blank).all()
    assert (voxels(batch)[0] == 0).all()


def test_rgb_is_the_recorded_image(samples: list[dict]) -> None:
    batch = collate(samples)
    source = build_source("rgb", data=DataConfig())
    assert source.needs_images and not build_source("tencode", data=DataConfig()).needs_images
    np.testing.assert_allclose(source.images(batch).numpy(), np.stack([s["image"] for s in samples]) / 255, atol=1e-7)
    del batch["image"]
    with pytest.raises(ValueError, match="no image"):
        source.images(batch)


def test_voxels_span_each_window_from_first_to_last_event(samples: list[dict]) -> None:
    got = voxels(collate(samples), bins=5).double().numpy()
    assert got.shape == (2, T, 5, HEIGHT, WIDTH)
    for row, sample in enumerate(samples):
        for number, window in enumerate(sample["events"]):
            grid = np.zeros((5, HEIGHT, WIDTH))
            for t, x, y, p in zip(window.t, window.x, window.y, window.p):
                place = 4 * (t - window.t[0]) / (window.t[-1] + 1 - window.t[0])
                for instant in range(5):
                    grid[instant, y, x] += (1 if p else -1) * max(0.0, 1 - abs(instant - place))
            np.testing.assert_allclose(got[row, number], grid, atol=1e-5)


def test_mixed_batches_give_the_same_pictures(samples: list[dict]) -> None:
    plain = collate(samples)
    mixed = collate([{**sample, "origin": origin} for sample, origin in zip(samples, (1, 0))])
    assert isinstance(mixed["events"], Grouped)
    for spec in ("tencode", "histogram", "voxel", "event_image"):
        np.testing.assert_array_equal(images_of(spec, mixed), images_of(spec, plain))
    assert torch.equal(voxels(mixed), voxels(plain))


def test_simulated_stills_are_drawn_as_the_events_they_become(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(4):
        (tmp_path / f"c{number % 2}").mkdir(exist_ok=True)
        pixels = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"c{number % 2}" / f"{number}.png")
    images = ImagesConfig(path=str(tmp_path))
    config = DataConfig(name="images", images=images, height=20, width=20, windows=2, window_us=20_000)
    stills = StillImages.whole(config, paired=True)
    batch = collate([stills.sample(index, None) for index in range(2)])
    assert isinstance(batch["events"], StillBatch)
    plain = {**batch, "events": batch["events"].events()}
    assert plain["events"].num_events > 100
    for spec in ("tencode", "histogram", "voxel", "event_image"):
        source = build_source(spec, data=config)
        torch.testing.assert_close(source.images(batch), source.images(plain), rtol=0, atol=0)


def test_the_batch_is_left_as_it_was(samples: list[dict]) -> None:
    batch = collate(samples)
    events: EventBatch = batch["events"]
    before = {name: getattr(events, name).clone() for name in ("t", "x", "y", "p", "offsets", "t0", "t1")}
    for spec in ("tencode", "histogram", "voxel", "event_image"):
        images_of(spec, batch)
    voxels(batch)
    assert all(torch.equal(getattr(events, name), value) for name, value in before.items())
    assert len(whole(batch)) == len(samples) and len(batch["events"]) == T * len(samples)


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("tencode", ("tencode", "tencode", "")),
        ("raw=tencode", ("raw", "tencode", "")),
        ("llm_evrep:runs/a/export", ("llm_evrep:runs/a/export", "llm_evrep", "runs/a/export")),
        ("fidelity only=llm_evrep:a=b/c:d", ("fidelity only", "llm_evrep", "a=b/c:d")),
        ("e2vid:a=b.pth.tar", ("e2vid:a=b.pth.tar", "e2vid", "a=b.pth.tar")),
    ],
)
def test_specs(spec: str, expected: tuple[str, str, str]) -> None:
    assert split_spec(spec) == expected


@pytest.mark.parametrize(
    "spec, message",
    [
        ("tencod", "choose from tencode, histogram"),
        ("", "choose from"),
        ("e2vid", r"write e2vid:<E2VID_lightweight.pth.tar>"),
        ("llm_evrep:", "names no weights"),
        ("rgb:x", "takes nothing after the colon"),
    ],
)
def test_wrong_specs_say_what_is_right(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_source(spec, data=DataConfig())


def exported(folder: Path, windows: int, window_us: int = 0) -> Path:
    """A random generator for some windows."""
    settings = {name: getattr(DataConfig(), name) for name in INPUT_KEYS}
    settings |= {"windows": windows, "window_us": window_us}
    torch.manual_seed(windows)
    generator = build_generator("nano", in_chans=3 * windows)
    with torch.no_grad():
        for parameter in generator.parameters():  # its last layer starts near zero: every image would be grey
            parameter.add_(0.1 * torch.randn_like(parameter))
    return EvRep(Tencode(), generator, input_settings=settings).save_pretrained(folder)


def test_llm_evrep_gives_the_exports_images(samples: list[dict], tmp_path: Path) -> None:
    folder, batch = exported(tmp_path / "three", T), collate(samples)
    source = build_source(f"ours=llm_evrep:{folder}", data=DataConfig(windows=T, window_us=0))
    assert source.name == "ours"
    got = source.images(batch)
    with torch.no_grad():
        expected = EvRep.from_pretrained(folder)(batch)
    assert torch.equal(got, expected) and got.std() > 1e-3 and not got.requires_grad
    with pytest.raises(ValueError, match=rf"data.windows=6 \({T} there\)"):
        build_source(f"llm_evrep:{folder}", data=DataConfig(windows=6, window_us=0))
    with pytest.warns(UserWarning, match=r"data.window_us=7 \(0 there\)"):
        build_source(f"llm_evrep:{folder}", data=DataConfig(windows=T, window_us=7))


def test_llm_evrep_of_one_window_joins_many(samples: list[dict], tmp_path: Path) -> None:
    folder, batch = exported(tmp_path / "one", 1, window_us=300), collate(samples)
    source = build_source(f"llm_evrep:{folder}", data=DataConfig(windows=T, window_us=100))
    with torch.no_grad():
        raw = torch.from_numpy(images_of("tencode", batch)).float()
        expected = EvRep.from_pretrained(folder).images(raw)
    torch.testing.assert_close(source.images(batch), expected, rtol=0, atol=1e-6)
    assert batch["windows"] == T
