"""Shards: what was written is read back, identical however it was written, and resumed in mid-epoch."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gep.data.shard_write import write_shards
from gep.data.shards import open_shards
from gep.data.view import View
from gep.events.io.source import InMemory
from tests.shard_samples import (
    SENSOR,
    Pictures,
    assert_is,
    assert_same,
    digests,
    events_of,
    make,
    write,
)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "train"
    write(make(), out)
    return out


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    out = tmp_path / "copy"
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


def test_what_was_written_is_read_back(folder: Path) -> None:
    listing = open_shards(folder, "train")
    assert_is(listing, make())
    assert listing.notes["seen"] == "once" and listing.notes["shards"] == "5"
    assert "23 recordings" in listing.describe()
    assert_is(pickle.loads(pickle.dumps(listing)), make())
    part = listing.subset([7, 3], "part")
    assert_same(part.source(1).read(), events_of(3))
    assert sorted(path.name for path in folder.iterdir()) == ["index.json"] + [f"shard-{i:06d}.tar" for i in range(5)]
    with pytest.raises(
        ValueError, match=r"split 'train', 'val' was asked for; set data\.train_split=train \(and data\.eval_split\)"
    ):
        open_shards(folder, "val")
    assert len(open_shards(folder.parent, "train")) == len(open_shards(f"{folder.parent}/{{split}}", "train")) == 23


def test_samples_are_shuffled_over_the_shards_by_a_fixed_seed(folder: Path, tmp_path: Path) -> None:
    def numbers(out: Path) -> list[int]:
        entries = json.loads((out / "index.json").read_text())["shards"]
        assert [len(entry["numbers"]) for entry in entries] == [5, 5, 5, 5, 3]
        return [number for entry in entries for number in entry["numbers"]]

    assert numbers(folder) != list(range(23)) == sorted(numbers(folder))
    write(make(), tmp_path / "plain", shuffle_seed=None)
    assert numbers(tmp_path / "plain") == list(range(23))
    assert_is(open_shards(tmp_path / "plain"), make())


def test_webdataset_reads_the_shards(folder: Path) -> None:
    import webdataset

    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = webdataset.DataPipeline(
            webdataset.SimpleShardList([str(path) for path in sorted(folder.glob("*.tar"))]),
            webdataset.tarfile_to_samples(),
        )
        for sample in pipeline:
            facts = json.loads(sample["json"])
            found[facts["key"]] = (sample, facts)
    assert sorted(found) == sorted(make().keys)
    sample, facts = found["b/4"]
    assert {"events.arrow", "png", "mask.png", "depth.npy", "json"} <= set(sample)
    assert (facts["label"], facts["class"], facts["sensor"], facts["span"]) == (-1, None, [24, 32], None)
    assert View.from_json(facts["view"]) == Pictures().view(4)
    assert sample["png"] == Pictures().encoded(4)[0]


def test_any_number_of_workers_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write(make(), tmp_path / "two", workers=2)
    assert digests(tmp_path / "two") == digests(folder)


def test_killed_and_resumed_gives_the_same_bytes_and_keeps_what_was_done(folder: Path, tmp_path: Path) -> None:
    context, out = multiprocessing.get_context("spawn"), tmp_path / "out"
    process = context.Process(target=write, args=(make(slow=0.05), out))
    process.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (out / "shard-000001.json").exists():
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")}
    assert "shard-000001.tar" in done and not (out / "index.json").exists()
    with pytest.raises(FileNotFoundError, match=r"index.json.*once `gep shard` has finished"):
        open_shards(out)
    write(make(), out)
    assert digests(out) == digests(folder)
    assert (out / "shard-000000.tar").stat().st_mtime_ns == done["shard-000000.tar"]
    before = digests(out), (out / "index.json").stat().st_mtime_ns
    write(make(), out)
    assert before == (digests(out), (out / "index.json").stat().st_mtime_ns), "a finished set is left alone"
    (out / "shard-000000.json").write_text("{}")  # as of a run killed between the index and its last removal
    write(make(), out)
    assert not list(out.glob("shard-*.json"))


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_ctrl_c_ends_workers_and_leaves_no_halves(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, {root!r})\n"
        "from tests import shard_samples\n"
        "if __name__ == '__main__':\n"
        "    shard_samples.write(shard_samples.make(60, slow=0.05), {out!r}, workers=2)\n"
    ).format(root=str(ROOT), out=str(tmp_path / "out"))
    (tmp_path / "script.py").write_text(script)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")],
        stderr=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list((tmp_path / "out").glob("shard-*.json")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, complaints = process.communicate(timeout=30)
    assert process.returncode != 0 and "KeyboardInterrupt" in complaints
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert not [name for name in names if name.endswith(".tmp")] and "index.json" not in names
    while time.monotonic() < deadline and alive(process.pid):
        time.sleep(0.05)
    assert not alive(process.pid)


def test_other_samples_or_settings_are_refused(copied: Path) -> None:
    for change in ({"samples_per_shard": 6}, {"compression": "zstd"}, {"shuffle_seed": 3}):
        with pytest.raises(ValueError, match=r"index.json: of other samples or settings"):
            write_shards(make(), copied, progress=False, **{"samples_per_shard": 5, **change})
    with pytest.raises(ValueError, match="of other samples"):
        write(replace(make(), labels=np.zeros(23, np.int64)), copied)
    (copied / "shard-000002.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"shard-000002.tar: missing or not whole"):
        write(make(), copied)


def test_a_bad_recording_stops_or_is_left_out_and_listed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"class.a/../5.raw: five.raw: byte 16.*skip_bad"):
        write(make(broken=True), tmp_path / "out")
    with pytest.warns(UserWarning, match="1 of 23 samples left out, first class.a/../5.raw"):
        write(make(broken=True), tmp_path / "out", skip_bad=True)
    assert json.loads((tmp_path / "out" / "index.json").read_text())["skipped"] == [
        ["class.a/../5.raw", "five.raw: byte 16: no such event type"]
    ]
    listing = open_shards(tmp_path / "out")
    assert listing.keys == make().keys[:5] + make().keys[6:] and listing.notes["left out"].startswith("1 ")
    assert_same(listing.source(5).read(), events_of(6))


def test_recordings_of_spans_keep_apart_though_their_names_are_one(tmp_path: Path) -> None:
    files = tuple(tmp_path / "set" / f"seq{i % 3}" / "events" / "events.h5" for i in range(23))
    write(replace(make(spans=True), files=files), tmp_path / "out")
    listing = open_shards(tmp_path / "out")
    assert [path.as_posix() for path in listing.files] == [f"seq{i % 3}/events/events.h5" for i in range(23)]
    assert [part.keys for part in listing.hold_out(0.5)] == [
        part.keys for part in replace(make(spans=True), files=files).hold_out(0.5)
    ]


def test_spans_keep_their_times_and_the_past_asked_for(tmp_path: Path) -> None:
    write(make(spans=True), tmp_path / "out", past_us=4000)
    listing = open_shards(tmp_path / "out")
    np.testing.assert_array_equal(listing.spans, make(spans=True).spans)
    assert listing.anchor == "end" and "23 samples" in listing.describe()
    t0, t1 = listing.spans[9].tolist()
    assert_same(listing.source(9).by_time(t0 - 4000, t1), InMemory(Path(), events_of(9)).by_time(t0 - 4000, t1))
    with pytest.raises(ValueError, match="begin 1 µs before and end 2 µs after.*past_us"):
        listing.source(9).by_time(t0 - 4001, t1 + 2)


class Shift:
    def __call__(self, index: int) -> np.ndarray:
        ys, xs = np.mgrid[: SENSOR[0], : SENSOR[1]].astype(np.float32)
        return np.stack([xs + 2.4, ys], axis=-1)


def test_rectified_when_written(tmp_path: Path) -> None:
    pytest.importorskip("gep.data.paired")
    write(replace(make(4), rectify=Shift()), tmp_path / "out")
    listing = open_shards(tmp_path / "out")
    whole = events_of(2)
    inside = whole.x < 30
    np.testing.assert_array_equal(listing.source(2).read().x, whole.x[inside] + 2)
    np.testing.assert_array_equal(listing.source(2).read().t, whole.t[inside])
    assert listing.rectify is None and "rectified" in listing.notes


def test_two_ranks_of_two_workers_killed_in_mid_epoch_go_on_as_if_they_had_not_been(tmp_path: Path) -> None:
    from tests.workers.shard_run import batches, describe

    write(make(44), tmp_path / "shards")
    steps, killed_at = 14, 7  # of 8 samples: epochs end inside of steps
    whole = [
        [describe(step) for step in itertools.islice(batches(str(tmp_path / "shards"), rank, num_workers=0)(0), steps)]
        for rank in range(2)
    ]
    keys = [key for step in zip(*whole) for part in step for key in part["keys"]]
    assert sorted(keys[:44]) == sorted(keys[44:88]) == sorted(make(44).keys) and keys[:44] != keys[44:88]

    def start(rank: int, first: int, pause: float) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "workers" / "shard_run.py"), str(tmp_path / "shards"), str(rank),
             str(first), str(steps), str(pause), str(tmp_path / f"rank{rank}.jsonl")],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def lines(rank: int) -> list[dict]:
        path = tmp_path / f"rank{rank}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    ranks = [start(rank, 0, 0.3) for rank in range(2)]
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and min(len(lines(rank)) for rank in range(2)) < killed_at:
        time.sleep(0.01)
    for process in ranks:
        process.send_signal(signal.SIGKILL)
    for process in ranks:
        process.wait()
    done = [len(lines(rank)) for rank in range(2)]
    assert killed_at <= min(done) and max(done) < steps, "the runs ended before they could be killed"
    for rank in range(2):  # a checkpoint is what both had finished
        kept = (tmp_path / f"rank{rank}.jsonl").read_text().splitlines(keepends=True)[: min(done)]
        (tmp_path / f"rank{rank}.jsonl").write_text("".join(kept))
    ranks = [start(rank, min(done), 0.0) for rank in range(2)]
    try:
        assert [process.wait(60) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    assert [lines(rank) for rank in range(2)] == whole
