"""Tar archives as shards: members written the same byte for byte everywhere, and foreign archives scanned with care."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

_BLOCK = tarfile.BLOCKSIZE


class Member(NamedTuple):
    """Where one member's content lies in its shard."""

    offset: int
    """Byte of the shard at which the content begins."""
    size: int
    """Bytes of content."""
    crc: int
    """CRC-32 of the content; -1 = not known."""


def member_key(number: int, key: str) -> str:
    """A sample's name in a tar: unique by its number, without the dots at which WebDataset splits.

    Args:
        number: of the sample in its listing.
        key: of the sample, kept for people to read.
    """
    return f"{number:09d}_{re.sub('[^A-Za-z0-9_-]+', '_', key)[-60:]}"


class TarWriter:
    """A tar on its way to disk: complete under its name after `finish`, or not there at all.

    Headers hold no time, owner or machine, so that the bytes depend on the members alone.
    """

    def __init__(self, path: Path):
        self.path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file = open(self._temporary, "wb")
        self._hash = hashlib.sha256()
        self.size = 0

    def add(self, name: str, content: bytes | memoryview) -> Member:
        """Appends a member of at most 100 characters of name."""
        content = memoryview(content).cast("B")
        info = tarfile.TarInfo(name)
        info.size = len(content)
        self._write(info.tobuf(tarfile.GNU_FORMAT))
        member = Member(self.size, len(content), zlib.crc32(content))
        self._write(content)
        self._write(bytes(-len(content) % _BLOCK))
        return member

    def finish(self) -> str:
        """Puts the tar in its place; returns its SHA-256."""
        self._write(bytes(2 * _BLOCK))
        self._file.flush()
        os.fsync(self._file.fileno())  # on disk before the rename that makes it count
        self._file.close()
        os.replace(self._temporary, self.path)
        return self._hash.hexdigest()

    def discard(self) -> None:
        """Removes what was written, unless it is finished."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)


def scan(path: Path, name: str) -> dict[str, dict[str, Member]]:
    """The samples of a tar by WebDataset's convention: a member is `<key>.<suffix>`, split at the name's first dot.

    Nothing is unpacked. Of a damaged or cut tar the samples before the fault are given, with a warning; a last member
    that reaches beyond the end is kept, so that reading it says so.

    Args:
        path: the tar on this machine.
        name: what messages call it.
    Returns:
        key -> suffix -> member, in the archive's order.
    Raises:
        ValueError: no tar, a compressed one, a member that is a link, a device, or lies outside the archive's folder.

    Source: WebDataset's file format; POSIX ustar.
    """
    samples: dict[str, dict[str, Member]] = {}
    with open(path, "rb") as file:
        if file.read(2) in (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5"):
            raise ValueError(f"{name}: a compressed tar has no random access; unpack it to a plain .tar")
        file.seek(0)
        for info in _infos(file, path, name):
            safe = _safe_name(info, name)
            folder, _, base = safe.rpartition("/")
            stem, dot, suffix = base.partition(".")
            if info.isdir() or not stem or not dot:
                continue
            members = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
            if suffix.lower() in members:
                raise ValueError(f"{name}: byte {info.offset}: a second member {info.name!r}")
            members[suffix.lower()] = Member(info.offset_data, info.size, -1)
    if not samples:
        raise ValueError(f"{name}: byte 0: holds no member named <key>.<suffix>")
    return samples


def _infos(file: IO[bytes], path: Path, name: str) -> Iterator[tarfile.TarInfo]:
    size, end = path.stat().st_size, 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (info := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps them all otherwise
                if not 0 <= info.size < 1 << 62 or archive.offset <= end:
                    raise ValueError(f"{name}: byte {info.offset}: member {info.name!r} of {info.size} bytes")
                end = archive.offset
                yield info
    except tarfile.TarError as error:
        if end == 0:
            raise ValueError(f"{name}: byte 0: not a tar archive ({error})") from error
    except (OverflowError, UnicodeError, MemoryError) as error:
        raise ValueError(f"{name}: byte {end}: a header that is no tar's ({error})") from error
    # tarfile takes a damaged header for the end of the archive; the true end is a block of zeros.
    file.seek(min(end, size))
    if file.read(_BLOCK) != bytes(_BLOCK):
        warnings.warn(f"{name}: byte {end}: damaged or cut off here; the samples after are lost", stacklevel=4)


def _safe_name(info: tarfile.TarInfo, name: str) -> str:
    parts = info.name.split("/")
    if info.name.startswith("/") or ".." in parts or "\\" in info.name or "\0" in info.name:
        raise ValueError(
            f"{name}: byte {info.offset}: member {info.name!r} points outside the archive; not a safe shard"
        )
    if not (info.isreg() or info.isdir()) or info.issparse():
        raise ValueError(
            f"{name}: byte {info.offset}: member {info.name!r} is a link, a device or sparse; shards hold plain files"
        )
    return "/".join(part for part in parts if part not in ("", "."))
