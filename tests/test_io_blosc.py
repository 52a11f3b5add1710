"""Unpacking many Blosc chunks at once, by zstd called from compiled code."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest

from gep.events.io import blosc, open_events, zstd
from gep.events.types import EventFormatError
from tests.blosc_files import ROWS, same, some_events, write_chunks


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


@pytest.mark.parametrize("t", ["u4", "i8", "u8"])
def test_many_blosc_chunks_are_read_without_h5py(tmp_path, h5py_reads, t):
    path, events = tmp_path / "a.h5", some_events(40_000)
    # Blocks of several to a chunk, the last one shorter; the last chunk is not full.
    write_chunks(path, events, chunks=9000, t=t)
    with open_events(path) as source:
        h5py_reads.clear()
        assert same(source.read(), events)
        assert same(source.by_index(100, 39_000), events[100:39_000])
        assert not h5py_reads
        assert same(source.by_index(100, 200), events[100:200])
        assert h5py_reads


@pytest.mark.parametrize("settings", [{"cname": "lz4"}, {"shuffle": 0}, {"shuffle": 2}, {"clevel": 0}])
def test_other_ways_of_packing_are_left_to_h5py(tmp_path, h5py_reads, settings):
    path, events = tmp_path / "a.h5", some_events(20_000)
    write_chunks(path, events, **settings)
    with open_events(path) as source:
        h5py_reads.clear()
        assert same(source.read(), events)
    assert h5py_reads


def test_flipped_bytes_of_a_chunk_read_as_h5py_reads_them(tmp_path):
    h5py, path, events = pytest.importorskip("h5py"), tmp_path / "a.h5", some_events(6 * ROWS)
    write_chunks(path, events)
    with h5py.File(path) as file:
        info = file["events/x"].id.get_chunk_info_by_coord((2 * ROWS,))
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


def test_nothing_is_read_or_written_outside_a_damaged_chunk(monkeypatch):
    for name in ("_number", "_unshuffle"):  # compiled, they check no index
        monkeypatch.setattr(blosc, name, getattr(blosc, name).py_func)
    values, calls = np.arange(6, dtype=np.uint16), []
    blocks = [b"Z" * 5, b"z" * 3]  # of 8 and 4 bytes, unpacked
    places = [24, 24 + 4 + len(blocks[0])]
    body = b"".join(n.to_bytes(4, "little") for n in places) + b"".join(
        len(block).to_bytes(4, "little") + block for block in blocks
    )
    head = [bytes([2, 1, 0x91, 2])] + [n.to_bytes(4, "little") for n in (12, 8, 16 + len(body))]
    content, planes, out = b"".join(head) + body, np.zeros(12, np.uint8), np.zeros(6, np.uint16)

    def decompress(function, context, to, room, frame, size):
        begin = frame - chunk.ctypes.data
        calls.append((to - planes.ctypes.data, room, bytes(chunk[begin : begin + size])))
        assert size > 0 and 16 <= begin <= len(chunk) - size and to == planes.ctypes.data and room <= len(planes)
        part = values[:4] if room == 8 else values[4:]
        planes[:room] = part.view(np.uint8).reshape(-1, 2).T.ravel()[:room]
        return room

    monkeypatch.setattr(blosc.zstd, "decompress", decompress)
    chunk = np.frombuffer(content, np.uint8)
    assert blosc._unpack.py_func(chunk, 2, 0, 0, 0, planes, out) == 5 and np.array_equal(out, values)
    assert calls == [(0, 8, blocks[0]), (0, 4, blocks[1])]
    for place in range(len(content)):
        for value in {0, 1, 7, 127, 128, 255, content[place] ^ 1, content[place] + 1 & 255}:
            chunk = np.frombuffer(content[:place] + bytes([value]) + content[place + 1 :], np.uint8)
            blosc._unpack.py_func(chunk, 2, 0, 0, 0, planes, out)
        chunk = np.frombuffer(content[:place], np.uint8)
        assert blosc._unpack.py_func(chunk, 2, 0, 0, 0, planes, out) == -1


def test_frames_are_unpacked_as_pyarrow_packed_them():
    pa, rng = pytest.importorskip("pyarrow"), np.random.default_rng(0)
    decoder = zstd.decoder() or pytest.skip("no zstd library")
    for size in (1, 300, 70_000):
        content = rng.integers(0, 5, size, np.uint8)
        frame = np.frombuffer(pa.compress(content.tobytes(), "zstd", asbytes=True), np.uint8)
        out = np.full(size + 8, 99, np.uint8)
        assert _decompress(*decoder, out, size, frame) == size
        assert np.array_equal(out[:size], content) and (out[size:] == 99).all()
        assert _decompress(*decoder, out, size - 1, frame) < 0 and _decompress(*decoder, out, size, frame[:-1]) < 0


@numba.njit
def _decompress(function, context, out, room, frame):
    return zstd.decompress(function, context, out.ctypes.data, room, frame.ctypes.data, len(frame))


def test_each_thread_has_its_own_context():
    if zstd.decoder() is None:
        pytest.skip("no zstd library")
    both = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: (zstd.decoder(), both.wait())[0], range(2)))
    assert zstd.decoder() == zstd.decoder() and len({zstd.decoder(), *found}) == 3


def test_without_a_zstd_library_h5py_reads(tmp_path, monkeypatch, h5py_reads):
    path, events = tmp_path / "a.h5", some_events(20_000)
    write_chunks(path, events)
    monkeypatch.setattr(zstd, "_library", lambda: None)
    with open_events(path) as source:
        h5py_reads.clear()
        assert same(source.read(), events)
    assert h5py_reads
