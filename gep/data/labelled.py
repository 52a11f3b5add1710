"""Published recognition sets, listed from their on-disk layouts (facts: docs of each set).

Every lister takes `(root, split)` and returns a `Listing`. Classes are in sorted order, files in sorted
order within a class: `os.listdir` order differs between file systems and silently permutes the labels.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from gep.data.caltech_images import NCALTECH_SENSOR, caltech_images
from gep.data.layout import ImageFiles, first_folder, list_classes
from gep.data.listing import Listing
from gep.data.mnist_images import NMNIST_SENSOR, mnist_images

_MINI = 100  # classes of Mini N-ImageNet
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


def nmnist(root: Path, split: str) -> Listing:
    """N-MNIST: `{Train,Test}/{0..9}/%05d.bin`, the file number being the MNIST index + 1.

    The paired images are read from `train_images.npz` / `test_images.npz` (index, label, image) or from
    MNIST's own IDX files (`train-images-idx3-ubyte`, also `.gz`) in the root, where there are such.

    Source: Orchard et al. 2015, "Converting static image datasets to spiking neuromorphic datasets".
    """
    folder = _split_folder(root, split, {"train": ("Train", "train"), "test": ("Test", "test")}, "N-MNIST")
    keys, files, labels, classes = list_classes(folder, root, (".bin",), [str(d) for d in range(10)])
    numbers = np.array([_file_number(path) for path in files], dtype=np.int64)
    image = mnist_images(root, split, numbers, files)
    return Listing("nmnist", split, keys, files, labels, classes, NMNIST_SENSOR, image)


def ncaltech101(root: Path, split: str) -> Listing:
    """N-Caltech101: `Caltech101/<class>/image_%04d.bin`, or EST's `{training,validation,testing}/<class>/*.npy`.

    The original release has no official split: its split is "all"; hold a part out by `data.holdout`. Caltech-101's own
    pictures are looked for in `101_ObjectCategories/` beside them, see `caltech_images`.

    Source: Orchard et al. 2015; EST: Gehrig et al. 2019.
    """
    est = {"train": "training", "val": "validation", "test": "testing"}
    suffixes: tuple[str, ...] = (".npy",)
    if split in est and (root / est[split]).is_dir():
        folder = root / est[split]
    elif split in ("all", "train") and not (root / est["train"]).is_dir():
        bases = (root / "Caltech101", *([root] if any(root.glob("*/*.bin")) else []))
        folder = first_folder(bases, root, "N-Caltech101", "Caltech101/<class>/image_%04d.bin")
        suffixes = (".bin",)
    else:
        raise FileNotFoundError(
            f"N-Caltech101: no split {split!r} in {root}: the original release (Caltech101/<class>/*.bin) "
            f"has only 'all', EST's re-release ({', '.join(sorted(est.values()))}) has {sorted(est)}"
        )
    # In the root other folders may lie beside the classes, and one more class would move all labels.
    own = sorted({path.parent.name for path in root.glob("*/*.bin")}) if folder == root else None
    keys, files, labels, classes = list_classes(folder, root, suffixes, own)
    # The .bin release is of one camera; its largest recordings fill 180 × 240.
    sensor = NCALTECH_SENSOR if suffixes == (".bin",) else None
    image, notes = caltech_images(root, keys, files)
    return Listing("ncaltech101", split, keys, files, labels, classes, sensor, image, notes=notes)


def nimagenet(root: Path, split: str) -> Listing:
    """N-ImageNet: `extracted_{train,val}/nXXXXXXXX/*.npz`; class index = place in the sorted synset list.

    Splits: train, val; the robustness variants by the rest of their folder's name ("val_mode_1",
    "val_brightness_4", whose folder may also be called `…val_mode_brightness_4`), also in `N_Imagenet_cam/`;
    and mini_train, mini_val: the 100 classes of `mini_classes.txt` (a synset a line) in the root where there is
    one, as papers disagree on them, else the first 100 of the sorted synsets, as the authors' code has it.
    Paired ImageNet files are looked for in `imagenet_{train,val}/` beside them: `{synset}/{stem}.JPEG`.

    Source: Kim et al. 2021, "N-ImageNet", and its released code (trim_class_count).
    """
    which = split.removeprefix("mini_").removeprefix("extracted_")
    names = [f"extracted_{which}"]
    if which not in ("train", "val"):
        names += [f"extracted_{which.replace('val_brightness', 'val_mode_brightness')}", which]
    bases = (root, root / "N_Imagenet_cam") if len(names) > 1 else (root,)
    layout = "extracted_<split>/<synset>/*.npz"
    folder = first_folder(dict.fromkeys(base / name for base in bases for name in names), root, "N-ImageNet", layout)
    chosen: list[str] | None = None
    notes: dict[str, str] = {}
    if split.startswith("mini_"):
        chosen, notes = _mini_classes(root, folder)
    keys, files, labels, classes = list_classes(folder, root, (".npz",), chosen)
    photos = root / f"imagenet_{which.split('_')[0]}"
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
    return Listing("nimagenet", split, keys, files, labels, classes, (480, 640), image, notes=notes)


def _mini_classes(root: Path, folder: Path) -> tuple[list[str], dict[str, str]]:
    listed = root / "mini_classes.txt"
    if listed.exists():
        names = sorted({line.split()[0] for line in listed.read_text(encoding="utf-8").splitlines() if line.split()})
        missing = [name for name in names if not (folder / name).is_dir()]
        if missing:
            raise FileNotFoundError(
                f"N-ImageNet: {folder / missing[0]} is missing ({len(missing)} of the {len(names)} classes in {listed})"
            )
        return names, {"classes": f"those of {listed.name}"}
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return found[:_MINI], {"classes": f"the first {min(_MINI, len(found))} synsets"}


def ncars(root: Path, split: str) -> Listing:
    """N-Cars: `n-cars_{train,test}/{background,cars}/*.dat`, 100 ms each, also one folder further down.

    The recordings are crops of up to 100 × 120 pixels (height × width; from memory, so that a larger one is
    named by the reader); all are listed as of that size, placed at the top left.

    Source: Sironi et al. 2018, "HATS".
    """
    if split not in ("train", "test"):
        raise ValueError(f"N-Cars: no split {split!r}; choose one of test, train")
    bases = (root, root / "Prophesee_Dataset_n_cars")
    folder = first_folder(
        [base / f"n-cars_{split}" for base in bases], root, "N-Cars", "n-cars_{train,test}/{background,cars}/*.dat"
    )
    keys, files, labels, classes = list_classes(folder, root, (".dat",), ("background", "cars"))
    return Listing("ncars", split, keys, files, labels, classes, (100, 120), None)


def cifar10dvs(root: Path, split: str) -> Listing:
    """CIFAR10-DVS: `<class>/*.aedat` (original) or `*.aedat4` (re-releases), 10 classes, 128 × 128.

    There is no official split. "all" is everything; "test" is 20 % of each class, drawn by the SHA-256 of
    "123/<class>/<file stem>" (the lowest fifth, rounded), and "train" the rest: the same for every release,
    machine and library version. Other works draw their 80/20 with seed 123 of their own generator.

    Source: Li et al. 2017, "CIFAR10-DVS: An event-stream dataset for object classification".
    """
    if split not in ("train", "test", "all"):
        raise ValueError(f"CIFAR10-DVS: no split {split!r}; choose one of all, test, train")
    layout = "<class>/*.aedat with the classes " + ", ".join(CIFAR10_CLASSES)
    folder = first_folder([root / "airplane", root / "CIFAR10DVS" / "airplane"], root, "CIFAR10-DVS", layout).parent
    keys, files, labels, classes = list_classes(folder, root, (".aedat", ".aedat4"), CIFAR10_CLASSES)
    listing = Listing("cifar10dvs", "all", keys, files, labels, classes, (128, 128), None)
    test = np.zeros(len(files), bool)
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels == label)
        draws = [hashlib.sha256(f"123/{name}/{files[i].stem}".encode()).hexdigest() for i in members]
        test[members[np.argsort(draws)[: round(0.2 * len(members))]]] = True
    kept = {"all": np.ones_like(test), "train": ~test, "test": test}[split]
    return dataclasses.replace(
        listing.subset(np.flatnonzero(kept), split), notes={"split": "80/20 a class, seed 123 (none is official)"}
    )


def _file_number(path: Path) -> int:
    if not path.stem.isdigit():
        raise ValueError(f"{path}: N-MNIST recordings are named by a number, as in 00001.bin")
    return int(path.stem)


def _split_folder(root: Path, split: str, names: dict[str, tuple[str, ...]], title: str) -> Path:
    if split not in names:
        raise ValueError(f"{title}: no split {split!r}; choose one of {', '.join(sorted(names))}")
    return first_folder([root / name for name in names[split]], root, title)
