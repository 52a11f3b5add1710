"""The index of a set of shards: which samples there are and where each of their members lies, as `index.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FORMAT, VERSION = "gep-shards", 1
INDEX = "index.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard:
    """One tar of the set."""

    file: str
    """Name below the set's folder, or a whole address."""
    bytes: int
    """Size; -1 = not known."""
    sha256: str
    """Of the whole tar; empty = not known."""


@dataclass(frozen=True, eq=False)
class Table:
    """Every sample of a set of shards, in the order of the listing that was written."""

    shards: tuple[Shard, ...]
    """M tars."""
    shard: np.ndarray
    """int64 (N,): the shard each sample lies in."""
    keys: tuple[str, ...]
    """N names, those of the listing that was written."""
    labels: np.ndarray
    """int64 (N,); -1 = none."""
    members: Mapping[str, np.ndarray]
    """suffix -> int64 (N, 3) offset, size, CRC-32 of the sample's member; offset -1 = it has none."""
    spans: np.ndarray | None
    """int64 (N, 2) µs; see `Listing.spans`."""
    files: tuple[str, ...]
    """N names of the recordings the samples were cut from; () where each was its own."""


def side_entry(
    shard: Shard,
    samples: Sequence[Mapping[str, Any]],
    skipped: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    """What the index says of one shard, in columns (a tenth of the size of a record a sample).

    Args:
        shard: the finished tar.
        samples: for each its number in the listing, key, label, span, file, and members {suffix: Member}.
        skipped: key and reason of each sample that could not be read.
    """
    suffixes = sorted({suffix for sample in samples for suffix in sample["members"]})
    return {
        "file": shard.file,
        "bytes": shard.bytes,
        "sha256": shard.sha256,
        "numbers": [sample["number"] for sample in samples],
        "keys": [sample["key"] for sample in samples],
        "labels": [sample["label"] for sample in samples],
        "spans": [sample["span"] for sample in samples] if samples and samples[0]["span"] is not None else None,
        "files": [sample["file"] for sample in samples] if samples and samples[0]["span"] is not None else None,
        "members": {s: [sample["members"].get(s, (-1, 0, -1)) for sample in samples] for s in suffixes},
        "skipped": [list(pair) for pair in skipped],
    }


def parse(text: str | bytes, name: str) -> tuple[dict[str, Any], Table]:
    """An `index.json`, checked: nothing in it can point outside its shards.

    Args:
        text: the file's content.
        name: what messages call it.
    Returns:
        The set's own values (name, split, classes, sensor, …), and the table of samples.
    Raises:
        ValueError: it is no index, of another version, or holds a value that cannot be.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not valid JSON ({error}); copy it again") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f'{name}: not an index of shards (no "format": "{FORMAT}")')
    if values.get("version") != VERSION:
        raise ValueError(f"{name}: version {values.get('version')!r}, this gep reads {VERSION}; write the shards again")
    try:
        return values, _table(values)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        cause = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{name}: {cause}; the index is damaged or not gep's: copy it again") from error


def _table(values: Mapping[str, Any]) -> Table:
    entries = values["shards"]
    classes, sensor = values["classes"], values["sensor"]
    if not all(isinstance(name, str) for name in classes):
        raise ValueError("classes must be names")
    if sensor is not None and not (len(sensor) == 2 and all(type(v) is int and 0 < v < 1 << 15 for v in sensor)):
        raise ValueError(f"sensor {sensor} is no (height, width)")
    if values["anchor"] not in ("start", "end"):
        raise ValueError(f"anchor {values['anchor']!r} is neither start nor end")
    kinds = {"past_us": int, "future_us": int, "name": str, "split": str, "notes": dict, "skipped": list}
    for field, kind in kinds.items():
        if type(values[field]) is not kind:
            raise ValueError(f"{field} is {values[field]!r}")
    shards = tuple(_shard(entry) for entry in entries)
    if len({shard.file for shard in shards}) != len(shards):
        raise ValueError("two shards have one name")
    keys = tuple(key for entry in entries for key in entry["keys"])
    counts = [len(entry["keys"]) for entry in entries]
    if not keys:
        raise ValueError("no samples")
    if not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise ValueError("keys must be names, each once")
    filled = [entry for entry in entries if entry["keys"]]
    labels = _column([entry["labels"] for entry in filled], counts, ())
    if labels.min() < -1 or labels.max() >= len(classes):
        raise ValueError(f"labels span {labels.min()}..{labels.max()} where there are {len(classes)} classes")
    shard = np.repeat(np.arange(len(shards)), counts)
    limit = np.array([part.bytes for part in shards], np.int64)[shard]
    suffixes = sorted({suffix for entry in entries for suffix in entry["members"]})
    members = {}
    for suffix in suffixes:
        empty = [[-1, 0, -1]]
        parts = [entry["members"].get(suffix, empty * len(entry["keys"])) for entry in filled]
        column = _column(parts, counts, (3,))
        offset, size = column[:, 0], column[:, 1]
        present = offset != -1
        # `limit - size` and not `offset + size`: the sum of two huge values would wrap around.
        if (present & ((offset < 0) | (size < 0) | (size > limit) | (offset > limit - size))).any():
            raise ValueError(f"a member {suffix} lies outside its shard")
        members[suffix] = column
    spanned = filled[0]["spans"] is not None
    spans = _column([entry["spans"] for entry in filled], counts, (2,)) if spanned else None
    files = tuple(str(file) for entry in filled for file in entry["files"]) if spanned else ()
    if spanned and len(files) != len(keys):
        raise ValueError("files is not as long as keys")
    numbers = _column([entry["numbers"] for entry in filled], counts, ())
    if len(np.unique(numbers)) != len(keys):
        raise ValueError("two samples have one number")
    return reordered(Table(shards, shard, keys, labels, members, spans, files), np.argsort(numbers))


def reordered(table: Table, order: np.ndarray) -> Table:
    """The table with its samples in another order."""
    return Table(
        table.shards,
        table.shard[order],
        tuple(table.keys[i] for i in order),
        table.labels[order],
        {suffix: column[order] for suffix, column in table.members.items()},
        None if table.spans is None else table.spans[order],
        tuple(table.files[i] for i in order) if table.files else (),
    )


def _shard(entry: Mapping[str, Any]) -> Shard:
    file, size, sha256 = entry["file"], entry["bytes"], entry["sha256"]
    if not isinstance(file, str) or not _NAME.fullmatch(file):
        raise ValueError(f"a shard is named {file!r}")
    if type(size) is not int or not 0 < size < 1 << 62 or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise ValueError(f"{file} has no size or SHA-256")
    return Shard(file, size, sha256)


def _column(parts: Sequence[Any], counts: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
    arrays = [np.asarray(part) for part in parts]
    for array, count in zip(arrays, [count for count in counts if count]):
        if array.dtype.kind != "i" or array.shape != (count, *shape):
            raise ValueError(f"a column is {array.dtype} {array.shape} where integers {(count, *shape)} belong")
    return np.concatenate(arrays).astype(np.int64)
