"""`gep embed`: the array of a whole recording, whole or not at all, and one window in memory at a time."""

from __future__ import annotations

import gc
import warnings

import numpy as np
import pytest
import torch

from gep import cli
from gep.embed import Latencies, NpyWriter, embed
from gep.events.io import open_events
from gep.events.io.source import InMemory
from gep.events.slicing import by_duration
from gep.events.types import EventFormatError
from tests.test_stream import NAMES, SENSOR, WINDOW_US, make, recording


@pytest.mark.parametrize("what", NAMES)
def test_embed_writes_what_the_whole_sequence_gives(tmp_path, what):
    events, model = recording(7.5), make(windows=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = embed(model, InMemory(tmp_path / "r", events), tmp_path / "e.npy", what=what)
    bounds = by_duration(events, WINDOW_US).bounds
    got, want = np.load(tmp_path / "e.npy", mmap_mode="r"), getattr(model.predict(events, bounds=bounds), what)[0]
    assert got.dtype == np.float32 and got.shape == written.shape == tuple(want.shape)
    np.testing.assert_allclose(got, want.numpy(), atol=1e-4)
    assert np.array_equal(np.load(tmp_path / "e.times.npy"), bounds)
    assert written.num_bytes == (tmp_path / "e.npy").stat().st_size == 128 + got.nbytes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.npy", "e.times.npy"]
    assert "p50" in str(written) and "8 x" in str(written)


class Failing(InMemory):
    """A recording that breaks off in its fourth window."""

    def windows(self, window_us, **_):
        for number, window in enumerate(super().windows(window_us)):
            if number == 3:
                raise EventFormatError("byte 7: broken")
            yield window


def test_embed_leaves_nothing_half_written(tmp_path):
    model, events, out = make(), recording(6), tmp_path / "e.npy"
    with pytest.raises(EventFormatError, match="byte 7"):
        embed(model, Failing(tmp_path / "r", events), out)
    assert list(tmp_path.iterdir()) == []
    embed(model, InMemory(tmp_path / "r", events), out, dtype="float16")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(EventFormatError):
        embed(model, Failing(tmp_path / "r", events), out)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert np.load(out).dtype == np.float16
    for keywords, match in (({"what": "logits"}, "tokens, pooled"), ({"dtype": "int8"}, "float16")):
        with pytest.raises(ValueError, match=match):
            embed(model, InMemory(tmp_path / "r", events), out, **keywords)
    with pytest.raises(ValueError, match="none"):
        embed(make(backbone=False), InMemory(tmp_path / "r", events), out, what="image")
    with pytest.raises(ValueError, match=r"\.npy"):
        embed(model, InMemory(tmp_path / "r", events), tmp_path / "e.npz")
    with pytest.raises(ValueError, match="no events"):
        embed(model, InMemory(tmp_path / "r", events[:0]), out)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        embed(model, InMemory(tmp_path / "r", events), tmp_path / "nowhere" / "e.npy")


def test_embed_holds_one_window_at_a_time(tmp_path, monkeypatch):
    counts, append = [], NpyWriter.append

    def counting(self, row):
        append(self, row)
        if row.ndim == 2 and self.rows in (10, 60):
            counts.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))

    monkeypatch.setattr(NpyWriter, "append", counting)
    embed(make(), InMemory(tmp_path / "r", recording(61, count=2000)), tmp_path / "e.npy", what="image", span=4)
    assert len(counts) == 2 and counts[0] == counts[1]


def test_embed_on_the_command_line(tmp_path, capsys):
    model, events = make(), recording(5)
    model.save_pretrained(tmp_path / "export")
    np.savez(tmp_path / "r.npz", t=events.t, x=events.x, y=events.y, p=events.p, height=SENSOR[0], width=SENSOR[1])
    size = ["--height", str(SENSOR[0]), "--width", str(SENSOR[1])]
    common = [
        "embed",
        str(tmp_path / "r.npz"),
        "--model",
        str(tmp_path / "export"),
        "-o",
        str(tmp_path / "t.npy"),
        *size,
    ]
    cli.main(common)
    said = capsys.readouterr().out
    assert "p50" in said and "p90" in said and "p99" in said and "t.times.npy" in said
    with open_events(tmp_path / "r.npz", height=SENSOR[0], width=SENSOR[1]) as source:
        want = model.encode(source.read(), windows=5).tokens[0].numpy()
    np.testing.assert_allclose(np.load(tmp_path / "t.npy"), want, atol=1e-4)
    cli.main([*common, "--what", "image", "--span", "2", "--window-ms", "25"])
    assert np.load(tmp_path / "t.npy").shape == (10, 36, 96)
    with pytest.raises(SystemExit):
        cli.main([*common, "--span", "0", "--what", "image"])
    assert "span = 0" in capsys.readouterr().err


def test_latencies_are_numpys_percentiles_to_a_percent():
    times, found = np.random.default_rng(0).lognormal(-6, 1, 20_000), Latencies()
    for seconds in times:
        found.add(seconds)
    for q in (1, 50, 90, 99, 100):
        assert found.percentile(q) == pytest.approx(np.percentile(times, q, method="inverted_cdf"), rel=0.0101)
    assert np.isnan(Latencies().percentile(50))
    found.add(1e9)
    assert found.slowest == 1e9 and found.percentile(100) > 1e6
