"""Going through recordings window by window, and files read slice by slice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gep.events.io import arrow_source, hdf5, open_events, windows
from gep.events.io.arrow import write_arrow
from gep.events.io.arrow_source import ArrowSource
from gep.events.io.files import FileBytes
from gep.events.io.source import InMemory
from gep.events.types import EventFormatError, Events
from tests.blosc_files import ROWS, same, some_events, write_chunks


@pytest.mark.parametrize(("window_us", "piece"), [(7, 1 << 20), (1000, 2000), (10_000, 500), (10**9, 1000)])
@pytest.mark.parametrize("kind", ["memory", "dsec", "arrow"])
def test_windows_are_those_of_by_time(tmp_path, monkeypatch, kind, window_us, piece):
    events = some_events(20_000)
    monkeypatch.setattr(windows, "_PIECE", piece)
    monkeypatch.setattr(windows, "_EDGES", 50)
    if kind == "dsec":
        write_chunks(tmp_path / "a.h5", events)
    if kind == "arrow":
        write_arrow(tmp_path / "a.arrow", events, compression="lz4", batch=3000)
    files = {"dsec": "a.h5", "arrow": "a.arrow"}
    with InMemory(tmp_path, events) if kind == "memory" else open_events(tmp_path / files[kind]) as source:
        found = list(source.windows(window_us))
        edges = np.array([bounds for _, bounds in found])
        assert edges[0, 0] == events.t[0] and (edges[1:, 0] == edges[:-1, 1]).all()
        assert (edges[:, 1] - edges[:, 0] == window_us).all() and edges[-1, 0] <= events.t[-1] < edges[-1, 1]
        cuts = np.searchsorted(events.t, edges)
        assert all(same(window, events[a:b]) for (window, _), (a, b) in zip(found, cuts.tolist(), strict=True))
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
    events = some_events(20_000)
    monkeypatch.setattr(windows, "_PIECE", 3000)
    if kind == "dsec":
        write_chunks(tmp_path / "a.h5", events)
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
            assert all(same(window, events[a:b]) for (window, _), (a, b) in zip(found, cuts, strict=True))


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
        write_chunks(tmp_path / "a.h5", events)
    with InMemory(tmp_path, events) if kind == "memory" else open_events(tmp_path / "a.h5") as source:
        for name in ("by_time", "by_index"):
            monkeypatch.setattr(source, name, counted(getattr(source, name)))
        for window_us in (100, 1_050_000):  # the longer one alone holds more than a piece
            sizes.clear()
            assert sum(len(window) for window, _ in source.windows(window_us)) == len(t)
            assert max(sizes) <= 4 * windows._PIECE and sum(sizes) <= len(t) + 10 * len(sizes)


@pytest.mark.parametrize("at", [5000, 5001, 6 * ROWS])  # the last one between two chunks
def test_times_that_step_back_are_refused(tmp_path, monkeypatch, at):
    path, events = tmp_path / "a.h5", some_events(20_000)
    monkeypatch.setattr(windows, "_PIECE", 5000)  # at 5000 the step back shows between two pieces only
    events.t[at] = events.t[0] + 1
    write_chunks(path, events)
    with open_events(path) as source, pytest.raises(EventFormatError, match=rf"a\.h5: byte \d+: event {at}: t"):
        list(source.windows(1000))
    events.t[5000:10_000] = events.t[0]
    with pytest.raises(EventFormatError, match=r"a\.h5: event 5000: the time steps back from \d+ to 17"):
        list(InMemory(path, events).windows(1000))


def test_a_closed_source_is_not_read_ahead_of(tmp_path, monkeypatch):
    path = tmp_path / "a.h5"
    monkeypatch.setattr(windows, "_PIECE", 500)
    write_chunks(path, some_events(20_000))
    source = open_events(path)
    going = source.windows(1000)
    next(going)
    source.close()
    with pytest.raises(ValueError, match=r"a\.h5: read after close"):
        list(going)
    assert source._handle._file is None


def test_a_damaged_piece_raises_where_it_is_reached(tmp_path, monkeypatch):
    h5py, path, events = pytest.importorskip("h5py"), tmp_path / "a.h5", some_events(20_000)
    monkeypatch.setattr(windows, "_PIECE", 5000)
    write_chunks(path, events)
    with h5py.File(path) as file:
        info = file["events/x"].id.get_chunk_info_by_coord((12 * ROWS,))
    data, seen = bytearray(path.read_bytes()), 0
    data[info.byte_offset + 40] ^= 0xFF
    path.write_bytes(data)
    with open_events(path) as source:
        with pytest.raises(
            EventFormatError, match=rf"a\.h5: byte {info.byte_offset}: dataset 'events/x', elements 12288"
        ):
            for window, _ in source.windows(1000):
                seen += len(window)
        assert 1000 < seen < 12 * ROWS and same(window, events[seen - len(window) : seen])


def test_pieces_are_whole_chunks(tmp_path, monkeypatch):
    path, events, spans = tmp_path / "a.h5", some_events(20_000), []
    write_chunks(path, events, chunks=700)
    monkeypatch.setattr(hdf5, "_PIECE", 3000)
    with open_events(path) as source:
        assert source.piece == 2800
        read = source.by_index
        monkeypatch.setattr(source, "by_index", lambda *span: spans.append(span) or read(*span))
        t0, t1 = int(events.t[1000]) + 1, int(events.t[15_000])
        found = [window for window, _ in source.windows(500, t0=t0, t1=t1)]
    low, high = np.searchsorted(events.t, [t0, t1]).tolist()
    assert sum(map(len, found)) == high - low
    edges = [low, *range(2800, high, 2800), high]
    assert sorted(spans) == list(itertools.pairwise(edges))


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
    path, events = tmp_path / "a.arrow", some_events(20_000)
    write_arrow(path, events, compression="none", batch=1 << 10)
    source = ArrowSource.from_file(path, mapped=False)
    for start, stop in [(0, 20_000), (500, 600), (1000, 3000), (19_990, 20_000), (5, 5)]:
        assert same(source.by_index(start, stop), events[start:stop])
    begin, end = np.searchsorted(events.t, events.t[[700, 9000]])
    assert same(source.by_time(int(events.t[700]), int(events.t[9000])), events[begin:end])
    content = path.read_bytes()
    byte = ArrowSource.from_file(path)._batch(7).message.buffers[3][0]
    path.write_bytes(content[:byte] + bytes([content[byte] ^ 1]) + content[byte + 1 :])
    source = ArrowSource.from_file(path, mapped=False)
    assert same(source.by_index(0, 7 << 10), events[: 7 << 10])
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
