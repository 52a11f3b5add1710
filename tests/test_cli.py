"""The command line: what people type, on files made here."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from PIL import Image

from gep import cli
from gep.data.config import DataConfig
from gep.data.paired import Recordings
from gep.data.registry import list_recordings
from gep.events.io import read_events
from tests.layouts import random_events, write_dat, write_nimagenet, write_nmnist


def test_info_names_what_a_path_holds(tmp_path, capsys):
    write_nmnist(tmp_path / "set")
    cli.main(["info", str(tmp_path / "set")])
    assert "nmnist" in capsys.readouterr().out
    write_dat(tmp_path / "a.dat", random_events(0, 500, 10_000, 100, 120))
    cli.main(["info", str(tmp_path / "a.dat"), "--height", "100", "--width", "120"])
    assert "500" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        cli.main(["info", str(tmp_path / "none")])
    assert stopped.value.code == 2


def test_convert_there_and_back(tmp_path, capsys):
    events = random_events(3, 5000, 100_000, 100, 120)
    write_dat(tmp_path / "a.dat", events)
    size = ["--height", "100", "--width", "120"]
    cli.main(["convert", str(tmp_path / "a.dat"), str(tmp_path / "a.arrow"), *size, "--compression", "zstd"])
    assert "5,000 events" in capsys.readouterr().out
    for suffix in ("npz", "csv", "h5"):
        cli.main(["convert", str(tmp_path / "a.arrow"), str(tmp_path / f"a.{suffix}"), *size])
        back = read_events(tmp_path / f"a.{suffix}", height=100, width=120)
        assert all(np.array_equal(getattr(back, name), getattr(events, name)) for name in "txyp")
    with pytest.raises(SystemExit):
        cli.main(["convert", str(tmp_path / "a.arrow"), str(tmp_path / "a.xyz")])


def test_render(tmp_path):
    write_dat(tmp_path / "a.dat", random_events(3, 5000, 200_000, 100, 120))
    common = ["render", str(tmp_path / "a.dat"), "--height", "100", "--width", "120", "-o"]
    cli.main([*common, str(tmp_path / "a.png"), "--windows", "2"])
    assert Image.open(tmp_path / "a.png").size == (2 * 240 + 4, 200)
    cli.main([*common, str(tmp_path / "a.gif")])
    assert 4 <= Image.open(tmp_path / "a.gif").n_frames <= 7  # 200 ms at 30 frames a second


def test_shard_and_train_from_it(tmp_path):
    write_nmnist(tmp_path / "set")
    cli.main(["shard", "nmnist", str(tmp_path / "out"), "--root", str(tmp_path / "set"), "--samples", "4"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix == ".tar") == [
        "shard-000000.tar",
        "shard-000001.tar",
    ]
    config = DataConfig(height=34, width=34)
    files = Recordings(list_recordings("nmnist", tmp_path / "set", "train"), config, paired=True)
    shards = Recordings(list_recordings("shards", tmp_path / "out", "train"), config, paired=True)
    assert files.listing.hash == shards.listing.hash
    for index in range(len(files)):
        one, two = files.sample(index, None), shards.sample(index, None)
        assert one["key"] == two["key"] and one["label"] == two["label"]
        assert np.array_equal(one["image"], two["image"])
        assert all(np.array_equal(a.t, b.t) and np.array_equal(a.x, b.x) for a, b in zip(one["events"], two["events"]))
    order = shards.order(0, lambda positions: positions % 3)
    assert sorted(order(position) for position in range(6)) == list(range(6))


def test_decoded_recordings_are_kept_and_follow_a_changed_file(tmp_path):
    write_nimagenet(tmp_path / "set", ("n01",), "extracted_train", each=2, count=300, images=False)
    listing = list_recordings("nimagenet", tmp_path / "set", "train")
    config = DataConfig(height=480, width=640, windows=1, window_us=0, cache_dir=str(tmp_path / "cache"))
    plain = Recordings(listing, DataConfig(height=480, width=640, windows=1, window_us=0), paired=False)
    cached = Recordings(listing, config, paired=False)
    first = cached.sample(0, None)["events"][0]
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 1
    again = Recordings(listing, config, paired=False).sample(0, None)["events"][0]
    expected = plain.sample(0, None)["events"][0]
    for events in (first, again):
        assert np.array_equal(events.t, expected.t) and np.array_equal(events.x, expected.x)
    rows = np.zeros(5, [("x", "<u2"), ("y", "<u2"), ("t", "<i8"), ("p", "?")])
    listing.files[0].unlink()
    np.savez(listing.files[0], event_data=rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(Recordings(listing, config, paired=False).sample(0, None)["events"][0]) == 5
