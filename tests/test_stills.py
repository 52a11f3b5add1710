"""Stills that become events: the same as the simulator's own, whatever else is in the batch; numba as torch."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch

from gep.events import advance as advance_module
from gep.events.camera import CameraPath, Wander
from gep.events.represent import REPRESENTATIONS, Histogram, build
from gep.events.sensor import SensorModel
from gep.events.simulate import simulate_batch, simulate_counts, simulate_events
from gep.events.slicing import by_bounds
from gep.events.stills import StillBatch
from gep.events.types import EventBatch

NOISY = SensorModel(
    gamma=1.8, threshold=0.15, off_ratio=1.3, threshold_mismatch=0.1, cutoff_hz=90.0, blur_px=0.6, initial_spread=1.0,
    refractory_us=700, leak_rate_hz=5.0, shot_noise_hz=20.0, shot_noise_on=0.4,
)  # fmt: skip
OTHER = dataclasses.replace(
    NOISY, gamma=1.0, log_offset=0.1, threshold=0.3, off_ratio=0.8, threshold_mismatch=0.2, cutoff_hz=0.0, blur_px=0.0,
    initial_spread=0.0, refractory_us=100, leak_rate_hz=0.0, shot_noise_hz=60.0, shot_noise_bright=0.9,
)  # fmt: skip


def stills(num: int = 4, each: int = 1, sensors: tuple[SensorModel, ...] = (NOISY,), channels: int = 3) -> StillBatch:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, (num, channels, 20, 18), generator=generator, dtype=torch.uint8)
    rng, t_us = np.random.default_rng(4), np.arange(9) * 5_000
    motions = [Wander.draw(rng, speed_px_s=(40, 90), turn_hz=(1, 4), rotation_rad_s=0.5) for _ in range(num * each)]
    homography = [motion.homography(t_us, image_size=(20, 18), sensor_size=(12, 11)) for motion in motions]
    return StillBatch(
        images=images,
        homography=torch.from_numpy(np.stack(homography)),
        t_us=torch.from_numpy(t_us),
        bounds=torch.tensor([[0, 15_000], [12_000, 40_000]]),
        seeds=torch.arange(100, 100 + num * each),
        sensors=sensors,
        height=12,
        width=11,
        outside="border",
    )


def one(batch: StillBatch, index: int) -> StillBatch:
    """Recording `index` by itself."""
    own, pick = slice(index, index + 1), index // (len(batch.homography) // len(batch.images))
    sensors = batch.sensors if len(batch.sensors) == 1 else batch.sensors[own]
    return dataclasses.replace(
        batch, images=batch.images[pick : pick + 1], homography=batch.homography[own], seeds=batch.seeds[own],
        sensors=sensors,
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(REPRESENTATIONS))
def test_equals_the_recorded_events_of_the_same_simulation(name: str) -> None:
    """Against `simulate_events` on hand-made luminance, cut by the slicing of recordings."""
    batch = stills()
    red, green, blue = batch.images.double().unbind(1)
    light = ((0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255).float()
    np.testing.assert_allclose(batch.light(), light, atol=1e-6)
    recordings = simulate_events(
        batch.light(), CameraPath(batch.t_us, batch.homography), sensor=NOISY, height=12, width=11, outside="border",
        seeds=batch.seeds.tolist(),
    )  # fmt: skip
    windows = [by_bounds(recording, batch.bounds.numpy()) for recording in recordings]
    expected = EventBatch.from_windows(
        [window for cut in windows for window in cut.events], np.concatenate([cut.bounds for cut in windows])
    )
    made = batch.events()
    assert made.num_events > 1000 and len(made) == len(batch) == 8
    for field in ("t", "x", "y", "p", "offsets", "t0", "t1"):
        assert torch.equal(getattr(made.validate(), field), getattr(expected, field)), field
    represent = build(name)
    assert torch.equal(represent(made), represent(expected))
    assert torch.equal(batch.counts(), Histogram()(expected))


@pytest.mark.parametrize("sensors", [(NOISY,), (NOISY, OTHER) * 4])
def test_a_recording_does_not_depend_on_its_batch(sensors: tuple[SensorModel, ...]) -> None:
    batch = stills(each=2, sensors=sensors)
    whole = batch.counts().unflatten(0, (8, 2))
    events = batch.events()
    for index in range(8):
        alone = one(batch, index)
        assert torch.equal(alone.counts(), whole[index])
        cut = slice(int(events.offsets[2 * index]), int(events.offsets[2 * index + 2]))
        assert torch.equal(alone.events().t, events.t[cut]) and torch.equal(alone.events().x, events.x[cut])
    assert not torch.equal(whole[0], whole[1])  # two recordings of one still
    moved = dataclasses.replace(batch, seeds=batch.seeds + 1).counts().unflatten(0, (8, 2))
    assert all(not torch.equal(a, b) for a, b in zip(moved, whole))


def test_windows_of_each_recording_by_themselves() -> None:
    batch = stills()
    bounds = torch.stack([batch.bounds + 1000 * k for k in range(4)])
    own = dataclasses.replace(batch, bounds=bounds)
    expected = torch.cat([dataclasses.replace(one(batch, k), bounds=bounds[k]).counts() for k in range(4)])
    assert torch.equal(own.counts(), expected) and torch.equal(Histogram()(own.events()), expected)


@pytest.mark.parametrize("cap", [0, 2])
def test_numba_does_as_torch_does(monkeypatch: pytest.MonkeyPatch, cap: int) -> None:
    sensors = tuple(dataclasses.replace(s, threshold=0.05, max_events_per_step=cap) for s in (NOISY, OTHER) * 2)
    batch = stills(sensors=sensors)
    fast = batch.events()
    monkeypatch.setattr(advance_module, "_advance_numba", advance_module._advance_torch)
    slow = batch.events()
    assert fast.num_events > 4000
    for field in ("t", "x", "y", "p", "offsets"):
        assert torch.equal(getattr(fast, field), getattr(slow, field)), field


def test_more_events_than_a_buffer_holds() -> None:
    """A step with dozens of events in each pixel: the kernel's output is continued in further buffers."""
    image = torch.linspace(0, 1, 100).expand(1, 60, 100).contiguous()
    shift = torch.tensor([[[20.0, 0.0], [-20.0, 0.0]]])
    path = CameraPath.from_shifts(torch.tensor([0, 10_000]), shift, image_size=(60, 100), sensor_size=(60, 60))
    sensor = SensorModel(response="linear", threshold=0.00401, threshold_mismatch=0.0)
    counts = simulate_counts(image, path, sensor=sensor, height=60, width=60, bins=1)
    # A rise of 40 / 99 in every pixel: floor(0.404 / 0.00401) events.
    assert torch.equal(counts[0, 0], torch.stack([torch.zeros(60, 60), torch.full((60, 60), 100.0)]))


def test_gamma_is_light_before_the_optics() -> None:
    images = torch.rand(1, 20, 20, generator=torch.Generator().manual_seed(0))
    path = stills(1).homography
    args = {"path": CameraPath(torch.arange(9) * 5_000, path), "height": 12, "width": 11, "bins": 2, "seeds": [5]}
    plain = SensorModel(blur_px=0.5, threshold=0.1)
    encoded = dataclasses.replace(plain, gamma=2.2)
    assert torch.equal(
        simulate_counts(images, sensor=encoded, **args), simulate_counts(images**2.2, sensor=plain, **args)
    )


def test_off_ratio_moves_the_off_threshold_alone() -> None:
    images = torch.rand(1, 20, 20, generator=torch.Generator().manual_seed(0))
    args = {"path": CameraPath(torch.arange(9) * 5_000, stills(1).homography), "height": 12, "width": 11, "bins": 1}
    equal, rare = (
        simulate_counts(images, sensor=SensorModel(threshold_mismatch=0.0, off_ratio=ratio), **args).sum((0, 1, 3, 4))
        for ratio in (1.0, 3.0)
    )
    assert rare[0] < 0.5 * equal[0] and rare[1] > 0.8 * equal[1]


def test_autocast_and_gradients_leave_it_alone() -> None:
    batch = stills()
    plain = batch.counts()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(batch.counts(), plain) and not batch.counts().requires_grad


def test_travels() -> None:
    batch = stills(channels=1)
    again = pickle.loads(pickle.dumps(batch)).to("cpu", non_blocking=True)
    assert torch.equal(again.counts(), batch.counts()) and again.device.type == "cpu"
    np.testing.assert_allclose(batch.light(), batch.images[:, 0].double() / 255, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(4, 3, 9, 9)}, "uint8"),
        ({"seeds": torch.arange(3)}, "3 seeds"),
        ({"sensors": (NOISY, OTHER)}, "2 sensors for 4"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(stills(), **change)


def test_refuses_what_the_simulator_refuses() -> None:
    with pytest.raises(ValueError, match="response, invert"):
        stills(sensors=(NOISY, dataclasses.replace(NOISY, invert=True)) * 2).counts()
    args = {"path": CameraPath(torch.arange(9) * 5_000, stills(1).homography), "height": 12, "width": 11}
    image = torch.zeros(1, 20, 20)
    with pytest.raises(ValueError, match=r"\(T, 2\) or \(1, T, 2\)"):
        simulate_batch(image, sensor=NOISY, bounds=np.zeros((2, 3, 2), np.int64), **args)
    with pytest.raises(ValueError, match="2 seeds"):
        simulate_batch(image, sensor=NOISY, bounds=np.zeros((3, 2), np.int64), seeds=[1, 2], **args)


def test_wander_keeps_its_pace_and_its_bounds() -> None:
    rng, t_us = np.random.default_rng(0), np.arange(0, 40_000_000, 10_000)
    speeds, reach = [], []
    for _ in range(40):
        motion = Wander.draw(rng, speed_px_s=(50, 50), turn_hz=(0.5, 2), max_shift_px=1e9)
        shift = motion.homography(t_us, image_size=(30, 40), sensor_size=(20, 20))[:, :2, 2]
        speeds.append(np.sqrt(((np.diff(shift, axis=0) / 0.01) ** 2).sum(1).mean()))
        motion = Wander.draw(rng, speed_px_s=(50, 50), turn_hz=(0.5, 2), max_shift_px=4)
        shift = motion.homography(t_us, image_size=(30, 40), sensor_size=(20, 20))[:, :2, 2] - [10, 5]
        reach.append(np.abs(shift).max())
        assert abs(np.sqrt(((np.diff(shift, axis=0) / 0.01) ** 2).sum(1).mean()) / 50 - 1) < 0.15
    np.testing.assert_allclose(speeds, 50, rtol=0.12)
    assert 3 < max(reach) <= 4 + 1e-4
    turning = Wander.draw(rng, speed_px_s=(1, 1), turn_hz=(1, 1), rotation_rad_s=1.0, zoom_s=0.5)
    matrix = turning.homography(t_us, image_size=(30, 40), sensor_size=(20, 20)).astype(np.float64)
    angle, size = np.arctan2(matrix[:, 1, 0], matrix[:, 0, 0]), np.linalg.det(matrix)
    assert 0.01 < angle.std() < 0.3 and 0.001 < np.log(size).std() < 0.3
    # At any time the pixel at the sensor's centre plus the shift sees the image's centre.
    x, y = ((turning.waves[i, :, 0] * np.sin(turning.waves[i, :, 2])).sum() for i in (0, 1))
    np.testing.assert_allclose(matrix[0] @ [9.5 + x, 9.5 + y, 1], [19.5, 14.5, 1], atol=1e-4)
