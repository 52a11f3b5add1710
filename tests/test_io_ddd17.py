"""DDD17's two memory-mapped files: values, lazy slices, and damage in either of them."""

from __future__ import annotations

import numpy as np
import pytest

from gep.events.io import find_format, open_events, read_events
from gep.events.types import EventFormatError
from tests.fuzz import handmade
from tests.fuzz.seeds import events as some_events


@pytest.fixture
def folder(tmp_path):
    """dir0 with 200 events, 700 ns after each whole µs."""
    path = tmp_path / "dir0"
    path.mkdir()
    for name, content in handmade.ddd17(some_events(200, 260, 346, seed=1, t0=-500), ns=700).items():
        (path / name).write_bytes(content)
    return path


def test_values_by_folder_and_by_file(folder):
    made = some_events(200, 260, 346, seed=1, t0=-500)
    for path in (folder, folder / "events.dat.t", folder / "events.dat.xyp"):
        assert find_format(path).name == "DDD17"
        events = read_events(path)
        assert all(getattr(events, name).tolist() == getattr(made, name).tolist() for name in "txyp")
        assert (events.height, events.width) == (260, 346)
    # By hand: -1 ns is in the µs before 0.
    np.array([-1, 0, 1999], "<i8").tofile(folder / "events.dat.t")
    np.array([[345, 259, 1], [0, 0, 0], [7, 8, 1]], "<i2").tofile(folder / "events.dat.xyp")
    events = read_events(folder)
    assert events.t.tolist() == [-1, 0, 1] and events.x.tolist() == [345, 0, 7] and events.p.tolist() == [1, 0, 1]


def test_slices(folder):
    made = some_events(200, 260, 346, seed=1, t0=-500)
    with open_events(folder) as source:
        assert len(source) == 200 and source.span == (made.t[0], made.t[-1] + 1)
        assert source.by_index(20, 60).y.tolist() == made.y[20:60].tolist()
        for t0, t1 in ((int(made.t[20]), int(made.t[90])), (-(10**18), 10**18), (10**18, 2 * 10**18), (50, -50)):
            inside = (made.t >= t0) & (made.t < t1)
            assert source.by_time(t0, t1).x.tolist() == made.x[inside].tolist()


def test_a_slice_does_not_read_the_rest(folder):
    xyp = np.fromfile(folder / "events.dat.xyp", "<i2").reshape(-1, 3)
    xyp[150] = 346, 0, 0
    xyp.tofile(folder / "events.dat.xyp")
    with open_events(folder) as source:
        assert len(source.by_index(0, 150)) == 150
        with pytest.raises(EventFormatError, match=r"dir0: .*: event 10: x = 346 is outside the sensor's 346 columns"):
            source.by_index(140, 160)
    with pytest.warns(UserWarning, match=r"events\.dat\.t: byte 1200: event 150 .*kept the 150 events.*lost 50 of 200"):
        assert len(read_events(folder, recover=True)) == 150


def test_polarity_and_order(folder):
    xyp = np.fromfile(folder / "events.dat.xyp", "<i2").reshape(-1, 3)
    xyp[9, 2] = 257  # 1 when cut to a byte
    xyp.tofile(folder / "events.dat.xyp")
    with pytest.raises(EventFormatError, match=r"events\.dat\.xyp: byte 58: event 9: p = 257 is no polarity"):
        read_events(folder)
    xyp[9, 2] = 1
    xyp.tofile(folder / "events.dat.xyp")
    t = np.fromfile(folder / "events.dat.t", "<i8")
    t[0] = t[-1] + 1
    t.tofile(folder / "events.dat.t")
    with pytest.raises(EventFormatError, match="event 1: t = .* is before"):
        read_events(folder)
    with pytest.warns(UserWarning, match="kept the 1 events"):
        assert len(read_events(folder, recover=True)) == 1


def test_sizes(folder):
    t = (folder / "events.dat.t").read_bytes()
    (folder / "events.dat.t").write_bytes(t[:-16])
    message = r"events\.dat\.t: byte 1584: .*events\.dat\.t holds 198 events, .*events\.dat\.xyp 200"
    with pytest.raises(EventFormatError, match=message):
        open_events(folder)
    with pytest.warns(UserWarning, match=r"kept the 198 events before it, lost 2 events of the longer file"):
        assert len(read_events(folder, recover=True)) == 198
    (folder / "events.dat.t").write_bytes(t + b"abc")
    with pytest.warns(UserWarning, match=r"events\.dat\.t: byte 1600: dropped a trailing partial record of 3 bytes"):
        assert len(read_events(folder)) == 200
    (folder / "events.dat.t").write_bytes(b"")
    with pytest.raises(EventFormatError, match=r"events\.dat\.t: byte 0: 0 bytes hold no event"):
        read_events(folder)
    (folder / "events.dat.xyp").unlink()
    (folder / "events.dat.t").write_bytes(t)
    with pytest.raises(FileNotFoundError, match=r"events\.dat\.xyp: a DDD17 recording is a folder with"):
        read_events(folder)
