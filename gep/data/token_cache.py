"""The frozen teacher's tokens of a set's pictures, kept on disk: what a cache holds, where it lies, and reading it.

A folder a set: `meta.json` says in words what it holds; `part_00000.bin`, … are consecutive rows. A row is one picture
as one flip: its tokens, row by row of their grid, then its pooled vector, all of one type. A part is complete or not
there; a row of NaN is a picture that could not be read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gep.data.config import DataConfig
from gep.events.augment import OFF_GRID, AugmentConfig

DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Names of the types that a cache can hold."""
PART_BYTES = 64 << 20
Flip = tuple[bool, bool]
"""(left and right, top and bottom): whether a picture is mirrored."""


@dataclass(frozen=True)
class Layout:
    """What the cache of one set holds and where."""

    folder: Path
    """The set's own folder, named by the hash of `key`."""
    key: Mapping[str, Any]
    """All that the content depends on, JSON values."""
    num_pictures: int
    flips: tuple[Flip, ...]
    """The versions of each picture, one row each."""
    grid: tuple[int, int]
    """Rows and columns of a picture's tokens."""
    token_dim: int
    pooled_dim: int
    dtype: str
    """One of DTYPES."""
    part_bytes: int = PART_BYTES
    """A part has as many rows as fit into this, at least one."""

    @property
    def row_values(self) -> int:
        """Numbers in a row."""
        return self.grid[0] * self.grid[1] * self.token_dim + self.pooled_dim

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.row_values * DTYPES[self.dtype].itemsize

    @property
    def num_rows(self) -> int:
        """Rows in all: pictures times flips."""
        return self.num_pictures * len(self.flips)

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        return self.num_rows * self.row_bytes

    @property
    def part_rows(self) -> int:
        """Rows of every part but the last."""
        return max(1, self.part_bytes // self.row_bytes)

    @property
    def num_parts(self) -> int:
        """Parts in all."""
        return -(-self.num_rows // self.part_rows)

    def rows(self, part: int) -> range:
        """The rows in a part."""
        return range(part * self.part_rows, min((part + 1) * self.part_rows, self.num_rows))

    def path(self, part: int) -> Path:
        """The file of a part."""
        return self.folder / f"part_{part:05d}.bin"

    def missing(self) -> list[int]:
        """Parts that are not there, or not of their size."""
        sizes = {}
        if self.folder.is_dir():
            sizes = {path.name: path.stat().st_size for path in self.folder.glob("part_*.bin")}
        return [
            part
            for part in range(self.num_parts)
            if sizes.get(self.path(part).name) != len(self.rows(part)) * self.row_bytes
        ]


def key_hash(key: Mapping[str, Any]) -> str:
    """First 16 hex digits of the SHA-256 of a key's JSON."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def flips_of(augment: AugmentConfig | None) -> tuple[Flip, ...]:
    """The versions of a picture that training can ask for; None = no augmentation."""
    across = (False, True) if augment is not None and augment.flip_x else (False,)
    down = (False, True) if augment is not None and augment.flip_y else (False,)
    return tuple((x, y) for y in down for x in across)


def check_cacheable(data: DataConfig) -> None:
    """Whether the pictures of a config's samples are the same every epoch, up to flips and crops of whole patches.

    Raises:
        ValueError: they are not; the message names the setting and what to set instead.
    """
    for name, source in data.sources().items():
        prefix = f"data.mix.{name}" if data.mix else "data"
        if source.name == "images":
            raise ValueError(
                f"teacher.cache: {prefix}.name=images films every picture anew, so that no view comes twice; set "
                "teacher.cache= (empty), or record the set and pack it (shards)"
            )
        if source.clip:
            raise ValueError(
                f"teacher.cache: {prefix}.clip=true gives a picture a window, the cache holds one a sample; set "
                f"{prefix}.clip=false or teacher.cache= (empty)"
            )
        usual = AugmentConfig()
        for field in OFF_GRID:
            value, off = getattr(source.augment, field), getattr(usual, field)
            if value != off:
                raise ValueError(
                    f"teacher.cache: {prefix}.augment.{field}={value} moves pixels off the token grid, so that a "
                    f"picture's tokens are others every time; set {prefix}.augment.{field}={off} (grid_crop crops "
                    "whole patches) or teacher.cache= (empty)"
                )


class TokenCache:
    """Reads the rows of a complete cache; memory-mapped, and each process that it is sent to maps it anew.

    Args:
        layout: what is there and where.
    """

    def __init__(self, layout: Layout):
        self.layout = layout
        self._maps: dict[int, np.memmap] = {}

    def read(
        self, picture: int, flip: Flip = (False, False), box: tuple[int, int, int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the teacher says of one picture.

        Args:
            picture: its number in the set.
            flip: which of its versions.
            box: (row, column, rows, columns) of the tokens to take; None = all.
        Returns:
            tokens (n, token_dim) in raster order and the whole picture's pooled vector (pooled_dim,), of the cache's
            dtype.
        Raises:
            ValueError: the picture could not be read when the cache was made.
            FileNotFoundError: the cache has gone.
        """
        layout = self.layout
        part, place = divmod(picture * len(layout.flips) + layout.flips.index(flip), layout.part_rows)
        row = self._map(part)[place]
        tokens, pooled = row[: -layout.pooled_dim].reshape(*layout.grid, -1), row[-layout.pooled_dim :]
        if box is not None:
            top, left, rows, columns = box
            tokens = tokens[top : top + rows, left : left + columns]
        tokens, pooled = (torch.from_numpy(part.copy()).view(DTYPES[layout.dtype]) for part in (tokens, pooled))
        if pooled[0].isnan():
            raise ValueError(f"its picture could not be read when {layout.folder} was made")
        return tokens.flatten(0, 1), pooled

    def _map(self, part: int) -> np.memmap:
        if part not in self._maps:
            layout = self.layout
            shape = (len(layout.rows(part)), layout.row_values)
            stored = np.int16 if DTYPES[layout.dtype].itemsize == 2 else np.float32  # NumPy has no bfloat16
            self._maps[part] = np.memmap(layout.path(part), stored, "r", shape=shape)
        return self._maps[part]

    def __getstate__(self) -> dict[str, Any]:
        return {"layout": self.layout, "_maps": {}}
