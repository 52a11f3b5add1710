"""Augmentation against hand calculations, and its alignment between events, images and targets."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gep.events.augment import AugmentConfig, Transform, draw
from gep.events.types import Events


def make(rows, height=4, width=6) -> Events:
    t, x, y, p = np.array(rows, np.int64).reshape(-1, 4).T
    return Events.from_arrays(t, x, y, p, height=height, width=width)


def rows(events: Events) -> list[tuple[int, ...]]:
    return list(zip(*(getattr(events, name).tolist() for name in "txyp")))


def one(transform: Transform, events: Events, bounds=((0, 100),)) -> list[tuple[int, ...]]:
    (moved,), _ = transform.apply_events([events], np.array(bounds))
    moved.validate()
    assert (moved.height, moved.width) == transform.size
    return rows(moved)


BASE = Transform.identity(4, 6)
SAMPLE = make([(1, 0, 0, 1), (5, 5, 3, 0), (9, 2, 1, 1)])


def test_identity_keeps_everything():
    image = np.random.default_rng(0).integers(256, size=(3, 4, 6), dtype=np.uint8)
    assert one(BASE, SAMPLE) == rows(SAMPLE)
    np.testing.assert_array_equal(BASE.apply_image(image), image)
    np.testing.assert_array_equal(BASE.apply_mask(image[0]), image[0])


def test_flips():
    assert one(dataclasses.replace(BASE, flip_x=True), SAMPLE) == [(1, 5, 0, 1), (5, 0, 3, 0), (9, 3, 1, 1)]
    assert one(dataclasses.replace(BASE, flip_y=True), SAMPLE) == [(1, 0, 3, 1), (5, 5, 0, 0), (9, 2, 2, 1)]
    flipped = dataclasses.replace(BASE, flip_polarity=True)
    assert one(flipped, SAMPLE) == [(1, 0, 0, 0), (5, 5, 3, 1), (9, 2, 1, 0)]


def test_crop_and_downscale_add_up():
    # Columns 2..5 and rows 0..3 to 2x2: pixels 2, 3 -> 0 and 4, 5 -> 1.
    transform = Transform((4, 6), (0, 2, 4, 4), (2, 2))
    events = make([(0, x, 1, 1) for x in range(6)])
    assert one(transform, events) == [(0, 0, 0, 1), (0, 0, 0, 1), (0, 1, 0, 1), (0, 1, 0, 1)]


def test_upscale_hits_the_centre():
    # Centre of pixel 1 is 1.5, tripled 4.5: output pixel 4.
    assert one(Transform.resize((4, 6), (12, 18)), make([(0, 1, 2, 0)])) == [(0, 4, 7, 0)]


def test_pad_and_cut():
    assert one(Transform.pad((4, 6), (7, 8)), SAMPLE) == [(1, 1, 1, 1), (5, 6, 4, 0), (9, 3, 2, 1)]
    assert one(Transform.pad((4, 6), (2, 4)), SAMPLE) == [(9, 1, 0, 1)]
    away = Transform((4, 6), (0, 9, 4, 6), (4, 6))
    assert one(away, SAMPLE) == [] and (away.apply_image(np.ones((1, 4, 6), np.uint8), fill=3) == 3).all()
    mask = np.full((4, 6), 7, np.uint8)
    padded = Transform.pad((4, 6), (6, 8)).apply_mask(mask)
    assert (padded[1:5, 1:7] == 7).all() and (padded == 255).sum() == 48 - 24


def test_time_reversal():
    windows = [make([(10, 0, 0, 1), (14, 1, 0, 0)]), make([(20, 2, 0, 1), (20, 3, 0, 1)])]
    bounds = np.array([[10, 20], [20, 35]])
    moved, mirrored = dataclasses.replace(BASE, reverse_time=True).apply_events(windows, bounds)
    assert mirrored.tolist() == [[10, 25], [25, 35]]
    # t -> 44 - t: the first µs of the span becomes the last one.
    assert rows(moved[0]) == [(24, 3, 0, 0), (24, 2, 0, 0)]
    assert rows(moved[1]) == [(30, 1, 0, 1), (34, 0, 0, 0)]
    again, back = dataclasses.replace(BASE, reverse_time=True).apply_events(moved, mirrored)
    assert back.tolist() == bounds.tolist()
    assert [rows(w) for w in again] == [rows(w) for w in windows]


def test_area_and_time_drop():
    box = dataclasses.replace(BASE, area_drop=(1, 2, 1, 2))
    events = make([(0, x, y, 0) for y in range(4) for x in range(6)])
    assert sorted(set(rows(events)) - set(one(box, events))) == [(0, 2, 1, 0), (0, 3, 1, 0)]
    clock = make([(t, 0, 0, 0) for t in range(100)])
    kept = [row[0] for row in one(dataclasses.replace(BASE, time_drop=(0.25, 0.5)), clock)]
    assert kept == [*range(25), *range(50, 100)]


def test_event_drop_and_noise_follow_their_rates_and_the_seed():
    rng = np.random.default_rng(0)
    events = Events(np.arange(20000), *(rng.integers(4, size=20000).astype(np.uint16) for _ in "xy"),
                    rng.integers(2, size=20000).astype(np.uint8), 4, 6)  # fmt: skip
    bounds = np.array([[0, 20000]])
    dropped = dataclasses.replace(BASE, event_drop=0.3, seed=1)
    (kept,), _ = dropped.apply_events([events], bounds)
    assert abs(len(kept) / 20000 - 0.7) < 0.015
    assert rows(dropped.apply_events([events], bounds)[0][0]) == rows(kept)
    assert rows(dataclasses.replace(dropped, seed=2).apply_events([events], bounds)[0][0]) != rows(kept)
    (noisy,), _ = dataclasses.replace(BASE, noise=0.25).apply_events([events], bounds)
    noisy.validate()
    assert len(noisy) == 25000


@pytest.mark.parametrize(
    "transform",
    [
        Transform((30, 40), (3, 4, 20, 24), (20, 24)),
        Transform((30, 40), (-2, -3, 34, 46), (34, 46), flip_x=True),
        Transform((30, 40), (0, 0, 30, 40), (90, 120), flip_y=True),
        Transform((30, 40), (2, 2, 26, 32), (13, 16), flip_x=True, flip_y=True),
        Transform((30, 40), (0, 0, 30, 40), (30, 40), rotation_deg=20.0, scale=1.3),
        Transform((30, 40), (5, 5, 20, 30), (40, 60), rotation_deg=-35.0, scale=1.2, flip_x=True),
    ],
)
def test_events_stay_on_their_bright_pixel(transform):
    for x, y in ((12, 14), (20, 15), (25, 18)):
        image = np.zeros((1, 30, 40), np.uint8)
        image[0, y, x] = 255
        mask = (image[0] > 0).astype(np.uint8)
        depth = np.where(mask > 0, 5.0, np.nan).astype(np.float32)
        ((_, at_x, at_y, _),) = one(transform, make([(0, x, y, 1)], 30, 40))
        out = transform.apply_image(image)[0]
        assert out.shape == transform.size
        if transform._turns:
            # Bilinear interpolation spreads the pixel: its weighted centre is within a pixel of the event.
            weight = out / out.sum()
            centre = (weight.sum(1) @ np.arange(out.shape[0]), weight.sum(0) @ np.arange(out.shape[1]))
            assert np.hypot(centre[0] - at_y, centre[1] - at_x) < 1.0
            assert out[at_y, at_x] > 0
        else:
            assert out[at_y, at_x] == out.max() > 0
        if transform.crop[2] <= transform.size[0]:
            assert transform.apply_mask(mask)[at_y, at_x] == 1
            assert transform.apply_depth(depth)[at_y, at_x] == 5.0


def test_targets_keep_labels_nan_kind_and_dtype():
    transform = Transform((4, 6), (-1, -1, 6, 8), (6, 8), flip_x=True)
    depth = torch.full((4, 6), 2.0)
    depth[0, 0] = torch.nan
    out = transform.apply_depth(depth)
    assert isinstance(out, torch.Tensor) and out.dtype == torch.float32
    assert torch.isnan(out[1, 6]) and torch.isnan(out[0]).all() and out[1, 5] == 2.0
    mask = torch.arange(24, dtype=torch.uint8).view(4, 6)
    assert set(transform.apply_mask(mask).unique().tolist()) == {*range(24), 255}
    assert transform.apply_mask(mask)[1, 1] == 5


def test_downscaled_image_is_antialiased():
    stripes = np.tile(np.array([0, 255], np.uint8), (1, 8, 4))
    out = Transform.resize((8, 8), (4, 4)).apply_image(stripes)
    assert out.min() > 100 and out.max() < 155  # every second column alone would give 0 or 255


def test_inputs_are_not_written_to():
    events = make([(1, 0, 0, 1), (5, 5, 3, 0), (9, 2, 1, 1)])
    for array in (events.t, events.x, events.y, events.p):
        array.flags.writeable = False
    bounds = np.array([[0, 100]])
    bounds.flags.writeable = False
    image = torch.zeros(1, 4, 6, dtype=torch.uint8)
    everything = Transform((4, 6), (0, 0, 4, 6), (8, 8), 10.0, 1.1, True, True, True, True, 0.2, (0, 0, 2, 2),
                           (0.2, 0.4), 0.5, 3)  # fmt: skip
    everything.apply_events([events], bounds)
    everything.apply_image(image, fill=9)
    assert not image.any()


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="window 0 is 4x6, the transform was drawn for 5x5"):
        Transform.identity(5, 5).apply_events([SAMPLE], np.array([[0, 10]]))
    with pytest.raises(ValueError, match="bounds"):
        BASE.apply_events([SAMPLE], np.array([[0, 10], [10, 20]]))
    with pytest.raises(ValueError, match="image is"):
        BASE.apply_image(np.zeros((3, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="fit=resize"):
        draw(AugmentConfig(crop_area_min=0.5), np.random.default_rng(0), (4, 6), how="pad")
    with pytest.raises(ValueError, match="flip_x"):
        AugmentConfig(flip_x=2)


def test_draw_defaults_to_identity_and_covers_its_ranges():
    rng = np.random.default_rng(0)
    assert dataclasses.replace(draw(AugmentConfig(), rng, (4, 6)), seed=0) == BASE
    cfg = AugmentConfig(max_shift_px=2, flip_x=0.5, max_scale=0.25)
    drawn = [draw(cfg, rng, (34, 34), (36, 36), "pad") for _ in range(400)]
    assert {d.crop[0] for d in drawn} == {d.crop[1] for d in drawn} == {-3, -2, -1, 0, 1}
    assert abs(np.mean([d.flip_x for d in drawn]) - 0.5) < 0.1
    scales = [d.scale for d in drawn]
    assert 0.8 <= min(scales) < 0.82 and 1.22 < max(scales) <= 1.25
    crops = [draw(AugmentConfig(crop_area_min=0.25), rng, (40, 80)).crop for _ in range(300)]
    areas = [c[2] * c[3] / 3200 for c in crops]
    assert 0.24 < min(areas) < 0.3 and max(areas) > 0.95
    assert all(c[0] >= 0 and c[1] >= 0 and c[0] + c[2] <= 40 and c[1] + c[3] <= 80 for c in crops)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_draw_on_any_events_is_valid(data):
    height, width = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    unit = st.floats(0, 1)
    pad = data.draw(st.booleans())
    cfg = AugmentConfig(
        crop_area_min=1.0 if pad else data.draw(st.floats(0.01, 1)),
        crop_aspect_max=1.0 if pad else data.draw(st.floats(1, 3)), max_shift_px=data.draw(st.integers(0, 3)),
        max_rotation_deg=data.draw(st.sampled_from([0.0, 30.0])),
        max_scale=data.draw(st.sampled_from([0.0, 0.5])),
        flip_x=0.5, flip_y=0.5, flip_polarity=0.5, reverse_time=0.5, max_event_drop=data.draw(unit),
        area_drop=0.5, area_drop_max=data.draw(unit), time_drop=0.5, time_drop_max=data.draw(unit),
        max_noise=data.draw(unit),
    )  # fmt: skip
    windows, bounds = [], []
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    for index in range(data.draw(st.integers(0, 4))):
        num = data.draw(st.integers(0, 30))
        t = np.sort(rng.integers(1000 * index, 1000 * index + 1000, num))
        x, y, p = (rng.integers(0, side, num) for side in (width, height, 2))
        windows.append(Events.from_arrays(t, x, y, p, height=height, width=width))
        bounds.append((1000 * index, 1000 * index + 1000))
    size = (data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30)))
    transform = draw(cfg, rng, (height, width), size, "pad" if pad else "resize")
    moved, edges = transform.apply_events(windows, np.array(bounds, np.int64).reshape(-1, 2))
    assert len(moved) == len(windows) and edges.shape == (len(windows), 2)
    for window, (t0, t1) in zip(moved, edges):
        window.validate()
        assert (window.height, window.width) == transform.size
        assert len(window) == 0 or (t0 <= window.t[0] and window.t[-1] < t1)
    assert transform.apply_image(np.zeros((1, height, width), np.uint8)).shape[1:] == transform.size
    assert transform.apply_mask(np.zeros((height, width), np.int64)).shape == transform.size
