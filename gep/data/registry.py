"""Every data set by its name: how it is listed, which splits it has, and how a folder that holds it is recognised."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from gep.data.ddd17 import ddd17
from gep.data.dsec import dsec, dsec_semantic
from gep.data.eventscape import eventscape
from gep.data.folder import folder
from gep.data.labelled import CIFAR10_CLASSES, cifar10dvs, ncaltech101, ncars, nimagenet, nmnist
from gep.data.listing import Listing
from gep.data.mvsec import mvsec
from gep.data.options import ListingOptions
from gep.data.scene_files import INDEX, scenes
from gep.data.shards import open_shards

Lister = Callable[[Path, str, ListingOptions], Listing]


@dataclass(frozen=True)
class Dataset:
    """One data set."""

    list: Lister
    """(root, split, options) -> listing."""
    splits: tuple[str, ...]
    """Splits to try when a folder is described; others may exist."""
    marks: tuple[str, ...]
    """Patterns below the root of which one matches in the set's own layout, and in no other's."""


def _plain(lister: Callable[[Path, str], Listing]) -> Lister:
    """A lister without options."""
    return lambda root, split, options: lister(root, split)


DATASETS: dict[str, Dataset] = {
    "nmnist": Dataset(_plain(nmnist), ("train", "test"), ("[Tt]rain/[0-9]/*.bin", "[Tt]est/[0-9]/*.bin")),
    "ncaltech101": Dataset(
        _plain(ncaltech101),
        ("train", "val", "test", "all"),
        ("Caltech101/*/*.bin", "*/image_*.bin", "training/*/*.npy", "testing/*/*.npy"),
    ),
    "nimagenet": Dataset(
        _plain(nimagenet),
        (
            *("train", "val"),
            *(f"val_mode_{number}" for number in (1, 3, 5, 6, 7)),
            *(f"val_brightness_{number}" for number in (4, 5, 6, 7)),
        ),
        ("extracted_*/n[0-9]*", "val_mode_*/n[0-9]*", "N_Imagenet_cam/*/n[0-9]*"),
    ),
    "ncars": Dataset(
        _plain(ncars), ("train", "test"), ("n-cars_*/*/*.dat", "Prophesee_Dataset_n_cars/n-cars_*/*/*.dat")
    ),
    "cifar10dvs": Dataset(
        _plain(cifar10dvs),
        ("train", "test"),
        tuple(f"{base}{CIFAR10_CLASSES[0]}/*.{ext}" for base in ("", "CIFAR10DVS/") for ext in ("aedat", "aedat4")),
    ),
    "dsec_semantic": Dataset(
        dsec_semantic,
        ("train", "test"),
        (
            "*/semantic/left/11classes",
            "*/11classes",
            "*/*/semantic/left/11classes",
            "*/*/11classes",
            "*_semantic_segmentation/*/*/11classes",
        ),
    ),
    "dsec": Dataset(
        dsec,
        ("train", "test", "train_depth", "depth_train", "depth_val", "depth_test"),
        ("*/events/left/events.h5", "*/*/events/left/events.h5"),
    ),
    "ddd17": Dataset(ddd17, ("train", "test"), ("dir*/segmentation_masks", "data/dir*/segmentation_masks")),
    "mvsec": Dataset(mvsec, ("train", "test"), ("*_gt.hdf5", "*/*_gt.hdf5", "*/*/*_gt.hdf5")),
    "eventscape": Dataset(
        eventscape, ("train", "val", "test"), ("*/sequence_*/events/data", "*/*/sequence_*/events/data")
    ),
    "scenes": Dataset(scenes, ("train", "val", "test"), (INDEX,)),
    "shards": Dataset(lambda root, split, options: open_shards(root, split), ("",), ("index.json",)),
    "folder": Dataset(folder, ("train", "val", "test", "all"), ()),
}


def list_recordings(name: str, root: str | Path, split: str, options: object | None = None) -> Listing:
    """Lists one split of a data set.

    Args:
        name: a key of `DATASETS`.
        root: the folder that holds the set's own layout; for shards also a URL.
        split: the published split's name; see the lister's documentation.
        options: `ListingOptions`, or any config that has fields of these names.
    Raises:
        ValueError: an unknown name or split, or a folder without one recording.
        FileNotFoundError: a missing folder; the message shows the layout that was looked for.
    """
    if name == "images":
        raise ValueError(
            "data.name=images: sets of images are no recordings, and are not packed into shards here; a stage reads "
            "them directly with data.name=images data.images.path=… (a folder, parquet files or a Hub id)"
        )
    if name not in DATASETS:
        raise ValueError(f"data.name={name!r} is not known; choose one of {', '.join(sorted(DATASETS))}")
    if not str(root):
        raise FileNotFoundError(f"data.root is not set: name the folder that holds {name}, data.root=DIR")
    if name == "shards":
        return open_shards(root, split)
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"data.root={root}: no such folder (it should hold {name} in its own layout)")
    return DATASETS[name].list(root, split, ListingOptions.of(options))


def recognise(root: Path) -> list[str]:
    """The data sets in whose layout a folder is; "folder" only where it is none of the others."""
    found = [name for name, dataset in DATASETS.items() if any(_any(root.glob(mark)) for mark in dataset.marks)]
    return found or ["folder"]


def _any(matches: Iterable[Path]) -> bool:
    return next(iter(matches), None) is not None
