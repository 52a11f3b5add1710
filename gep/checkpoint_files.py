"""Checkpoints as folders on disk: found by their step, complete or not, checked byte by byte, pruned.

The marker `complete` is written last and lists each file's size and CRC-32.
"""

import json
import os
import shutil
import zlib
from pathlib import Path

MARKER = "complete"


class CheckpointError(OSError):
    """A checkpoint could not be written or read; the message names the path and the way out."""


def find(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, newest (by step: clocks may be wrong) first."""
    folders = sorted((run_dir / "checkpoints").glob("step_*"), key=step_of, reverse=True)
    return [folder for folder in folders if (folder / MARKER).is_file()]


def step_of(folder: Path) -> int:
    """The optimiser steps that a checkpoint's name states; -1 for another name."""
    digits = folder.name.removeprefix("step_")
    return int(digits) if digits.isdigit() else -1


def mark_complete(folder: Path) -> None:
    """Put all files of a checkpoint on disk, then the marker."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        found[str(path.relative_to(folder))] = [path.stat().st_size, _crc(path)]
        _fsync(path)
    write_whole(folder / MARKER, json.dumps(found))


def check(folder: Path, *, content: bool = True) -> None:
    """Compare a checkpoint's files with its marker.

    Args:
        folder: of one checkpoint.
        content: compare checksums too, which reads every byte.
    Raises:
        CheckpointError: a file is missing, or not the one that was written.
    """
    for name, noted in json.loads((folder / MARKER).read_text(encoding="utf-8")).items():
        size, crc = noted if isinstance(noted, list) else (noted, None)  # of a version without checksums
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{name} is missing")
        if path.stat().st_size != size:
            raise CheckpointError(f"{name} has {path.stat().st_size} bytes, not {size}")
        if content and crc is not None and _crc(path) != crc:
            raise CheckpointError(f"{name} is damaged: its CRC-32 is not the one it was written with")


def prune(run_dir: Path, step: int, keep: int) -> None:
    """Remove what the checkpoint of `step`, just completed, makes superfluous.

    Args:
        run_dir: the run's folder.
        step: of the newest checkpoint. Later ones could not be loaded when the run was resumed: they would take the
            places of sound ones.
        keep: checkpoints to keep; 0 keeps all.
    """
    complete = [folder for folder in find(run_dir) if step_of(folder) <= step]
    kept = complete[:keep] if keep > 0 else complete
    for folder in (run_dir / "checkpoints").glob("step_*"):
        if folder not in kept and step_of(folder) >= 0:
            # The marker goes first: a half-removed folder must not look complete.
            (folder / MARKER).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write a small file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    _fsync(partial)
    os.replace(partial, path)
    _fsync(path.parent)


def _crc(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return crc


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
