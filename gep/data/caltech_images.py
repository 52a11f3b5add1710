"""The pictures of Caltech-101 that N-Caltech101 shows, in the view of its recordings.

What is known: each picture was shown as large as fits into 240 × 180 pixels (width × height) with its own aspect ratio
(Orchard et al. 2015), and a recording's addresses begin at (0, 0). What is not: how much the authors cut off around the
saccades. A recording that was looked at ends 4 % before the picture would, so that edges of events and pictures may be
a few pixels apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from gep.data.layout import ImageFiles
from gep.data.view import View

NCALTECH_SENSOR = (180, 240)
FOLDER = "101_ObjectCategories"
TABLE = "images.txt"
"""Lines "<recording> <class>/<picture>", for recordings whose names do not say which picture they show."""


@dataclass(frozen=True)
class CaltechFiles(ImageFiles):
    """Pictures of any size: as large as fits into the sensor's view, from its upper left corner on, black beyond."""

    def view(self, index: int) -> View:
        height, width = self.sensor
        try:
            with Image.open(self.paths[index]) as picture:  # its header alone
                w, h = picture.size
        except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
            return View(self.sensor)  # reading the picture itself says what is wrong
        scale = min(height / h, width / w)
        return View(self.sensor, place=(0, 0), resized=(max(1, round(h * scale)), max(1, round(w * scale))))


def caltech_images(
    root: Path, keys: Sequence[str], files: Sequence[Path]
) -> tuple[CaltechFiles | None, dict[str, str]]:
    """The pictures beside a root's recordings, `101_ObjectCategories/<class>/image_%04d.jpg`.

    A recording `<class>/image_0007.*` shows the picture of that class and number. The names `<class>_<n>.npy` of EST's
    re-release do not say: each of its splits counts from 0. For them a table `images.txt` in the root may.

    Args:
        root: of the set; the folder may also lie in `caltech-101/`, as its archive has it.
        keys, files: the recordings.
    Returns:
        The pictures, None where there are none, and what to note of the listing.
    Raises:
        FileNotFoundError: some recordings have no picture.
        ValueError: a line of the table that is none.
    """
    bases = [base for base in (root / FOLDER, root / "caltech-101" / FOLDER) if base.is_dir()]
    if not bases:
        return None, {}
    table = _table(root / TABLE)
    named = [table.get(key) or _by_name(file) for key, file in zip(keys, files)]
    if not any(named):
        return None, {"pictures": f"unknown, as {files[0].name} does not say which one it shows (see {TABLE})"}
    for key, name in zip(keys, named):
        if name is None:
            raise FileNotFoundError(
                f"N-Caltech101: no picture is known for {key}; complete {root / TABLE} with a line "
                f"'{key} <class>/image_0001.jpg', or move {bases[0]} away to use the recordings without pictures"
            )
    paths = tuple(bases[0] / name for name in named if name is not None)
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise FileNotFoundError(
            f"N-Caltech101: {len(missing)} of {len(paths)} recordings have no picture; the first is {missing[0]}. "
            f"Complete {bases[0]}, or move it away to use the recordings without pictures"
        )
    return CaltechFiles(paths, NCALTECH_SENSOR), {}


def _by_name(file: Path) -> str | None:
    return f"{file.parent.name}/{file.stem}.jpg" if re.fullmatch(r"image_\d+", file.stem) else None


def _table(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    pairs = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split()
        if fields and len(fields) != 2:
            raise ValueError(f"{path}: line {number}: {line[:60]!r} is not '<recording> <class>/image_0001.jpg'")
        if fields:
            pairs[fields[0]] = fields[1]
    return pairs
