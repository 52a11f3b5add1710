"""Making caches of the teacher's tokens: announced, checked against the disk, shared among ranks, resumable."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from gep import distributed
from gep.data.paired import Recordings
from gep.data.token_cache import PART_BYTES, Layout, TokenCache, flips_of, key_hash
from gep.data.token_cache_write import Bar, Replacing, Teacher, write_parts

_VERSION = 1
_STALE_S = 3600  # a file that is being written changes far more often
_PROBED = 8


def attach(
    sources: Mapping[str, tuple[Recordings, bool]],
    folder: str | os.PathLike[str],
    teacher: Teacher,
    *,
    dtype: str = "bf16",
    batch_size: int = 64,
    num_workers: int = 0,
    part_bytes: int = PART_BYTES,
    say: Callable[[str], object] = print,
    progress: bool = True,
) -> None:
    """Lets sets read the teacher's tokens from a cache, which is first made where it is missing. On every rank.

    What is there already is not made again; a part that a killed run left unfinished is. Several runs may share a
    folder.

    Args:
        sources: unique name for people -> (set, whether it is trained on: with the flips of its augmentation).
        folder: seen by all ranks; each set and teacher have a folder of their own in it.
        teacher: what is cached.
        dtype: one of DTYPES.
        batch_size: pictures that the teacher sees at once, on each rank.
        num_workers: processes that read pictures, on each rank.
        part_bytes: largest size of a file.
        say: prints a line (of the main rank).
        progress: show a bar on the main rank.
    Raises:
        ValueError: not enough room; a fault in writing; or an answer of the teacher that is not finite or of another
            shape. On every rank.
    """
    root = Path(folder).expanduser()
    layouts = {
        name: layout_of(source, root, teacher, dtype=dtype, trained=trained, part_bytes=part_bytes)
        for name, (source, trained) in sources.items()
    }
    rank, ranks = distributed.rank(), distributed.world_size()
    missing, problem = distributed.gather_objects(_plan(layouts, root, say) if rank == 0 else None)[0]
    for name, (source, _) in sources.items():
        layout, own = layouts[name], missing[name][rank::ranks]
        total = sum(len(layout.rows(part)) for part in own)
        bar = Bar(f"teacher cache of {name}", total, say, progress and rank == 0)
        with bar, closing(write_parts(source, layout, own, teacher, batch_size, num_workers, bar)) as writer:
            # Ranks meet after every part: one rank's fault ends all of them soon, and none waits long for another.
            for _ in range(0 if problem else -(-len(missing[name]) // ranks)):
                problem = _first(distributed.gather_objects(_next(writer, layout)))
                if problem:
                    break
    if problem is None and any(layout.missing() for layout in layouts.values()):
        problem = f"teacher.cache={root}: rank {rank} does not see all of it; name a folder that all ranks share"
    problem = _first(distributed.gather_objects(problem))
    if problem is not None:
        raise ValueError(problem)
    for name, (source, _) in sources.items():
        source.tokens = TokenCache(layouts[name])


def layout_of(
    source: Recordings, root: Path, teacher: Teacher, *, dtype: str, trained: bool, part_bytes: int = PART_BYTES
) -> Layout:
    """Where a set's cache lies and what it holds; some of its pictures are read for the key."""
    config, listing = source.config, source.listing
    flips = flips_of(config.augment if trained else None)
    key = {
        "version": _VERSION,
        "teacher": dict(teacher.key),
        "set": listing.name,
        "list": listing.hash,
        "pictures": _probe(source),
        "canvas": [config.height, config.width],
        "fit": config.fit,
        "flips": [list(flip) for flip in flips],
        "grid": list(teacher.grid),
        "dims": [teacher.token_dim, teacher.pooled_dim],
        "dtype": dtype,
        "part_bytes": part_bytes,
    }
    place = root / f"{listing.name}-{key_hash(key)}"
    sizes: dict[str, Any] = {"grid": teacher.grid, "token_dim": teacher.token_dim, "pooled_dim": teacher.pooled_dim}
    return Layout(place, key, len(listing), flips, **sizes, dtype=dtype, part_bytes=part_bytes)


def _probe(source: Recordings) -> str:
    """Hash of a few pictures: two sets of the same keys and labels are told apart by what they show."""
    digest, image = hashlib.sha256(), source.listing.image
    assert image is not None
    for index in np.unique(np.linspace(0, len(source) - 1, _PROBED).astype(int)).tolist():
        try:
            digest.update(np.ascontiguousarray(image(index)).tobytes())
        except (ValueError, OSError):
            digest.update(b"unreadable")
    return digest.hexdigest()[:16]


def _plan(
    layouts: Mapping[str, Layout], root: Path, say: Callable[[str], object]
) -> tuple[dict[str, list[int]], str | None]:
    """(what is missing of each set, why it cannot be made): announces sizes and makes the folders. Of the main rank."""
    missing = {name: layout.missing() for name, layout in layouts.items()}
    needed = 0
    for name, layout in layouts.items():
        todo = sum(len(layout.rows(part)) for part in missing[name]) * layout.row_bytes
        needed += todo
        tokens, versions = layout.grid[0] * layout.grid[1], len(layout.flips)
        say(
            f"teacher cache of {name}: {layout.num_pictures:,} pictures × {versions} flips × ({tokens} × "
            f"{layout.token_dim} + {layout.pooled_dim}) {layout.dtype} = {_size(layout.num_bytes)} in {layout.folder}, "
            + (f"{_size(todo)} to be written" if todo else "complete")
        )
    try:
        _clean([layout.folder for layout in layouts.values()])
        existing = next(parent for parent in (root, *root.absolute().parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        if needed > free:
            return missing, (
                f"teacher.cache={root} needs {_size(needed)}, {_size(free)} are free there; name a folder on a larger "
                "disk, leave out flips or set teacher.cache_dtype=bf16, or teacher.cache= (empty)"
            )
        for name, layout in layouts.items():
            if missing[name]:
                layout.folder.mkdir(parents=True, exist_ok=True)
                with Replacing(layout.folder / "meta.json") as file:
                    file.write(json.dumps(dict(layout.key), indent=1).encode())
    except OSError as error:
        return missing, f"teacher.cache={root} cannot be written: {error}; name a folder that can"
    return missing, None


def _next(writer: Iterator[None], layout: Layout) -> str | None:
    """Writes this rank's next part, if there is one; what went wrong, in words for all ranks."""
    try:
        next(writer, None)
    except OSError as error:
        return f"{layout.folder} could not be written: {error}; what is there stays: free space and start again"
    except ValueError as error:
        return str(error)
    return None


def _first(problems: Sequence[str | None]) -> str | None:
    return next((problem for problem in problems if problem), None)


def _clean(folders: Sequence[Path]) -> None:
    """Removes what killed runs left half written."""
    for folder in folders:
        for path in folder.glob("*.tmp"):
            if time.time() - path.stat().st_mtime > _STALE_S:
                path.unlink(missing_ok=True)


def _size(num_bytes: int) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes:,} bytes"
