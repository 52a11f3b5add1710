"""Writing a listing as shards: WebDataset tars and an index, whose bytes depend on nothing but the samples."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout

from gep.data.listing import Listing
from gep.data.shard_bytes import EVENTS
from gep.data.shard_index import FORMAT, INDEX, VERSION, Shard, side_entry
from gep.data.shard_parts import DEPTH, FACTS, IMAGES, MASK
from gep.data.shard_tar import Member, TarWriter, member_key
from gep.data.shard_work import run
from gep.data.view import encode_png
from gep.events.io.arrow import to_bytes
from gep.events.types import Events

_TARGETS = {"mask": MASK, "depth": DEPTH}


@dataclass(frozen=True, eq=False)
class Plan:
    """What is written, fixed before the work starts; everything a worker has to know."""

    listing: Listing
    out: Path
    order: np.ndarray
    """int64 (N,): numbers of the samples in the order in which they are written."""
    samples_per_shard: int
    compression: str
    past_us: int
    future_us: int
    skip_bad: bool
    files: tuple[str, ...]
    """N recordings' paths below the folder that holds them all; () where the listing names none."""
    hash: str
    """Of the samples and all settings that the bytes depend on."""

    @property
    def num_shards(self) -> int:
        """Tars, the last of which may be smaller."""
        return -(-len(self.order) // self.samples_per_shard)


def write_shards(
    listing: Listing,
    out: str | Path,
    *,
    workers: int = 1,
    samples_per_shard: int = 1000,
    compression: Literal["lz4", "zstd", "none"] = "lz4",
    past_us: int = 0,
    future_us: int = 0,
    shuffle_seed: int | None = 0,
    skip_bad: bool = False,
    progress: bool = True,
) -> Path:
    """Writes every sample of a listing into `out/shard-000000.tar` … and then `out/index.json`.

    Which sample goes to which shard follows from the listing and the settings alone. A shard is there once it is
    complete; a run that was interrupted (Ctrl-C, kill) goes on with those that are missing.

    Args:
        listing: any data set's split.
        out: folder for this one split.
        workers: processes; no effect on the bytes.
        samples_per_shard: samples in a tar.
        compression: of the events; see `gep.events.io.arrow.write_arrow`.
        past_us: of samples that are spans of a recording, events this long before the span are stored too [µs]: for
            several windows that end at an image.
        future_us: likewise after the span [µs], for data.jitter_us.
        shuffle_seed: samples are put into the shards in an order shuffled by this seed; None keeps the listing's
            order (clips of video are then read from few shards).
        skip_bad: leave out what cannot be read, and list it in the index, instead of stopping.
        progress: whether to show a bar.
    Returns:
        The path of the index.
    Raises:
        ValueError: a recording cannot be read (naming it), a setting cannot be, or `out` holds shards of something
            else or is being written by another process.
    """
    from tqdm import tqdm

    plan = _plan(listing, Path(out), samples_per_shard, compression, past_us, future_us, shuffle_seed, skip_bad)
    plan.out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(plan.out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"{plan.out}: another process is writing shards there; wait for it or end it") from error
    try:
        if _finished_index(plan):
            for side in _sides(plan):  # of a run that was killed when all was written
                side.unlink(missing_ok=True)
            return plan.out / INDEX
        for left in plan.out.glob(".*.tmp"):  # of a run that was killed
            left.unlink()
        todo = [number for number in range(plan.num_shards) if not _is_done(plan, number)]
        done = len(plan.order) - sum(len(_numbers(plan, number)) for number in todo)
        with tqdm(total=len(plan.order), initial=done, desc=f"shards {listing.name}", disable=not progress) as bar:
            run(functools.partial(_write_shard, plan), todo, workers, bar.update)
        _finish(plan)
    finally:
        (plan.out / ".lock").unlink(missing_ok=True)
        lock.release()
    return plan.out / INDEX


def _plan(
    listing: Listing, out: Path, per_shard: int, compression: str, past: int, future: int, seed: int | None, skip: bool
) -> Plan:
    if len(listing) == 0:
        raise ValueError(f"{listing.name} {listing.split}: no samples to write")
    for name, value, least in (("samples_per_shard", per_shard, 1), ("past_us", past, 0), ("future_us", future, 0)):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    if unknown := set(listing.targets) - set(_TARGETS):
        raise ValueError(f"shards hold the targets {', '.join(_TARGETS)}, not {', '.join(sorted(unknown))}")
    count = len(listing)
    if len(set(listing.keys)) != count:
        raise ValueError(f"{listing.name} {listing.split}: two samples have one key")
    order = np.arange(count) if seed is None else np.random.default_rng([seed, count]).permutation(count)
    digest = hashlib.sha256()
    for index, key in enumerate(listing.keys):
        span = None if listing.spans is None else listing.spans[index].tolist()
        digest.update(json.dumps([key, int(listing.labels[index]), span]).encode())
    parts = [sorted(listing.targets), listing.image is not None, listing.rectify is not None]
    facts = [listing.name, listing.split, listing.classes, listing.sensor, listing.anchor, *parts]
    settings = [VERSION, per_shard, compression, past, future, seed]
    digest.update(json.dumps([facts, settings]).encode())
    # The same on every machine, and apart for recordings that are all called events.h5.
    base = os.path.commonpath([path.absolute().parent for path in listing.files]) if listing.files else ""
    files = tuple(Path(os.path.relpath(path.absolute(), base)).as_posix() for path in listing.files)
    return Plan(listing, out, order, per_shard, compression, past, future, skip, files, digest.hexdigest())


def _numbers(plan: Plan, shard: int) -> np.ndarray:
    return plan.order[shard * plan.samples_per_shard : (shard + 1) * plan.samples_per_shard]


def _stem(shard: int) -> str:
    return f"shard-{shard:06d}"


# ---- one shard --------------------------------------------------------------------------------------


def _write_shard(plan: Plan, shard: int, tick: Callable[[], object]) -> None:
    """One tar, then the file beside it that says it is complete."""
    samples, skipped = [], []
    writer = TarWriter(plan.out / f"{_stem(shard)}.tar")
    try:
        for number in _numbers(plan, shard).tolist():
            try:
                members = list(_members(plan, number))  # all of them before the first is written
            except (ValueError, OSError) as error:
                key, reason = plan.listing.keys[number], str(error)
                if not plan.skip_bad:
                    raise ValueError(f"{key}: {reason}; skip_bad leaves such samples out") from error
                skipped.append((key, reason))
            else:
                samples.append(_add(writer, plan, number, members))
            tick()
        sha256 = writer.finish()
    finally:
        writer.discard()
    entry = side_entry(Shard(writer.path.name, writer.size, sha256), samples, skipped)
    _replace(plan.out / f"{_stem(shard)}.json", {"plan": plan.hash, **entry})


def _add(writer: TarWriter, plan: Plan, number: int, members: list[tuple[str, bytes]]) -> dict[str, Any]:
    listing, stem = plan.listing, member_key(number, plan.listing.keys[number])
    placed: dict[str, Member] = {suffix: writer.add(f"{stem}.{suffix}", content) for suffix, content in members}
    return {
        "number": number,
        "key": listing.keys[number],
        "label": int(listing.labels[number]),
        "span": None if listing.spans is None else listing.spans[number].tolist(),
        "file": plan.files[number] if plan.files else "",
        "members": placed,
    }


def _members(plan: Plan, number: int) -> Iterator[tuple[str, bytes]]:
    """(suffix, content) of everything that belongs to a sample."""
    listing = plan.listing
    events = _events(plan, number)
    yield EVENTS, to_bytes(events, plan.compression)
    if listing.image is not None:
        content, suffix = listing.image.encoded(number)
        suffix = suffix.lower().lstrip(".").replace("jpeg", "jpg")
        if suffix not in IMAGES or not content:
            raise ValueError(f"{listing.keys[number]}: an image of {len(content)} bytes and suffix {suffix!r}")
        yield suffix, content
    for name, target in sorted(listing.targets.items()):
        yield _TARGETS[name], _encode(target(number), name)
    label = int(listing.labels[number])
    facts = {
        "key": listing.keys[number],
        "label": label,
        "class": listing.classes[label] if 0 <= label < len(listing.classes) else None,
        "span": None if listing.spans is None else listing.spans[number].tolist(),
        "view": None if listing.image is None else listing.image.view(number).to_json(),
        "sensor": [events.height, events.width],
        "file": plan.files[number] if plan.files else None,
    }
    yield FACTS, json.dumps(facts, ensure_ascii=False).encode()


def _events(plan: Plan, number: int) -> Events:
    listing = plan.listing
    source = listing.source(number)
    if listing.spans is None:
        events = source.read()
    else:
        t0, t1 = listing.spans[number].tolist()
        events = source.by_time(t0 - plan.past_us, t1 + plan.future_us)
    if listing.rectify is None:
        return events
    from gep.data.paired import rectified

    return rectified(events, listing.rectify(number))


def _encode(target: np.ndarray, name: str) -> bytes:
    if name == "mask":
        return encode_png(np.ascontiguousarray(target, dtype=np.uint8))
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(target, dtype=np.float32))
    return buffer.getvalue()


# ---- all of them ------------------------------------------------------------------------------------


def _is_done(plan: Plan, shard: int) -> bool:
    side, tar = plan.out / f"{_stem(shard)}.json", plan.out / f"{_stem(shard)}.tar"
    if not side.exists():
        return False
    entry = _load(side)
    if entry.get("plan") != plan.hash:
        raise _foreign(side)
    return tar.exists() and tar.stat().st_size == entry["bytes"]


def _finished_index(plan: Plan) -> bool:
    path = plan.out / INDEX
    if not path.exists():
        return False
    values = _load(path)
    if values.get("plan") != plan.hash:
        raise _foreign(path)
    for entry in values["shards"]:
        tar = plan.out / entry["file"]
        if not tar.exists() or tar.stat().st_size != entry["bytes"]:
            raise ValueError(
                f"{tar}: missing or not whole, though the set was finished; remove {path} to write it again"
            )
    return True


def _foreign(path: Path) -> ValueError:
    return ValueError(
        f"{path}: of other samples or settings than these; choose another folder, or remove the shards in {path.parent}"
    )


def _sides(plan: Plan) -> list[Path]:
    return [plan.out / f"{_stem(shard)}.json" for shard in range(plan.num_shards)]


def _finish(plan: Plan) -> None:
    """Gathers what the files beside the shards say into the index, and removes them."""
    sides = _sides(plan)
    entries = [_load(side) for side in sides]
    skipped = [pair for entry in entries for pair in entry.pop("skipped")]
    for entry in entries:
        del entry["plan"]
    listing = plan.listing
    if len(skipped) == len(listing):
        raise ValueError(f"{listing.name}: none of the {len(skipped)} samples can be read, first {skipped[0][1]}")
    if skipped:
        warnings.warn(f"{len(skipped)} of {len(listing)} samples left out, first {': '.join(skipped[0])}", stacklevel=3)
    index = {
        "format": FORMAT,
        "version": VERSION,
        "name": listing.name,
        "split": listing.split,
        "classes": list(listing.classes),
        "sensor": None if listing.sensor is None else list(listing.sensor),
        "anchor": listing.anchor,
        "past_us": plan.past_us,
        "future_us": plan.future_us,
        "rectified": listing.rectify is not None,
        "compression": plan.compression,
        "listing": listing.hash,
        "notes": dict(listing.notes),
        "samples": len(listing) - len(skipped),
        "skipped": skipped,
        "plan": plan.hash,
        "shards": entries,
    }
    _replace(plan.out / INDEX, index)
    for side in sides:
        side.unlink()


def _load(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); remove it, its shard is written again") from error
    return values if isinstance(values, dict) else {}


def _replace(path: Path, values: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(values, file, ensure_ascii=False, separators=(",", ":"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
