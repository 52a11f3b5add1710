"""Published recognition sets, listed from their on-disk layouts (facts: docs of each set).

Every lister takes `(root, split)` and returns a `Listing`. Classes are in sorted order, files in sorted
order within a class: `os.listdir` order differs between file systems and silently permutes the labels.
"""

from __future__ import annotations

import gzip
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gep.data.listing import Listing
from gep.data.view import View, decode, encode_png

NMNIST_SENSOR = (34, 34)
MNIST_OFFSET = 3  # px: where the 28×28 digit sits in the 34×34 view of the sensor


def nmnist(root: Path, split: str) -> Listing:
    """N-MNIST: `{Train,Test}/{0..9}/%05d.bin`, the file number being the MNIST index + 1.

    The paired images are read from `train_images.npz` / `test_images.npz` (index, label, image) or from
    MNIST's own IDX files (`train-images-idx3-ubyte`, also `.gz`) in the root, where there are such.

    Source: Orchard et al. 2015, "Converting static image datasets to spiking neuromorphic datasets".
    """
    folder = _split_folder(root, split, {"train": ("Train", "train"), "test": ("Test", "test")}, "N-MNIST")
    keys, files, labels, classes = _list_classes(folder, root, (".bin",), [str(d) for d in range(10)])
    numbers = np.array([_file_number(path) for path in files], dtype=np.int64)
    image = _mnist_images(root, split, numbers, files)
    return Listing("nmnist", split, keys, files, labels, classes, NMNIST_SENSOR, image)


def ncaltech101(root: Path, split: str) -> Listing:
    """N-Caltech101: `Caltech101/<class>/image_%04d.bin`, or EST's `{training,validation,testing}/<class>/*.npy`.

    The original release has no official split: its split is "all"; hold a part out by `data.holdout`.

    Source: Orchard et al. 2015; EST: Gehrig et al. 2019.
    """
    est = {"train": "training", "val": "validation", "test": "testing"}
    if split in est and (root / est[split]).is_dir():
        folder, suffixes = root / est[split], (".npy",)
    elif split in ("all", "train") and not (root / est["train"]).is_dir():
        folder, suffixes = _first_folder((root / "Caltech101", root), root, "N-Caltech101"), (".bin",)
    else:
        raise FileNotFoundError(
            f"N-Caltech101: no split {split!r} in {root}: the original release (Caltech101/<class>/*.bin) "
            f"has only 'all', EST's re-release ({', '.join(sorted(est.values()))}) has {sorted(est)}"
        )
    keys, files, labels, classes = _list_classes(folder, root, suffixes, None)
    # The .bin release is of one camera; its largest recordings fill 180 × 240.
    sensor = (180, 240) if suffixes == (".bin",) else None
    return Listing("ncaltech101", split, keys, files, labels, classes, sensor, None)


def nimagenet(root: Path, split: str) -> Listing:
    """N-ImageNet: `extracted_{train,val}/nXXXXXXXX/*.npz`; class index = place in the sorted synset list.

    Splits: train, val, and the robustness variants by the rest of their folder's name (for instance
    "val_brightness_4", "val_mode_1"). Paired ImageNet files are looked for in `imagenet_{train,val}/`
    beside them: `{synset}/{stem}.JPEG`.

    Source: Kim et al. 2021, "N-ImageNet".
    """
    folder = _split_folder(root, split, {}, "N-ImageNet", prefix="extracted_")
    keys, files, labels, classes = _list_classes(folder, root, (".npz",), None)
    photos = root / f"imagenet_{split.split('_')[0]}"
    image = None
    if photos.is_dir():
        paths = tuple(photos / path.parent.name / f"{path.stem}.JPEG" for path in files)
        missing = [path for path in paths if not path.exists()]
        if missing:
            raise FileNotFoundError(
                f"N-ImageNet: {len(missing)} of {len(paths)} recordings have no image; the first is {missing[0]}. "
                f"Complete {photos}, or move it away to use the recordings without images"
            )
        image = ImageFiles(paths, (480, 640))
    return Listing("nimagenet", split, keys, files, labels, classes, (480, 640), image)


DATASETS: dict[str, Callable[[Path, str], Listing]] = {
    "nmnist": nmnist,
    "ncaltech101": ncaltech101,
    "nimagenet": nimagenet,
}


def list_recordings(name: str, root: str | Path, split: str) -> Listing:
    """Lists one split of a published data set.

    Args:
        name: a key of `DATASETS`.
        root: the folder that holds the set's own layout.
        split: the published split's name.
    Raises:
        ValueError: an unknown name, or a folder without one recording.
        FileNotFoundError: a missing folder; the message shows the layout that was looked for.
    """
    if name not in DATASETS:
        raise ValueError(f"data.name={name!r} is not known; choose one of {', '.join(sorted(DATASETS))}")
    if not str(root):
        raise FileNotFoundError(f"data.root is not set: name the folder that holds {name}, data.root=DIR")
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"data.root={root}: no such folder (it should hold {name} in its own layout)")
    return DATASETS[name](root, split)


# ---- images -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _MnistImages:
    """28×28 digits, each placed where the sensor saw it."""

    digits: np.ndarray
    rows: np.ndarray

    def encoded(self, index: int) -> tuple[bytes, str]:
        return encode_png(self.digits[self.rows[index]]), ".png"

    def view(self, index: int) -> View:
        return View(NMNIST_SENSOR, place=(MNIST_OFFSET, MNIST_OFFSET))

    def __call__(self, index: int) -> np.ndarray:
        digit = self.digits[self.rows[index]]
        return self.view(index).apply(np.repeat(digit[..., None], 3, axis=2))


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
        return self.view(index).apply(decode(self.encoded(index)[0], str(self.paths[index])))


def _mnist_images(root: Path, split: str, numbers: np.ndarray, files: tuple[Path, ...]) -> _MnistImages | None:
    stem = "train" if split == "train" else "t10k"
    npz = root / f"{'train' if split == 'train' else 'test'}_images.npz"
    idx = [root / f"{stem}-images{dot}idx3-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
    if npz.exists():
        source = npz
        try:
            with np.load(npz, allow_pickle=False) as archive:
                digits, index = archive["image"], archive["index"].astype(np.int64)
        except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{npz}: not an npz with `index` (N,) and `image` (N, 28, 28) ({error}); make it again, or move it away"
            ) from error
        if digits.ndim != 3 or digits.shape[1:] != (28, 28) or digits.dtype != np.uint8:
            raise ValueError(f"{npz}: image is {digits.dtype} {digits.shape}, expected uint8 (N, 28, 28)")
    elif found := [path for path in idx if path.exists()]:
        source, digits = found[0], _read_idx(found[0])
        index = np.arange(1, len(digits) + 1)
    else:
        return None
    if len(index) != len(digits):
        raise ValueError(f"{source}: {len(index)} indices for {len(digits)} images")
    row_of = {int(number): row for row, number in enumerate(index)}
    missing = [path for number, path in zip(numbers, files) if int(number) not in row_of]
    if missing:
        raise ValueError(
            f"{source}: {len(digits)} images for {len(files)} recordings, none for {len(missing)} of them "
            f"(the first is {missing[0]}); complete the file, or move it away to go on without images"
        )
    return _MnistImages(digits, np.array([row_of[int(number)] for number in numbers], dtype=np.int64))


def _read_idx(path: Path) -> np.ndarray:
    """MNIST's IDX3 images: uint8 (N, 28, 28)."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            data = file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged ({error}); get it again") from error
    header = np.frombuffer(data[:16], dtype=">i4") if len(data) >= 16 else np.zeros(4)
    count, height, width = (int(v) for v in header[1:])
    if header[0] != 2051 or (height, width) != (28, 28) or len(data) != 16 + count * 784:
        raise ValueError(f"{path}: not a whole IDX3 file of 28×28 images; get train-images-idx3-ubyte again")
    return np.frombuffer(data, dtype=np.uint8, offset=16).reshape(count, 28, 28)


# ---- folders ----------------------------------------------------------------------------------------


def _file_number(path: Path) -> int:
    if not path.stem.isdigit():
        raise ValueError(f"{path}: N-MNIST recordings are named by a number, as in 00001.bin")
    return int(path.stem)


def _split_folder(
    root: Path, split: str, names: dict[str, tuple[str, ...]], title: str, prefix: str | None = None
) -> Path:
    if prefix is not None:
        candidates = (prefix + split,)
    elif split in names:
        candidates = names[split]
    else:
        raise ValueError(f"{title}: no split {split!r}; choose one of {', '.join(sorted(names))}")
    return _first_folder([root / name for name in candidates], root, title)


def _first_folder(candidates: Iterable[Path], root: Path, title: str) -> Path:
    candidates = list(candidates)
    for folder in candidates:
        if folder.is_dir():
            return folder
    wanted = " or ".join(str(folder) for folder in candidates)
    raise FileNotFoundError(f"{title}: {wanted} is missing; data.root={root} should hold <split>/<class>/<files>")


def _list_classes(
    folder: Path, root: Path, suffixes: tuple[str, ...], classes: list[str] | None
) -> tuple[tuple[str, ...], tuple[Path, ...], np.ndarray, tuple[str, ...]]:
    """All recordings below `folder/<class>/`; `classes` fixes the list where the set defines it."""
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    names = classes if classes is not None else found
    keys: list[str] = []
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        if name not in found:
            continue
        for path in sorted((folder / name).iterdir()):
            if path.suffix.lower() in suffixes:
                keys.append(path.relative_to(root).as_posix())
                files.append(path)
                labels.append(label)
    if not files:
        raise ValueError(
            f"{folder}: no recording found; expected <class>/*{suffixes[0]} with classes such as "
            f"{', '.join((names or ['<class>'])[:3])}"
        )
    return tuple(keys), tuple(files), np.array(labels, dtype=np.int64), tuple(names)
