"""Text readers on hand-written lines, `.npz` and structured `.npy` beyond N-ImageNet and EST."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from gep.events.io import open_events, read_events, read_npz, write_events
from gep.events.types import EventFormatError, Events

_ROWS = [(5, 1, 2, 1), (5, 3, 0, 0), (1_000_007, 9, 8, 1)]


def _check(events: Events, height: int = 180, width: int = 240, rows=_ROWS) -> None:
    found = list(zip(*(getattr(events, name).tolist() for name in "txyp")))
    assert found == rows and (events.height, events.width) == (height, width)


@pytest.mark.parametrize(
    "text, size",
    [
        ("0.000005 1 2 1\n0.000005 3 0 0\n1.000007 9 8 1\n", (180, 240)),
        ("346 260\n0.000005 1 2 1\n0.000005 3 0 0\n1.000007 9 8 1", (260, 346)),
        ("5 1 2 1\n5 3 0 0\n1000007 9 8 1\n", (180, 240)),
        ("5e-6 1 2 1\n5e-6 3 0 -1\n1.000007 9 8 1\n", (180, 240)),
        ("5,1,2,1\r\n5,3,0,-1\r\n1000007,9,8,1\r\n", (180, 240)),
        ("t,x,y,p\n5,1,2,1\n5,3,0,0\n1000007,9,8,1\n", (180, 240)),
        ("x, y, polarity, timestamp\n1, 2, 1, 5\n3, 0, 0, 5\n9, 8, 1, 1000007\n", (180, 240)),
        ("# made by hand\n# sensor 20x10\n\nx;y;p;t_us;frame\n1;2;1;5.0;7\n3;0;0;5.0;7\n9;8;1;1000007.0;7\n", (10, 20)),
        ("  0.000005   1\t2  1 \n0.000005 3 0 0\n\n1.000007 9 8 1\n", (180, 240)),
        ('"t_s","x","y","p"\n0.000005,1.0,2.0,1\n0.000005,3.0,0.0,0\n1.000007,9.0,8.0,1\n', (180, 240)),
    ],
)
def test_layouts_by_hand(tmp_path, text, size):
    path = tmp_path / "events.txt"
    path.write_bytes(text.encode())
    _check(read_events(path), *size)
    path = path.rename(tmp_path / "events.dump")  # what it holds tells, not the suffix
    _check(read_events(path, height=50, width=60), 50, 60)


def test_unix_seconds_keep_their_microseconds(tmp_path):
    path = tmp_path / "events.txt"
    path.write_text("240 180\n1468939993.067416019 33 39 1\n1468939993.067417020 158 145 1\n")
    assert read_events(path).t.tolist() == [1_468_939_993_067_416, 1_468_939_993_067_417]


def test_a_point_that_comes_late_makes_the_times_seconds(tmp_path):
    path = tmp_path / "events.txt"
    path.write_text("0 1 1 1\n" * 5000 + "0.000005 1 2 1\n" + "1 3 0 0\n")
    assert read_events(path).t[-3:].tolist() == [0, 5, 1_000_000]


@pytest.mark.parametrize(
    "line, cause",
    [
        ("5 1 2", "'5 1 2' is no event of columns t, x, y, p"),
        ("5 1 2 1 1", "is no event"),
        ("5 1 abc 1", "is no event"),
        ("5 1 nan 1", "is no event|outside the sensor"),
        ("5 240 2 1", "x = 240 is outside the sensor's 240 columns"),
        ("5 -1 2 1", "x = -1 is outside"),
        ("5 1 2 2", "p = 2 is not a polarity"),
        ("3 1 2 1", "t = 3 µs is before the previous event's 4 µs"),
        ("99999999999999999999 1 2 1", "is no event|not finite or out of range"),
    ],
)
def test_faults_name_line_and_byte(tmp_path, line, cause):
    path = tmp_path / "events.txt"
    good = "# a comment\n240 180\n4 0 0 0\n4 1 1 1\n"
    path.write_text(good + line + "\n9 9 9 1\n")
    with pytest.raises(EventFormatError, match=rf"events\.txt: byte {len(good)}: (line 5|event 2).*({cause})"):
        read_events(path)
    with pytest.warns(UserWarning, match=rf"byte {len(good)}: .*kept the 2 events before it, lost"):
        assert read_events(path, recover=True).t.tolist() == [4, 4]


def test_ends_and_empty_files(tmp_path):
    path = tmp_path / "events.csv"
    path.write_text("t,x,y,p\n1,2,3,1\n2,3,4,0\n3,4")
    with pytest.warns(UserWarning, match=r"events\.csv: byte 24: dropped a partial last line \(4\)"):
        assert read_events(path).t.tolist() == [1, 2]
    for text in ("t,x,y,p\n", "# nothing\n", "t,x,y\n1,2,3\n", "hello world\n", "1 2 3\n", "\n\n"):
        path.write_text(text)
        with pytest.raises(EventFormatError, match=r"events\.csv: byte 0: no line of numbers"):
            read_events(path)
    path.write_bytes(b"t,x,y,p\n1,2,3,1\n\xff\xfe\x00,1,1,1\n")
    with pytest.raises(EventFormatError, match="byte 16: line 3"):
        read_events(path)


@pytest.mark.parametrize("suffix", [".csv", ".txt", ".npz", ".npy", ".h5", ".arrow"])
def test_round_trips(tmp_path, suffix):
    rng = np.random.default_rng(0)
    t = 1_700_000_000_000_000 // (1000 if suffix == ".txt" else 1) + np.cumsum(rng.integers(0, 9, 5000))
    x, y, p = rng.integers(0, 640, 5000), rng.integers(0, 480, 5000), rng.integers(0, 2, 5000)
    events = Events.from_arrays(t, x, y, p, height=480, width=640)
    path = tmp_path / f"a{suffix}"
    write_events(path, events)
    again = read_events(path)
    assert all(np.array_equal(getattr(again, name), getattr(events, name)) for name in "txyp")
    assert (again.height, again.width) == (480, 640)


def test_text_writers_by_hand(tmp_path):
    t, x, y, p = zip(*_ROWS)
    events = Events.from_arrays(np.array(t), np.array(x), np.array(y), np.array(p), height=10, width=20)
    write_events(tmp_path / "a.csv", events)
    assert (tmp_path / "a.csv").read_text() == "# sensor 20x10\nt,x,y,p\n5,1,2,1\n5,3,0,0\n1000007,9,8,1\n"
    write_events(tmp_path / "a.txt", events)
    _check(read_events(tmp_path / "a.txt"), 10, 20)
    assert (tmp_path / "a.txt").read_text().splitlines()[0] == "20 10"
    late = Events.from_arrays([10**16], [0], [0], [0], height=10, width=20)
    with pytest.raises(ValueError, match="seconds as text cannot hold 10000000000000000 µs"):
        write_events(tmp_path / "b.txt", late)
    for suffix in (".csv", ".txt", ".npz", ".npy"):
        with pytest.raises(ValueError, match="no events"):
            write_events(tmp_path / f"b{suffix}", Events.empty(10, 20))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.txt"]


def test_npz_layouts(tmp_path):
    path = tmp_path / "a.npz"
    t, x, y, p = (np.array(column) for column in zip(*_ROWS))
    np.savez(path, t=t, x=x, y=y, p=p)
    _check(read_events(path), 480, 640)
    np.savez(path, t=t, x=x, y=y, p=p, height=10, width=20, extra=np.zeros(5))
    _check(read_events(path), 10, 20)
    np.savez(path, t_us=t, x=x, y=y, p=p == 1)
    _check(read_events(path, height=260, width=346), 260, 346)
    np.savez(path, t_ns=t * 1000 + 999, x=x, y=y, p=p)
    _check(read_events(path), 480, 640)
    np.savez(path, ts=t / 1e6, xs=x, ys=y, ps=2 * p - 1)
    _check(read_events(path), 480, 640)
    np.savez(path, timestamps=t * 1000, x=x, y=y, pol=p)
    _check(read_npz(path, unit="ns"), 480, 640)
    rows = np.zeros(3, [("ts", "f8"), ("x", "i2"), ("y", "i2"), ("pol", "?")])
    rows["ts"], rows["x"], rows["y"], rows["pol"] = t / 1e6, x, y, p
    np.savez(path, events=rows)
    _check(read_events(path), 480, 640)


@pytest.mark.parametrize("scale, dtype", [(1000, np.int64), (1, np.int64), (1e-6, np.float64)])
def test_eventscape_files_tell_their_unit_by_the_time_stamps(tmp_path, scale, dtype):
    folder = tmp_path / "events" / "data"
    folder.mkdir(parents=True)
    (folder / "timestamps.txt").write_text("0 100.0\n1 100.04\n2 100.08\n")
    t = np.linspace(100_040_000, 100_079_000, 40).round().astype(np.int64)
    zeros = np.zeros(40, np.int16)
    np.savez(folder / "00_0001_events.npz", x=zeros + 511, y=zeros, t=(t * scale).astype(dtype), p=2 * (zeros == 0) - 1)
    events = read_events(folder / "00_0001_events.npz")
    assert np.array_equal(events.t, t) and (events.height, events.width) == (256, 512)


def test_npz_and_npy_do_not_allocate_what_a_head_claims(tmp_path):
    huge = np.zeros(1, np.int64)
    head = {"descr": "<i8", "fortran_order": False, "shape": (1 << 45,)}
    npz, npy = tmp_path / "a.npz", tmp_path / "a.npy"
    import zipfile

    with zipfile.ZipFile(npz, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in "txyp":
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array_header_1_0(file, head)
                file.write(huge.tobytes())
    with pytest.raises(EventFormatError, match=r"a\.npz: .*'x' claims 281,474,976,710,656 bytes"):
        read_events(npz)
    with open(npy, "wb") as file:
        head["descr"] = [("t", "<i8"), ("x", "<u2"), ("y", "<u2"), ("p", "u1")]
        np.lib.format.write_array_header_1_0(file, head)
        file.write(bytes(13 * 2 + 5))
    with pytest.raises(EventFormatError, match=r"a\.npy: byte \d+: .*35,184,372,088,832 events claimed, 2 are there"):
        read_events(npy)
    with pytest.warns(UserWarning, match="kept the 2 events"):
        assert len(read_events(npy, recover=True)) == 2


def test_structured_npy_slices_lazily_and_recovers(tmp_path):
    path = tmp_path / "a.npy"
    rng = np.random.default_rng(0)
    rows = np.zeros(3000, [("x", "<u2"), ("timestamp", "<i8"), ("y", "<u2"), ("polarity", "i1")])
    rows["timestamp"], rows["x"] = np.cumsum(rng.integers(0, 3, 3000)) + 10**15, rng.integers(0, 640, 3000)
    rows["y"], rows["polarity"] = rng.integers(0, 480, 3000), 1
    np.save(path, rows)
    with open_events(path) as source:
        assert len(source) == 3000 and source.span == (rows["timestamp"][0], rows["timestamp"][-1] + 1)
        for t0 in rng.integers(rows["timestamp"][0] - 9, rows["timestamp"][-1] + 9, 20):
            low, high = np.searchsorted(rows["timestamp"], [t0, t0 + 100])
            assert np.array_equal(source.by_time(int(t0), int(t0) + 100).x, rows["x"][low:high])
        assert np.array_equal(source.by_index(5, 700).t, rows["timestamp"][5:700])
        assert len(source.by_index(7, 3)) == 0
        sent = pickle.dumps(source)
        assert len(sent) < 1000 and np.array_equal(pickle.loads(sent).read().x, rows["x"])
    begin = path.stat().st_size - rows.nbytes
    rows["x"][1234] = 640
    np.save(path, rows)
    with pytest.raises(EventFormatError, match=rf"a\.npy: byte {begin + 1234 * 13}: event 1234: x = 640 is outside"):
        read_events(path)
    with pytest.warns(UserWarning, match="kept the 1,234 events before it, lost 1,766 of 3,000"):
        assert np.array_equal(read_events(path, recover=True).x, rows["x"][:1234])


def test_npz_recovers(tmp_path):
    path = tmp_path / "a.npz"
    t, x, y, p = (np.arange(5000) % n for n in (6000, 640, 480, 2))
    t[4000] = 5
    np.savez(path, t=t, x=x, y=y, p=p)
    with pytest.warns(UserWarning, match="event 4000: t = 5 µs is before .*kept the 4,000 events"):
        assert np.array_equal(read_events(path, recover=True).x, x[:4000])


@pytest.mark.parametrize("layout", ["columns", "structured"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_truncated_npz_recovers_what_all_columns_hold(tmp_path, save, layout):
    path = tmp_path / "a.npz"
    rng = np.random.default_rng(0)
    t, x, y, p = np.sort(rng.integers(0, 10**6, 5000)), *(rng.integers(0, n, 5000) for n in (640, 480, 2))
    if layout == "columns":
        save(path, t=t, x=x, y=y, p=p)
    else:
        rows = np.zeros(5000, [("x", "u2"), ("y", "u2"), ("t", "i8"), ("p", "?")])
        rows["t"], rows["x"], rows["y"], rows["p"] = t, x, y, p
        save(path, event_data=rows)
    content = path.read_bytes()
    last = content.find(b"p.npy" if layout == "columns" else b"event_data.npy")
    end, most = content.find(b"PK\x01\x02"), 0
    path.write_bytes(content[: max(last - 100, 10)])
    with pytest.raises(EventFormatError, match=r"a\.npz: .*(keys are|sound)"):
        read_events(path, recover=True)
    for part in (0.5, 0.8, 0.95, 1.0):
        path.write_bytes(content[: last + int((end - last) * part)])
        with pytest.raises(EventFormatError, match="not a readable .npz archive"):
            read_events(path)
        with pytest.warns(UserWarning, match=r"kept the [\d,]+ events"):
            events = read_events(path, recover=True)
        assert len(events) > most
        most = len(events)
        for name, values in (("t", t), ("x", x), ("y", y), ("p", p)):
            assert np.array_equal(getattr(events, name), values[:most])
    assert most == 5000
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    path.write_bytes(flipped[:-30])
    with pytest.raises(EventFormatError):
        read_events(path, recover=True)


def test_real_davis_events(real_data):
    archive = np.load(real_data / "davis346" / "events.npz")
    events = read_events(real_data / "davis346" / "events.npz")
    assert (events.height, events.width) == (260, 346)
    for name, key in (("t", "t_us"), ("x", "x"), ("y", "y"), ("p", "p")):
        assert np.array_equal(getattr(events, name), archive[key])
