"""Shards from afar: servers, commands and buckets, through a cache that is bounded, shared and checked."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
import time
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gep.data import shard_store
from gep.data.bad import BadSample
from gep.data.shard_store import Store, expand
from gep.data.shards import open_shards
from gep.events.io.arrow import to_bytes
from tests.shard_samples import (
    assert_is,
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


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_store, "_PAUSE", 0.0)


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; the first `faults` answers to shards break off half way."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        path = Path(self.directory) / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.server.faults and path.suffix == ".tar":
            self.server.faults -= 1
            data = data[: len(data) // 2]
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(copied: Path):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(copied))) as http:
        http.asked, http.faults = [], 0
        thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield http
        http.shutdown()


def test_over_http_each_shard_is_fetched_once_and_checked(server, copied: Path, tmp_path: Path, quick: None) -> None:
    url, cache = f"http://127.0.0.1:{server.server_port}", tmp_path / "cache"
    server.faults = 2
    assert_is(open_shards(url, cache=cache), make())
    tars = [path for path in server.asked if path.endswith(".tar")]
    assert len(tars) == 5 + 2, "two answers broke off and were asked for again"
    assert_is(open_shards(url, cache=cache), make())
    assert len([path for path in server.asked if path.endswith(".tar")]) == 7
    assert not list(cache.glob("*.tmp")) and not list(cache.glob(".*.tmp"))
    with pytest.raises(FileNotFoundError, match=r"none/index.json.*404|none/index.json: no such file"):
        open_shards(f"{url}/none", cache=cache)


def test_a_shard_damaged_at_its_source_makes_bad_samples(server, copied: Path, tmp_path: Path, quick: None) -> None:
    name, members = members_of(copied, "b/4")
    data = bytearray((copied / name).read_bytes())
    data[members["png"][0] + 20] ^= 1
    (copied / name).write_bytes(data)
    listing = open_shards(f"http://127.0.0.1:{server.server_port}/", cache=tmp_path / "cache")
    for _ in range(3):
        with pytest.raises(BadSample, match=rf"{name}: its SHA-256 is not the index's"):
            listing.source(4)
    assert server.asked.count(f"/{name}") == 2, "fetched twice, then remembered"
    (copied / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        open_shards(f"http://127.0.0.1:{server.server_port}/", cache=tmp_path / "cache").source(4)


def test_a_server_that_is_not_there_is_an_error_of_its_own(server, tmp_path: Path, quick: None) -> None:
    listing = open_shards(f"http://127.0.0.1:{server.server_port}/", cache=tmp_path / "cache")
    gone = replace(listing.recording.shards.store, url="http://127.0.0.1:1")
    listing.recording.shards.store = gone
    with pytest.raises(OSError, match="could not be fetched in 4 tries"):
        listing.source(0)


def test_the_cache_stays_within_its_bounds(server, copied: Path, tmp_path: Path) -> None:
    sizes = [path.stat().st_size for path in copied.glob("*.tar")]
    url, cache, bound = f"http://127.0.0.1:{server.server_port}", tmp_path / "cache", 2 * max(sizes) + 10
    listing = open_shards(url, cache=cache, cache_bytes=bound)
    for index in range(len(listing)):
        assert_same(listing.source(index).read(), events_of(index))
        assert sum(path.stat().st_size for path in cache.glob("*.tar")) <= bound
    with pytest.raises(OSError, match="the cache holds 100"):
        Store(url, cache, 100).local("shard-000000.tar", 5000)


def read_all(url: str, cache: Path) -> None:
    assert_is(open_shards(url, cache=cache), make())


def test_processes_share_the_cache(copied: Path, tmp_path: Path) -> None:
    count = tmp_path / "count"
    url = f"pipe:echo {{shard}} >> {count}; sleep 0.05; cat {copied}/{{shard}}"
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=read_all, args=(url, tmp_path / "cache")) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    fetched = count.read_text().split()
    assert sorted(name for name in fetched if name.endswith(".tar")) == [f"shard-{i:06d}.tar" for i in range(5)]


def test_commands(copied: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_is(open_shards(f"pipe:cat {copied}/{{shard}}", cache=tmp_path / "a"), make())
    with pytest.raises(OSError, match=r"could not be fetched.*ended with 1: cat: .*No such file"):
        open_shards("pipe:cat nowhere/{shard}", cache=tmp_path / "b")
    foreign_tar(tmp_path / "x-0.tar", ("0.events.arrow", to_bytes(events_of(0))))
    foreign_tar(tmp_path / "x-1.tar", ("0.events.arrow", to_bytes(events_of(1))))
    both = open_shards(f"pipe:cat {tmp_path}/x-{{0..1}}.tar", cache=tmp_path / "c")
    assert_same(both.source(1).read(), events_of(1))
    # A name is quoted, whatever an index says; and a command that hangs is ended.
    store = Store("pipe:printf %s {shard}", tmp_path / "d", 1000)
    assert store.read("a; rm b") == b"a; rm b"
    monkeypatch.setattr(shard_store, "_SILENCE", 0.1)
    monkeypatch.setattr(shard_store, "_TRIES", 1)
    begin = time.monotonic()
    with pytest.raises(OSError, match="gave nothing for"):
        Store("pipe:sleep 60; echo {shard}", tmp_path / "e", 1000).read("x")
    assert time.monotonic() - begin < 10
    with pytest.raises(ValueError, match="goes on past"):
        Store("pipe:cat /dev/zero {shard}", tmp_path / "f", 1000).local("x", 100)


def test_other_addresses_go_through_fsspec(copied: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in copied.iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    try:
        assert_is(open_shards("memory://bucket", cache=tmp_path / "cache"), make())
        for number in (0, 1):
            foreign_tar(tmp_path / "x.tar", ("0.events.arrow", to_bytes(events_of(number))))
            memory.pipe("/bucket/x.tar", (tmp_path / "x.tar").read_bytes())
            found = open_shards("memory://bucket/x.tar", cache=tmp_path / "cache")
            assert_same(found.source(0).read(), events_of(number))
        with pytest.raises(FileNotFoundError, match="memory://none/index.json"):
            open_shards("memory://none", cache=tmp_path / "cache")
    finally:
        memory.rm("/bucket", recursive=True)
    assert_is(open_shards(copied.as_uri()), make())


def test_a_tar_without_an_index_is_fetched_again_once_the_server_has_another(server, copied: Path, tmp_path: Path):
    url, cache = f"http://127.0.0.1:{server.server_port}/x.tar", tmp_path / "cache"

    def put(number: int, seconds: int) -> None:
        foreign_tar(copied / "x.tar", ("0.events.arrow", to_bytes(events_of(number))))
        os.utime(copied / "x.tar", (seconds, seconds))

    put(0, 1_000_000)
    first = open_shards(url, cache=cache)
    assert_same(first.source(0).read(), events_of(0))
    assert_same(open_shards(url, cache=cache).source(0).read(), events_of(0))
    assert server.asked.count("/x.tar") == 1
    put(1, 2_000_000)
    assert_same(open_shards(url, cache=cache).source(0).read(), events_of(1))
    assert server.asked.count("/x.tar") == 2
    # Who has opened the old one keeps it, in data workers too.
    assert_same(pickle.loads(pickle.dumps(first)).source(0).read(), events_of(0))
    assert server.asked.count("/x.tar") == 2
    time.sleep(0.05)  # more than a tick of the file system's clock
    open_shards(url, cache=cache)
    (copied / "x.tar").unlink()  # out of reach: what was used last has to do
    assert_same(open_shards(url, cache=cache).source(0).read(), events_of(1))
    assert server.asked.count("/x.tar") == 2


def test_hf_addresses_are_the_hubs_file_system(monkeypatch: pytest.MonkeyPatch, copied: Path, tmp_path: Path) -> None:
    import fsspec
    from huggingface_hub import HfFileSystem

    assert fsspec.get_filesystem_class("hf") is HfFileSystem
    asked = []

    def opened(address: str, mode: str, **_: object):
        asked.append(address)
        return open(copied / address.rsplit("/", 1)[1], mode)

    monkeypatch.setattr(fsspec, "open", opened)
    assert_is(open_shards("hf://datasets/user/set@main/train", cache=tmp_path / "cache"), make())
    assert asked[0] == "hf://datasets/user/set@main/train/index.json" and len(asked) == 6


def test_braces_and_names() -> None:
    assert expand("a-{008..010}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar"]
    assert expand("{0..1}/{1..2}") == ["0/1", "0/2", "1/1", "1/2"] and expand("x/{shard}") == ["x/{shard}"]
    with pytest.raises(ValueError, match="no range of shards"):
        expand("{3..1}.tar")
    store = Store("https://user:secret@host/a/?token=t", Path(), 1)
    assert store._address("b.tar") == "https://user:secret@host/a/b.tar?token=t"
    assert store.name("b.tar") == "https://host/a/b.tar"
