"""DAT and the lazy side of `.bin` against hand-made records, another decoder and real recordings; damage."""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import pytest

import gep.events.io.stream as stream
from gep.events.io import find_format, open_events, read_bin, read_events, write_bin, write_dat
from gep.events.types import EventFormatError, Events

_HEAD = b"% Data file containing CD events.\n% Version 2\n"
_SIZE = b"% Height 480\n% Width 640\n"
_KIND = bytes((12, 8))


def _dat(path, rows, head=_HEAD + _SIZE, kind=_KIND):
    """Writes rows of t, x, y, p."""
    words = [(t & 0xFFFFFFFF, p << 28 | y << 14 | x) for t, x, y, p in rows]
    path.write_bytes(head + kind + np.array(words, "<u4").tobytes())
    return path


def _rows(events: Events) -> list[tuple[int, int, int, int]]:
    return list(zip(*(getattr(events, name).tolist() for name in "txyp"), strict=True))


def _same(a: Events, b: Events) -> bool:
    arrays = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in "txyp")
    return arrays and (a.height, a.width) == (b.height, b.width)


def _replace(path, content) -> None:
    path.unlink(missing_ok=True)  # Some file systems write out a file that is cut to 0 bytes: 10 ms each.
    path.write_bytes(content)


def _random(num, duration, height=480, width=640, seed=0) -> Events:
    rng = np.random.default_rng(seed)
    t = np.sort(rng.integers(0, duration, num))
    x, y, p = rng.integers(0, width, num), rng.integers(0, height, num), rng.integers(0, 2, num)
    return Events.from_arrays(t, x, y, p, height=height, width=width)


def test_dat_by_hand(tmp_path):
    rows = [(0, 639, 479, 1), (7, 0, 0, 0), (7, 300, 200, 1), (0xFFFFFFFF, 1, 2, 0)]
    path = _dat(tmp_path / "a.dat", rows[:3])
    events = read_events(path)
    assert find_format(path).name == "DAT" and _rows(events) == rows[:3]
    assert (events.height, events.width) == (480, 640)
    assert [getattr(events, name).dtype for name in "txyp"] == [np.int64, np.uint16, np.uint16, np.uint8]
    assert _rows(read_events(_dat(path, rows, kind=bytes((0, 8)))))[0] == rows[0]


def test_dat_clock_turns_over(tmp_path, monkeypatch):
    t = np.array(
        [4_000_000_000, 4_294_967_295, 4_294_967_296, 4_294_967_300, 6_000_000_000, 8_000_000_000, 10_000_000_000]
    )
    rows = [(int(time), k, k, k % 2) for k, time in enumerate(t)]
    path = _dat(tmp_path / "a.dat", rows)
    assert _rows(read_events(path)) == rows
    monkeypatch.setattr(stream, "_CHUNK_BYTES", 16)
    with open_events(path) as source:
        assert source.span == (t[0], t[-1] + 1) and _rows(source.by_index(2, 4)) == rows[2:4]
        assert _rows(source.by_time(4_294_967_296, 8_000_000_000)) == rows[2:5]
        assert _rows(source.read()) == rows
    write_dat(tmp_path / "b.dat", read_events(path))
    assert _same(read_events(tmp_path / "b.dat"), read_events(path))


def test_dat_sensor_size(tmp_path):
    path = tmp_path / "a.dat"
    assert read_events(_dat(path, [(0, 119, 99, 1)], head=_HEAD)).height == 100
    assert read_events(_dat(path, [(0, 120, 99, 1)], head=_HEAD)).width == 304
    assert read_events(path, height=300, width=300).width == 300
    with pytest.raises(EventFormatError, match=r"x = 304, y = 99 fit neither N-Cars \(120x100\) nor .*; give height"):
        read_events(_dat(path, [(0, 304, 99, 1)], head=_HEAD))
    assert read_events(path, height=300, width=305).width == 305


def test_dat_faults_name_their_byte_and_recover_keeps_what_is_before(tmp_path):
    path, first = tmp_path / "a.dat", len(_HEAD + _SIZE) + 2
    for row, message in (
        ((8, 1, 1, 1), "the time steps back from 9 to 8"),
        ((9, 640, 1, 1), "x = 640, y = 1 lies outside the 480x640"),
        ((9, 1, 480, 1), "x = 1, y = 480 lies outside"),
        ((9, 1, 1, 2), "polarity 2 is neither"),
    ):
        _dat(path, [(3, 0, 0, 0), (9, 1, 1, 1), row, (10, 1, 1, 1)])
        for use in (read_events, lambda path: list(open_events(path).chunks())):
            with pytest.raises(EventFormatError, match=rf"a\.dat: byte {first + 16}: .*{message}"):
                use(path)
        with pytest.warns(UserWarning, match=r"kept the 2 events before it, lost the last 16 of"):
            assert _rows(read_events(path, recover=True)) == [(3, 0, 0, 0), (9, 1, 1, 1)]
        with pytest.warns(UserWarning), open_events(path, recover=True) as source:
            assert len(source) == 2 and source.span == (3, 10)


def test_dat_headers_that_cannot_be_read(tmp_path):
    path = tmp_path / "a.dat"
    for head, kind, message in (
        (_HEAD, bytes((40, 24)), f"byte {len(_HEAD)}: records of type 40 and 24 bytes"),
        (b"% Version 1\n", _KIND, "version 1"),
        (_HEAD, b"\0", "ends before its records' type"),
    ):
        _dat(path, [] if len(kind) == 1 else [(1, 1, 1, 1)], head=head, kind=kind)
        with pytest.raises(EventFormatError, match=message):
            read_events(path)
    with pytest.raises(EventFormatError, match="0 bytes hold no 8-byte event record"):
        read_events(_dat(path, []))
    _dat(path, [(1, 1, 1, 1)])
    path.write_bytes(path.read_bytes() + b"abc")
    with pytest.warns(UserWarning, match="dropped a trailing partial record of 3 bytes"):
        assert len(read_events(path)) == 1


def test_dat_round_trip_and_slices_without_a_pass_over_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_CHUNK_BYTES", 256)
    path, events = tmp_path / "a.dat", _random(3000, 900_000)
    write_dat(path, events)
    assert _same(read_events(path), events)
    rng = np.random.default_rng(1)
    with open_events(path) as source:
        loaded, load = [], source._load
        source._load = lambda chunk: (loaded.append(chunk), load(chunk))[1]
        assert len(source) == 3000 and _same(source.by_index(1000, 1010), events[1000:1010])
        assert len(set(loaded)) <= 2
        for start, stop in rng.integers(-10, 3010, (40, 2)):
            assert _same(source.by_index(start, stop), events[start:stop])
        for t0, t1 in rng.integers(-10, 900_010, (40, 2)):
            assert _same(source.by_time(t0, t1), events[slice(*np.searchsorted(events.t, [t0, max(t0, t1)]))])
        at = 0
        for part in source.chunks(777):
            assert _same(part, events[at : at + 777])
            at += len(part)
    for given, message in (
        (Events.from_arrays([1 << 32], [0], [0], [1], height=8, width=8), "subtract the first time"),
        (Events.from_arrays([0, 1 << 31], [0, 0], [0, 0], [1, 1], height=8, width=8), "pauses"),
        (Events.empty(8, 8), "empty recording"),
    ):
        with pytest.raises(ValueError, match=message):
            write_dat(path, given)


def test_dat_damage_inside_is_found_where_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_CHUNK_BYTES", 256)
    path, events = tmp_path / "a.dat", _random(3000, 900_000)
    write_dat(path, events)
    content = bytearray(path.read_bytes())
    begin = len(content) - 3000 * 8
    content[begin + 1500 * 8 + 3] ^= 0x40
    path.write_bytes(content)
    with open_events(path) as source:
        assert _same(source.by_index(100, 200), events[100:200])
        with pytest.raises(EventFormatError, match=rf"byte {begin + 1501 * 8}: the time steps back"):
            source.by_index(1450, 1550)
    with pytest.warns(UserWarning, match="kept the 1,501 events"):
        assert len(read_events(path, recover=True)) == 1501


def test_real_ncars_file(real_data, tmp_path):
    path = real_data / "recordings" / "ncars.dat"
    events = read_events(path).validate()
    content = path.read_bytes()
    records = np.frombuffer(content[len(content) - 8 * 2009 :], "<u4").reshape(-1, 2).astype(np.int64)
    columns = records[:, 0], records[:, 1] % 16384, records[:, 1] // 16384 % 16384, records[:, 1] >> 28
    assert all(np.array_equal(getattr(events, name), column) for name, column in zip("txyp", columns, strict=True))
    assert (events.height, events.width, len(events)) == (100, 120, 2009)
    faery = pytest.importorskip("faery")
    write_dat(tmp_path / "a.dat", events)
    theirs = faery.events_stream_from_file(tmp_path / "a.dat").to_array()
    for name, field in (("t", "t"), ("x", "x"), ("y", "y"), ("p", "on")):
        assert np.array_equal(theirs[field], getattr(events, name)), name


def test_bin_slices_and_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_CHUNK_BYTES", 100)
    path, events = tmp_path / "a.bin", _random(2000, 12_000_000, 34, 34)
    write_bin(path, events)
    assert path.stat().st_size > 5 * 2000  # It has overflow rows.
    rng = np.random.default_rng(1)
    with open_events(path) as source:
        assert (len(source), source.height, source.width) == (2000, 34, 34)
        assert source.span == (events.t[0], events.t[-1] + 1) and _same(source.read(), events)
        for start, stop in rng.integers(-10, 2010, (40, 2)):
            assert _same(source.by_index(start, stop), events[start:stop])
        for t0, t1 in rng.integers(-10, 12_000_010, (40, 2)):
            assert _same(source.by_time(t0, t1), events[slice(*np.searchsorted(events.t, [t0, max(t0, t1)]))])
        assert [len(part) for part in source.chunks(900)] == [900, 900, 200]
        write_bin(tmp_path / "b.bin", source)
    assert (tmp_path / "b.bin").read_bytes() == path.read_bytes()


def test_bin_recover(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(bytes([1, 1, 0, 0, 9, 2, 2, 128, 0, 9, 3, 3, 0, 0, 8]))
    with pytest.warns(UserWarning, match="byte 10: the time steps back from 9 to 8 µs; kept the 2 events"):
        assert _rows(read_bin(path, recover=True)) == [(9, 1, 1, 0), (9, 2, 2, 1)]
    path.write_bytes(bytes([0, 240, 0, 0, 0]))
    with pytest.raises(EventFormatError, match="byte 0: the recording holds no events"):
        read_bin(path)


@pytest.mark.parametrize("kind", ["dat", "bin"])
@pytest.mark.parametrize("recover", [False, True])
def test_cut_and_flipped_files_give_valid_events_or_an_error(tmp_path, kind, recover):
    path, events = tmp_path / f"a.{kind}", _random(40, 9_000_000, 34, 34)
    {"dat": write_dat, "bin": write_bin}[kind](path, events)
    content, failed = path.read_bytes(), 0
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for size in range(len(content)):
            _replace(path, content[:size])
            with contextlib.suppress(EventFormatError):
                cut = read_events(path, height=34, width=34, recover=recover)
                assert _same(cut, events[: len(cut)])
        for at in range(len(content)):
            _replace(path, content[:at] + bytes([content[at] ^ int(rng.integers(1, 256))]) + content[at + 1 :])
            try:
                flipped = read_events(path, recover=recover).validate()
                with open_events(path, recover=recover) as source:
                    assert len(source) == len(flipped) and _same(source.by_index(5, 30), flipped[5:30])
            except EventFormatError as error:
                assert f"a.{kind}: byte " in str(error)
                failed += 1
    assert failed > 0
