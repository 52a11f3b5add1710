"""Conversion between formats: values survive, targets are whole or absent, refusals say what can be done."""

from __future__ import annotations

import os

import numpy as np
import pytest

from gep.events.io import open_events, read_events, write_events
from gep.events.io.convert import convert
from gep.events.types import EventFormatError, Events


def _events(count: int = 3000) -> Events:
    rng = np.random.default_rng(0)
    t = np.cumsum(rng.integers(0, 50, count)) + 1000
    return Events.from_arrays(
        t, rng.integers(0, 240, count), rng.integers(0, 180, count), rng.integers(0, 2, count), height=180, width=240
    )


def _same(a: Events, b: Events) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in "txyp")


@pytest.mark.parametrize("target", [".arrow", ".h5", ".npz", ".npy", ".csv", ".txt", ".bin"])
@pytest.mark.parametrize("source", [".arrow", ".h5", ".npy", ".csv"])
def test_from_any_to_any(tmp_path, source, target):
    events = _events()
    write_events(tmp_path / f"in{source}", events)
    count = convert(
        tmp_path / f"in{source}",
        tmp_path / f"out{target}",
        height=None if source == ".arrow" else 180,
        width=None if source == ".arrow" else 240,
        progress=False,
    )
    size = {"height": 180, "width": 240} if target in (".npy", ".bin") else {}
    again = read_events(tmp_path / f"out{target}", **size)
    assert count == 3000 and _same(again, events) and (again.height, again.width) == (180, 240)


@pytest.mark.parametrize("target", [".raw", ".dat", ".arrow", ".npz"])
def test_times_of_day_count_from_zero_where_asked_for(tmp_path, target):
    at = _events()
    today = Events.from_arrays(at.t + 1_700_000_000_000_000, at.x, at.y, at.p, height=180, width=240)
    write_events(tmp_path / "in.arrow", today)
    if target in (".raw", ".dat"):
        with pytest.raises(ValueError, match="--from-zero"):
            convert(tmp_path / "in.arrow", tmp_path / f"out{target}", progress=False)
    convert(tmp_path / "in.arrow", tmp_path / f"out{target}", from_zero=True, progress=False)
    again = read_events(tmp_path / f"out{target}")
    assert np.array_equal(again.t, at.t - at.t[0]) and np.array_equal(again.x, at.x) and np.array_equal(again.p, at.p)


def test_streams_in_chunks_and_shows_progress(tmp_path, monkeypatch, capsys):
    events = _events(200_000)
    write_events(tmp_path / "a.npy", events)
    with open_events(tmp_path / "a.npy", height=180, width=240) as source:
        kind = type(source)
    monkeypatch.setattr(kind, "read", lambda self: pytest.fail("read whole"))
    original, chunks = kind.chunks, []

    def small(self, count=0):
        for chunk in original(self, 70_000):
            chunks.append(len(chunk))
            yield chunk

    monkeypatch.setattr(kind, "chunks", small)
    for name in ("b.arrow", "b.h5"):
        assert convert(tmp_path / "a.npy", tmp_path / name, height=180, width=240) == 200_000
    assert chunks == [70_000, 70_000, 60_000] * 2
    assert "b.arrow" in capsys.readouterr().err
    assert _same(read_events(tmp_path / "b.arrow"), events) and _same(read_events(tmp_path / "b.h5"), events)


def test_refusals(tmp_path):
    events = _events(10)
    write_events(tmp_path / "a.arrow", events)
    with pytest.raises(
        ValueError, match=r"no format of this suffix can be written; choose one of \.arrow \(gep\), .*csv"
    ):
        convert(tmp_path / "a.arrow", tmp_path / "b.jpg", progress=False)
    with pytest.raises(ValueError, match="source and target are one file"):
        convert(tmp_path / "a.arrow", tmp_path / "a.arrow", progress=False)
    with pytest.raises(FileNotFoundError, match="no event file"):
        convert(tmp_path / "none.arrow", tmp_path / "b.arrow", progress=False)
    with pytest.raises(FileNotFoundError, match="the folder .* does not exist"):
        convert(tmp_path / "a.arrow", tmp_path / "none" / "b.arrow", progress=False)
    with pytest.raises(ValueError, match="npz has no choice of compression"):
        convert(tmp_path / "a.arrow", tmp_path / "b.npz", compression="lz4", progress=False)
    assert os.listdir(tmp_path) == ["a.arrow"]


def test_a_failure_leaves_the_old_target(tmp_path, monkeypatch):
    events = _events(10)
    for name in ("b.arrow", "b.h5", "b.npz", "b.npy", "b.csv"):
        write_events(tmp_path / name, events)
    write_events(tmp_path / "a.arrow", _events(20))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    for name in ("b.arrow", "b.h5", "b.npz", "b.npy", "b.csv"):
        with pytest.raises(OSError, match="No space"):
            convert(tmp_path / "a.arrow", tmp_path / name, progress=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_damaged_sources(tmp_path):
    write_events(tmp_path / "a.arrow", _events(70_000))
    data = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(data[:-3000])
    with pytest.raises(EventFormatError, match="recover=True"):
        convert(tmp_path / "a.arrow", tmp_path / "b.npz", progress=False)
    assert not (tmp_path / "b.npz").exists()
    with pytest.warns(UserWarning, match="kept the 65,536 events"):
        assert convert(tmp_path / "a.arrow", tmp_path / "b.npz", recover=True, progress=False) == 65_536
    assert len(read_events(tmp_path / "b.npz")) == 65_536
