"""The simulator against a slow single-pixel loop, known ramps, expected rates and real recordings."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from gep.events import stepping
from gep.events.camera import CameraPath, nmnist_saccades, smooth_random
from gep.events.sensor import NMNIST_SENSOR, SensorModel, draw
from gep.events.simulate import render, simulate_counts, simulate_events

EVERYTHING = SensorModel(
    response="power", gamma=1.5, invert=True, threshold=0.05, threshold_mismatch=0.15, threshold_spread=0.1,
    cutoff_hz=60.0, initial_spread=0.5, refractory_us=900, leak_rate_hz=30.0, shot_noise_hz=40.0,
    shot_noise_on=0.4, max_events_per_step=4,
)  # fmt: skip


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scene(batch=3, size=(7, 6), steps=12, duration_us=61_003, dtype=torch.float32):
    images = torch.rand(batch, 12, 11, generator=seeded(5)).to(dtype)
    path = smooth_random(batch, image_size=(12, 11), sensor_size=size, duration_us=duration_us, steps=steps,
                         max_shift_px=4.0, max_rotation_rad=0.2, generator=seeded(6))  # fmt: skip
    return images, path, {"height": size[0], "width": size[1]}


def still(images: torch.Tensor, times: list[int]) -> CameraPath:
    return CameraPath(torch.tensor(times), torch.eye(3).repeat(len(images), len(times), 1, 1))


def columns(events) -> list[tuple[int, ...]]:
    return list(zip(*(getattr(events, name).tolist() for name in "txyp")))


def one_pixel(level, t_us, on, off, start, noise, sensor) -> list[tuple[int, int]]:
    """The (t, p) of one pixel, followed in absolute time: the meaning of the model, spelled out."""
    events, difference, free, noise = [], start, t_us[0], sorted(noise)
    for s in range(len(t_us) - 1):
        begin, end, fired = t_us[s], t_us[s + 1], 0
        slope = (level[s + 1] - level[s]) / (end - begin) + sensor.leak_rate_hz * 1e-6 * on
        free = max(free, begin)
        while free < end:
            goal = on if slope > 0 else -off
            crossing = free + (goal - difference) / slope if slope else math.inf
            while noise and noise[0][0] < free:
                noise.pop(0)
            t, p = min((crossing, int(slope > 0)), *noise[:1]) if noise else (crossing, int(slope > 0))
            if t >= end:
                difference += slope * (end - free)
                break
            events.append((math.floor(t), p))
            fired += 1
            difference, free = 0.0, t + sensor.refractory_us
            if noise and noise[0][0] == t:
                noise.pop(0)
            if fired == sensor.max_events_per_step:
                free = max(free, end)
    return events


@pytest.mark.parametrize(
    "sensor",
    [EVERYTHING, SensorModel(threshold=0.3, threshold_mismatch=0.0), SensorModel(refractory_us=9000)],
)
def test_every_event_of_the_reference_loop(sensor):
    images, path, size = scene(dtype=torch.float64)
    recordings = simulate_events(images, path, sensor=sensor, generator=seeded(1), **size)
    seeds = torch.randint(2**62, (3,), generator=seeded(1)).tolist()
    t_us = path.t_us.tolist()
    total = 0
    for b, events in enumerate(recordings):
        draws = draw(sensor, seeds[b : b + 1], path.t_us, 42, like=images)
        seen = [render(images[b : b + 1], path.homography[b : b + 1, s], **size) for s in range(len(t_us))]
        noise = {pixel: [] for pixel in range(42)}
        for s in range(len(t_us) - 1):
            for i in range(draws.noise.edges[s], draws.noise.edges[s + 1]):
                pixel = int(draws.noise.pixel[i])
                rate = 1 + (sensor.shot_noise_bright - 1) * float(seen[s + 1].flatten()[pixel])
                if draws.noise.rank[i] < rate:
                    noise[pixel].append((t_us[s] + float(draws.noise.t[i]), int(draws.noise.on[i])))
        expected = []
        for pixel in range(42):
            level = [float(sensor.level(v.flatten()[pixel])) for v in seen]
            for s in range(1, len(level) if sensor.cutoff_hz else 0):
                keep = math.exp(-2 * math.pi * sensor.cutoff_hz * (t_us[s] - t_us[s - 1]) * 1e-6)
                level[s] = keep * level[s - 1] + (1 - keep) * level[s]
            on, off, start = (float(v[pixel]) for v in draws[:3])
            for t, p in one_pixel(level, t_us, on, -off, start, noise[pixel], sensor):
                expected.append((t, pixel // 6, pixel % 6, p))
        assert [(t, y, x, p) for t, x, y, p in columns(events.validate())] == sorted(expected)
        total += len(expected)
    assert total > 100


def test_linear_ramp_gives_known_times():
    # Brightness x / 50 seen through a camera that moves by a pixel a ms: 0.02 a ms, a threshold in 1234.3 µs.
    image = torch.arange(50, dtype=torch.float64).expand(1, 3, 50) / 50
    shift = torch.stack([-torch.arange(6.0), torch.zeros(6)], -1)[None].double()
    path = CameraPath.from_shifts(torch.arange(6) * 1000, shift, image_size=(3, 50), sensor_size=(1, 4))
    sensor = SensorModel(response="linear", threshold=0.02 * 1.2343, threshold_mismatch=0.0)
    (events,) = simulate_events(image, path, sensor=sensor, height=1, width=4)
    assert columns(events) == [(t, x, 0, 1) for t in (1234, 2468, 3702, 4937) for x in range(4)]
    inverted = SensorModel(response="linear", threshold=0.02 * 1.2343, threshold_mismatch=0.0, invert=True)
    (events,) = simulate_events(image, path, sensor=inverted, height=1, width=4)
    assert set(events.p.tolist()) == {0}
    # Held in reset for 500 µs after each event, a pixel comes round every 1734.3 µs.
    slow = SensorModel(response="linear", threshold=0.02 * 1.2343, threshold_mismatch=0.0, refractory_us=500)
    (events,) = simulate_events(image, path, sensor=slow, height=1, width=4)
    assert events.t[events.x == 0].tolist() == [1234, 2968, 4702]


def test_responses():
    brightness = torch.tensor([0.0, 0.25, 1.0])
    torch.testing.assert_close(SensorModel(log_offset=0.1).level(brightness), torch.tensor([0.1, 0.35, 1.1]).log())
    torch.testing.assert_close(
        SensorModel(response="power", gamma=1.5, invert=True).level(brightness),
        torch.tensor([0.0, -0.125, -1.0]),
    )


def test_render_by_hand():
    image = torch.tensor([[[0.0, 1.0], [0.5, 0.25]]])
    shift = torch.tensor([[1.0, 0.0, -0.25], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])[None]
    # Pixel (0, 0) looks at (-0.25, 0.5), pixel (1, 0) at (0.75, 0.5).
    seen = render(image, shift, height=1, width=2)
    torch.testing.assert_close(seen, torch.tensor([[[0.75 * 0.25, 0.25 * 0.25 + 0.75 * 0.625]]]))
    seen = render(image, shift, height=1, width=1, outside="border")
    torch.testing.assert_close(seen, torch.tensor([[[0.25]]]))


def test_nothing_moves_nothing_happens():
    images = torch.rand(4, 9, 9, generator=seeded())
    sensor = SensorModel(threshold_mismatch=0.3, threshold_spread=0.3, refractory_us=100, initial_spread=1.0)
    recordings = simulate_events(images, still(images, [0, 1000, 50_000]), sensor=sensor, height=9, width=9)
    assert [len(events) for events in recordings] == [0] * 4
    assert simulate_events(images[:0], still(images[:0], [0, 9]), sensor=sensor, height=9, width=9) == []


def test_mismatch_and_spread_statistics():
    sensor = SensorModel(threshold=0.2, threshold_mismatch=0.1, threshold_spread=0.05)
    drawn = draw(sensor, range(400), torch.tensor([0, 1000]), 900, like=torch.zeros(1))
    on, off = drawn.threshold_on.view(400, 900) / 0.2, -drawn.threshold_off.view(400, 900) / 0.2
    assert abs(on.mean(1).std() - 0.05) < 0.006 and abs(on.mean() - 1) < 0.01
    assert torch.corrcoef(torch.stack([on.mean(1), off.mean(1)]))[0, 1] > 0.95
    within = torch.stack([on / on.mean(1, keepdim=True), off / off.mean(1, keepdim=True)]).flatten(1)
    torch.testing.assert_close(within.std(1), torch.tensor([0.1, 0.1]), atol=0.002, rtol=0)
    assert abs(torch.corrcoef(within)[0, 1]) < 0.01


def test_leak_rate():
    images = torch.rand(2, 8, 8, generator=seeded())
    path = still(images, list(range(0, 1_000_001, 50_000)))
    size = {"height": 8, "width": 8}
    sensor = SensorModel(leak_rate_hz=10.5, threshold_mismatch=0.3)
    for events in simulate_events(images, path, sensor=sensor, **size):
        assert (events.p == 1).all() and len(events) == 64 * 10
        own = events.t[(events.x == 3) & (events.y == 2)]
        np.testing.assert_allclose(own, np.arange(1, 11) * 1e6 / 10.5, atol=3)


def test_shot_noise_rate_and_its_dependence_on_brightness():
    images = torch.cat([torch.zeros(2, 20, 20), torch.ones(2, 20, 20)])
    path = still(images, list(range(0, 2_000_001, 10_000)))
    sensor = SensorModel(shot_noise_hz=5.0, shot_noise_bright=0.25, shot_noise_on=0.3)
    counts = simulate_counts(images, path, sensor=sensor, height=20, width=20, bins=4, generator=seeded())
    per_second = counts.sum((2, 3, 4)).view(2, 2, 4).sum(1) / (2 * 400 * 0.5)
    # 2000 and 500 expected events in each of the 4 windows: 4 standard deviations.
    assert (per_second[0] - 5.0).abs().max() < 4 * 5.0 / 2000**0.5
    assert (per_second[1] - 1.25).abs().max() < 4 * 1.25 / 500**0.5
    fraction = counts[:, :, 1].sum() / counts.sum()
    assert abs(fraction - 0.3) < 0.02


def test_refractory_spacing():
    images, path, size = scene(batch=2)
    for refractory in (0, 700, 8000):
        sensor = SensorModel(threshold=0.05, refractory_us=refractory, shot_noise_hz=200.0)
        shortest = []
        for events in simulate_events(images, path, sensor=sensor, generator=seeded(), **size):
            pixel = events.y.astype(int) * 6 + events.x
            gaps = [np.diff(events.t[pixel == i]) for i in range(42)]
            shortest.append(min(int(gap.min()) for gap in gaps if len(gap)))
        assert min(shortest) >= refractory
    assert min(shortest) < 9000  # and it is not longer than asked for


def test_cap_on_a_step():
    images, path, size = scene(batch=2)
    t_us = path.t_us
    free, capped = (
        simulate_counts(images, path, sensor=SensorModel(threshold=0.03, max_events_per_step=cap),
                        bounds=torch.stack([t_us[:-1], t_us[1:]], 1), **size).sum(2)
        for cap in (0, 2)
    )  # fmt: skip
    assert free.max() > 5 and capped.max() == 2


def test_same_seed_same_events_in_any_chunking(monkeypatch):
    images, path, size = scene(batch=5)
    runs = {}
    for name, pixels, seed in (
        ("whole", 2**18, 0),
        ("again", 2**18, 0),
        ("chunks", 84, 0),
        ("other", 2**18, 1),
    ):
        monkeypatch.setitem(stepping.CHUNK_PIXELS, "cpu", pixels)
        recordings = simulate_events(images, path, sensor=EVERYTHING, generator=seeded(seed), **size)
        runs[name] = [columns(events) for events in recordings]
    assert runs["whole"] == runs["again"] == runs["chunks"]
    assert all(a != b for a, b in zip(runs["whole"], runs["other"]))
    # Batch by batch from one generator gives the recordings of the whole.
    generator = seeded(0)
    parts = [
        simulate_events(images[part], path[part], sensor=EVERYTHING, generator=generator, **size)
        for part in (slice(0, 2), slice(2, 5))
    ]
    assert [columns(events) for part in parts for events in part] == runs["whole"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_entries_give_the_same_counts(dtype):
    images, path, size = scene(dtype=dtype)
    args = {"sensor": EVERYTHING, "outside": "border", **size}
    recordings = simulate_events(images, path, generator=seeded(3), **args)

    def counted(bounds: list[list[int]]) -> torch.Tensor:
        counts = np.zeros((3, len(bounds), 2, 7, 6), np.float32)
        for b, events in enumerate(recordings):
            for w, (t0, t1) in enumerate(bounds):
                here = (events.t >= t0) & (events.t < t1)
                np.add.at(counts[b, w], (events.p[here], events.y[here], events.x[here]), 1)
        return torch.from_numpy(counts)

    # 7 windows over 12 steps and 61003 µs: boundaries fall inside steps.
    edges = [k * 61_003 // 7 for k in range(8)]
    counts = simulate_counts(images, path, generator=seeded(3), bins=7, **args)
    assert counts.dtype == torch.float32 and counts.sum() == sum(len(events) for events in recordings)
    assert torch.equal(counts, counted([list(pair) for pair in itertools.pairwise(edges)]))
    ragged = [[-50, 3], [1000, 30_000], [20_000, 20_500], [20_500, 20_500], [60_000, 99_000]]
    assert torch.equal(
        simulate_counts(images, path, generator=seeded(3), bounds=np.array(ragged), **args), counted(ragged)
    )


def test_blur_keeps_the_light():
    image = torch.zeros(1, 15, 15)
    image[0, 7, 7] = 1
    blurred = stepping.blur(image, [1.2], "zeros")[0]
    x = torch.arange(15) - 7.0
    assert abs(blurred.sum() - 1) < 1e-5 and abs((blurred.sum(0) * x**2).sum() - 1.44) < 0.05
    assert torch.allclose(stepping.blur(torch.ones(1, 5, 5), [2.0], "border"), torch.ones(1, 5, 5))


def test_times_may_begin_anywhere():
    images, path, size = scene()
    late = CameraPath(path.t_us + 3_000_000_000, path.homography)
    early, shifted = (simulate_events(images, p, sensor=EVERYTHING, generator=seeded(), **size) for p in (path, late))
    for a, b in zip(early, shifted):
        assert [(t + 3_000_000_000, x, y, p) for t, x, y, p in columns(a)] == columns(b)


def test_refusals_name_the_fix():
    images, path, size = scene()
    for bad, message in (
        (images * 255, "scale them"),
        (images[:2], "2 images but 3"),
        (images[0], "B, H0, W0"),
    ):
        with pytest.raises(ValueError, match=message):
            simulate_events(bad, path, sensor=EVERYTHING, **size)
    with pytest.raises(ValueError, match="either bins"):
        simulate_counts(images, path, sensor=EVERYTHING, **size)
    with pytest.raises(ValueError, match="integer µs"):
        simulate_counts(images, path, sensor=EVERYTHING, bounds=np.zeros((2, 2)), **size)
    with pytest.raises(ValueError, match="log, linear, power"):
        SensorModel(response="cubic")
    with pytest.raises(ValueError, match="threshold = 0"):
        SensorModel(threshold=0)
    with pytest.raises(ValueError, match="shot_noise_bright"):
        SensorModel(shot_noise_bright=2)


def test_nmnist_recordings_are_matched(real_data):
    from gep.events.io import read_events

    table = np.load(real_data / "nmnist" / "train_images.npz")
    chosen = slice(401, 461)
    real = np.zeros((60, 6, 2, 34, 34), np.float32)
    for i, (index, label) in enumerate(zip(table["index"][chosen], table["label"][chosen])):
        events = read_events(real_data / "nmnist" / "Train" / str(label) / f"{index:05d}.bin")
        here = events.t < 300_000
        t, x, y, p = (getattr(events, name)[here] for name in "txyp")
        np.add.at(real[i], (t // 50_000, p, y, x), 1)
    images = torch.from_numpy(table["image"][chosen]).float() / 255
    path = nmnist_saccades(60, image_size=(28, 28), sensor_size=(34, 34), generator=seeded())
    bounds = [[50_000 * k, 50_000 * (k + 1)] for k in range(6)]
    made = simulate_counts(images, path, sensor=NMNIST_SENSOR, height=34, width=34, bounds=np.array(bounds),
                           generator=seeded()).numpy()  # fmt: skip
    assert np.corrcoef(np.log1p(made).ravel(), np.log1p(real).ravel())[0, 1] > 0.87
    np.testing.assert_allclose(made.sum((2, 3, 4)).mean(0), real.sum((2, 3, 4)).mean(0), rtol=0.15)
    np.testing.assert_allclose(made.sum((1, 3, 4)).mean(0), real.sum((1, 3, 4)).mean(0), rtol=0.1)
