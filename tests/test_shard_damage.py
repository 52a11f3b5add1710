"""Damaged shards are named sample by sample, what cannot be safe is refused, and others' tars are read."""

from __future__ import annotations

import itertools
import json
import pickle
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest

from gep.data.bad import BadSample
from gep.data.config import DataConfig
from gep.data.paired import Recordings, collate
from gep.data.sampler import Batches
from gep.data.shard_index import parse
from gep.data.shard_tar import scan
from gep.data.shards import open_shards
from gep.events.io import write_bin
from gep.events.io.arrow import to_bytes
from gep.events.types import Events
from tests.shard_samples import (
    SENSOR,
    Pictures,
    assert_same,
    events_of,
    foreign_tar,
    make,
    members_of,
    write,
)


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


def test_every_damaged_member_is_named_and_the_others_read(copied: Path) -> None:
    readers = {
        "events.arrow": lambda listing: listing.source(4).read(),
        "png": lambda listing: listing.image(4),
        "mask.png": lambda listing: listing.targets["mask"](4),
        "depth.npy": lambda listing: listing.targets["depth"](4),
        "json": lambda listing: listing.image.view(4),
    }
    name, members = members_of(copied, "b/4")
    path = copied / name
    sound = path.read_bytes()
    for suffix, reader in readers.items():
        offset, size, _ = members[suffix]
        rng = np.random.default_rng(size)
        for place in rng.integers(0, size, 10).tolist():
            damaged = bytearray(sound)
            damaged[offset + place] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            listing = open_shards(copied)
            if suffix == "events.arrow":
                try:  # a flip in padding or in a part that is not read has no effect
                    assert_same(listing.source(4).read(), events_of(4))
                except BadSample as error:
                    assert error.key == "b/4" and f"{name}: b/4.events.arrow: byte" in error.reason
            else:
                with pytest.raises(BadSample, match=rf"sample b/4: .*{name}: b/4.{suffix}: byte {offset}: its CRC-32"):
                    reader(listing)
            for other in range(5, 23):
                listing.image(other)
    path.write_bytes(sound)
    for reader in readers.values():
        reader(open_shards(copied))


def test_training_goes_on_with_another_sample_up_to_the_share_allowed(copied: Path) -> None:
    name, members = members_of(copied, "b/4")
    data = bytearray((copied / name).read_bytes())
    data[members["png"][0] + 9] ^= 1
    (copied / name).write_bytes(data)
    source = Recordings(open_shards(copied), DataConfig(height=24, width=32, windows=1, window_us=0), paired=True)

    def keys(max_bad: float) -> list[str]:
        batches = Batches(source, collate=collate, batch_size=23, max_bad=max_bad)
        return sorted(key for (batch,) in itertools.islice(batches(0), 1) for key in batch["key"])

    with pytest.warns(UserWarning, match=r"skipped unreadable sample 1 \(of .*: sample b/4: .*b/4.png: byte"):
        found = keys(0.01)
    kept = [key for key in make().keys if key != "b/4"]
    assert len(found) == 23 and set(found) == set(kept)  # one of the others twice, in the place of the bad one
    with pytest.raises(ValueError, match="max_bad_fraction=0: sample b/4"):
        keys(0.0)


def test_a_cut_shard_is_said_at_once_and_its_first_samples_read(copied: Path) -> None:
    name, members = members_of(copied, "b/4")
    path = copied / name
    path.write_bytes(path.read_bytes()[: members["json"][0] + 3])
    with pytest.warns(UserWarning, match=rf"{name}: .* bytes where the index says"):
        listing = open_shards(copied)
    good, bad = [], []
    for index, key in enumerate(listing.keys):
        try:
            listing.source(index).read(), listing.image(index), listing.targets["depth"](index)
            good.append(key)
        except BadSample as error:
            assert error.key == key and name in error.reason and "the shard has" in error.reason
            bad.append(key)
    entry = next(e for e in json.loads((copied / "index.json").read_text())["shards"] if e["file"] == name)
    assert bad == sorted(entry["keys"][entry["keys"].index("b/4") :], key=listing.keys.index)
    path.write_bytes(b"")
    with pytest.warns(UserWarning, match="0 bytes"), pytest.raises(BadSample, match=rf"{name}: .*empty"):
        open_shards(copied).source(4)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of 5 shards are missing, first .*{name}"):
        open_shards(copied)


def test_a_bad_sample_survives_the_way_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(BadSample("a", "b")))
    assert (error.key, error.reason, str(error)) == ("a", "b", "sample a: b")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda index: index["shards"][0].update(file="../../etc/passwd"), "a shard is named"),
        (lambda index: index["shards"][0].update(file="http://evil/x.tar"), "a shard is named"),
        (lambda index: index["shards"][0].update(bytes=-1), "no size"),
        (lambda index: index["shards"][0]["members"]["png"][0].__setitem__(1, 1 << 40), "outside its shard"),
        (lambda index: index["shards"][0]["members"]["png"][0].__setitem__(0, (1 << 63) - 1), "outside its shard"),
        (lambda index: index["shards"][0]["members"]["png"][0].__setitem__(0, -7), "outside its shard"),
        (lambda index: index["shards"][0]["members"]["png"][0].__setitem__(0, 1 << 80), "integers"),
        (lambda index: index["shards"][0]["members"]["png"][0].__setitem__(0, 0.5), "integers"),
        (lambda index: index["shards"][0]["members"]["png"].pop(), "integers"),
        (lambda index: index["shards"][1]["labels"].__setitem__(0, 3), "3 classes"),
        (lambda index: index["shards"][1]["keys"].__setitem__(0, index["shards"][0]["keys"][0]), "each once"),
        (lambda index: index["shards"][1]["numbers"].__setitem__(0, index["shards"][0]["numbers"][0]), "one number"),
        (lambda index: index.update(sensor=[0, 5]), "sensor"),
        (lambda index: index.update(version=2), "version 2"),
        (lambda index: index.update(format="other"), "not an index of shards"),
        (lambda index: index.pop("shards"), "'shards' is missing|shards is missing"),
        (lambda index: index.update(shards=[]), "no samples"),
        (lambda index: index.update(past_us="1"), "past_us"),
    ],
)
def test_an_index_that_cannot_be_is_refused(folder: Path, change, message: str) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index)
    with pytest.raises(ValueError, match=message):
        parse(json.dumps(index), "index.json")


def test_shards_without_an_index_are_scanned(tmp_path: Path) -> None:
    for shard in range(2):
        foreign_tar(
            tmp_path / f"other-{shard:03d}.tar",
            *[
                (f"./{i:04d}.{suffix}", content)
                for i in range(3)
                for suffix, content in (
                    ("events.arrow", to_bytes(events_of(3 * shard + i))),
                    ("PNG", Pictures().encoded(3 * shard + i)[0]),
                    ("cls", str(i).encode()),
                )
            ],
            ("README", b"no sample"),
        )
    listing = open_shards(tmp_path / "other-{000..001}.tar")
    assert listing.keys[3] == "other-001/0000" and len(listing) == 6
    assert listing.labels.tolist() == [0, 1, 2] * 2 and listing.classes == ("0", "1", "2")
    for index in range(6):
        assert_same(listing.source(index).read(), events_of(index))
        assert listing.image(index).shape == (3, *SENSOR) and (listing.image(index) == index).all()
    one = open_shards(f"{tmp_path}/other-001.tar")
    assert one.keys == ("0000", "0001", "0002")
    # A cut archive: the samples before it, and the last one as far as its header came.
    path = tmp_path / "other-001.tar"
    members = scan(path, "x")
    path.write_bytes(path.read_bytes()[: members["0002"]["events.arrow"].offset + 5])
    with pytest.warns(UserWarning, match="damaged or cut off"):
        cut = open_shards(path)
    assert cut.keys == ("0000", "0001", "0002")
    assert_same(cut.source(1).read(), events_of(4))
    with pytest.raises(BadSample, match="0002"):
        cut.source(2).read()


def test_recordings_of_other_formats_in_shards(tmp_path: Path) -> None:
    small = Events.from_arrays(np.arange(9) * 1000, np.arange(9), np.arange(9), np.arange(9) % 2, height=34, width=34)
    write_bin(tmp_path / "a.bin", small)
    raw = (tmp_path / "a.bin").read_bytes()
    foreign_tar(tmp_path / "x.tar", ("0.bin", raw), ("0.json", b'{"label": 2}'), ("1.bin", raw[:5] + b"\xff" * 5))
    listing = open_shards(tmp_path / "x.tar")
    assert_same(listing.source(0).read(), small)
    assert listing.labels.tolist() == [2, -1] and listing.image is None
    with pytest.raises(BadSample, match=r"x.tar: 1.bin: byte 5: event at x = 255"):
        listing.source(1)
    foreign_tar(tmp_path / "y.tar", ("0.txt.gz", b"1"), ("0.jpg", b"2"))
    with pytest.raises(ValueError, match="no events in it: its members end in jpg, txt.gz"):
        open_shards(tmp_path / "y.tar")


@pytest.mark.parametrize("name", ["/etc/a.bin", "../a.bin", "b/../../a.bin", "..\\a.bin"])
def test_members_that_point_outside_are_refused(tmp_path: Path, name: str) -> None:
    foreign_tar(tmp_path / "x.tar", ("0.bin", b"12345"), (name, b"12345"))
    with pytest.raises(ValueError, match=r"x.tar: byte 1024: member .* points outside"):
        open_shards(tmp_path / "x.tar")


def test_a_member_of_an_impossible_size_is_refused(tmp_path: Path) -> None:
    """A negative size would move a scan backwards, for ever."""
    for size in (-1024, 1 << 70):
        path = foreign_tar(tmp_path / "x.tar", ("0.bin", b"12345"), ("1.bin", b"12345"))
        data = bytearray(path.read_bytes())
        header = data[1024:1536]
        header[124:136] = (b"\x80" if size > 0 else b"\xff") + (size & ((1 << 88) - 1)).to_bytes(11, "big")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        data[1024:1536] = header
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"member '1.bin' of {size} bytes|header that is no tar's"):
            open_shards(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        info = tarfile.TarInfo("0.bin")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(ValueError, match="a link, a device or sparse"):
        open_shards(tmp_path / "x.tar")


def test_what_is_no_plain_tar_is_refused(tmp_path: Path) -> None:
    foreign_tar(tmp_path / "x.tar", ("0.bin", b"12345"), mode="w:gz")
    with pytest.raises(ValueError, match="compressed tar"):
        open_shards(tmp_path / "x.tar")
    (tmp_path / "y.tar").write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(ValueError, match=r"y.tar: byte 0: not a tar"):
        open_shards(tmp_path / "y.tar")
    with pytest.raises(FileNotFoundError, match="no such shard"):
        open_shards(tmp_path / "z-{0..3}.tar")


def test_mutated_foreign_tars_never_give_garbage(tmp_path: Path) -> None:
    path = foreign_tar(tmp_path / "x.tar", *[(f"{i}.events.arrow", to_bytes(events_of(i, 40))) for i in range(3)])
    sound, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(sound)
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(256)
        path.write_bytes(data[: int(rng.integers(len(data) // 2, len(data) + 1))])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                listing = open_shards(path)
            except (ValueError, FileNotFoundError):
                continue
            for index, key in enumerate(listing.keys):
                try:
                    read = listing.source(index).read()
                except BadSample:
                    continue
                if key in ("0", "1", "2"):
                    assert_same(read, events_of(int(key), 40))
