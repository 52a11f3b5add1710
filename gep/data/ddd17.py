"""DDD17 with segmentation masks (Ev-SegNet's labels, ESS's release): DAVIS346 driving, 260 × 346."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gep.data.layout import ImageFiles, MaskFiles, coverage, files_in
from gep.data.listing import Listing
from gep.data.options import ListingOptions
from gep.data.view import View, decode

SENSOR = (260, 346)
LABELLED_ROWS = 200
CLASSES = ("flat", "background", "object", "vegetation", "human", "vehicle")
SPLITS = {
    "train": ("dir0", "dir3", "dir4", "dir6", "dir7"),
    "test": ("dir1",),
    "all": ("dir0", "dir1", "dir3", "dir4", "dir6", "dir7"),
}
_INTERVALS_MS = (50, 10, 250)
_LAYOUT = (
    "dirN/{events.dat.t,events.dat.xyp}, dirN/index/index_50ms.npy, dirN/segmentation_masks/segmentation_%08d.png and "
    "dirN/imgs/img_%08d.png, also below data/"
)


def ddd17(root: Path, split: str, options: ListingOptions) -> Listing:
    """DDD17 segmentation: one sample a mask, spanning the 50 ms before its frame.

    Masks cover the top 200 rows of the sensor; the 60 rows below are 255 = ignore. Frame numbers are one above the
    row of the index file, which holds (t [ns], last event, first event) of each frame; of the index files any serves,
    as they agree on the times. Frames that are too large for the view are scaled to it, others lie at its top left;
    that and the names of the picture folder (imgs, images) differ between releases (from memory).

    Args:
        root: holds the folders dirN, itself or in data/.
        split: train (dirs 0, 3, 4, 6, 7), test (dir 1) or all.
        options: `rows` "labelled" = events of the top 200 rows alone.

    Source: Binas et al. 2017, "DDD17"; Alonso and Murillo 2019, "EV-SegNet"; Sun et al. 2022, "ESS".
    """
    if split not in SPLITS:
        raise ValueError(f"DDD17: no split {split!r}; choose one of {', '.join(sorted(SPLITS))}")
    cut = options.rows == "labelled"
    if cut and not options.rectify:
        raise ValueError(
            "data.rectify=false leaves all events where they are, so that data.rows=labelled has no effect; unset one"
        )
    base = root / "data" if (root / "data").is_dir() else root
    found = [base / name for name in SPLITS[split] if (base / name).is_dir()]
    if not found:
        raise FileNotFoundError(
            f"DDD17: {base / SPLITS[split][0]} is missing; data.root={root} should hold {_LAYOUT} (N = "
            f"{', '.join(name[3:] for name in SPLITS[split])} for {split!r})"
        )
    keys: list[str] = []
    files: list[Path] = []
    spans: list[np.ndarray] = []
    masks: list[Path] = []
    pictures: list[Path] = []
    views: list[View] = []
    for folder in found:
        events = folder / "events.dat.t"
        for path in (events, events.with_suffix(".xyp")):
            if not path.exists():
                raise FileNotFoundError(f"DDD17: {path} is missing; data.root={root} should hold {_LAYOUT}")
        stamps, labelled = _frame_times(folder), _numbered(folder / "segmentation_masks")
        if not labelled:
            raise FileNotFoundError(
                f"DDD17: {folder / 'segmentation_masks'} holds no mask (unpack segmentation_masks.zip); "
                f"data.root={root} should hold {_LAYOUT}"
            )
        frames = _numbered(folder / "imgs") or _numbered(folder / "images")
        view = _view(next(iter(frames.values()))) if frames else None
        for number, mask in labelled.items():
            if not 1 <= number <= len(stamps):
                raise ValueError(f"{mask}: frame {number} is not in the index, which has frames 1 to {len(stamps)}")
            end = int(stamps[number - 1]) // 1000
            keys.append(f"{folder.name}/{mask.stem}")
            files.append(events)
            spans.append(np.array([end - 50_000, end], np.int64))
            masks.append(mask)
            if view is not None:
                if number not in frames:
                    raise FileNotFoundError(
                        f"DDD17: {mask} has no picture (img_{number:08d}.png) beside it; complete the folder of "
                        "pictures, or move it away to use masks alone"
                    )
                pictures.append(frames[number])
                views.append(view)
    if pictures and len(pictures) < len(masks):
        raise FileNotFoundError(
            f"DDD17 {split}: pictures for {len(pictures)} of {len(masks)} masks; complete imgs/ in every dirN, or move "
            "all of them away"
        )
    return Listing(
        "ddd17",
        split,
        tuple(keys),
        tuple(files),
        np.full(len(keys), -1, np.int64),
        CLASSES,
        SENSOR,
        ImageFiles(tuple(pictures), SENSOR, tuple(views)) if pictures else None,
        spans=np.stack(spans),
        anchor="end",
        targets={"mask": MaskFiles(tuple(masks), SENSOR)},
        rectify=LabelledRows() if cut else None,
        notes=coverage([folder.name for folder in found], SPLITS[split])
        | ({"events": f"of the top {LABELLED_ROWS} rows"} if cut else {}),
    )


@dataclass(frozen=True)
class LabelledRows:
    """A table that leaves every pixel where it is, and has no place for those below the labels."""

    def __call__(self, index: int) -> np.ndarray:
        return _labelled_rows()


@functools.lru_cache(maxsize=1)
def _labelled_rows() -> np.ndarray:
    height, width = SENSOR
    table = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float32)
    table[LABELLED_ROWS:] = np.nan
    return table


def _frame_times(folder: Path) -> np.ndarray:
    """(frames,) int64 ns."""
    paths = [folder / "index" / f"index_{interval}ms.npy" for interval in _INTERVALS_MS]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise FileNotFoundError(f"DDD17: {paths[0]} is missing; the folder should hold {_LAYOUT}")
    try:
        table = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: not a readable .npy array ({error})") from error
    if table.ndim != 2 or table.shape[1] < 2 or table.dtype.kind not in "iu" or len(table) == 0:
        raise ValueError(f"{path}: holds {table.dtype} {table.shape}, expected whole (t ns, last, first) rows")
    return table[:, 0].astype(np.int64)


def _numbered(folder: Path) -> dict[int, Path]:
    """Frame number -> file, in the numbers' order."""
    found = {}
    for path in files_in(folder, (".png", ".jpg")):
        match = re.search(r"(\d+)$", path.stem)
        if match:
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def _view(picture: Path) -> View:
    """How the frames lie in the sensor's view, judged by one of them."""
    height, width = decode(picture.read_bytes(), str(picture)).shape[:2]
    fits = width == SENSOR[1] and height <= SENSOR[0]
    return View(SENSOR, place=(0, 0)) if fits else View(SENSOR)
