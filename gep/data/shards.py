"""Reading shards: a set of WebDataset tars, here or far away, as a listing whose samples are read where they lie."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from gep.data.eventscape import sequence_of
from gep.data.listing import Listing
from gep.data.shard_bytes import EVENTS, Shards
from gep.data.shard_index import INDEX, Shard, Table, parse
from gep.data.shard_parts import DEPTH, IMAGES, MASK, ShardImages, ShardRecordings, ShardTargets, facts
from gep.data.shard_store import Store, default_cache, expand
from gep.data.shard_tar import scan
from gep.events.io import FORMATS

_LABEL = "cls"


def open_shards(
    url: str | Path,
    split: str = "",
    *,
    cache: str | Path | None = None,
    cache_bytes: int = 100 << 30,
) -> Listing:
    """The samples of a set of shards, in the order of the listing that was written.

    Args:
        url: the folder that `gep shard` wrote, on this machine, behind http(s)://, hf:// or another URL that fsspec
            knows, or as `pipe:command {shard}`; `{split}` in it stands for the split. Without {shard} or a folder:
            tars of WebDataset's layout that have no index, as `…/name-{000..099}.tar`; they are scanned once.
        split: the split asked for; empty = whichever it is.
        cache: folder in which remote shards are kept, shared by the processes of a machine; see `default_cache`.
        cache_bytes: most that it holds.
    Raises:
        FileNotFoundError, OSError: the index or a local shard is missing, or the address cannot be reached.
        ValueError: a damaged index, another split, or an archive that is not safe to read.
    """
    url = str(url).replace("{split}", split)
    folder = Path(cache).expanduser() if cache else default_cache()
    names = expand(url)
    if len(names) > 1 or url.endswith(".tar") or (url.startswith("pipe:") and "{shard}" not in url):
        return _foreign(names, split, folder, cache_bytes)
    store = Store(url, folder, cache_bytes)
    local = store.folder
    if local is not None and split and not (local / INDEX).exists() and (local / split / INDEX).exists():
        store = Store(str(local / split), folder, cache_bytes)
    name = store.name(INDEX)
    try:
        text = store.read(INDEX)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: no such file; the folder of a set of shards holds it once `gep shard` has finished "
            "(name tars without an index as …/name-{000..099}.tar)"
        ) from error
    values, table = parse(text, name)
    if split and values["split"] != split:
        fix = f"set data.train_split={shlex.quote(values['split'])} (and data.eval_split)"
        raise ValueError(f"{name}: these are shards of the split {values['split']!r}, {split!r} was asked for; {fix}")
    return _listing(Shards(store, table, values["past_us"], values["future_us"]), values)


def _listing(shards: Shards, values: dict[str, Any]) -> Listing:
    table = shards.table
    notes = {str(key): str(value) for key, value in values["notes"].items()}
    if values.get("rectified"):
        notes["rectified"] = "to the nearest pixel, when written"
    if values["skipped"]:
        notes["left out"] = f"{len(values['skipped'])} unreadable when written"
    known = set(table.members)
    recording = ShardRecordings(shards, _event_suffixes(known))
    return Listing(
        name=str(values["name"]),
        split=str(values["split"]),
        keys=table.keys,
        files=tuple(Path(file) for file in table.files),
        labels=table.labels,
        classes=tuple(values["classes"]),
        sensor=None if values["sensor"] is None else tuple(values["sensor"]),
        image=ShardImages(shards, recording) if known & set(IMAGES) else None,
        spans=table.spans,
        anchor=values["anchor"],
        targets={
            name: ShardTargets(shards, suffix) for name, suffix in (("mask", MASK), ("depth", DEPTH)) if suffix in known
        },
        recording=recording,
        notes={**notes, "shards": str(len(table.shards))},
        # The index has no column for groups; of all other sets the keys say them.
        groups=tuple(sequence_of(key) for key in table.keys) if values["name"] == "eventscape" else (),
    )


def _event_suffixes(known: set[str]) -> tuple[str, ...]:
    """Suffixes of recordings, gep's own first."""
    endings = sorted({ending.lstrip(".") for found in FORMATS for ending in found.suffixes})
    others = [s for s in sorted(known) if s not in (EVENTS, MASK, DEPTH) and s.rpartition(".")[2] in endings]
    return (EVENTS, *others)


def _foreign(urls: list[str], split: str, cache: Path, cache_bytes: int) -> Listing:
    """Tars without an index: each is fetched, and its headers are read."""
    store, files = Store(urls[0], cache, cache_bytes), urls
    if store.folder is not None:
        store, files = Store("", cache, cache_bytes), [str(Store(url, cache, cache_bytes).folder) for url in urls]
    shards, rows = [], []
    for number, file in enumerate(files):
        path, name = store.local(file), store.name(file)
        if not path.is_file():
            raise FileNotFoundError(f"{name}: no such shard")
        shards.append(Shard(file, path.stat().st_size, ""))
        # Tars of one set may count their samples from 0 each.
        stem = Path(name).stem if len(files) > 1 else ""
        rows += [(number, f"{stem}/{key}".lstrip("/"), members) for key, members in scan(path, name).items()]
    suffixes = sorted({suffix for _, _, members in rows for suffix in members})
    absent = (-1, 0, -1)
    columns = {s: np.array([members.get(s, absent) for _, _, members in rows], np.int64) for s in suffixes}
    numbers = np.array([number for number, _, _ in rows], np.int64)
    keys, unknown = tuple(key for _, key, _ in rows), np.full(len(rows), -1, np.int64)
    if len(set(keys)) != len(keys):
        raise ValueError(f"{store.name(files[0])}: two tars of one name hold samples of one name; rename one")
    if len(_event_suffixes(set(suffixes))) == 1 and EVENTS not in columns:
        raise ValueError(
            f"{store.name(files[0])}: no events in it: its members end in {', '.join(suffixes)}; expected {EVENTS}, or "
            "a recording's suffix"
        )
    bytes_of = Shards(store, Table(tuple(shards), numbers, keys, unknown, columns, None, ()))
    labels = np.array([_label(bytes_of, index) for index in range(len(rows))], np.int64)
    bytes_of.table = dataclasses.replace(bytes_of.table, labels=labels)
    values: dict[str, Any] = {
        "name": Path(store.name(files[0])).stem,
        "split": split,
        "classes": [str(number) for number in range(int(labels.max()) + 1)],
        "sensor": None,
        "anchor": "start",
        "rectified": False,
        "skipped": [],
        "notes": {},
    }
    return _listing(bytes_of, values)


def _label(shards: Shards, index: int) -> int:
    """The class in a sample's `cls` or `json` member; -1 without, or where it cannot be read."""
    try:
        if shards.suffix(index, (_LABEL,)) is not None:
            label = int(bytes(shards.member(index, _LABEL)[:32]))
        else:
            label = facts(shards, index).get("label", -1)
    except ValueError:  # a bad sample too: it is named when it is read
        return -1
    return label if type(label) is int and 0 <= label < 1 << 20 else -1
