"""EVT2 and EVT3 against other decoders, on real recordings and on what gep writes."""

from __future__ import annotations

import numpy as np
import pytest

from gep.events.io import open_events, read_events, write_evt2, write_evt3
from gep.events.types import Events


def _same(a: Events, b: Events) -> bool:
    arrays = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in "txyp")
    return arrays and (a.height, a.width) == (b.height, b.width)


def _random(num, duration, height=480, width=640, seed=0, runs=1) -> Events:
    rng = np.random.default_rng(seed)
    t = np.sort(rng.integers(0, duration, -(-num // runs)))
    x, y, p = rng.integers(0, width - runs, len(t)), rng.integers(0, height, len(t)), rng.integers(0, 2, len(t))
    t, x, y, p = (np.repeat(array, runs)[:num] for array in (t, x, y, p))
    return Events.from_arrays(t, x + np.arange(num) % runs, y, p, height=height, width=width)


@pytest.mark.parametrize("runs", [1, 30])
def test_other_decoders_read_what_is_written(tmp_path, runs):
    evt3 = pytest.importorskip("evt3")
    path, events = tmp_path / "a.raw", _random(3000, 40_000_000, runs=runs)
    write_evt3(path, events)
    theirs = evt3.decode_file(str(path))
    for name in "txyp":
        assert np.array_equal(getattr(theirs, name), getattr(events, name)), name
    faery = pytest.importorskip("faery")
    for write in (write_evt2, write_evt3):
        write(path, events)
        theirs = faery.events_stream_from_file(path).to_array()
        for name, field in (("t", "t"), ("x", "x"), ("y", "y"), ("p", "on")):
            assert np.array_equal(theirs[field], getattr(events, name)), name


def test_real_evt3_equals_the_oracle(real_data):
    evt3 = pytest.importorskip("evt3")
    path = real_data / "recordings" / "evt3.raw"
    events, theirs = read_events(path).validate(), evt3.decode_file(str(path))
    assert (len(events), events.height, events.width) == (219_596, 720, 1280)
    for name in "txyp":
        assert np.array_equal(getattr(events, name), getattr(theirs, name)), name
    faery = pytest.importorskip("faery")
    theirs = faery.events_stream_from_file(path, dimensions_fallback=(1280, 720)).to_array()
    for name, field in (("x", "x"), ("y", "y"), ("p", "on")):
        assert np.array_equal(theirs[field], getattr(events, name)), name
    # faery never lets TIME_LOW step back, so its times stay up to 11 µs ahead after each of the nine steps.
    late = theirs["t"].astype(np.int64) - events.t
    assert late.min() == 0 and late.max() == 11


def test_real_evt2_equals_the_oracle_and_slices(real_data):
    faery = pytest.importorskip("faery")
    path = real_data / "recordings" / "evt2.raw"
    events = read_events(path).validate()
    theirs = faery.events_stream_from_file(path, dimensions_fallback=(640, 480)).to_array()
    assert (len(events), events.height, events.width) == (521_252, 480, 640)
    for name, field in (("t", "t"), ("x", "x"), ("y", "y"), ("p", "on")):
        assert np.array_equal(theirs[field], getattr(events, name)), name
    with open_events(path) as source:
        t0 = int(events.t[0])
        part = source.by_time(t0 + 30_000, t0 + 50_000)
        assert _same(part, events[slice(*np.searchsorted(events.t, [t0 + 30_000, t0 + 50_000]))])
        assert _same(source.by_index(400_000, 400_100), events[400_000:400_100])
