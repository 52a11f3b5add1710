"""Writing the parts of a cache of the teacher's tokens, each whole or not at all."""

from __future__ import annotations

import os
import socket
import sys
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from gep import distributed
from gep.data.bad import BadSample
from gep.data.paired import Recordings
from gep.data.token_cache import DTYPES, Layout


@dataclass(frozen=True)
class Teacher:
    """The frozen model as the cache sees it."""

    features: Callable[[Tensor], tuple[Tensor, Tensor]]
    """uint8 (n, 3, H, W) -> tokens (n, N, D) and pooled vectors (n, P), on any device"""
    key: Mapping[str, Any]
    """all that its answers depend on besides the picture, JSON values"""
    grid: tuple[int, int]
    """rows and columns of the N tokens"""
    token_dim: int
    pooled_dim: int


def write_parts(
    source: Recordings,
    layout: Layout,
    parts: Sequence[int],
    teacher: Teacher,
    batch_size: int,
    num_workers: int,
    bar: Bar,
) -> Generator[None, None, None]:
    """Writes parts one after the other; yields after each.

    Raises:
        OSError: a part could not be written; nothing is left of it.
        ValueError: an answer of the teacher that is not finite or of another shape.
    """
    chunks = [
        list(layout.rows(part))[start : start + batch_size]
        for part in parts
        for start in range(0, len(layout.rows(part)), batch_size)
    ]
    loader = DataLoader(
        _Pictures(source, layout),
        batch_size=None,
        sampler=chunks,
        num_workers=num_workers,
        worker_init_fn=distributed.ignore_signals,
        multiprocessing_context="spawn" if num_workers and torch.cuda.is_available() else None,
    )
    bad: dict[str, None] = {}
    # A DataLoader draws from torch's generator: a run with a cache to make goes on as one without.
    with torch.random.fork_rng(devices=[]):
        pictures = iter(loader)
        try:
            for part in parts:
                left = len(layout.rows(part))
                with Replacing(layout.path(part)) as file:
                    while left:
                        keys, images, faults = next(pictures)
                        file.write(_encoded(keys, images, faults, teacher, layout))
                        bad |= dict.fromkeys(fault for fault in faults if fault)
                        left -= len(faults)
                        bar.advance(len(faults))
                yield
        finally:  # the caller asks for as many parts as there are, not for one more
            if bad:
                warnings.warn(f"{bar.title}: {len(bad)} cannot be read, the first: {next(iter(bad))}", stacklevel=2)


def _encoded(keys: list[str], images: Tensor, faults: list[str], teacher: Teacher, layout: Layout) -> bytes:
    """Rows of a cache: what the teacher says of the pictures that could be read, NaN for the others."""
    rows = torch.full((len(faults), layout.row_values), float("nan"), dtype=DTYPES[layout.dtype])
    if len(images):
        tokens, pooled = teacher.features(images)
        found = torch.cat([tokens.flatten(1), pooled], dim=1).float().cpu()
        if found.shape[1] != layout.row_values:
            raise ValueError(
                f"teacher.cache: the teacher gives tokens {tuple(tokens.shape)} and pooled vectors "
                f"{tuple(pooled.shape)}, expected a grid of {layout.grid}"
            )
        finite = found.isfinite().all(dim=1)
        if not finite.all():
            raise ValueError(
                f"teacher.cache: the teacher's tokens of {keys[int((~finite).nonzero()[0])]} are not finite; try "
                "train.precision=no"
            )
        rows[torch.tensor([not fault for fault in faults])] = found.to(rows.dtype)
    return rows.view(torch.uint8).numpy().tobytes()


class _Pictures(Dataset):
    """Rows of a cache -> (keys of those that can be read, their pictures uint8 (n, 3, H, W), a fault or "" a row)."""

    def __init__(self, source: Recordings, layout: Layout):
        self.source, self.layout = source, layout

    def __getitem__(self, rows: Sequence[int]) -> tuple[list[str], Tensor, list[str]]:
        keys, images, faults = [], [], []
        last, fault = -1, ""
        picture = np.empty((3, 0, 0), np.uint8)
        for row in rows:
            index, version = divmod(row, len(self.layout.flips))
            if index != last:
                last, fault = index, ""
                try:
                    picture = self.source.picture(index)
                except BadSample as error:
                    fault = str(error)
            faults.append(fault)
            if not fault:
                x, y = self.layout.flips[version]
                images.append(picture[:, :: -1 if y else 1, :: -1 if x else 1])
                keys.append(self.source.listing.keys[index])
        stacked = np.stack(images) if images else np.empty((0, 3, 1, 1), np.uint8)
        return keys, torch.from_numpy(stacked), faults


class Bar:
    """A bar on a terminal, a line every tenth elsewhere; counts rows of the main rank's share."""

    def __init__(self, title: str, total: int, say: Callable[[str], object], enabled: bool):
        self.title, self.total, self.say, self.done = title, total, say, 0
        self._lines = enabled and not sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=title, unit="picture", disable=not enabled or self._lines, leave=False)

    def advance(self, count: int) -> None:
        """So many more are done."""
        before, self.done = self.done, self.done + count
        self._bar.update(count)
        if self._lines and self.done * 10 // self.total > before * 10 // self.total:
            self.say(f"{self.title}: {self.done:,} of {self.total:,} pictures")

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


class Replacing:
    """A binary file that takes its name only when it is whole."""

    def __init__(self, path: Path):
        self.path = path
        self.temporary = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")

    def __enter__(self) -> Any:
        self._file = open(self.temporary, "wb")
        return self._file

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
            if kind is None:
                os.replace(self.temporary, self.path)
        finally:
            self.temporary.unlink(missing_ok=True)
