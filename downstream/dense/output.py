"""Predictions on disk, whole or not there at all: a folder of pictures, and maps too many for memory in one .npz."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gep.events.io.files import replacing

_FILMS = (".mp4", ".gif")
_OWN = re.compile(r"\d{6,}\.png|predictions\.npz")


def is_film(out: Path) -> bool:
    """Whether a path names a film; else it names a folder.

    Raises:
        ValueError: it has the suffix of neither.
    """
    if out.suffix and out.suffix.lower() not in _FILMS and not out.is_dir():
        raise ValueError(f"{out}: predictions are a {' or '.join(_FILMS)}, or PNGs in a folder named without suffix")
    return out.suffix.lower() in _FILMS


@contextmanager
def replacing_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well.

    Raises:
        FileExistsError: `out` holds files that are no predictions.
        FileNotFoundError: the folder around it does not exist.
    """
    if out.is_file():
        raise FileExistsError(f"{out} is a file: choose another name for the folder of PNGs")
    if out.is_dir() and (foreign := [path.name for path in out.iterdir() if not _OWN.fullmatch(path.name)]):
        raise FileExistsError(f"{out} holds {foreign[0]}, which is no prediction: choose another folder")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: the folder {out.parent} does not exist; create it first")
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    old = temporary / "old"
    try:
        new = temporary / "new"
        new.mkdir()
        yield new
        if out.exists():
            os.rename(out, old)
        try:
            os.rename(new, out)
        except BaseException:
            if old.exists():
                os.rename(old, out)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class MapWriter:
    """Maps of one size into an open .npz archive, one after the other."""

    def __init__(self, archive: zipfile.ZipFile, count: int):
        self.archive, self.count = archive, count
        self.t_us: list[int] = []
        self._entry: Any = None

    def add(self, values: np.ndarray, t_us: int) -> None:
        """Appends a map (h, w) and its time."""
        if self._entry is None:
            self._entry = self.archive.open("prediction.npy", "w", force_zip64=True)
            header = np.lib.format.header_data_from_array_1_0(values) | {"shape": (self.count, *values.shape)}
            np.lib.format.write_array_header_1_0(self._entry, header)
        self._entry.write(np.ascontiguousarray(values).tobytes())
        self.t_us.append(t_us)

    def close(self) -> None:
        """Ends the maps."""
        if self._entry is not None:
            self._entry.close()

    def finish(self, extra: Mapping[str, np.ndarray]) -> None:
        """Closes the maps and adds what belongs to them."""
        self.close()
        for name, values in {"t_us": np.array(self.t_us, np.int64), **extra}.items():
            with self.archive.open(f"{name}.npy", "w") as entry:
                np.lib.format.write_array(entry, values)


@contextmanager
def map_writer(path: Path, count: int, extra: Mapping[str, np.ndarray]) -> Iterator[MapWriter]:
    """A .npz as `np.load` reads it, written map by map: prediction (count, h, w), t_us int64 (count,), and `extra`."""
    with (
        replacing(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
    ):
        writer = MapWriter(archive, count)
        try:
            yield writer
            writer.finish(extra)
        finally:
            writer.close()  # an archive with an open entry would raise in place of the error that brought us here
