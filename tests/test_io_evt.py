"""EVT2, EVT2.1 and EVT3 against hand-made words; slices, writers; damage ends in one clear error."""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import pytest

import gep.events.io.stream as stream
from gep.events.io import find_format, open_events, read_events, write_evt2, write_evt3
from gep.events.types import EventFormatError, Events

_HEADS = {np.uint32: "% evt 2.0\n", np.uint64: "% evt 2.1\n% endianness little\n", np.uint16: "% evt 3.0\n"}
_SIZE = "% geometry 640x480\n% end\n"


def _write(path, words, dtype, head=None):
    content = (_HEADS[dtype] + _SIZE if head is None else head).encode() + np.array(words, dtype).tobytes()
    path.write_bytes(content)
    return path


def _rows(events: Events) -> list[tuple[int, int, int, int]]:
    return list(zip(*(getattr(events, name).tolist() for name in "txyp"), strict=True))


def _same(a: Events, b: Events) -> bool:
    arrays = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in "txyp")
    return arrays and (a.height, a.width) == (b.height, b.width)


def _replace(path, content) -> None:
    path.unlink(missing_ok=True)  # Some file systems write out a file that is cut to 0 bytes: 10 ms each.
    path.write_bytes(content)


def _random(num, duration, height=480, width=640, seed=0, runs=1) -> Events:
    rng = np.random.default_rng(seed)
    t = np.sort(rng.integers(0, duration, -(-num // runs)))
    x, y, p = rng.integers(0, width - runs, len(t)), rng.integers(0, height, len(t)), rng.integers(0, 2, len(t))
    t, x, y, p = (np.repeat(array, runs)[:num] for array in (t, x, y, p))
    return Events.from_arrays(t, x + np.arange(num) % runs, y, p, height=height, width=width)


def _cd2(kind, low, x, y):
    return kind << 28 | low << 22 | x << 11 | y


def _cd21(kind, low, x, y, mask):
    return kind << 60 | low << 54 | x << 43 | y << 32 | mask


def test_evt2_words_by_hand(tmp_path):
    words = [
        _cd2(1, 9, 1, 1),  # before any TIME_HIGH: no time, left out
        8 << 28 | 5,
        _cd2(0, 63, 639, 479),
        0xA << 28 | 0x101,
        8 << 28 | 6,
        _cd2(1, 0, 0, 7),
        0xE << 28 | 3,
        0xF << 28 | 4,
        _cd2(1, 0, 5, 0),
    ]
    path = _write(tmp_path / "a.raw", words, np.uint32)
    events = read_events(path)
    assert find_format(path).name == "EVT2" and (events.height, events.width) == (480, 640)
    assert _rows(events) == [(5 * 64 + 63, 639, 479, 0), (6 * 64, 0, 7, 1), (6 * 64, 5, 0, 1)]
    assert [getattr(events, name).dtype for name in "txyp"] == [np.int64, np.uint16, np.uint16, np.uint8]


def test_evt2_time_high_wraps(tmp_path):
    top = (1 << 28) - 1
    words = [8 << 28 | top, _cd2(1, 63, 0, 0), 8 << 28 | 0, _cd2(1, 1, 0, 0), 8 << 28 | 3, _cd2(0, 0, 0, 0)]
    events = read_events(_write(tmp_path / "a.raw", words, np.uint32))
    assert events.t.tolist() == [(1 << 34) - 1, (1 << 34) + 1, (1 << 34) + 192]


@pytest.mark.parametrize("order", ["little", "legacy", "unstated little", "unstated legacy", "in format"])
def test_evt21_words_by_hand(tmp_path, order):
    words = [
        _cd21(0, 1, 0, 0, 1),  # before any TIME_HIGH
        8 << 60 | 7 << 32,
        _cd21(1, 5, 32, 9, 0x80000001),
        _cd21(0, 5, 608, 479, 0xFFFFFFFF),
        0xA << 60,
        _cd21(0, 6, 3, 2, 0x00801800),
        _cd21(0, 1, 2047, 2047, 0),
    ]
    head = {"little": "% evt 2.1\n% endianness little\n", "legacy": "% evt 2.1\n% endianness legacy\n"}.get(
        order, "% evt 2.1\n"
    )
    head = "% format EVT21;endianness=legacy;height=480;width=640\n" if order == "in format" else head
    words = np.array(words, np.uint64)
    if order.endswith("legacy") or order == "in format":
        words = words.view(np.uint32).reshape(-1, 2)[:, ::-1].copy()
    path = tmp_path / "a.raw"
    path.write_bytes((head + _SIZE).encode() + words.tobytes())
    expected = [(453, 32, 9, 1), (453, 63, 9, 1), *((453, 608 + k, 479, 0) for k in range(32))]
    expected += [(454, 14, 2, 0), (454, 15, 2, 0), (454, 26, 2, 0)]
    assert find_format(path).name == "EVT2.1" and _rows(read_events(path)) == expected


def test_evt3_words_by_hand(tmp_path):
    words = [
        0x2805,  # before any time or row: left out
        0x6010,
        0x8002,
        0x2805,  # before any row
        0x4FFF,  # before any VECT_BASE_X
        0x61DF & 0x6FFF,  # TIME_LOW 0x1DF
        0x01DF,  # row 479
        0x2A7F,  # x = 639, ON
        0x3000 | 600,  # base 600, OFF
        0x4801,
        0x4000,
        0x5081,
        0x4008,  # base has moved on by 32
        0x7001,
        0xA001,
        0xE123,
        0xFABC,
        0x0800 | 3,  # row 3 of the second camera
        0x2000,
        0x8002,  # repeated TIME_HIGH: the low part stays
        0x2001,
        0x8003,  # a new one: the low part is 0
        0x2002,
    ]
    path = _write(tmp_path / "a.raw", words, np.uint16)
    events = read_events(path)
    t = 2 * 4096 + 0x1DF
    row = [(t, 639, 479, 1), (t, 600, 479, 0), (t, 611, 479, 0), (t, 624, 479, 0), (t, 631, 479, 0), (t, 635, 479, 0)]
    assert find_format(path).name == "EVT3"
    assert _rows(events) == [*row, (t, 0, 3, 0), (t, 1, 3, 0), (3 * 4096, 2, 3, 0)]


def test_evt3_time_low_wraps_before_its_time_high(tmp_path):
    words = [0x8001, 0x0000, 0x6FFE, 0x2000, 0x6001, 0x2001, 0x8001, 0x2002, 0x8002, 0x2003, 0x6005, 0x2004, 0x6FFF]
    words += [0x2005, 0x8003, 0x6000, 0x2006]
    events = read_events(_write(tmp_path / "a.raw", words, np.uint16))
    assert events.t.tolist() == [8190, 8193, 8193, 8193, 8197, 3 * 4096 - 1, 3 * 4096]


def test_evt3_time_high_wraps_and_small_steps_of_time_low_without_events_do_no_harm(tmp_path):
    words = [0x8FFF, 0x6FFF, 0x0001, 0x2001, 0x8000, 0x600B, 0x6000, 0x2002, 0x8001, 0x6002, 0x2003]
    events = read_events(_write(tmp_path / "a.raw", words, np.uint16))
    assert events.t.tolist() == [(1 << 24) - 1, 1 << 24, (1 << 24) + 4098]


_FAULTS = [
    (np.uint32, [8 << 28, _cd2(0, 5, 1, 1), _cd2(0, 4, 1, 1)], 2, "the time steps back from 5 to 4"),
    (np.uint32, [8 << 28, _cd2(0, 5, 1, 1), _cd2(0, 5, 640, 1)], 2, "x = 640, y = 1 lies outside the 480x640"),
    (np.uint32, [8 << 28, _cd2(0, 5, 1, 1), _cd2(0, 5, 0, 480)], 2, "x = 0, y = 480 lies outside"),
    (np.uint32, [8 << 28, _cd2(0, 5, 1, 1), 9 << 28], 2, "no word is of the type 0x9"),
    (np.uint32, [8 << 28 | 9, _cd2(0, 5, 1, 1), 8 << 28 | 8], 2, "the time steps back from 576 to 512"),
    (np.uint64, [8 << 60, _cd21(0, 5, 1, 1, 1), _cd21(0, 5, 609, 1, 0x80000000)], 2, "x = 640, y = 1 lies outside"),
    (np.uint64, [8 << 60, _cd21(0, 5, 1, 1, 1), _cd21(0, 4, 1, 1, 1)], 2, "the time steps back from 5 to 4"),
    (np.uint64, [8 << 60, _cd21(0, 5, 1, 1, 1), 5 << 60], 2, "no word is of the type 0x5"),
    (np.uint16, [0x8000, 0x6005, 0, 0x2000, 0x6004, 0x2000], 5, "the time steps back from 5 to 4"),
    (np.uint16, [0x8000, 0x6005, 0, 0x2000, 0x2280], 4, "x = 640, y = 0 lies outside"),
    (np.uint16, [0x8000, 0x6005, 0, 0x2000, 480, 0x2000], 5, "x = 0, y = 480 lies outside"),
    (np.uint16, [0x8000, 0x6005, 0, 0x2000, 0x3000 | 630, 0x4400], 5, "x = 640, y = 0 lies outside"),
    (np.uint16, [0x8000, 0x6005, 0, 0x2000, 0xB000], 4, "no word is of the type 0xB"),
    (np.uint16, [0x8005, 0x6005, 0, 0x2000, 0x8004], 4, "the time steps back from 20480 to 16384"),
]


@pytest.mark.parametrize(("dtype", "words", "bad", "message"), _FAULTS)
def test_faults_name_their_byte_and_recover_keeps_what_is_before(tmp_path, dtype, words, bad, message):
    path = _write(tmp_path / "a.raw", words, dtype)
    byte = len(_HEADS[dtype] + _SIZE) + bad * np.dtype(dtype).itemsize
    for use in (read_events, lambda path: len(open_events(path)), lambda path: list(open_events(path).chunks())):
        with pytest.raises(EventFormatError, match=rf"a\.raw: byte {byte}: .*{message}"):
            use(path)
    with pytest.warns(UserWarning, match=rf"byte {byte}: .*kept the 1 events before it, lost the last \d+ of"):
        assert len(read_events(path, recover=True)) == 1
    with pytest.warns(UserWarning), open_events(path, recover=True) as source:
        assert len(source) == 1 and [len(part) for part in source.chunks()] == [1] and len(source.read()) == 1


def test_nothing_sound_is_an_error_with_recover_too(tmp_path):
    path = _write(tmp_path / "a.raw", [8 << 28, _cd2(0, 5, 640, 1)], np.uint32)
    with pytest.raises(EventFormatError, match="lies outside"):
        read_events(path, recover=True)
    for words in ([8 << 28], [_cd2(0, 5, 1, 1)]):
        path = _write(tmp_path / "a.raw", words, np.uint32)
        for use in (read_events, lambda path: list(open_events(path).chunks())):
            with pytest.raises(EventFormatError, match=r"a\.raw: byte 35: the recording holds no events"):
                use(path)


def test_headers(tmp_path):
    path, words = tmp_path / "a.raw", [0x8000, 0x6005, 0, 0x2000]
    for head, size in (
        ("% evt 3.0\n% plugin_name hal_plugin_gen41_evk3\n", (720, 1280)),
        ("% evt 3.0\n% plugin_name hal_plugin_gen31_fx3\n", (480, 640)),
        ("% evt 3.0\n% plugin_name hal_plugin_prophesee\n% generation 4.2\n", (720, 1280)),
        ("% evt 3.0\n% sensor_generation 320.0\n", (320, 320)),
        ("% format EVT3;height=260;width=346\n", (260, 346)),
        ("% Date 2020-01-01\n% evt 3.0\n% geometry 1280x720\n% plugin_name hal_plugin_gen31_fx3\n% end\n", (720, 1280)),
        ("% evt 3.0\r\n% Width 100\r\n% Height 50\r\n", (50, 100)),
    ):
        events = read_events(_write(path, words, np.uint16, head))
        assert ((events.height, events.width), len(events)) == (size, 1), head
    assert read_events(_write(path, words, np.uint16, "% evt 3.0\n"), height=7, width=9).width == 9
    for size in (0, 70_000):
        with pytest.raises(ValueError, match=f"sensor size {size}x9 is not in 1..32767"):
            read_events(path, height=size, width=9)
    for head, message in (
        ("% evt 3.0\n", "states no sensor size .*it names no sensor.*; give height and width"),
        ("% evt 3.0\n% plugin_name other\n", "it names plugin_name = other"),
        ("% evt 3.0\n% geometry 0x720\n", "sensor size 0x720"),
        ("% evt 3.0\n% format EVT3;height=4;width=5\n% geometry 6x4\n", "size 5x4 and 6x4"),
        ("% evt 2.0\n% format EVT3;height=4;width=5\n", "both EVT2 and EVT3"),
        ("", "no header line says the encoding"),
        ("% evt 2.1\n% endianness big\n% geometry 6x4\n", "endianness big"),
        ("% evt 3.0\n% geometry 6x4\n% end\n", None),
    ):
        _write(path, [] if message is None else words, np.uint16, head)
        with pytest.raises(EventFormatError, match=message or r"a\.raw: byte \d+: 0 bytes hold no 16-bit word"):
            read_events(path)


def test_a_partial_last_word_is_a_warning(tmp_path):
    path = _write(tmp_path / "a.raw", [8 << 28, _cd2(0, 5, 1, 1)], np.uint32)
    path.write_bytes(path.read_bytes() + b"abc")
    with pytest.warns(UserWarning, match=r"a\.raw: byte 43: dropped a trailing partial record of 3 bytes"):
        assert len(read_events(path)) == 1


@pytest.mark.parametrize("write", [write_evt2, write_evt3])
@pytest.mark.parametrize("runs", [1, 3, 40])
def test_round_trip_and_slices_over_many_chunks(tmp_path, write, runs, monkeypatch):
    monkeypatch.setattr(stream, "_CHUNK_BYTES", 256)
    path, events = tmp_path / "a.raw", _random(4000, 3_000_000, runs=runs)
    write(path, events)
    assert _same(read_events(path), events)
    rng = np.random.default_rng(1)
    with open_events(path) as source:
        assert len(source) == 4000 and source.span == (events.t[0], events.t[-1] + 1)
        assert _same(source.read(), events)
        for start, stop in rng.integers(-10, 4010, (40, 2)):
            assert _same(source.by_index(start, stop), events[start:stop])
        for t0, t1 in rng.integers(-10, 3_000_010, (40, 2)):
            assert _same(source.by_time(t0, t1), events[slice(*np.searchsorted(events.t, [t0, max(t0, t1)]))])
        at = int(events.t[1234])
        assert _same(source.by_time(at, at + 1), events[slice(*np.searchsorted(events.t, [at, at + 1]))])
        for count in (1, 977, 4000, 9999):
            sizes, at = [], 0
            for part in source.chunks(count):
                assert _same(part, events[at : at + count])
                sizes.append(len(part))
                at += len(part)
            assert sizes[:-1] == [count] * (len(sizes) - 1) and at == 4000
    copy = tmp_path / "b.raw"
    with open_events(path) as source:
        write(copy, source)
    assert copy.read_bytes() == path.read_bytes()


def test_writers_keep_late_times_and_pauses_and_refuse_what_does_not_fit(tmp_path):
    path = tmp_path / "a.raw"
    t = np.cumsum([2_000_000_000, 1, 5000, 1 << 23, 1 << 24, 17_000_000, 4_000_000_000, 0])
    events = Events.from_arrays(t, np.arange(8), np.arange(8), [0, 1] * 4, height=8, width=8)
    for write in (write_evt2, write_evt3):
        write(path, events)
        assert _same(read_events(path), events)
    wide = Events.from_arrays([1], [2048], [0], [1], height=10, width=2049)
    for write, given, message in (
        (write_evt2, Events.from_arrays([1 << 34], [0], [0], [1], height=8, width=8), "subtract the first time"),
        (write_evt2, Events.from_arrays([0, 1 << 33], [0, 0], [0, 0], [1, 1], height=8, width=8), "pauses"),
        (write_evt3, Events.from_arrays([1 << 40], [0], [0], [1], height=8, width=8), "subtract the first time"),
        (write_evt3, Events.from_arrays([-1], [0], [0], [1], height=8, width=8), "subtract the first time"),
        (write_evt2, wide, "2048x2048"),
        (write_evt3, wide, "2048x2048"),
        (write_evt3, Events.empty(8, 8), "empty recording"),
    ):
        before = path.read_bytes()
        with pytest.raises(ValueError, match=message):
            write(path, given)
        assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["a.raw"]


def _small(path, kind) -> bytes:
    events = _random(60, 9000, runs=6, seed=3)
    if kind == "evt21":
        words = [8 << 60 | 1 << 32, *(_cd21(k % 2, k, 9 * k, 3 * k, 0x10801 + k) for k in range(40))]
        return _write(path, words, np.uint64).read_bytes()
    {"evt2": write_evt2, "evt3": write_evt3}[kind](path, events)
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["evt2", "evt21", "evt3"])
def test_cut_files_give_a_prefix_or_an_error(tmp_path, kind):
    path = tmp_path / "a.raw"
    content = _small(path, kind)
    whole = read_events(path)
    for size in range(len(content)):
        _replace(path, content[:size])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.suppress(EventFormatError):
                events = read_events(path)
                assert _same(events, whole[: len(events)])


@pytest.mark.parametrize("kind", ["evt2", "evt21", "evt3"])
@pytest.mark.parametrize("recover", [False, True])
def test_flipped_bytes_give_valid_events_or_an_error(tmp_path, kind, recover):
    path = tmp_path / "a.raw"
    content = _small(path, kind)
    rng, failed = np.random.default_rng(0), 0
    for at in range(len(content)):
        _replace(path, content[:at] + bytes([content[at] ^ int(rng.integers(1, 256))]) + content[at + 1 :])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                events = read_events(path, recover=recover).validate()
                with open_events(path, recover=recover) as source:
                    assert len(source) == len(events)
                    assert _same(source.by_index(5, 50), events[5:50])
                    assert sum(len(part) for part in source.chunks(7)) == len(events)
            except EventFormatError as error:
                assert "a.raw: byte " in str(error)
                failed += 1
    assert 0 < failed < len(content)


def test_a_file_that_shrinks_or_changes_while_open_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_CHUNK_BYTES", 256)
    path = tmp_path / "a.raw"
    write_evt2(path, _random(4000, 3_000_000))
    content = path.read_bytes()
    with open_events(path) as source:
        assert len(source) == 4000
        with open(path, "r+b") as file:
            file.truncate(3000)
        with pytest.raises(EventFormatError, match="it was longer when opened"):
            source.by_index(3900, 3950)
        path.write_bytes(content[:300] + content[304:])
        with pytest.raises(EventFormatError, match="byte"):
            source.read()
