"""AEDAT 2.0, 3.1 and 4.0 against bytes by hand, an independent decoder and real files; damage names its byte."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from gep.events.io import find_format, open_events, read_events
from gep.events.io.aedat4 import read_frames
from gep.events.types import EventFormatError, Events
from tests.fuzz import handmade
from tests.fuzz.seeds import events as some_events


def _lists(events: Events) -> list[list[int]]:
    return [getattr(events, name).tolist() for name in "txyp"]


def _same(a: Events, b: Events) -> bool:
    return _lists(a) == _lists(b) and (a.height, a.width) == (b.height, b.width)


def _file(tmp_path: Path, name: str, content: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def _jaer(*records: tuple[int, int], head: bytes = b"#!AER-DAT2.0\r\n") -> bytes:
    return head + b"".join(struct.pack(">II", address, time & 0xFFFFFFFF) for address, time in records)


# 2.0


def test_dvs128_addresses_by_hand(tmp_path):
    # x = 127 - 3, y = 127 - 5, bit 0 set = OFF; then ON at the other corner; a special event is no event.
    content = _jaer((5 << 8 | 3 << 1 | 1, 7), (0x8000 | 1, 8), (127 << 8 | 127 << 1, 9))
    path = _file(tmp_path, "a.aedat", content)
    events = read_events(path)
    assert _lists(events) == [[7, 9], [124, 0], [122, 0], [0, 1]]
    assert (events.height, events.width) == (128, 128)
    assert read_events(path, height=200, width=130).width == 130
    with pytest.raises(EventFormatError, match=r"a\.aedat: byte 14: event outside the sensor"):
        read_events(path, height=128, width=124)


def test_davis_addresses_by_hand(tmp_path):
    head = b"#!AER-DAT2.0\r\n# AEChip: eu.seebetter.ini.chips.davis.DAVIS240C\r\n#End Of ASCII Header\r\n"
    dvs = 100 << 22 | 200 << 12 | 1 << 11
    # Behind it an APS sample (bit 31) and an external event (bit 10); the times of those do not count.
    records = [(dvs, 20), (1 << 31 | dvs, 3), (dvs | 1 << 10, 5), (0, 30)]
    events = read_events(_file(tmp_path, "a.aedat", _jaer(*records, head=head)))
    assert _lists(events) == [[20, 30], [239 - 200, 239], [179 - 100, 179], [1, 0]]
    assert (events.height, events.width) == (180, 240)


def test_clock_wraps_at_32_bits_and_may_not_step_back(tmp_path):
    times = [2**31 - 1, 2**31, 2**32 - 1, 0, 5, 2**32 - 2, 1]
    path = _file(tmp_path, "a.aedat", _jaer(*((0, time) for time in times)))
    expected = [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2 * 2**32 - 2, 2 * 2**32 + 1]
    assert read_events(path).t.tolist() == expected
    with open_events(path) as source:
        assert source.by_time(2**32, 2**33).t.tolist() == expected[3:6]
    path.write_bytes(_jaer((0, 9), (0, 10), (0, 8), (0, 11)))
    with pytest.raises(EventFormatError, match=r"a\.aedat: byte 30: the time steps back.*reads the 2 events"):
        read_events(path)
    with pytest.warns(UserWarning, match=r"byte 30: .*kept the 2 events before it, lost 16 of 46 bytes"):
        assert read_events(path, recover=True).t.tolist() == [9, 10]


def test_aedat2_slices_over_many_blocks(tmp_path):
    # 65,536 records are a block: three of them, the middle one without any event.
    rng = np.random.default_rng(0)
    num = 3 << 16
    t, address = np.cumsum(rng.integers(0, 3, num)), rng.integers(0, 1 << 15, num)
    address[1 << 16 : 2 << 16] |= 0x8000
    content = b"#!AER-DAT2.0\r\n" + np.stack([address, t], axis=1).astype(">u4").tobytes()
    use = address < 0x8000
    with open_events(_file(tmp_path, "a.aedat", content)) as source:
        whole = source.read()
        assert np.array_equal(whole.t, t[use]) and np.array_equal(whole.x, 127 - (address[use] >> 1 & 127))
        for start, stop in ((0, 10), (65_530, 65_540), (70_000, 131_072), (65_536, 65_537), (5, 5), (-3, 10**9)):
            assert np.array_equal(source.by_index(start, stop).t, t[use][start:stop])
        for t0, t1 in ((t[65_000], t[140_000]), (t[70_000], t[80_000]), (-5, t[100]), (t[-5], 10**12), (9, 3)):
            inside = (whole.t >= t0) & (whole.t < t1)
            assert np.array_equal(source.by_time(int(t0), int(t1)).y, whole.y[inside])
        assert source.span == (t[use][0], t[use][-1] + 1)


def test_aedat2_header(tmp_path):
    made = some_events(50, 128, 128, seed=1)
    for chip, end in (("ch.unizh.ini.jaer.chip.retina.DVS128", True), (None, False), (None, True)):
        assert _same(read_events(_file(tmp_path, "a.aedat", handmade.aedat2(made, chip, end))), made)
    # The content says what it is, whatever the suffix; a space before the ! is written too.
    spaced = handmade.aedat2(made).replace(b"#!AER", b"# !AER", 1)
    assert _same(read_events(_file(tmp_path, "b.bin", spaced)), made)
    davis = some_events(50, 260, 346, seed=2)
    named = handmade.aedat2(davis, "eu.seebetter.ini.chips.davis.Davis346BMono")
    assert _same(read_events(_file(tmp_path, "a.aedat", named)), davis)


@pytest.mark.parametrize(
    "content, message",
    [
        (_jaer(), r"byte 14: holds no events"),
        (_jaer((0x8000, 1)), r"byte 14: holds no events"),
        (_jaer((1 << 16, 1)), r"byte 14: the address does not fit a DVS128"),
        (b"#!AER-DAT1.0\r\nabcdef", r"byte 0: AEDAT version 1\.0; 2\.0, 3\.1 and 4\.0 are read"),
        (b"# nothing\r\n", r"byte 0: AEDAT version none"),
        (_jaer((0, 1), head=b"#!AER-DAT2.0\r\n# AEChip: x.Cochlea\r\n"), r"unknown camera 'x\.Cochlea'"),
    ],
)
def test_aedat2_faults(tmp_path, content, message):
    for recover in (False, True):
        with pytest.raises(EventFormatError, match=r"a\.aedat: .*" + message):
            read_events(_file(tmp_path, "a.aedat", content), recover=recover)


def test_aedat2_partial_last_record(tmp_path):
    path = _file(tmp_path, "a.aedat", _jaer((0, 1), (0, 2)) + b"abc")
    with pytest.warns(UserWarning, match=r"a\.aedat: byte 30: dropped a trailing partial record of 3 bytes"):
        assert len(read_events(path)) == 2


def test_dvs128_real_files(real_data):
    paths = sorted((real_data / "dvs128_objects").glob("*.aedat"))
    assert len(paths) == 6
    for path in paths:
        content = path.read_bytes()
        body = content[content.index(b"#End Of ASCII Header\r\n") + 22 :]
        address, t = np.frombuffer(body, ">u4").reshape(-1, 2).astype(np.int64).T
        events = read_events(path)
        assert np.array_equal(events.t, t) and np.array_equal(events.p, 1 - (address & 1))
        assert np.array_equal(events.x, 127 - (address >> 1 & 127))
        assert np.array_equal(events.y, 127 - (address >> 8 & 127))


# 3.1


def test_aedat3_by_hand(tmp_path):
    head = b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n#!END-HEADER\r\n"
    words = [9 << 17 | 8 << 2 | 1 << 1 | 1, 1 << 17 | 2 << 2 | 1, 5 << 17 | 5 << 2]  # the third is marked invalid
    body = struct.pack("<hhiiiiii", 1, 1, 8, 4, 2, 3, 3, 2) + struct.pack(
        "<IiIiIi", words[0], 7, words[1], 8, words[2], 1
    )
    events = read_events(_file(tmp_path, "a.aedat", head + body))
    assert _lists(events) == [[2 * 2**31 + 7, 2 * 2**31 + 8], [9, 1], [8, 2], [1, 0]]
    assert (events.height, events.width) == (128, 128)


def test_aedat3_overflow_other_types_and_slices(tmp_path):
    made = some_events(200, 180, 240, seed=3, t0=2**31 - 3000)
    assert made.t[0] < 2**31 <= made.t[-1]
    path = _file(tmp_path, "a.aedat", handmade.aedat3(made, "DAVIS240C"))
    assert _same(read_events(path), made)
    with open_events(path) as source:
        assert source.by_index(30, 150).t.tolist() == made.t[30:150].tolist()
        inside = (made.t >= made.t[20]) & (made.t < made.t[130])
        assert source.by_time(int(made.t[20]), int(made.t[130])).x.tolist() == made.x[inside].tolist()


def test_aedat3_faults(tmp_path):
    made = some_events(60, 128, 128, seed=4)
    good = handmade.aedat3(made)
    begin = good.index(b"#!END-HEADER\r\n") + 14 + 28 + 16  # the first packet of events: 20 of them
    path = _file(tmp_path, "a.aedat", good[: begin + 28 + 160 + 5])
    with pytest.raises(EventFormatError, match=rf"a\.aedat: byte {begin + 188}: the file ends inside a packet header"):
        read_events(path)
    with pytest.warns(UserWarning, match="kept the 20 events"):
        assert _lists(read_events(path, recover=True)) == _lists(made[:20])
    back = bytearray(good)
    back[begin + 28 + 8 * 12 + 7] = 0x80  # a negative time
    path.write_bytes(back)
    with pytest.raises(EventFormatError, match=rf"byte {begin + 28 + 96}: the time steps back"):
        read_events(path)
    with pytest.warns(UserWarning, match="kept the 12 events"):
        assert _lists(read_events(path, recover=True)) == _lists(made[:12])
    huge = bytearray(good)
    struct.pack_into("<i", huge, begin + 20, 2**31 - 1)  # eventNumber
    path.write_bytes(huge)
    with pytest.raises(EventFormatError, match=rf"byte {begin}: a packet of type 1 with 2,147,483,647 events"):
        read_events(path, recover=True)
    path.write_bytes(good.replace(b"#Source 1: DVS128", b"#Source 1: Network"))
    with pytest.raises(EventFormatError, match="source 1 is none of .*pass height and width"):
        read_events(path)
    assert len(read_events(path, height=128, width=128)) == 60
    path.write_bytes(good.replace(b"#!END-HEADER\r\n", b""))
    with pytest.raises(EventFormatError, match="no line '#!END-HEADER'"):
        read_events(path)


# 4.0


@pytest.mark.parametrize("codec", [None, "lz4", "zstd"])
@pytest.mark.parametrize("indexed", [True, False])
def test_aedat4_round_trip_and_slices(tmp_path, codec, indexed):
    made = some_events(300, 30, 40, seed=5, t0=1_700_000_000_000_000)
    given = {} if indexed else {"index": None}
    path = _file(tmp_path, "a.aedat4", handmade.packets4(made, 4, codec=codec, **given))
    assert find_format(path).name == "AEDAT4"
    with open_events(path) as source:
        assert _same(source.read(), made)
        for start, stop in ((0, 1), (70, 80), (74, 226), (299, 300)):
            assert _lists(source.by_index(start, stop)) == _lists(made[start:stop])
        t0, t1 = int(made.t[70]), int(made.t[200])
        assert source.by_time(t0, t1).t.tolist() == [t for t in made.t.tolist() if t0 <= t < t1]
        assert source.span == (made.t[0], made.t[-1] + 1)


def test_aedat4_is_what_the_other_decoder_reads(tmp_path):
    aedat = pytest.importorskip("aedat")
    made = some_events(300, 30, 40, seed=5)
    path = _file(tmp_path, "a.aedat4", handmade.packets4(made))
    packets = list(aedat.Decoder(path))
    theirs = np.concatenate([packet["events"] for packet in packets if "events" in packet])
    assert [theirs[name].tolist() for name in ("t", "x", "y", "on")] == _lists(made)
    (frame,) = (packet["frame"] for packet in packets if "frame" in packet)
    times, images = read_frames(path)
    assert times.tolist() == [frame["t"]] and np.array_equal(images[0], frame["pixels"])


def test_aedat4_slice_reads_only_its_packets(tmp_path):
    made = some_events(300, 30, 40, seed=6, step=900)
    content = bytearray(handmade.packets4(made, 3, codec=None))
    body = content.index(b"</dv>")
    at = content.index(b"EVTS", content.index(b"EVTS", body) + 4)  # the second packet of events
    with open_events(_file(tmp_path, "a.aedat4", content)) as source:
        middle = source.by_index(100, 200)
    content[at : at + 4] = b"XXXX"
    path = _file(tmp_path, "b.aedat4", content)
    with open_events(path) as source:
        assert _lists(source.by_index(0, 100)) == _lists(made[:100])
        assert _lists(source.by_time(int(middle.t[-1]) + 1, 10**9)) == _lists(made[200:])
        with pytest.raises(EventFormatError, match=r"b\.aedat4: byte \d+: a packet of type b'XXXX'"):
            source.by_index(90, 110)
    with pytest.warns(UserWarning, match="kept the 100 events"):
        assert _lists(read_events(path, recover=True)) == _lists(made[:100])


def test_aedat4_frames(tmp_path):
    rng = np.random.default_rng(0)
    gray, color = rng.integers(0, 256, (5, 7), np.uint8), rng.integers(0, 256, (4, 6, 3), np.uint8)
    packets = [(1, handmade.frame4(11, gray)), (1, handmade.frame4(22, color))]
    path = _file(tmp_path, "a.aedat4", handmade.aedat4(packets, height=5, width=7))
    times, images = read_frames(path)
    assert times.tolist() == [11, 22] and times.dtype == np.int64
    assert np.array_equal(images[0], gray) and np.array_equal(images[1], color)
    with pytest.raises(EventFormatError, match="holds no events"):
        read_events(path)
    wrong = [(1, handmade.frame4(11, gray).replace(struct.pack("<hh", 7, 5), struct.pack("<hh", 7, 6)))]
    path.write_bytes(handmade.aedat4(wrong, height=5, width=7))
    with pytest.raises(EventFormatError, match=r"a\.aedat4: byte \d+: a 6x7 frame of type 0 with 35 bytes"):
        read_frames(path)


def test_aedat4_faults(tmp_path):
    made = some_events(90, 30, 40, seed=7)
    good = handmade.packets4(made, 3, codec=None)
    begin = 18 + int.from_bytes(good[14:18], "little")
    path = tmp_path / "a.aedat4"
    for content, message in (
        (good[:14], "byte 14: a header of 0 bytes in a file of 14"),
        (good[:14] + b"\xff\xff\xff\x7f" + good[18:], "byte 14: a header of 2,147,483,647 bytes"),
        (good[:begin], f"byte {begin}: holds no events"),
        (good.replace(b"EVTS</attr>", b"NONE</attr>"), "byte 18: the header names no event stream"),
        (good.replace(b"sizeX", b"size_"), "byte 18: the header has no sensor size; pass height and width"),
        (good.replace(b"<dv version", b"<!DOCTYPE x"), "byte 18: the header's XML declares entities"),
    ):
        path.write_bytes(content)
        with pytest.raises(EventFormatError, match=rf"a\.aedat4: {message}"):
            read_events(path, recover=True)
    path.write_bytes(good[: begin + 600])  # a whole packet takes 8 + 16 + 20 + 30 * 16
    with pytest.raises(EventFormatError, match=r"byte \d+: a packet of stream 1 and [\d,]+ bytes does not fit"):
        read_events(path)
    with pytest.warns(UserWarning, match="kept the 30 events"):
        assert _lists(read_events(path, recover=True)) == _lists(made[:30])


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_aedat4_bounds_what_it_decompresses(tmp_path, codec):
    bomb = struct.pack("<I", 2**31) + bytes(1 << 24)  # claims 2 GiB, and holds 16 MiB in a few kB
    path = _file(tmp_path, "a.aedat4", handmade.aedat4([(0, bomb)], height=30, width=40, codec=codec))
    assert path.stat().st_size < 200_000
    with pytest.raises(EventFormatError, match=r"byte \d+: a packet of [\d,]+ bytes claims to hold 2,147,483,648"):
        read_events(path)


def test_aedat4_real_files(real_data):
    aedat = pytest.importorskip("aedat")
    counts = {"aestream_davis346_robotlab": 117_667, "icns_davis346_street_trimmed": 6_676, "dvxplorer": 111_954}
    for name, count in counts.items():
        path = real_data / "recordings" / f"{name}.aedat4"
        packets = list(aedat.Decoder(path))
        theirs = np.concatenate([packet["events"] for packet in packets if "events" in packet])
        frames = [packet["frame"] for packet in packets if "frame" in packet]
        for recover in (False, True):
            events = read_events(path, recover=recover)
            assert len(events) == count
            assert all(np.array_equal(theirs[a], getattr(events, b)) for a, b in zip(("t", "x", "y", "on"), "txyp"))
        assert (events.height, events.width) == ((240, 320) if name == "dvxplorer" else (260, 346))
        times, images = read_frames(path)
        assert times.tolist() == [frame["t"] for frame in frames]
        assert all(np.array_equal(image, frame["pixels"]) for image, frame in zip(images, frames))
