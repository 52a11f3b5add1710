"""Going through recordings window by window, unpacking many Blosc chunks at once, and files read slice by slice."""

from __future__ import annotations

import numpy as np
import pytest

from gep.events.io import arrow_source, blosc, open_events, windows
from gep.events.io.arrow import write_arrow
from gep.events.io.arrow_source import ArrowSource
from gep.events.io.files import FileBytes
from gep.events.io.source import InMemory
from gep.events.types import EventFormatError, Events

_ROWS = 1024  # of a chunk


def _some(count: int, seed: int = 0) -> Events:
    rng = np.random.default_rng(seed)
    t = 1_700_000_000_000_000 + np.cumsum(rng.integers(0, 8, count))
    t[count // 2 :] += 12_345
    x, y, p = rng.integers(0, 640, count), rng.integers(0, 480, count), rng.integers(0, 2, count)
    return Events.from_arrays(t, x, y, p, height=480, width=640)


def _same(a: Events, b: Events) -> bool:
    pairs = [(getattr(a, name), getattr(b, name)) for name in "txyp"]
    return all(np.array_equal(left, right) and left.dtype == right.dtype for left, right in pairs)


def _write_dsec(path, events, chunks=_ROWS, t="u4", **settings):
    h5py, hdf5plugin = pytest.importorskip("h5py"), pytest.importorskip("hdf5plugin")
    packed = hdf5plugin.Blosc(**{"cname": "zstd", "clevel": 1, "shuffle": hdf5plugin.Blosc.SHUFFLE} | settings)
    first = int(events.t[0]) if t == "u4" else 0
    with h5py.File(path, "w") as file:
        for name, dtype in (("t", t), ("x", "u2"), ("y", "u2"), ("p", "u1")):
            values = getattr(events, name) - (first if name == "t" else 0)
            file.create_dataset(f"events/{name}", data=values.astype(dtype), chunks=(chunks,), **packed)
        file["t_offset"] = np.int64(first)


@pytest.fixture
def h5py_reads(monkeypatch):
    """How often h5py itself read a stretch of a dataset."""
    h5py = pytest.importorskip("h5py")
    reads, original = [], h5py.Dataset.__getitem__

    def counting(self, key, *args, **kwargs):
        if isinstance(key, slice) and (key.stop or 0) - (key.start or 0) > 1:
            reads.append(self.name)
        return original(self, key, *args, **kwargs)

    monkeypatch.setattr(h5py.Dataset, "__getitem__", counting)
    return reads


@pytest.mark.parametrize(("window_us", "piece"), [(7, 1 << 20), (1000, 2000), (10_000, 500), (10**9, 1000)])
@pytest.mark.parametrize("kind", ["memory", "dsec", "arrow"])
def test_windows_are_those_of_by_time(tmp_path, monkeypatch, kind, window_us, piece):
    events = _some(20_000)
    monkeypatch.setattr(windows, "_PIECE", piece)
    monkeypatch.setattr(windows, "_EDGES", 50)
    if kind == "dsec":
        _write_dsec(tmp_path / "a.h5", events)
    if kind == "arrow":
        write_arrow(tmp_path / "a.arrow", events, compression="lz4", batch=3000)
    files = {"dsec": "a.h5", "arrow": "a.arrow"}
    with InMemory(tmp_path, events) if kind == "memory" else open_events(tmp_path / files[kind]) as source:
        found = list(source.windows(window_us))
        edges = np.array([bounds for _, bounds in found])
        assert edges[0, 0] == events.t[0] and (edges[1:, 0] == edges[:-1, 1]).all()
        assert (edges[:, 1] - edges[:, 0] == window_us).all() and edges[-1, 0] <= events.t[-1] < edges[-1, 1]
        cuts = np.searchsorted(events.t, edges)
        assert all(_same(window, events[a:b]) for (window, _), (a, b) in zip(found, cuts.tolist(), strict=True))
        assert (cuts[0, 0], cuts[-1, 1]) == (0, len(events))


def test_windows_within_given_times():
    source = InMemory("a", Events.from_arrays([0, 1, 2, 3, 10], [0] * 5, [0] * 5, [0] * 5, height=1, width=1))

    def times(*args, **kwargs):
        return [(window.t.tolist(), bounds) for window, bounds in source.windows(*args, **kwargs)]

    assert times(4) == [([0, 1, 2, 3], (0, 4)), ([], (4, 8)), ([10], (8, 12))]
    # The events of the last window end at t1, its bounds do not.
    assert times(2, t0=-1, t1=2) == [([0], (-1, 1)), ([1], (1, 3))]
    assert times(3, t0=11) == [] and times(3, t0=5, t1=5) == []
    with pytest.raises(ValueError, match="at least 1 µs"):
        source.windows(0)
    with pytest.raises(ValueError, match="before t0"):
        source.windows(5, t0=3, t1=2)


@pytest.mark.parametrize("kind", ["memory", "dsec", "arrow"])
def test_windows_between_given_times_read_no_others(tmp_path, monkeypatch, kind):
    events = _some(20_000)
    monkeypatch.setattr(windows, "_PIECE", 3000)
    if kind == "dsec":
        _write_dsec(tmp_path / "a.h5", events)
    if kind == "arrow":
        write_arrow(tmp_path / "a.arrow", events, compression="lz4", batch=3000)
    files = {"dsec": "a.h5", "arrow": "a.arrow"}
    first, last = int(events.t[0]), int(events.t[-1])
    with InMemory(tmp_path, events) if kind == "memory" else open_events(tmp_path / files[kind]) as source:
        for t in (first - 5, first, first + 1, int(events.t[777]), int(events.t[9999]) + 50, last, last + 1, last + 9):
            assert source.before(t) == np.searchsorted(events.t, t)
        for t0, t1 in (
            (first - 70, first + 900),
            (first + 333, last - 444),
            (last - 5, last + 90),
            (last + 3, last + 9),
        ):
            found = list(source.windows(500, t0=t0, t1=t1))
            assert [bounds for _, bounds in found] == [(t, t + 500) for t in range(t0, t1, 500)]
            cuts = [np.searchsorted(events.t, [a, min(b, t1)]) for _, (a, b) in found]
            assert all(_same(window, events[a:b]) for (window, _), (a, b) in zip(found, cuts, strict=True))


@pytest.mark.parametrize("kind", ["memory", "dsec"])
def test_no_more_than_a_piece_is_read_at_once_where_the_rate_rises(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(windows, "_PIECE", 1000)
    t = np.concatenate([np.arange(0, 1_000_000, 1000), np.arange(1_000_000, 1_100_000)])
    zero = np.zeros_like(t)
    events, sizes = Events.from_arrays(t, zero, zero, zero, height=1, width=1), []

    def counted(read):
        def counting(*args):
            found = read(*args)
            sizes.append(len(found))
            return found

        return counting

    if kind == "dsec":
        _write_dsec(tmp_path / "a.h5", events)
    with InMemory(tmp_path, events) if kind == "memory" else open_events(tmp_path / "a.h5") as source:
        for name in ("by_time", "by_index"):
            monkeypatch.setattr(source, name, counted(getattr(source, name)))
        for window_us in (100, 1_050_000):  # the longer one alone holds more than a piece
            sizes.clear()
            assert sum(len(window) for window, _ in source.windows(window_us)) == len(t)
            assert max(sizes) <= 4 * windows._PIECE and sum(sizes) <= len(t) + 10 * len(sizes)


@pytest.mark.parametrize("at", [5000, 5001])
def test_times_that_step_back_are_refused(tmp_path, monkeypatch, at):
    path, events = tmp_path / "a.h5", _some(20_000)
    monkeypatch.setattr(windows, "_PIECE", 5000)  # at 5000 the step back shows between two pieces only
    events.t[at] = events.t[0] + 1
    _write_dsec(path, events)
    with open_events(path) as source, pytest.raises(EventFormatError, match=rf"a\.h5: byte \d+: event {at}: t"):
        list(source.windows(1000))
    events.t[5000:10_000] = events.t[0]
    with pytest.raises(EventFormatError, match=r"a\.h5: event 5000: the time steps back from \d+ to 17"):
        list(InMemory(path, events).windows(1000))


def test_a_closed_source_is_not_read_ahead_of(tmp_path, monkeypatch):
    path = tmp_path / "a.h5"
    monkeypatch.setattr(windows, "_PIECE", 500)
    _write_dsec(path, _some(20_000))
    source = open_events(path)
    going = source.windows(1000)
    next(going)
    source.close()
    with pytest.raises(ValueError, match=r"a\.h5: read after close"):
        list(going)
    assert source._handle._file is None


def test_a_damaged_piece_raises_where_it_is_reached(tmp_path, monkeypatch):
    h5py, path, events = pytest.importorskip("h5py"), tmp_path / "a.h5", _some(20_000)
    monkeypatch.setattr(windows, "_PIECE", 5000)
    _write_dsec(path, events)
    with h5py.File(path) as file:
        info = file["events/x"].id.get_chunk_info_by_coord((12 * _ROWS,))
    data, seen = bytearray(path.read_bytes()), 0
    data[info.byte_offset + 40] ^= 0xFF
    path.write_bytes(data)
    with open_events(path) as source:
        with pytest.raises(
            EventFormatError, match=rf"a\.h5: byte {info.byte_offset}: dataset 'events/x', elements 12288"
        ):
            for window, _ in source.windows(1000):
                seen += len(window)
        assert 1000 < seen < 12 * _ROWS and _same(window, events[seen - len(window) : seen])


@pytest.mark.parametrize("t", ["u4", "i8"])
def test_many_blosc_chunks_are_read_without_h5py(tmp_path, h5py_reads, t):
    path, events = tmp_path / "a.h5", _some(40_000)
    # Blocks of several to a chunk, the last one shorter; the last chunk is not full.
    _write_dsec(path, events, chunks=9000, t=t)
    with open_events(path) as source:
        h5py_reads.clear()
        assert _same(source.read(), events)
        assert _same(source.by_index(100, 39_000), events[100:39_000])
        assert not h5py_reads
        assert _same(source.by_index(100, 200), events[100:200])
        assert h5py_reads


@pytest.mark.parametrize("settings", [{"cname": "lz4"}, {"shuffle": 0}, {"shuffle": 2}, {"clevel": 0}])
def test_other_ways_of_packing_are_left_to_h5py(tmp_path, h5py_reads, settings):
    path, events = tmp_path / "a.h5", _some(20_000)
    _write_dsec(path, events, **settings)
    with open_events(path) as source:
        h5py_reads.clear()
        assert _same(source.read(), events)
    assert h5py_reads


def test_flipped_bytes_of_a_chunk_read_as_h5py_reads_them(tmp_path):
    h5py, path, events = pytest.importorskip("h5py"), tmp_path / "a.h5", _some(6 * _ROWS)
    _write_dsec(path, events)
    with h5py.File(path) as file:
        info = file["events/x"].id.get_chunk_info_by_coord((2 * _ROWS,))
    content, refused = path.read_bytes(), 0
    places = [*range(60), *np.random.default_rng(0).integers(60, info.size, 60).tolist()]
    for place in places:
        at = info.byte_offset + place
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x41]) + content[at + 1 :])
        with h5py.File(path) as file:
            try:
                expected = file["events/x"][:]
            except OSError:
                expected = None
        try:
            with open_events(path) as source:
                found = source.read().validate()
            assert expected is not None and np.array_equal(found.x, expected), place
        except EventFormatError as error:
            refused += 1
            assert "a.h5: byte" in str(error) and (expected is None or expected.max() >= 640)
    assert refused > 40


def test_a_damaged_last_block_is_not_read_past_its_end(monkeypatch):
    for name in ("_number", "_content"):  # compiled, they check no index
        monkeypatch.setattr(blosc, name, getattr(blosc, name).py_func)
    for length in (12, 13, 14):
        head = [bytes([2, 1, 0x91, 1])] + [n.to_bytes(4, "little") for n in (99, 99, 24 + length, 20, length)]
        # A zstd frame whose header says that 8 bytes with the unpacked size follow.
        frame = 0xFD2FB528.to_bytes(4, "little") + bytes([0xC0, 0]) + (99).to_bytes(8, "little")
        chunk = np.frombuffer(b"".join(head) + frame[:length], np.uint8)
        found = blosc._frames.py_func(chunk, 99, 1, np.empty(99, np.uint8), 0)
        assert found == ((14, 99) if length == 14 else (-1, 0))


def test_a_file_read_slice_by_slice(tmp_path):
    path, rng = tmp_path / "a", np.random.default_rng(0)
    content = rng.bytes(50_001)
    path.write_bytes(content)
    data = FileBytes(path)
    assert len(data) == 50_001
    for begin, end in [
        (0, 6),
        (49_990, 60_000),
        (-4, None),
        (9, 9),
        (60_000, 60_010),
        *rng.integers(0, 50_001, (50, 2)),
    ]:
        assert bytes(data[begin:end]) == content[begin:end] and data[begin:end].readonly
    kept = data[13:9000]
    data.close()
    assert bytes(kept) == content[13:9000]
    with pytest.raises(OSError):
        data[40_000:40_010]
    with pytest.raises(FileNotFoundError):
        FileBytes(tmp_path / "b")


def test_a_container_read_slice_by_slice(tmp_path):
    path, events = tmp_path / "a.arrow", _some(20_000)
    write_arrow(path, events, compression="none", batch=1 << 10)
    source = ArrowSource.from_file(path, mapped=False)
    for start, stop in [(0, 20_000), (500, 600), (1000, 3000), (19_990, 20_000), (5, 5)]:
        assert _same(source.by_index(start, stop), events[start:stop])
    begin, end = np.searchsorted(events.t, events.t[[700, 9000]])
    assert _same(source.by_time(int(events.t[700]), int(events.t[9000])), events[begin:end])
    content = path.read_bytes()
    byte = ArrowSource.from_file(path)._batch(7).message.buffers[3][0]
    path.write_bytes(content[:byte] + bytes([content[byte] ^ 1]) + content[byte + 1 :])
    source = ArrowSource.from_file(path, mapped=False)
    assert _same(source.by_index(0, 7 << 10), events[: 7 << 10])
    with pytest.raises(EventFormatError, match="checksum differs"):
        source.by_index(0, (7 << 10) + 1)
    path.write_bytes(content[:-100])
    with pytest.raises(EventFormatError, match="truncated"):
        ArrowSource.from_file(path, mapped=False)
    with open(path, "r+b") as file:  # cut off while it is open
        file.write(content)
        file.truncate(len(content))
        source = ArrowSource.from_file(path, mapped=False)
        file.truncate(100_000)
    with pytest.raises(EventFormatError):
        source.read()
    with pytest.raises(ValueError, match="1 to 65,536"):
        write_arrow(path, events, batch=arrow_source.BATCH + 1)
