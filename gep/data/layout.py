"""What listers share: folders and their classes, time stamps, pictures and masks on disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gep.data.view import View, decode

IGNORE = 255  # in a mask: not labelled
_NEAREST_US = 10_000  # stamps of one and the same frame, written by two tools, differ by less


@dataclass(frozen=True)
class ImageFiles:
    """Pictures on disk, one a sample, brought into the sensor's view; stretched to it unless `views` says more."""

    paths: tuple[Path, ...]
    sensor: tuple[int, int]
    views: tuple[View, ...] = ()

    def encoded(self, index: int) -> tuple[bytes, str]:
        return self.paths[index].read_bytes(), self.paths[index].suffix.lower()

    def view(self, index: int) -> View:
        return self.views[index] if self.views else View(self.sensor)

    def __call__(self, index: int) -> np.ndarray:
        picture = decode(self.encoded(index)[0], str(self.paths[index]))
        try:
            return self.view(index).apply(picture)
        except (ValueError, RuntimeError) as error:
            size = "x".join(str(side) for side in picture.shape[:2])
            raise ValueError(
                f"{self.paths[index]}: {size} pixels do not go into the sensor's view ({error})"
            ) from error


@dataclass(frozen=True)
class MaskFiles:
    """Class ids in image files, one a sample; rows that a mask lacks at the bottom of the view are ignored ones."""

    paths: tuple[Path, ...]
    sensor: tuple[int, int]
    num_classes: int = 0
    """Ids must be below it, or IGNORE; 0 = not looked at."""

    def __call__(self, index: int) -> np.ndarray:
        ids = read_plane(self.paths[index])
        height, width = self.sensor
        if ids.dtype != np.uint8 or ids.shape[1] != width or ids.shape[0] > height:
            raise ValueError(
                f"{self.paths[index]}: a mask of {ids.dtype} {ids.shape} is none of a {height}x{width} view; "
                f"expected uint8 class ids of width {width}"
            )
        if self.num_classes and (beyond := ids[(ids >= self.num_classes) & (ids != IGNORE)]).size:
            raise ValueError(
                f"{self.paths[index]}: class id {beyond.min()}, where {self.num_classes} classes are named (ids 0 to "
                f"{self.num_classes - 1}, {IGNORE} = not labelled); name it in classes.txt, or mend the mask"
            )
        mask = np.full(self.sensor, IGNORE, np.uint8)
        mask[: len(ids)] = ids
        return mask


def read_plane(path: Path) -> np.ndarray:
    """The (H, W) values of an image file with one channel, as stored (uint8, uint16 or int32)."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            plane = np.asarray(picture)
    except FileNotFoundError:
        raise
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable picture ({error})") from error
    if plane.ndim != 2:
        raise ValueError(f"{path}: has {plane.shape[-1]} channels where one with the values themselves was expected")
    return plane


def first_folder(candidates: Iterable[Path], root: Path, title: str, layout: str = "<split>/<class>/<files>") -> Path:
    """The first of the candidates that is a folder.

    Raises:
        FileNotFoundError: none is; names them and the layout.
    """
    candidates = list(candidates)
    for folder in candidates:
        if folder.is_dir():
            return folder
    wanted = " or ".join(str(folder) for folder in candidates)
    raise FileNotFoundError(f"{title}: {wanted} is missing; data.root={root} should hold {layout}")


def list_classes(
    folder: Path, root: Path, suffixes: tuple[str, ...], classes: Sequence[str] | None = None
) -> tuple[tuple[str, ...], tuple[Path, ...], np.ndarray, tuple[str, ...]]:
    """All recordings below `folder/<class>/`, in sorted order.

    Args:
        folder: the split.
        root: keys are paths relative to it.
        suffixes: of recordings, lower case.
        classes: the list where the set defines it; the folders' names by default.

    Returns:
        keys, files, labels int64 (N,), classes.
    """
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    names = found if classes is None else list(classes)
    keys: list[str] = []
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        if name not in found:
            continue
        for path in sorted((folder / name).iterdir()):
            if path.suffix.lower() in suffixes and not path.name.startswith("."):
                keys.append(path.relative_to(root).as_posix())
                files.append(path)
                labels.append(label)
    if not files:
        raise ValueError(
            f"{folder}: no recording found; expected <class>/*{suffixes[0]} with classes such as "
            f"{', '.join((names or ['<class>'])[:3])}"
        )
    return tuple(keys), tuple(files), np.array(labels, dtype=np.int64), tuple(names)


def files_in(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The folder's files of these (lower-case) suffixes, sorted by name; [] where there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() in suffixes and not path.name.startswith(".")
    )


def read_stamps(path: Path, columns: Sequence[int] = (1,)) -> np.ndarray:
    """Times in a text file, one line a picture: int64 (N, columns) µs, whole numbers separated by blanks or commas.

    Raises:
        FileNotFoundError, ValueError: no such file; a line that holds something else, by its number.
    """
    rows: list[list[int]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        fields = line.split("#")[0].replace(",", " ").split()
        if not fields:
            continue
        try:
            row = [int(field) for field in fields]
        except ValueError:
            row = []
        if len(row) not in columns or (rows and len(row) != len(rows[0])) or any(abs(t) >= 2**62 for t in row):
            raise ValueError(
                f"{path}: line {number}: {line.strip()[:60]!r} is no time stamp; expected "
                f"{' or '.join(str(count) for count in columns)} whole number(s) of µs a line"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: holds no time stamp")
    return np.array(rows, dtype=np.int64)


def stamped(pictures: Sequence[Path], stamps: np.ndarray, folder: Path, file: Path) -> None:
    """Raises ValueError unless there are as many pictures as stamps, and the stamps ascend."""
    if len(pictures) != len(stamps):
        raise ValueError(f"{folder}: {len(pictures)} files for {len(stamps)} time stamps in {file}; complete either")
    if (np.diff(stamps) <= 0).any():
        line = int(np.argmax(np.diff(stamps) <= 0)) + 2
        raise ValueError(f"{file}: line {line}: the time {stamps[line - 1]} µs is not after the one before it")


def spans_before(stamps: np.ndarray) -> np.ndarray:
    """(N, 2): from the stamp before to each stamp; the first span is as long as the second."""
    lead = stamps[0] - (stamps[1] - stamps[0] if len(stamps) > 1 else 0)
    return np.stack([np.concatenate([[lead], stamps[:-1]]), stamps], axis=1).astype(np.int64)


def nearest(stamps: np.ndarray, wanted: np.ndarray, source: Path, limit_us: int = _NEAREST_US) -> np.ndarray:
    """For each wanted time the index of the nearest stamp.

    Raises:
        ValueError: the nearest one is further off than the limit; names the source.
    """
    right = np.clip(np.searchsorted(stamps, wanted), 1, max(1, len(stamps) - 1))
    left = right - 1
    right = np.minimum(right, len(stamps) - 1)
    index = np.where(np.abs(wanted - stamps[left]) <= np.abs(stamps[right] - wanted), left, right)
    off = np.abs(stamps[index] - wanted)
    if (off > limit_us).any():
        at = int(np.argmax(off > limit_us))
        raise ValueError(
            f"{source}: no picture within {limit_us} µs of {wanted[at]} µs; the nearest is {off[at]} µs off"
        )
    return index


def coverage(found: Sequence[str], published: Sequence[str]) -> dict[str, str]:
    """The note that says how many of a split's published sequences are on disk."""
    here = len(set(found) & set(published))
    extra = f" and {len(set(found) - set(published))} more" if set(found) - set(published) else ""
    return {"sequences": f"{here} of {len(published)}{extra}"}
