"""Each representation against float64 loops over single events, on the numba and the torch path."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gep.events import represent, represent_functions, represent_numba, represent_torch
from gep.events.represent import REPRESENTATIONS, RepresentConfig, build, describe
from gep.events.types import EventBatch, EventFormatError, Events

_UNIX_US = 1_700_000_000_000_000
_CASES = {
    "histogram": ("histogram", {}),
    "histogram_log": ("histogram", {"log1p": True, "scale": 0.5}),
    "stacked_1": ("stacked_histogram", {"bins": 1}),
    "stacked_3": ("stacked_histogram", {"bins": 3, "scale": 2.0}),
    "voxel_1": ("voxel_grid", {"bins": 1}),
    "voxel_5": ("voxel_grid", {"bins": 5}),
    "voxel_4_split": ("voxel_grid", {"bins": 4, "split_polarity": True}),
    "time_surface": ("time_surface", {"tau_us": 7.0}),
    "time_surface_slow": ("time_surface", {"tau_us": 1e200}),
    "latest_timestamp": ("latest_timestamp", {}),
    "tencode": ("tencode", {}),
    "event_image": ("event_image", {"percentile": 60.0}),
}


def _loop(name: str, params: dict, batch: EventBatch) -> np.ndarray:
    """The definition, one event at a time, in float64 and Python's own integers."""
    height, width = batch.height, batch.width
    channels = build(name, params).channels
    out = np.zeros((len(batch), channels, height, width))
    for b in range(len(batch)):
        t0, t1 = int(batch.t0[b]), int(batch.t1[b])
        span = max(t1 - t0, 1)
        image, counts = out[b], np.zeros((2, height, width))
        for i in range(int(batch.offsets[b]), int(batch.offsets[b + 1])):
            t, p, x, y = int(batch.t[i]), int(batch.p[i]), batch.x[i].item(), batch.y[i].item()
            if name in ("histogram", "stacked_histogram"):
                bins = params.get("bins", 1)
                image[p * bins + min(bins * (t - t0) // span, bins - 1), y, x] += 1
            elif name == "voxel_grid":
                bins, split = params["bins"], params.get("split_polarity", False)
                tau = (bins - 1) * (t - t0) / span
                for k in range(bins):
                    for row in range(height):
                        for column in range(width):
                            share = max(0, 1 - abs(k - tau))
                            share *= max(0, 1 - abs(row - y)) * max(0, 1 - abs(column - x))
                            image[k + p * bins * split, row, column] += share * (1 if split or p else -1)
            elif name == "time_surface":
                image[p, y, x] = math.exp((t - t1) / params["tau_us"])
            elif name == "latest_timestamp":
                image[p, y, x] = (t - t0 + 1) / span
            elif name == "tencode":
                image[:, y, x] = (255 * p, 255 * (t1 - t) // span, 255 * (1 - p))
            else:
                counts[p, y, x] += 1
        if name == "event_image":
            q = [np.percentile(c[c > 0], params["percentile"]) if c.any() else 1.0 for c in counts]
            image[:] = 1
            for row in range(height):
                for column in range(width):
                    off, on = counts[:, row, column]
                    if on >= off:
                        image[1:, row, column] -= min(on, q[1]) / q[1]
                    else:
                        image[:2, row, column] -= min(off, q[0]) / q[0]
    if params.get("log1p"):
        out = np.log1p(out)
    return out * params.get("scale", 1.0)


def _window(rows: list[tuple[int, int, int, int]], height: int, width: int) -> Events:
    columns = np.array(sorted(rows), np.int64).reshape(-1, 4).T
    return Events.from_arrays(*columns, height=height, width=width)


@st.composite
def batches(draw) -> EventBatch:
    height, width = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    base = draw(st.sampled_from([0, -50, _UNIX_US]))
    event = st.tuples(
        st.integers(base, base + draw(st.sampled_from([0, 9, 100_000]))),
        st.integers(0, width - 1),
        st.integers(0, height - 1),
        st.integers(0, 1),
    )
    windows = [
        _window(rows, height, width) for rows in draw(st.lists(st.lists(event, max_size=12), min_size=1, max_size=4))
    ]
    own = EventBatch.from_windows(windows)
    if draw(st.booleans()):
        return own
    margins = draw(
        st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=len(windows), max_size=len(windows))
    )
    bounds = np.stack([own.t0, own.t1], axis=1) + np.array(margins) * (-1, 1)
    return EventBatch.from_windows(windows, bounds)


_EDGES = EventBatch.from_windows(
    [
        _window([(3, x, y, p) for x in (0, 4) for y in (0, 2) for p in (0, 1)] * 2, 3, 5),
        Events.empty(3, 5),
        Events.empty(3, 5),
        _window([(8, 4, 2, 1)], 3, 5),
    ],
    np.array([[3, 4], [7, 7], [0, 1000], [8, 9]]),
)


@pytest.fixture(params=["numba", "torch"])
def path(request, monkeypatch):
    """Both implementations on CPU tensors."""
    if request.param == "torch":
        monkeypatch.setattr(represent_functions, "represent_numba", represent_torch)
    return request.param


@pytest.mark.parametrize("case", _CASES)
def test_every_representation_matches_its_loop(case):
    name, params = _CASES[case]
    call = build(name, params)

    @settings(deadline=None, max_examples=40)
    @given(batches())
    @example(_EDGES)
    def check(batch):
        expected = _loop(name, params, batch)
        before = [getattr(batch, f).clone() for f in ("t", "x", "y", "p", "offsets", "t0", "t1")]
        for module in (represent_numba, represent_torch):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(represent_functions, "represent_numba", module)
                image = call(batch)
            assert image.dtype == torch.float32 and image.shape == expected.shape
            np.testing.assert_allclose(image.numpy(), expected, rtol=3e-6, atol=3e-6, err_msg=module.__name__)
        after = [getattr(batch, f) for f in ("t", "x", "y", "p", "offsets", "t0", "t1")]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    check()


def test_voxel_grid_by_hand(path):
    # T = 8, 5 instants: tau = t / 2. ON at t = 3 is half way between 1 and 2; OFF at t = 4 lies on 2.
    batch = EventBatch.from_windows([_window([(3, 1, 0, 1), (4, 0, 0, 0)], 1, 2)], np.array([[0, 8]]))
    assert represent.voxel_grid(batch, 5)[0, :, 0].T.tolist() == [[0, 0, -1, 0, 0], [0, 0.5, 0.5, 0, 0]]
    split = represent.voxel_grid(batch, 5, split_polarity=True)[0, :, 0].T
    assert split.tolist() == [[0, 0, 1, 0, 0] + [0] * 5, [0] * 5 + [0, 0.5, 0.5, 0, 0]]


def test_bin_edges_are_exact(path):
    # An event just before and one on each edge of 7 bins, at unix times: in float32, 2 minutes apart.
    span, bins = 1_000_003, 7
    edges = [-(-k * span // bins) for k in range(1, bins)]
    rows = [(_UNIX_US + e - 1 + on, 0, 0, on) for e in edges for on in (0, 1)]
    batch = EventBatch.from_windows([_window(rows, 1, 1)], np.array([[_UNIX_US, _UNIX_US + span]]))
    image = represent.stacked_histogram(batch, bins)[0, :, 0, 0]
    assert image.tolist() == [1] * 6 + [0] + [0] + [1] * 6


@pytest.mark.parametrize("case", _CASES)
def test_absolute_times_do_not_matter(path, case):
    call = build(*_CASES[case])
    rng = np.random.default_rng(0)
    rows = np.stack([rng.integers(0, 50_000, 300), *rng.integers(0, 6, (2, 300)), rng.integers(0, 2, 300)], 1)
    early, late = rows.tolist(), (rows + [_UNIX_US, 0, 0, 0]).tolist()
    bounds = np.array([[0, 50_000]])
    a = call(EventBatch.from_windows([_window(early, 6, 6)], bounds))
    b = call(EventBatch.from_windows([_window(late, 6, 6)], bounds + _UNIX_US))
    assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("case", _CASES)
def test_a_window_does_not_feel_its_neighbours(path, case):
    call = build(*_CASES[case])
    rng = np.random.default_rng(1)
    sizes = (40, 0, 1, 25)
    windows = [
        _window(
            np.stack([rng.integers(0, 99, n), *rng.integers(0, 5, (2, n)), rng.integers(0, 2, n)], 1).tolist(),
            5,
            5,
        )
        for n in sizes
    ]
    together = call(EventBatch.from_windows(windows))
    for k, window in enumerate(windows):
        assert torch.equal(together[k], call(EventBatch.from_windows([window]))[0])


@pytest.mark.parametrize("case", _CASES)
def test_out_is_overwritten_and_returned(path, case):
    call = build(*_CASES[case])
    out = torch.full((4, call.channels, 3, 5), torch.nan)
    assert call(_EDGES, out).data_ptr() == out.data_ptr()
    assert torch.equal(out, call(_EDGES))
    for wrong in (out[:3], out.double(), out.transpose(2, 3), out.to("meta")):
        with pytest.raises(ValueError, match="out must be contiguous float32"):
            call(_EDGES, wrong)


@pytest.mark.parametrize(("bins", "split"), [(1, False), (5, False), (4, True)])
def test_voxel_grids_of_many_events_are_sums_of_float64(path, bins, split):
    rng, (height, width) = np.random.default_rng(0), (7, 300)  # rows and columns that no 8 bits hold together
    windows, bounds = [], []
    for number, count in enumerate((9001, 0, 2 * represent_numba._FEW)):
        t = np.sort(rng.integers(_UNIX_US, _UNIX_US + 30_000, count))
        x, y, p = rng.integers(0, width, count), rng.integers(0, height, count), rng.integers(0, 2, count)
        windows.append(Events.from_arrays(t, x, y, p, height=height, width=width))
        bounds.append((_UNIX_US - 5, _UNIX_US + 30_000 + number))
    expected = np.zeros((3, 2, bins + 1, height, width))
    for grid, window, (t0, t1) in zip(expected, windows, bounds, strict=True):
        tau = (bins - 1) * (window.t - t0) / (t1 - t0)
        left, sign = np.floor(tau).astype(int), 1 if split else 2.0 * window.p - 1
        polarity = window.p if split else 0 * window.p
        np.add.at(grid, (polarity, left, window.y, window.x), sign * (left + 1 - tau))
        np.add.at(grid, (polarity, left + 1, window.y, window.x), sign * (tau - left))
    expected = expected[:, : 1 + split, :bins].reshape(3, -1, height, width)
    found = represent.voxel_grid(EventBatch.from_windows(windows, np.array(bounds)), bins, split_polarity=split)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)


def test_a_batch_may_share_the_arrays_of_a_single_window():
    columns = (
        np.array(values, dtype) for values, dtype in (([3, 4], "i8"), ([1, 0], "u2"), ([0, 1], "u2"), ([1, 0], "u1"))
    )
    window = Events(*columns, 2, 2)
    shared = EventBatch.from_windows([window], copy=False)
    assert shared.checked and torch.equal(shared.x, torch.tensor([1, 0], dtype=torch.int16))
    for name in "txyp":
        assert getattr(shared, name).data_ptr() == getattr(window, name).ctypes.data
        assert getattr(EventBatch.from_windows([window]), name).data_ptr() != getattr(window, name).ctypes.data
    locked = Events(*(getattr(window, name).copy() for name in "txyp"), 2, 2)
    locked.t.setflags(write=False)  # torch has no such tensors
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert EventBatch.from_windows([locked], copy=False).t.data_ptr() != locked.t.ctypes.data
    two = EventBatch.from_windows([window, window[:1]], copy=False)
    assert two.t.tolist() == [3, 4, 3] and two.offsets.tolist() == [0, 2, 3]
    with pytest.raises(EventFormatError, match="sensor 0..1"):
        EventBatch.from_windows([Events(window.t, window.x + np.uint16(1), window.y, window.p, 2, 2)], copy=False)


def test_equal_times_let_the_later_row_win(path):
    t, x, y = np.array([5, 5, 5]), np.zeros(3), np.zeros(3)
    batch = EventBatch.from_windows([Events.from_arrays(t, x, y, [1, 1, 0], height=1, width=1)], np.array([[5, 6]]))
    assert represent.tencode(batch)[0, :, 0, 0].tolist() == [0, 255, 255]
    assert represent.latest_timestamp(batch)[0, :, 0, 0].tolist() == [1, 1]


def test_rectified_coordinates_are_shared_between_pixels(path):
    rng = np.random.default_rng(2)
    n = 60
    window = _window([(int(t), 0, 0, int(p)) for t, p in zip(rng.integers(0, 90, n), rng.integers(0, 2, n))], 4, 5)
    x = torch.from_numpy(rng.uniform(-2, 7, n).astype(np.float32))
    y = torch.from_numpy(rng.uniform(-2, 6, n).astype(np.float32))
    x[:4], y[:4] = torch.tensor([4.0, -1.0, 5.0, 1e30]), torch.tensor([3.0, 0.0, 1.0, -1e30])
    batch = EventBatch.from_windows([window, window[:0]], np.array([[0, 90], [0, 90]])).with_coordinates(x, y)
    for params in ({"bins": 1}, {"bins": 3}, {"bins": 2, "split_polarity": True}):
        image = build("voxel_grid", params)(batch)
        np.testing.assert_allclose(image.numpy(), _loop("voxel_grid", params, batch), rtol=1e-5, atol=1e-5)
    whole = EventBatch.from_windows([window]).with_coordinates(torch.ones(n), torch.ones(n) * 2)
    same = whole.with_coordinates(whole.x.to(torch.int16), whole.y.to(torch.int16))
    torch.testing.assert_close(represent.voxel_grid(whole, 4), represent.voxel_grid(same, 4))
    for name in set(REPRESENTATIONS) - {"voxel_grid"}:
        with pytest.raises(ValueError, match="voxel_grid only"):
            build(name)(batch)


def test_coordinates_outside_are_refused_before_the_loop(path):
    batch = EventBatch.from_windows([_window([(1, 0, 0, 1)], 2, 2)])
    outside = batch.with_coordinates(torch.tensor([2], dtype=torch.int16), batch.y)
    bad_polarity = dataclasses.replace(batch, p=torch.tensor([7], dtype=torch.uint8), checked=False)
    bad_offsets = dataclasses.replace(batch, offsets=torch.tensor([0, 5]), checked=False)
    for name in REPRESENTATIONS:
        for wrong in (outside, bad_polarity, bad_offsets):
            with pytest.raises(EventFormatError):
                build(name)(wrong)


def test_counts_beyond_float32_steps(path):
    n = 2**24 + 4
    zeros = torch.zeros(n, dtype=torch.int16)
    batch = EventBatch(
        torch.zeros(n, dtype=torch.int64),
        zeros,
        zeros,
        torch.zeros(n, dtype=torch.uint8),
        torch.tensor([0, n]),
        torch.tensor([0]),
        torch.tensor([1]),
        1,
        1,
    )
    assert represent.histogram(batch)[0, 0, 0, 0] == n


def test_registry_round_trips_through_json():
    for name, params in _CASES.values():
        representation = build(name, params)
        described = json.loads(json.dumps(describe(representation)))
        assert described["name"] == name and build(**described) == representation
        assert representation(_EDGES).shape == (4, representation.channels, 3, 5)
    with pytest.raises(ValueError, match=r"unknown representation 'voxels'; choose one of histogram, .*voxel_grid"):
        build("voxels")
    with pytest.raises(ValueError, match="voxel_grid has no parameter bin; it takes bins, split_polarity"):
        build("voxel_grid", {"bin": 3})
    with pytest.raises(ValueError, match="int is not in REPRESENTATIONS"):
        describe(3)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("voxel_grid", {"bins": 0}),
        ("stacked_histogram", {"bins": 2.5}),
        ("time_surface", {"tau_us": 0}),
        ("time_surface", {"tau_us": math.nan}),
        ("event_image", {"percentile": 101}),
    ],
)
def test_parameters_out_of_range(name, params):
    (field,) = params
    with pytest.raises(ValueError, match=field):
        build(name, params)
    if params != {"bins": 2.5}:
        with pytest.raises(ValueError, match=field):
            RepresentConfig(name=name, **params)


def test_config_builds_and_warns_of_idle_fields():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, kind in REPRESENTATIONS.items():
            assert RepresentConfig(name=name).build() == kind()
        assert RepresentConfig(name="voxel_grid", bins=3).build().channels == 3
    with pytest.warns(UserWarning, match="tencode does not use bins"):
        RepresentConfig(name="tencode", bins=3).build()
    with pytest.raises(ValueError, match="unknown representation"):
        RepresentConfig(name="nothing").build()
