"""Image data sets as listings: a folder of pictures, local parquet files, or anything on the Hugging Face Hub."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from gep.data.listing import Listing
from gep.data.view import View, decode

if TYPE_CHECKING:
    import datasets

Size = tuple[int, int]
SUFFIXES = tuple(sorted(Image.registered_extensions()))
_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "jpeg", "webp", "picture", "pixel_values")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class", "target", "coarse_label")
_SYNSET = re.compile(r"(n\d{8})_.*")
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_SPLITS = {"train": ("train", "training"), "test": ("test", "testing"), "validation": ("validation", "valid", "val")}


def list_images(path: str, split: str, size: Size, *, image_column: str = "", label_column: str = "") -> Listing:
    """The pictures of one split; nothing is decoded yet.

    Args:
        path: folder of pictures (classes as subfolders, or loose; with or without a folder for the split), parquet
            file, glob or folder of them, or Hub id.
        split: name of the split.
        size: canvas (height, width), in whose view `listing.image` gives a picture.
        image_column, label_column: names of columns; empty = found by type and usual name.
    Raises:
        FileNotFoundError, ValueError: nothing there, no such split or column; the message names the fix.
    """
    path = local(path)
    files = _folder(path, split)
    if files is not None:
        return _list_files(Path(path), split, files, size)
    rows = load(path, split, streaming=False)
    image, label = columns(rows, path, image_column, label_column)
    labels, classes = _labels(rows, label)
    # Bytes as they are: pictures are decoded where they are needed, in data workers.
    pictures = Rows(undecoded(rows.select_columns([image]), image), image, size)
    keys = tuple(f"{split}/{row:08d}" for row in range(len(rows)))
    return Listing("images", split, keys, (), labels, classes, image=pictures, notes={"from": _short(path)})


# ---- pictures -----------------------------------------------------------------------------------------


class Pictures:
    """`ImageSource`: a picture, its whole middle in the canvas' shape."""

    size: Size

    def encoded(self, index: int) -> tuple[bytes, str]:
        raise NotImplementedError

    def view(self, index: int) -> View:
        """The largest box of the canvas' shape about the picture's centre."""
        return self._view(self._decoded(index))

    def __call__(self, index: int) -> np.ndarray:
        """uint8 (3, H, W)."""
        picture = self._decoded(index)
        return self._view(picture).apply(picture)

    def _decoded(self, index: int) -> np.ndarray:
        return decode(self.encoded(index)[0], f"picture {index}")

    def _view(self, picture: np.ndarray) -> View:
        (height, width), (rows, columns) = picture.shape[:2], self.size
        step = min(height / rows, width / columns)
        x, y = ((side - 1 - step * (own - 1)) / 2 for side, own in ((width, columns), (height, rows)))
        return View(self.size, homography=((step, 0.0, x), (0.0, step, y), (0.0, 0.0, 1.0)))


@dataclass(frozen=True, eq=False)
class Files(Pictures):
    """Pictures in files."""

    files: tuple[Path, ...]
    size: Size

    def encoded(self, index: int) -> tuple[bytes, str]:
        return self.files[index].read_bytes(), self.files[index].suffix.lower()


@dataclass(frozen=True, eq=False)
class Rows(Pictures):
    """Pictures in rows of a `datasets.Dataset` (memory-mapped; pickles by the names of its files)."""

    rows: Any
    column: str
    size: Size

    def encoded(self, index: int) -> tuple[bytes, str]:
        return as_bytes(self.rows[index][self.column])


def as_bytes(cell: Any) -> tuple[bytes, str]:
    """(bytes, suffix) of an undecoded Image cell: {"bytes", "path"}.

    Raises:
        ValueError: an empty cell.
        OSError: its file cannot be read.
    """
    path = (cell or {}).get("path") or ""
    data = (cell or {}).get("bytes")
    if data is None and path:
        data = Path(path).read_bytes()
    if not data:
        raise ValueError("the cell holds no picture")
    return data, Path(path).suffix.lower() or (".png" if data[:4] == b"\x89PNG" else ".jpg")


# ---- Hugging Face datasets ----------------------------------------------------------------------------


def local(path: str) -> str:
    """The path with ~ replaced; or a Hub id as it is, where nothing local has its name.

    Raises:
        FileNotFoundError: there is nothing, and it can be no Hub id either: the Hub is not asked.
        ValueError: a file of another kind, or no path at all.
    """
    if not path:
        raise ValueError("data.images.path is empty; give a folder of pictures, parquet files or a Hub id")
    here = os.path.expanduser(path)
    if os.path.isdir(here):
        return here
    if _glob(here):
        if here.endswith(".parquet"):
            return here
        raise ValueError(
            f"data.images.path={path} is neither a folder nor parquet files (*.parquet); give the folder of pictures"
        )
    if here.endswith(".parquet"):
        raise FileNotFoundError(f"data.images.path={path}: no such file: there is no such parquet file")
    if not _HUB_ID.fullmatch(path):
        raise FileNotFoundError(
            f"data.images.path={path}: no such file or folder (and no id of a Hub data set, owner/name)"
        )
    return path


def load(path: str, split: str, *, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    """The rows of parquet files, an image folder (streaming only) or a Hub id.

    Raises:
        FileNotFoundError, ValueError: cannot be loaded; the message says what was looked for.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError("image data sets are read by `datasets`; pip install datasets") from error
    path = local(path)
    parquet = _parquet(path, split)
    try:
        if parquet is not None:
            return datasets.load_dataset("parquet", data_files={split: parquet}, split=split, streaming=streaming)
        if Path(path).is_dir():
            return datasets.load_dataset("imagefolder", data_dir=path, split=split, streaming=streaming)
        return datasets.load_dataset(path, split=split, streaming=streaming)
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError, RuntimeError) as error:
        cause = error.__cause__ or error
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(
            f"data.images.path={path}: split {split!r} cannot be loaded as a folder of pictures, parquet files or a "
            f"Hugging Face data set: {type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"
        ) from error


def columns(rows: Any, path: str, image: str, label: str) -> tuple[str, str | None]:
    """(image column, label column or None) by name where given, else by type and usual name.

    Raises:
        ValueError: no such column; those there are listed.
    """
    import datasets

    features = dict(rows.features or {})
    for name, field in ((image, "image_column"), (label, "label_column")):
        if name and name not in features:
            raise ValueError(f"data.images.{field}={name}: {path} has the columns {', '.join(features)}")
    if not image:
        typed = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        usual = [name for name in _IMAGE_COLUMNS if name in features]
        if not typed and not usual:
            raise ValueError(f"{path}: no column of pictures among {', '.join(features)}; set data.images.image_column")
        image = next((name for name in usual if name in typed), (typed or usual)[0])
    if not label:
        typed = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        usual = [name for name in _LABEL_COLUMNS if name in features]
        label = next((name for name in usual if name in typed or not typed), typed[0] if typed else "")
    return image, label or None


def num_rows(rows: Any, path: str, split: str) -> int | None:
    """Rows of a streamed split where its files or its Hub entry say so."""
    parquet = _parquet(local(path), split)
    if parquet is not None:
        from pyarrow.parquet import read_metadata

        return sum(read_metadata(file).num_rows for file in parquet)
    splits = getattr(rows.info, "splits", None) or {}
    return getattr(splits.get(split), "num_examples", None) or None


def class_names(rows: Any, label: str | None) -> tuple[str, ...]:
    """The names that a ClassLabel column comes with; () where it has none."""
    return tuple(getattr(rows.features[label], "names", None) or ()) if label else ()


def undecoded(rows: Any, image: str) -> Any:
    import datasets

    return rows.cast_column(image, datasets.Image(decode=False))


def _labels(rows: Any, label: str | None) -> tuple[np.ndarray, tuple[str, ...]]:
    if label is None:
        return np.full(len(rows), -1, np.int64), ()
    names, values = class_names(rows, label), rows[label][:]
    if names:
        return np.array([-1 if value is None else value for value in values], np.int64), names
    found = sorted({value for value in values if value is not None})
    number = {value: place for place, value in enumerate(found)}
    return np.array([number.get(value, -1) for value in values], np.int64), tuple(str(value) for value in found)


def _parquet(path: str, split: str) -> list[str] | None:
    """The parquet files that a local path means; None where it means something else."""
    here = Path(path)
    if here.is_dir():
        found = sorted(here.rglob("*.parquet"))
    elif path.endswith(".parquet"):
        found = _glob(path)
    else:
        return None
    if not found:
        return None
    named = {file: _split_of(file) for file in found}
    if all(name is None for name in named.values()) and split == "train":
        return [str(file) for file in found]
    chosen = [str(file) for file in found if split in _SPLITS.get(named[file] or "", ())]
    if not chosen:
        names = sorted({name for name in named.values() if name}) or ["none that names its split"]
        raise ValueError(
            f"data.images.path={path}: no parquet file of split {split!r} (found: {', '.join(names)}); give the folder "
            "that holds <split>-*.parquet"
        )
    return chosen


def _split_of(file: Path) -> str | None:
    for name, words in _SPLITS.items():
        if re.split(r"[-_.\d]", file.stem.lower())[0] in words or file.parent.name.lower() in words:
            return name
    return None


def _glob(pattern: str) -> list[Path]:
    """Files that a path with wildcards names; the path itself where it has none."""
    return [Path(name) for name in sorted(glob.glob(pattern, recursive=True))] or (
        [Path(pattern)] if Path(pattern).is_file() else []
    )


# ---- folders ------------------------------------------------------------------------------------------


def _folder(path: str, split: str) -> list[Path] | None:
    """The pictures below a local folder (of a split); None where it is no folder of pictures."""
    root = Path(path)
    if not root.is_dir():
        return None
    named = [root / word for words in _SPLITS.values() for word in words if (root / word).is_dir()]
    own = [folder for folder in named if folder.name in _SPLITS.get(split, (split,))] + [root / split]
    where = next((folder for folder in own if folder.is_dir()), None)
    if where is None and (named or split != "train") and not list(root.rglob("*.parquet")):
        found = ", ".join(folder.name for folder in named) or "no folder of a split"
        raise FileNotFoundError(f"data.images.path={path}: no split {split!r} ({found}); expected {root / split}/")
    return sorted(_pictures(where or root)) or None


def _pictures(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file():
            yield file


def _list_files(root: Path, split: str, files: Sequence[Path], size: Size) -> Listing:
    parents = {file.parent for file in files}
    synsets = [_SYNSET.fullmatch(file.stem) for file in files]
    if len(parents) > 1:
        names = [file.parent.name for file in files]
    elif all(synsets):
        names = [match.group(1) for match in synsets if match]
    else:
        names = []
    classes = tuple(sorted(set(names)))
    number = {name: place for place, name in enumerate(classes)}
    labels = np.array([number[name] for name in names] if names else [-1] * len(files), np.int64)
    keys = tuple(file.relative_to(root).as_posix() for file in files)
    notes = {"from": root.name}
    return Listing("images", split, keys, (), labels, classes, image=Files(tuple(files), size), notes=notes)


def _short(path: str) -> str:
    """A path's last part, so that records of a run name no machine's folders; a Hub id as it is."""
    return Path(path).name if Path(path).is_absolute() or Path(path).exists() else path
