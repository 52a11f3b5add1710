"""EventScape: simulated driving (CARLA), 256 × 512, with pictures and dense depth."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from gep.data.layout import ImageFiles, files_in
from gep.data.listing import Listing
from gep.data.options import ListingOptions

SENSOR = (256, 512)
_FOLDERS = {"train": "Town01-03_train", "val": "Town05_val", "test": "Town05_test"}
_LAYOUT = (
    "<split>/…/sequence_*/{events/data/*_events.npz,rgb/data/*_image.png,depth/data/*_depth.npy}, the split's folder "
    "being train, val, test or the archives' own Town01-03_train, Town05_val, Town05_test"
)
_CARLA_FAR_M = 1000.0
_DEPTH_SUFFIXES = (".npy", ".png", ".npz")


def eventscape(root: Path, split: str, options: ListingOptions) -> Listing:
    """EventScape: one sample an events file, with the picture and the depth at its end.

    Files of one moment share their name up to the last underscore. Depth is `.npy` in metres or CARLA's `.png`
    (R + 256 G + 65536 B, of 1000 m); whatever is not finite and positive is none. The folders between the split and
    a sequence, the names and the depth's files are from memory: the lister takes what it finds.

    Args:
        root: see the layout in the message for a missing folder.
        split: train, val or test.
        options: none of them has an effect here.

    Source: Gehrig et al. 2021, "Combining Events and Frames using Recurrent Asynchronous Multimodal Networks".
    """
    if split not in _FOLDERS:
        raise ValueError(f"EventScape: no split {split!r}; choose one of {', '.join(sorted(_FOLDERS))}")
    folder = next((path for path in (root / split, root / _FOLDERS[split]) if path.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"EventScape: {root / split} is missing; data.root={root} should hold {_LAYOUT}")
    sequences = [path for depth in range(3) for path in sorted(folder.glob("*/" * depth + "events/data"))]
    keys: list[str] = []
    events: list[Path] = []
    pictures: list[Path] = []
    depths: list[Path] = []
    for found in sequences:
        home = found.parent.parent
        own = files_in(found, (".npz",))
        for name, suffixes, into in (("rgb", (".png", ".jpg"), pictures), ("depth", _DEPTH_SUFFIXES, depths)):
            if (home / name).is_dir():
                into += _partners(own, home / name / "data", suffixes)
        events += own
        keys += [path.relative_to(root).as_posix() for path in own]
    if not events:
        raise FileNotFoundError(
            f"EventScape: {folder} holds no events/data/*.npz; data.root={root} should hold {_LAYOUT}"
        )
    for name, those in (("rgb", pictures), ("depth", depths)):
        if those and len(those) < len(events):
            raise FileNotFoundError(
                f"EventScape {split}: {name} for {len(those)} of {len(events)} events files; complete {name}/ in every "
                "sequence, or move all of them away"
            )
    return Listing(
        "eventscape",
        split,
        tuple(keys),
        tuple(events),
        np.full(len(keys), -1, np.int64),
        (),
        SENSOR,
        ImageFiles(tuple(pictures), SENSOR) if pictures else None,
        targets={"depth": CarlaDepth(tuple(depths))} if depths else {},
        groups=tuple(sequence_of(key) for key in keys),
    )


def sequence_of(key: str) -> str:
    """The sequence's folder in a sample's key; files of one sequence follow each other by the time of a frame."""
    return key.rpartition("/events/data/")[0]


@dataclass(frozen=True)
class CarlaDepth:
    """Depth [m] of each sample: float `.npy`, or CARLA's three-channel `.png`."""

    paths: tuple[Path, ...]

    def __call__(self, index: int) -> np.ndarray:
        path = self.paths[index]
        try:
            if path.suffix.lower() == ".png":
                with Image.open(path) as picture:
                    planes = np.asarray(picture.convert("RGB")).astype(np.float64)
                depth = planes @ np.array([1.0, 256.0, 65536.0]) / (256**3 - 1) * _CARLA_FAR_M
            else:
                stored = np.load(path, allow_pickle=False)
                depth = stored[stored.files[0]] if hasattr(stored, "files") else stored
        except (OSError, ValueError, EOFError, IndexError) as error:
            raise ValueError(f"{path}: not readable depth ({error})") from error
        depth = np.squeeze(np.asarray(depth))
        if depth.shape != SENSOR or depth.dtype.kind not in "fiu":
            raise ValueError(f"{path}: depth is {depth.dtype} {depth.shape}, expected numbers {SENSOR}")
        with np.errstate(invalid="ignore"):
            return np.where(np.isfinite(depth) & (depth > 0), depth, np.nan).astype(np.float32)


def _stem(path: Path) -> str:
    """What the files of one moment share: the name without "_events", "_image", "_depth"."""
    return re.sub(r"_[A-Za-z]+$", "", path.stem)


def _partners(own: list[Path], folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    by_stem = {_stem(path): path for path in files_in(folder, suffixes)}
    missing = [path for path in own if _stem(path) not in by_stem]
    if missing:
        raise FileNotFoundError(
            f"EventScape: {folder} has no {_stem(missing[0])}_* for {missing[0]} ({len(missing)} of {len(own)} are "
            "missing); complete the folder, or move it away"
        )
    return [by_stem[_stem(path)] for path in own]
