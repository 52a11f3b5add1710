"""Where the bytes of shards come from: a folder, or a command, web server or bucket whose files are kept in a cache."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import select
import shlex
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

_TRIES = 4
_PAUSE = 1.0  # s before the second try; doubled for each further one
_SILENCE = 120.0  # s without a byte after which a server or a command counts as dead
_LOOK = 20.0  # s for a server to say what it has
_TELLING = ("etag", "lastmodified", "mtime", "created", "blobid", "oid", "contentlength", "size")
_CHUNK = 1 << 20
_INDEX_LIMIT = 1 << 30
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


def default_cache() -> Path:
    """The folder remote shards are kept in: $GEP_CACHE, else gep/shards in the user's cache folder."""
    given = os.environ.get("GEP_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given).expanduser() if given else Path(base) / "gep" / "shards"


@dataclass(frozen=True)
class Store:
    """The files below one URL.

    Args:
        url: a folder (or file://), an http(s):// or hf:// folder, any other URL that fsspec knows, or a
            `pipe:command {shard}` that prints the file whose name takes the place of `{shard}`.
        cache: folder for what is fetched; processes of one machine may share it.
        cache_bytes: most that the cache holds; the files used longest ago are removed.

    A file whose SHA-256 nobody knows (a tar without an index) is fetched again when the server gives it another ETag,
    time of change or size; where it says none of them, as a command or a server without HEAD, the cached one is kept:
    delete the cache after a change. What was said first holds for this object and its copies in data workers.
    """

    url: str
    cache: Path
    cache_bytes: int
    states: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def folder(self) -> Path | None:
        """The folder on this machine, or None where files have to be fetched."""
        if self.url.startswith("file://"):
            return Path(urllib.request.url2pathname(self.url[len("file://") :]))
        return None if _is_remote(self.url) else Path(self.url).expanduser()

    def name(self, file: str) -> str:
        """What messages call a file: its address without credentials."""
        if self.folder is not None:
            return str(self.folder / file)
        return re.sub(r"://[^/@]*@", "://", self._address(file)).split("?")[0]

    def read(self, file: str) -> bytes:
        """A small file's content.

        Raises:
            FileNotFoundError, OSError: it is not there, or cannot be reached.
        """
        if self.folder is not None:
            return (self.folder / file).read_bytes()
        self.cache.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.cache, prefix=".", suffix=".tmp")
        os.close(handle)
        try:
            self._fetch(file, Path(name), _INDEX_LIMIT)
            return Path(name).read_bytes()
        finally:
            os.unlink(name)

    def local(self, file: str, size: int = -1, sha256: str = "") -> Path:
        """A shard as a file on this machine, fetched if need be.

        Args:
            file: its name below the URL.
            size, sha256: what it has to be; fetched files are checked. -1 and "" = not known.
        Raises:
            FileNotFoundError, OSError: it is not there, or cannot be reached.
            ValueError: what arrives is not what the index says, twice.
        """
        if self.folder is not None:
            return self.folder / file
        if size > self.cache_bytes:
            raise OSError(f"{self.name(file)}: {size:,} bytes, the cache holds {self.cache_bytes:,}; allow it more")
        # Named by content: the same shard from another server is not fetched again, a rewritten one is.
        stem = sha256 or self._stem(self._address(file))
        path = self.cache / f"{stem}.tar"
        locks = self.cache / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / f"{stem}.lock"):
            if not path.exists() or (size >= 0 and path.stat().st_size != size):
                self._fill(file, path, size, sha256)
            os.utime(path)  # the time of its last use
        return path

    def _stem(self, address: str) -> str:
        """What the cache calls a file that is known by its address alone."""
        stem = "url-" + hashlib.sha256(address.encode()).hexdigest()
        if address not in self.states:
            self.states[address] = _state(address)
        state = self.states[address]
        if state:
            return f"{stem}-{hashlib.sha256(state.encode()).hexdigest()[:16]}"
        # The server cannot be asked: what was used last has to do.
        known = sorted(self.cache.glob(f"{stem}*.tar"), key=lambda path: path.stat().st_mtime_ns)
        return known[-1].stem if known else stem

    def _fill(self, file: str, path: Path, size: int, sha256: str) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            for last in (False, True):
                self._make_room(max(size, 0))
                self._fetch(file, temporary, size if size >= 0 else self.cache_bytes)
                found = temporary.stat().st_size
                if size >= 0 and found != size:
                    fault = f"{found:,} bytes where the index says {size:,}"
                elif sha256 and _digest(temporary) != sha256:
                    fault = "its SHA-256 is not the index's"
                else:
                    os.replace(temporary, path)
                    return
                if last:
                    raise ValueError(f"{self.name(file)}: {fault}; the shard is damaged: write or upload it again")
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Removes the files used longest ago; who still has one of them mapped keeps reading it."""
        with FileLock(self.cache / ".locks" / "room.lock"):
            files = []
            for path in self.cache.glob("*.tar"):
                stat = path.stat()
                files.append((stat.st_mtime_ns, stat.st_size, path))
            total = sum(length for _, length, _ in files) + size
            for _, length, path in sorted(files):
                if total <= self.cache_bytes:
                    break
                path.unlink(missing_ok=True)
                total -= length

    def _address(self, file: str) -> str:
        if _is_remote(file):  # never of an index, whose names hold no colon
            return file
        if self.url.startswith("pipe:"):
            # A name comes from an index that others wrote: it is quoted, whatever it says.
            return self.url.replace("{shard}", shlex.quote(file)) if "{shard}" in self.url else self.url
        base, mark, query = self.url.partition("?")
        return f"{base.rstrip('/')}/{file}{mark}{query}"

    def _fetch(self, file: str, path: Path, limit: int) -> None:
        """Writes the remote file to `path`; never more than `limit` bytes."""
        address, name = self._address(file), self.name(file)
        parts: Callable[[str], Iterator[bytes]] = _of_file_system
        if address.startswith("pipe:"):
            parts = _of_command
        elif address.startswith(("http://", "https://")):
            parts = _of_server
        for attempt in range(_TRIES):
            try:
                with open(path, "wb") as out:
                    count = 0
                    for part in parts(address):
                        count += len(part)
                        if count > limit:
                            raise ValueError(f"{name}: goes on past the {limit:,} bytes it may have; not fetched")
                        out.write(part)
                return
            except (FileNotFoundError, PermissionError, ValueError) as error:
                kind = next(k for k in (FileNotFoundError, PermissionError, ValueError) if isinstance(error, k))
                raise kind(str(error) if name in str(error) else f"{name}: {error}") from error
            except (OSError, TimeoutError) as error:
                if attempt == _TRIES - 1:
                    raise OSError(f"{name}: could not be fetched in {_TRIES} tries ({error})") from error
                time.sleep(2.0**attempt * _PAUSE)


def _state(address: str) -> str:
    """What a server says of a file without sending it; empty where it says nothing, or cannot be reached."""
    try:
        if address.startswith("pipe:"):
            return ""
        if address.startswith(("http://", "https://")):
            request = urllib.request.Request(address, headers={"User-Agent": "gep"}, method="HEAD")
            with urllib.request.urlopen(request, timeout=_LOOK) as answer:
                facts: Mapping[str, Any] = dict(answer.headers)
        else:
            import fsspec

            system, path = fsspec.core.url_to_fs(address)
            facts = system.info(path)
    except Exception:  # each file system has its own client's errors; the fetch that follows names them
        return ""
    said = {name.lower().replace("-", "").replace("_", ""): value for name, value in facts.items()}
    return "|".join(f"{name}={said[name]}" for name in _TELLING if said.get(name))


def expand(url: str) -> list[str]:
    """The URLs that WebDataset's braces stand for: "a-{000..002}.tar" -> three; the URL itself without braces."""
    found = _BRACES.search(url)
    if found is None:
        return [url]
    first, last = found.groups()
    if int(last) < int(first) or int(last) - int(first) >= 1 << 20:
        raise ValueError(f"{url}: {found.group()} is no range of shards")
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [whole for n in numbers for whole in expand(url[: found.start()] + n + url[found.end() :])]


def _is_remote(url: str) -> bool:
    return url.startswith("pipe:") or ("://" in url and not url.startswith("file://"))


def _digest(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(_CHUNK):
            total.update(part)
    return total.hexdigest()


def _of_server(address: str) -> Iterator[bytes]:
    request = urllib.request.Request(address, headers={"User-Agent": "gep"})
    try:
        with urllib.request.urlopen(request, timeout=_SILENCE) as answer:
            length = answer.headers.get("Content-Length")
            count = 0
            while part := answer.read(_CHUNK):
                count += len(part)
                yield part
            if length is not None and count != int(length):
                raise OSError(f"the connection ended after {count:,} of {int(length):,} bytes")
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise FileNotFoundError(f"the server has no such file ({error})") from error
        if error.code in (401, 403):
            raise PermissionError(f"the server refuses access ({error})") from error
        raise
    except (ValueError, http.client.HTTPException) as error:  # answers that are not HTTP, or end early
        raise OSError(f"{type(error).__name__}: {error}") from error


def _of_file_system(address: str) -> Iterator[bytes]:
    import fsspec

    try:
        # hf:// is huggingface_hub's file system; its own cache of blocks would hold the shard once more.
        with fsspec.open(address, "rb", block_size=16 << 20) as file:
            while part := file.read(_CHUNK):
                yield part
    except (OSError, ImportError, ValueError):
        raise
    except Exception as error:  # each file system has its own client's errors
        raise OSError(f"{type(error).__name__}: {error}") from error


def _of_command(address: str) -> Iterator[bytes]:
    command = address[len("pipe:") :]
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            start_new_session=True,  # so that the whole pipeline can be ended
        )
        assert process.stdout is not None  # a pipe
        try:
            while True:
                if not select.select([process.stdout], [], [], _SILENCE)[0]:
                    raise OSError(f"the command gave nothing for {_SILENCE:.0f} s")
                part = os.read(process.stdout.fileno(), _CHUNK)
                if not part:
                    break
                yield part
            if code := process.wait():
                complaints.seek(0)
                tail = complaints.read()[-300:].decode(errors="replace").strip()
                raise OSError(f"the command ended with {code}: {tail}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdout.close()
