"""Readers against hand-made bytes, an independent decoder and real files; damage ends in one clear error."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gep.events.io import read_bin, read_events, write_bin
from gep.events.types import EventFormatError, Events


def _record(x, y, p, t) -> bytes:
    return bytes([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255])


def _same(a: Events, b: Events) -> bool:
    arrays = all(np.array_equal(getattr(a, f), getattr(b, f)) for f in "txyp")
    return arrays and (a.height, a.width) == (b.height, b.width)


def _decode(path) -> np.ndarray:
    """(N, 4) x, y, p, t of a .bin, column by column in NumPy."""
    rows = np.fromfile(path, np.uint8).reshape(-1, 5).astype(np.int64)
    t = (rows[:, 2] % 128 * 256 + rows[:, 3]) * 256 + rows[:, 4] + 8192 * np.cumsum(rows[:, 1] == 240)
    return np.stack([rows[:, 0], rows[:, 1], rows[:, 2] // 128, t], axis=1)[rows[:, 1] != 240]


def test_bin_by_hand_with_overflow_rows(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(_record(1, 2, 1, 5) + _record(0, 240, 0, 0) + _record(33, 33, 0, 0x7FFFFF) + _record(9, 240, 1, 7))
    events = read_events(path)
    assert events.t.tolist() == [5, 0x7FFFFF + 8192]
    assert events.x.tolist() == [1, 33] and events.y.tolist() == [2, 33] and events.p.tolist() == [1, 0]
    assert (events.height, events.width) == (34, 34)
    assert (events.t.dtype, events.x.dtype, events.p.dtype) == (np.int64, np.uint16, np.uint8)


def test_bin_sensor_size(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(_record(34, 0, 1, 5))
    assert (read_bin(path).height, read_bin(path).width) == (180, 240)
    assert read_events(path, height=40, width=50).width == 50
    with pytest.raises(EventFormatError, match=r"a\.bin: byte 0: event at x = 34, y = 0 lies outside the 34x34"):
        read_bin(path, height=34, width=34)
    with pytest.raises(ValueError, match="both height and width"):
        read_events(path, height=34)
    path.write_bytes(_record(0, 240, 0, 0) + _record(1, 1, 0, 0) + _record(1, 200, 1, 5))
    with pytest.raises(EventFormatError, match=r"byte 10: event at x = 1, y = 200 fits neither"):
        read_bin(path)


def test_bin_damage_names_file_and_byte(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(_record(1, 1, 0, 9) + _record(1, 1, 0, 8))
    with pytest.raises(EventFormatError, match=r"a\.bin: byte 5: the time steps back"):
        read_events(path)
    for content, message in ((b"", "byte 0: the file is empty"), (b"abc", "3 bytes hold no 5-byte")):
        path.write_bytes(content)
        with pytest.raises(EventFormatError, match=message):
            read_events(path)
    path.write_bytes(_record(1, 1, 0, 9) + b"ab")
    with pytest.warns(UserWarning, match=r"a\.bin: byte 5: dropped a trailing partial record of 2 bytes"):
        assert len(read_events(path)) == 1


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 12_000_000), st.integers(0, 239), st.integers(0, 179)), min_size=1))
def test_bin_round_trip(tmp_path_factory, rows):
    t, x, y = np.array(sorted(rows)).T
    events = Events.from_arrays(t, x, y, (x + y) % 2, height=180, width=240)
    path = tmp_path_factory.mktemp("bin") / "a.bin"
    write_bin(path, events)
    assert _same(read_bin(path, height=180, width=240), events)
    assert (t[-1] >= 2**23) == (path.stat().st_size > 5 * len(events))


def test_write_bin_refuses_what_does_not_fit_and_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    good = Events.from_arrays([1], [1], [1], [1], height=300, width=300)
    write_bin(path, good)
    before = path.read_bytes()
    for t, x, y, message in (
        ([-1], [0], [0], r"0 <= t < 2\*\*32"),
        ([2**32], [0], [0], r"subtract the first time"),
        ([0], [256], [0], "x < 256"),
        ([0], [0], [240], "y < 240"),
        ([], [], [], "empty recording"),
    ):
        with pytest.raises(ValueError, match=message):
            write_bin(path, Events.from_arrays(t, x, y, [1] * len(t), height=300, width=300))

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_bin(path, good)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.bin"]


def test_real_bin_files(real_data):
    mnist = read_events(real_data / "recordings" / "nmnist.bin")
    caltech = read_events(real_data / "recordings" / "ncaltech101.bin")
    assert (len(mnist), mnist.height, mnist.width) == (4325, 34, 34)
    assert (len(caltech), caltech.height, caltech.width) == (67445, 180, 240)
    for events, name in ((mnist, "nmnist.bin"), (caltech, "ncaltech101.bin")):
        columns = np.stack([events.x, events.y, events.p, events.t], axis=1)
        assert np.array_equal(columns, _decode(real_data / "recordings" / name))


def test_real_nmnist_files_decode(real_data, tmp_path):
    paths = sorted((real_data / "nmnist").glob("T*/*/*.bin"))
    assert paths
    for path in paths[::10]:
        events = read_events(path).validate(str(path))
        assert (events.height, events.width) == (34, 34) and len(events) > 100
    write_bin(tmp_path / "copy.bin", events)
    assert (tmp_path / "copy.bin").read_bytes() == path.read_bytes()


_T, _X, _Y = np.array([5, 5, 900]), np.array([639, 0, 3]), np.array([479, 1, 2])


@pytest.mark.parametrize("polarity", [np.array([1, 0, 1]), np.array([True, False, True]), np.array([1, -1, 1])])
@pytest.mark.parametrize("layout", ["structured", "old"])
def test_npz_layouts(tmp_path, layout, polarity):
    path = tmp_path / "n01440764_1.npz"
    if layout == "structured":
        fields = [("x", np.uint16), ("y", np.uint16), ("t", np.int64), ("p", polarity.dtype)]
        rows = np.zeros(3, fields)
        rows["x"], rows["y"], rows["t"], rows["p"] = _X, _Y, _T, polarity
        np.savez_compressed(path, event_data=rows)
    else:
        np.savez(path, x_pos=_X, y_pos=_Y, timestamp=_T, polarity=polarity)
    events = read_events(path)
    assert (events.height, events.width) == (480, 640) and events.x.flags.c_contiguous
    assert events.t.tolist() == _T.tolist() and events.x.tolist() == _X.tolist()
    assert events.y.tolist() == _Y.tolist() and events.p.tolist() == [1, 0, 1]


def test_npz_faults(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, frames=np.zeros(3))
    with pytest.raises(EventFormatError, match=r"a\.npz: keys are frames; an N-ImageNet file has 'event_data'"):
        read_events(path)
    np.savez(path, event_data=np.zeros((3, 4)))
    with pytest.raises(EventFormatError, match="expected \\(N,\\) with the fields x, y, t, p"):
        read_events(path)
    np.savez(path, event_data=np.array([{"x": 1}], dtype=object))
    with pytest.raises(EventFormatError, match="allow_pickle"):
        read_events(path)
    np.savez(path, x_pos=_X, y_pos=_Y, timestamp=_T[::-1], polarity=_X % 2)
    with pytest.raises(EventFormatError, match=r"a\.npz: event 1: t = 5 µs is before"):
        read_events(path)
    np.savez(path, x_pos=_X, y_pos=_Y, timestamp=_T, polarity=_X % 2)
    with pytest.raises(EventFormatError, match=r"a\.npz: event 0: x = 639 is outside the sensor's 346"):
        read_events(path, height=260, width=346)
    empty = np.zeros(0, int)
    np.savez(path, x_pos=empty, y_pos=empty, timestamp=empty, polarity=empty)
    with pytest.raises(EventFormatError, match="holds no events"):
        read_events(path)


def test_npy_of_est(tmp_path):
    path = tmp_path / "a.npy"
    seconds = np.array([0.1, 0.1, 1_700_000_000.123457])
    rows = np.stack([[0, 239, 3], [179, 0, 2], seconds, [-1, 1, -1]], axis=1).astype(np.float64)
    np.save(path, rows)
    events = read_events(path)
    assert events.t.tolist() == [100_000, 100_000, 1_700_000_000_123_457]
    assert events.x.tolist() == [0, 239, 3] and events.p.tolist() == [0, 1, 0]
    assert (events.height, events.width) == (180, 240)
    np.save(path, np.asfortranarray(rows[:2].astype(np.float32)))
    assert read_events(path).t.tolist() == [100_000, 100_000]
    rows[1, 2] = np.nan
    np.save(path, rows)
    at = path.stat().st_size - rows.nbytes + 32
    with pytest.raises(EventFormatError, match=rf"a\.npy: byte {at}: event 1 is not finite"):
        read_events(path)
    np.save(path, np.zeros((3, 5)))
    with pytest.raises(EventFormatError, match=r"holds float64 \(3, 5\), expected float \(N, 4\)"):
        read_events(path)


def test_what_a_file_holds_counts_more_than_its_name(tmp_path):
    path = tmp_path / "a.bin"
    with open(path, "wb") as file:
        np.savez(file, x_pos=_X, y_pos=_Y, timestamp=_T, polarity=_X % 2)
    assert len(read_events(path)) == 3
    (tmp_path / "a.npz").write_bytes(b"not an archive")
    with pytest.raises(EventFormatError, match=r"a\.npz: not a readable \.npz archive"):
        read_events(tmp_path / "a.npz")
    with open(tmp_path / "b.npz", "wb") as file:
        np.save(file, np.array([[3, 4, 0.5, 1]]))
    assert read_events(tmp_path / "b.npz").t.tolist() == [500_000]
    (tmp_path / "a.npy").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(EventFormatError, match=r"not a readable \.npy"):
        read_events(tmp_path / "a.npy")
    (tmp_path / "a.xyz").write_bytes(b"12345")
    with pytest.raises(EventFormatError, match=r"unknown event format; known are .*npz.*\.npy.*bin \(\.bin: N-MNIST"):
        read_events(tmp_path / "a.xyz")
    with pytest.raises(FileNotFoundError, match=r"none\.bin"):
        read_events(tmp_path / "none.bin")


@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_cut_and_flipped_files_never_give_garbage(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    rng = np.random.default_rng(0)
    t, x, y, p = np.sort(rng.integers(0, 10**6, 200)), rng.integers(0, 240, 200), rng.integers(0, 180, 200), 1
    if kind == "npz":
        np.savez_compressed(path, x_pos=x, y_pos=y, timestamp=t, polarity=np.full(200, p))
    else:
        np.save(path, np.stack([x, y, t / 1e6, np.full(200, p)], axis=1))
    good, content = read_events(path), path.read_bytes()
    for size in range(1, len(content), 97):
        path.write_bytes(content[:size])
        with pytest.raises(EventFormatError, match=path.name):
            read_events(path)
    if kind == "npz":  # A zip carries checksums: what still reads must be what was written.
        for at in rng.integers(0, len(content), 150):
            path.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
            try:
                assert _same(read_events(path), good)
            except EventFormatError as error:
                assert path.name in str(error)
