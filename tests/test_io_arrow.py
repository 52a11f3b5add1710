"""The native container against pyarrow's own reader; slices, damage, hostile sizes, processes."""

from __future__ import annotations

import multiprocessing
import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gep.events.io import arrow_source, open_events, read_events, write_events
from gep.events.io.arrow import BATCH, COMPRESSIONS, from_bytes, to_bytes, write_arrow
from gep.events.types import EventFormatError, Events


def _some(count: int, seed: int = 0, step: int = 3, start: int = 1_700_000_000_000_000) -> Events:
    rng = np.random.default_rng(seed)
    t = start + np.cumsum(rng.integers(0, step, count))
    x, y, p = rng.integers(0, 640, count), rng.integers(0, 480, count), rng.integers(0, 2, count)
    return Events.from_arrays(t, x, y, p, height=480, width=640)


def _same(a: Events, b: Events) -> bool:
    arrays = all(np.array_equal(getattr(a, f), getattr(b, f)) for f in "txyp")
    dtypes = all(getattr(a, f).dtype == getattr(b, f).dtype for f in "txyp")
    return arrays and dtypes and (a.height, a.width) == (b.height, b.width)


def test_plain_files_are_what_arrow_says_they_are(tmp_path):
    path, events = tmp_path / "a.arrow", _some(BATCH + 10)
    write_arrow(path, events, compression="none")
    table = pa.ipc.open_file(path).read_all()
    assert table.schema.names == ["t", "x", "y", "p"]
    assert [str(field.type) for field in table.schema] == ["int64", "uint16", "uint16", "uint8"]
    for name in "txyp":
        assert np.array_equal(table[name].to_numpy(), getattr(events, name))
    assert table.schema.metadata[b"height"] == b"480" and table.schema.metadata[b"width"] == b"640"


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_columns_unpacked_by_hand(tmp_path, compression):
    events = _some(1001)
    table = pa.ipc.open_file(pa.py_buffer(to_bytes(events, compression))).read_all()
    assert table.schema.names == ["t", "x", "y", "p"]

    def plain(name):
        stored = table[name].combine_chunks().to_numpy()
        return np.frombuffer(stored.tobytes(), np.uint8).reshape(stored.itemsize, -1).T.copy().view(stored.dtype)[:, 0]

    assert np.array_equal(np.cumsum(plain("t").astype(np.int64)) + events.t[0], events.t)
    assert np.array_equal(plain("x"), events.x) and np.array_equal(plain("y"), events.y)
    assert np.array_equal(table["p"].to_numpy(), events.p == 1)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_lazy_slices_are_those_of_the_whole(tmp_path, compression):
    path, events = tmp_path / "a.arrow", _some(2 * BATCH + 77)
    write_events(path, events, compression=compression)
    with open_events(path) as source:
        assert len(source) == len(events) and source.span == (events.t[0], events.t[-1] + 1)
        assert _same(source.read(), events)
        for start, stop in (
            (0, 5),
            (BATCH - 3, BATCH + 3),
            (7, 2 * BATCH + 50),
            (-5, None or len(events)),
            (9, 9),
            (9, 2),
        ):
            assert _same(source.by_index(start, stop), events[slice(start, stop)])
        rng = np.random.default_rng(1)
        edges = [*rng.integers(events.t[0] - 9, events.t[-1] + 9, 20), events.t[0], events.t[-1], events.t[BATCH]]
        for t0 in edges:
            for t1 in (t0, t0 + 1, t0 + 5000, t0 + 200_000, t0 - 7):
                low, high = np.searchsorted(events.t, [t0, max(t0, t1)])
                assert _same(source.by_time(int(t0), int(t1)), events[low:high])
        joined = [np.copy(part.x) for part in source.chunks(BATCH - 1)]
        assert [len(part) for part in joined] == [BATCH - 1, BATCH - 1, 79]
        assert np.array_equal(np.concatenate(joined), events.x)


def test_plain_slices_are_views_on_the_file(tmp_path):
    data = to_bytes(_some(100), "none")
    slice_ = from_bytes(data).by_index(10, 20)
    assert all(np.shares_memory(np.frombuffer(data, np.uint8), getattr(slice_, f)) for f in "txyp")
    shifted = from_bytes(memoryview(b"abc" + data)[3:]).by_index(10, 20)  # a member at an odd place is copied
    assert shifted.t.flags.aligned and _same(shifted, slice_)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(0, 32766), st.integers(0, 32766)), max_size=20),
    st.sampled_from(COMPRESSIONS),
)
def test_any_valid_events_come_back(rows, compression):
    t, x, y = np.array(sorted(rows), np.int64).reshape(-1, 3).T
    events = Events.from_arrays(t, x, y, (x + y) % 2, height=32767, width=32767)
    data = to_bytes(events, compression)
    assert data == to_bytes(events, compression)
    assert _same(from_bytes(data).read(), events)


def test_long_gaps_split_a_compressed_batch():
    t = np.array([0, 5, 2**32 + 4, 2**33 + 5, 2**40])
    events = Events.from_arrays(t, t % 7, t % 5, t % 2, height=5, width=7)
    source = from_bytes(to_bytes(events, "lz4"))
    assert len(source._begins) == 3  # a pause of 2**32 - 1 µs still fits a step, one more does not
    assert _same(source.read(), events) and _same(source.by_time(5, 2**33 + 6), events[1:4])
    assert _same(source.by_index(3, 5), events[3:5])


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_every_flipped_byte_is_found(compression):
    events = _some(40)
    data = to_bytes(events, compression)
    with pytest.raises(EventFormatError):
        from_bytes(b"")
    found = 0
    for at in range(len(data)):
        for flip in (0x01, 0x80):
            bad = bytearray(data)
            bad[at] ^= flip
            try:
                assert _same(from_bytes(bytes(bad), "x.arrow").read(), events), at
            except EventFormatError as error:
                assert str(error).startswith("x.arrow: byte ")
                found += 1
    assert found > len(data) / 2  # the rest is padding, and what the schema says twice


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_truncated_files_recover_whole_batches(tmp_path, compression):
    path, events = tmp_path / "a.arrow", _some(3 * BATCH)
    write_events(path, events, compression=compression)
    data = path.read_bytes()
    third = from_bytes(data)._batch(2).message
    path.write_bytes(data[: third.end - 100])
    with pytest.raises(EventFormatError, match=r"a\.arrow: byte \d+: the closing ARROW1 is missing.*recover=True"):
        open_events(path)
    with pytest.warns(UserWarning, match=rf"a\.arrow: byte {third.begin}: .*kept the 131,072 events.*lost [\d,]+ of"):
        assert _same(read_events(path, recover=True), events[: 2 * BATCH])
    for size in (0, 3, 7, 8, 50, 300, 600, 900):
        path.write_bytes(data[:size])
        with pytest.raises(EventFormatError, match=r"byte \d+"):
            read_events(path, recover=True)


def test_a_damaged_batch_ends_what_recovers(tmp_path):
    path, events = tmp_path / "a.arrow", _some(3 * BATCH)
    write_events(path, events, compression="lz4")
    data = bytearray(path.read_bytes())
    batch = from_bytes(data)._batch(1).message
    data[batch.buffers[3][0] + 1000] ^= 4
    path.write_bytes(data)
    with open_events(path) as source:  # lazily: the first batch reads
        assert len(source.by_index(0, BATCH)) == BATCH
        with pytest.raises(EventFormatError, match=r"a\.arrow: byte \d+: "):
            source.by_index(BATCH, BATCH + 1)
    with pytest.warns(UserWarning, match="kept the 65,536 events"):
        assert _same(read_events(path, recover=True), events[:BATCH])


def test_hostile_sizes_are_refused_before_anything_is_allocated(monkeypatch):
    data = bytearray(to_bytes(_some(500), "zstd"))
    at, _ = from_bytes(data)._batch(0).message.buffers[1]
    data[at : at + 8] = (1 << 40).to_bytes(8, "little")
    with pytest.raises(EventFormatError, match=rf"byte {at}: a column that claims 1,099,511,627,776 bytes where 2,000"):
        from_bytes(data).read()
    with pytest.raises(EventFormatError, match="holds 500 events where at most 499 are allowed"):
        from_bytes(to_bytes(_some(500)), max_events=499)
    monkeypatch.setattr(arrow_source, "BATCH", 499)
    with pytest.raises(EventFormatError, match="a record batch of 500 events"):
        from_bytes(to_bytes(_some(500)))


def test_other_arrow_files_are_refused(tmp_path):
    path = tmp_path / "a.arrow"
    table = pa.table({"t": [1, 2]})
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(EventFormatError, match=r"a\.arrow: byte 8: .*no gep\.events"):
        read_events(path)
    write_arrow(path, _some(5))
    with pytest.raises(ValueError, match="holds a 480x640 sensor, not the 10x20"):
        open_events(path, height=10, width=20)
    with pytest.raises(ValueError, match="compression is 'gzip'"):
        write_arrow(path, _some(5), compression="gzip")
    assert len(read_events(path)) == 5
    write_arrow(path, Events.empty(4, 6))
    empty = read_events(path)
    assert (len(empty), empty.height, empty.width) == (0, 4, 6)


def _child(source, queue):
    queue.put(int(source.by_index(10, 20).t.sum()))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_source_goes_to_another_process(tmp_path, method):
    path, events = tmp_path / "a.arrow", _some(100)
    write_arrow(path, events)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    with open_events(path) as source:
        assert _same(pickle.loads(pickle.dumps(source)).read(), events)
        process = context.Process(target=_child, args=(source, queue))
        process.start()
        assert queue.get(timeout=60) == int(events.t[10:20].sum())
        process.join()
    with pytest.raises(TypeError, match="only a container opened from a file"):
        pickle.dumps(from_bytes(to_bytes(events)))
