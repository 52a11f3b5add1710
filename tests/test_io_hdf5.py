"""HDF5 readers against files written by h5py in each data set's layout; slices, damage, processes."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

h5py = pytest.importorskip("h5py", reason='needs the extra: pip install "gep[io]"')
hdf5plugin = pytest.importorskip("hdf5plugin", reason='needs the extra: pip install "gep[io]"')

from gep.events.io import hdf5_handle, open_events, open_hdf5, read_events, write_events  # noqa: E402
from gep.events.io.hdf5_file import open_file  # noqa: E402
from gep.events.types import EventFormatError, Events  # noqa: E402

_OFFSET = 49_599_300_523
_NUM = 20_000


def _columns(num: int = _NUM, height: int = 480, width: int = 640, seed: int = 0):
    rng = np.random.default_rng(seed)
    t = np.cumsum(rng.integers(0, 8, num))
    t[num // 2 :] += 12_345  # a pause of some ms: several entries of the map are equal
    return t, rng.integers(0, width, num), rng.integers(0, height, num), rng.integers(0, 2, num)


def _map(t: np.ndarray) -> np.ndarray:
    """First index with t >= m ms, entry by entry."""
    return np.array([int((t < ms * 1000).sum()) for ms in range(int(t[-1]) // 1000 + 1)], np.uint64)


def _write_dsec(path, t, x, y, p, chunks=1024, **filters):
    filters = filters or dict(hdf5plugin.Blosc(cname="zstd", clevel=1))
    with h5py.File(path, "w") as file:
        for name, values, dtype in (("t", t, "u4"), ("x", x, "u2"), ("y", y, "u2"), ("p", p, "u1")):
            file.create_dataset(
                f"events/{name}", data=values.astype(dtype), chunks=(min(chunks, len(values)),), **filters
            )
        file["ms_to_idx"] = _map(t)
        file["t_offset"] = np.int64(_OFFSET)


def _write_m3ed(path, left, right):
    with h5py.File(path, "w") as file:
        for camera, (t, x, y, p) in (("left", left), ("right", right)):
            group = file.create_group(f"prophesee/{camera}")
            for name, values, dtype in (("t", t, "i8"), ("x", x, "u2"), ("y", y, "u2"), ("p", p, "i1")):
                group.create_dataset(name, data=values.astype(dtype), chunks=(min(700, len(t)),), compression="lzf")
            group["ms_map_idx"] = _map(t)[:-1]  # its writer leaves the last millisecond out


def _write_mvsec(path, left, right):
    with h5py.File(path, "w") as file:
        for camera, (t, x, y, p) in (("left", left), ("right", right)):
            seconds = 1_504_645_177.0 + t / 1e6
            rows = np.stack([x, y, seconds, 2 * p - 1], axis=1).astype("f8")
            file.create_dataset(f"davis/{camera}/events", data=rows, chunks=(512, 4), compression="gzip")
            file[f"davis/{camera}/image_raw"] = np.zeros((1, 260, 346), "u1")


def _write_v2e(path, t, x, y, p):
    with h5py.File(path, "w") as file:
        rows = np.stack([t, x, y, p], axis=1).astype("u4")
        file.create_dataset("events", data=rows, maxshape=(None, 4), chunks=(min(1000, len(t)), 4), compression="gzip")


def _equal(events: Events, t, x, y, p) -> bool:
    pairs = ((events.t, t), (events.x, x), (events.y, y), (events.p, p))
    return all(np.array_equal(a, b) for a, b in pairs)


def _make(layout, path):
    """Writes a file; returns its (t µs absolute, x, y, p), rows, columns."""
    height, width = {"DSEC": (480, 640), "M3ED": (720, 1280)}.get(layout, (260, 346))
    t, x, y, p = _columns(height=height, width=width)
    other = _columns(height=height, width=width, seed=1)
    if layout == "DSEC":
        _write_dsec(path, t, x, y, p)
        t = t + _OFFSET
    elif layout == "M3ED":
        _write_m3ed(path, (t, x, y, p), other)
    elif layout == "MVSEC":
        _write_mvsec(path, (t, x, y, p), other)
        t = t + 1_504_645_177_000_000
    else:
        _write_v2e(path, t, x, y, p)
    return (t, x, y, p), (height, width)


@pytest.mark.parametrize("layout", ["DSEC", "M3ED", "MVSEC", "v2e"])
def test_layouts_hold_exact_values_and_slice_lazily(tmp_path, layout):
    path = tmp_path / "events.h5"
    (t, x, y, p), size = _make(layout, path)
    with open_events(path) as source:
        assert (source.height, source.width) == size and len(source) == _NUM
        assert source.span == (t[0], t[-1] + 1)
        whole = source.read().validate()
        assert _equal(whole, t, x, y, p)
        for start, stop in ((0, 1), (1000, 5001), (-7, _NUM), (5, 5)):
            part = slice(start, stop)
            assert _equal(source.by_index(start, stop), t[part], x[part], y[part], p[part])
        rng = np.random.default_rng(2)
        middle = int(t[_NUM // 2])
        for t0 in (*rng.integers(t[0] - 3000, t[-1] + 3000, 30), t[0], t[-1], t[-1] + 1, middle, middle - 9000):
            for t1 in (t0 + 1, t0 + 700, t0 + 30_000, t0, t0 - 5):
                part = slice(*np.searchsorted(t, [t0, max(t0, t1)]))
                assert _equal(source.by_time(int(t0), int(t1)), t[part], x[part], y[part], p[part]), (t0, t1)
        assert np.array_equal(np.concatenate([chunk.t for chunk in source.chunks(999)]), t)


def test_windows_read_only_what_they_need(tmp_path, monkeypatch):
    path = tmp_path / "events.h5"
    (t, *_), _ = _make("DSEC", path)
    read = []
    original = h5py.Dataset.__getitem__

    def counting(self, key, *args, **kwargs):
        if isinstance(key, slice) and self.name.startswith("/events/"):
            read.append(key.stop - key.start)
        return original(self, key, *args, **kwargs)

    with open_events(path) as source:
        monkeypatch.setattr(h5py.Dataset, "__getitem__", counting)
        events = source.by_time(int(t[5000]), int(t[6000]))
    assert len(read) == 4 and max(read) < len(events) + 600  # at most a millisecond more on either side


def test_the_right_camera(tmp_path):
    for layout in ("M3ED", "MVSEC"):
        path = tmp_path / f"{layout}.h5"
        _, (height, width) = _make(layout, path)
        t, x, y, p = _columns(height=height, width=width, seed=1)
        right = open_hdf5(path, camera="right").read()
        assert _equal(right, t + (1_504_645_177_000_000 if layout == "MVSEC" else 0), x, y, p)
    with pytest.raises(ValueError, match="left and right"):
        open_hdf5(path, camera="middle")


def test_sensor_size_from_file_or_caller(tmp_path):
    path = tmp_path / "a.h5"
    t, x, y, p = _columns(50, 100, 200)
    _write_v2e(path, t, x, y, p)
    assert read_events(path, height=100, width=200).width == 200
    with pytest.raises(EventFormatError, match=r"byte \d+: event \d+: y = \d+ is outside the sensor's 10 rows"):
        read_events(path, height=10, width=200)
    with h5py.File(path, "a") as file:
        file.attrs["height"], file.attrs["width"] = 100, 200
    assert (read_events(path).height, read_events(path).width) == (100, 200)
    _write_m3ed(path, (t, x, y, p), (t, x, y, p))
    with h5py.File(path, "a") as file:
        file["prophesee/left/calib/resolution"] = np.array([320, 240])
    assert (read_events(path).height, read_events(path).width) == (240, 320)


@pytest.mark.parametrize("wrong", ["shifted", "short", "huge"])
def test_a_wrong_map_does_not_give_wrong_windows(tmp_path, wrong):
    path = tmp_path / "a.h5"
    (t, x, y, p), _ = _make("DSEC", path)
    with h5py.File(path, "a") as file:
        index = file["ms_to_idx"][:]
        del file["ms_to_idx"]
        changed = {"shifted": index + 700, "short": index[:3], "huge": index + np.uint64(2**63)}[wrong]
        file["ms_to_idx"] = changed
    with open_events(path) as source:
        for t0 in range(int(t[0]) - 500, int(t[-1]), 9_000):
            part = slice(*np.searchsorted(t, [t0, t0 + 7000]))
            assert _equal(source.by_time(t0, t0 + 7000), t[part], x[part], y[part], p[part])


def _broken(path):
    """Flips a byte inside the compressed chunk of elements 10240..11263 of events/x; returns its byte."""
    with h5py.File(path) as file:
        info = file["events/x"].id.get_chunk_info_by_coord((10_240,))
    data = bytearray(path.read_bytes())
    data[info.byte_offset : info.byte_offset + 30] = b"\xff" * 30
    path.write_bytes(data)
    return info.byte_offset


def test_damage_names_dataset_elements_and_byte(tmp_path):
    path = tmp_path / "a.h5"
    (t, x, y, p), _ = _make("DSEC", path)
    byte = _broken(path)
    with open_events(path) as source:
        assert _equal(source.by_index(0, 10_240), t[:10_240], x[:10_240], y[:10_240], p[:10_240])
        with pytest.raises(EventFormatError, match=rf"a\.h5: byte {byte}: dataset 'events/x', elements 10240\.\.11263"):
            source.read()
    with pytest.warns(UserWarning, match=rf"byte {byte}: .*kept the 10,240 events before it, lost 9,760 of 20,000"):
        events = read_events(path, recover=True)
    assert _equal(events, t[:10_240], x[:10_240], y[:10_240], p[:10_240])


def test_faulty_values_recover_to_the_event(tmp_path):
    path = tmp_path / "a.h5"
    t, x, y, p = _columns()
    x[7777] = 640
    _write_dsec(path, t, x, y, p)
    with pytest.raises(EventFormatError, match=r"a\.h5: byte \d+: event 7777: x = 640 is outside the sensor's 640"):
        read_events(path)
    with pytest.warns(UserWarning, match="kept the 7,777 events"):
        assert _equal(read_events(path, recover=True), t[:7777] + _OFFSET, x[:7777], y[:7777], p[:7777])
    x[7777], t[4096] = 0, 5  # exactly on a chunk's border: the step back shows between two reads
    _write_dsec(path, t, x, y, p)
    with pytest.warns(UserWarning, match="kept the 4,096 events"):
        assert len(read_events(path, recover=True)) == 4096


def test_truncated_files(tmp_path):
    path = tmp_path / "a.h5"
    t, x, y, p = _columns()
    _write_v2e(path, t, x % 346, y % 260, p)
    content = path.read_bytes()
    for part in (0.0, 0.001, 0.1, 0.5, 0.9, 0.99):
        path.write_bytes(content[: int(len(content) * part)])
        with pytest.raises(EventFormatError, match=r"a\.h5: byte 0"):
            read_events(path)
        if part < 0.1:  # not even the dataset's description is there
            with pytest.raises(EventFormatError, match=r"a\.h5: byte 0"):
                read_events(path, recover=True)
            continue
        with pytest.warns(UserWarning, match=r"byte \d+: dataset 'events' is cut off before element \d+000; kept the"):
            events = read_events(path, recover=True)
        assert part - 0.1 <= len(events) / _NUM <= part
        assert _equal(events, *(values[: len(events)] for values in (t, x % 346, y % 260, p)))


def test_flipped_bytes_never_give_invalid_events(tmp_path):
    path = tmp_path / "a.h5"
    _make("MVSEC", path)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for at in (*rng.integers(0, 4000, 60), *rng.integers(0, len(content), 40)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        try:
            with open_events(path) as source:
                source.read().validate()
                source.by_time(1_504_645_177_000_000, 1_504_645_177_010_000).validate()
        except EventFormatError as error:
            assert "a.h5" in str(error)


def test_other_and_impossible_files(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["frames"] = np.zeros(3)
    with pytest.raises(EventFormatError, match=r"no known event layout; looked for DSEC: events/t.*it holds frames"):
        read_events(path)
    with h5py.File(path, "w") as file:
        file["events"] = np.zeros((3, 5), "u4")
    with pytest.raises(EventFormatError, match=r"'events' is uint32 \(3, 5\), expected numbers of shape \(N, 4\)"):
        read_events(path)
    with h5py.File(path, "w") as file:
        file.create_dataset("events", (1 << 50, 4), "u4", chunks=(1000, 4))
    with pytest.raises(EventFormatError, match="which a file of .* bytes cannot hold"):
        read_events(path)
    with h5py.File(path, "w") as file:
        file["events"] = np.zeros((0, 4), "u4")
    with pytest.raises(EventFormatError, match="holds no events"):
        read_events(path)
    t, x, y, p = _columns(9)
    _write_dsec(path, t, x, y, p[:8])
    with pytest.raises(EventFormatError, match=r"'events/p' has 8 entries where 'events/t' has 9"):
        read_events(path)


def test_missing_libraries_name_the_extra(tmp_path, monkeypatch):
    path = tmp_path / "a.h5"
    _make("DSEC", path)
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda code: False)
    with pytest.raises(ImportError, match=r"filter 32001 \(Blosc\).*pip install \"gep\[io\]\""):
        read_events(path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"needs h5py: pip install \"gep\[io\]\""):
        read_events(path)


def _child(source, queue):
    queue.put(int(source.by_index(10, 20).t.sum()))


def test_handles_do_not_cross_processes(tmp_path):
    path = tmp_path / "a.h5"
    (t, x, y, p), _ = _make("DSEC", path)
    source = open_events(path)
    expected = int(source.by_index(10, 20).t.sum())
    parent = source._handle.file()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_child, args=(source, queue))
    process.start()
    assert queue.get(timeout=60) == expected == int(t[10:20].sum())
    process.join()
    copy = pickle.loads(pickle.dumps(source))
    assert copy._handle._file is None and _equal(copy.read(), t, x, y, p)
    assert source._handle.file() is parent and _equal(source.by_index(0, 9), t[:9], x[:9], y[:9], p[:9])


def test_a_closed_source_stays_closed(tmp_path):
    (t, *_), _ = _make("DSEC", tmp_path / "a.h5")
    source = open_events(tmp_path / "a.h5")
    source.close()
    for read in (source.read, lambda: source.by_time(int(t[5]), int(t[9])), pickle.loads(pickle.dumps(source)).read):
        with pytest.raises(ValueError, match=r"a\.h5: read after close\(\); open it again"):
            read()


def test_threads_open_a_file_once(tmp_path, monkeypatch):
    path, opened = tmp_path / "a.h5", []
    _make("DSEC", path)

    def slow(*args):
        time.sleep(0.05)
        opened.append(open_file(*args))
        return opened[-1]

    source = pickle.loads(pickle.dumps(open_events(path)))  # as after a fork: no handle yet
    monkeypatch.setattr(hdf5_handle, "open_file", slow)
    with ThreadPoolExecutor(4) as pool:
        sums = {int(events.t.sum()) for events in pool.map(lambda _: source.by_index(10, 20), range(4))}
    assert len(opened) == len(sums) == 1


@pytest.mark.parametrize("compression", ["lz4", "zstd", "gzip", "none"])
def test_written_files_are_in_the_dsec_layout(tmp_path, compression):
    path = tmp_path / "a.h5"
    t, x, y, p = _columns(height=100, width=120)
    events = Events.from_arrays(t + _OFFSET, x, y, p, height=100, width=120)
    write_events(path, events, compression=compression)
    with h5py.File(path) as file:
        relative = file["events/t"][:].astype(np.int64)
        assert int(file["t_offset"][()]) + relative[0] == t[0] + _OFFSET and file["events/t"].dtype == np.uint32
        assert np.array_equal(file["ms_to_idx"][:], _map(relative))
    again = read_events(path)
    assert _equal(again, t + _OFFSET, x, y, p) and (again.height, again.width) == (100, 120)
    with open_events(path) as source:  # as a stream, too
        write_events(tmp_path / "b.h5", source)
    assert (tmp_path / "b.h5").exists() and _equal(read_events(tmp_path / "b.h5"), t + _OFFSET, x, y, p)


def test_what_the_dsec_layout_cannot_hold(tmp_path):
    path = tmp_path / "a.h5"
    for t, message in (([0, 2**32], "71 minutes"), ([], "empty recording")):
        zeros = [0] * len(t)
        with pytest.raises(ValueError, match=message):
            write_events(path, Events.from_arrays(t, zeros, zeros, zeros, height=2, width=2))
    assert list(tmp_path.iterdir()) == []
