"""DSEC and DSEC-Semantic: driving at 480 × 640, with pictures, depth and class ids in the rectified event view."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gep.data.dsec_calibration import Matrix, depth_factors, homography_to_picture, load_calibration
from gep.data.dsec_layout import (
    DEPTH_SPLITS,
    LAYOUT,
    SEMANTIC_LAYOUT,
    SEMANTIC_TEST,
    SEMANTIC_TRAIN,
    TEST,
    TRAIN,
    Drive,
    drives,
)
from gep.data.hdf5 import read_h5
from gep.data.layout import ImageFiles, MaskFiles, coverage, nearest, read_plane, spans_before
from gep.data.listing import Listing, TargetOf
from gep.data.options import ListingOptions
from gep.data.view import View

SENSOR = (480, 640)
LABELLED_ROWS = 440
CLASSES = (
    "background", "building", "fence", "person", "pole", "road", "sidewalk", "vegetation", "car", "wall",
    "traffic sign",
)  # fmt: skip


def dsec(root: Path, split: str, options: ListingOptions) -> Listing:
    """DSEC: one sample a picture ("train", "test", "all") or a disparity map ("train_depth", "depth_…").

    A sample spans the time since the picture (or map) before it; the first of a sequence has none and is left out.
    Pictures are brought to the rectified event view by the rotation between the cameras; depth in metres comes from
    the event cameras' disparity. Sequences on disk that are in neither published split count as the one whose folder
    (train/, test/) they are in, and else only as "all".

    Args:
        root: see the layout in the message for a missing folder.
        split: train, test, all, train_depth, or its parts depth_train, depth_val and depth_test. The published test
            set's depth is not public; those three parts are this project's own, by whole drives.
        options: `rectify` off = raw events, and then no pictures and no depth.

    Source: Gehrig et al. 2021, "DSEC: A Stereo Event Camera Dataset for Driving Scenarios".
    """
    if split not in ("train", "test", "all", "train_depth", *DEPTH_SPLITS):
        raise ValueError(
            f"DSEC: no split {split!r}; choose one of all, test, train (pictures), train_depth, "
            f"{', '.join(DEPTH_SPLITS)} (depth; the published test set has none)"
        )
    deep = "depth" in split
    if deep and not options.rectify:
        raise ValueError("data.rectify=false: DSEC's depth is in the rectified view; events have to be rectified too")
    part, published = "train" if deep else split, {"train": TRAIN, "test": TEST, "all": TRAIN + TEST}
    found = drives(root, part, published, LAYOUT)
    if split in DEPTH_SPLITS:
        here = ", ".join(drive.name for drive in found[:4])
        part, published = split, DEPTH_SPLITS
        found = [drive for drive in found if drive.name in DEPTH_SPLITS[split]]
        if not found:
            raise FileNotFoundError(
                f"DSEC {split}: none of {', '.join(DEPTH_SPLITS[split])} is below data.root={root}, where there are "
                f"{here} …"
            )
    samples = _Samples()
    for drive in found:
        pictures = drive.pictures(required=options.rectify and not deep)
        if deep:
            maps, times = drive.disparity()
            factors = depth_factors(load_calibration(drive.calibration), str(drive.calibration))
            samples.depth += [(path, factors) for path in maps[1:]]
            samples.add(drive, [path.stem for path in maps[1:]], spans_before(times)[1:])
            if pictures:
                chosen = nearest(drive.times(), times, drive.folder("images"))
                samples.show(drive, [pictures[i] for i in chosen[1:]])
        else:
            times = drive.times()
            names = [path.stem for path in pictures] or [f"{number:06d}" for number in range(len(times))]
            samples.add(drive, names[1:], spans_before(times)[1:])
            if options.rectify:
                samples.show(drive, pictures[1:])
    notes = coverage([drive.name for drive in found], published[part])
    if not options.rectify:
        notes["events"] = "raw, therefore without pictures"
    return samples.listing("dsec", split, (), found, notes, rectify=options.rectify)


def dsec_semantic(root: Path, split: str, options: ListingOptions) -> Listing:
    """DSEC-Semantic: one sample a label map of 11 classes, at the time of its picture.

    Maps have 440 rows; they cover the top of the 480-row view, and the 40 rows below are 255 = ignore, so that
    events, pictures and masks share one view. A sample spans the time since the label before it. Pictures are
    taken where the sequence has them. Where labels and time stamps lie differs between releases (from memory).

    Args:
        root: see the layout in the message for a missing folder.
        split: train (8 sequences), test (3) or all.
        options: `subsampling` "ess" = the labels of ESS's loader; `rows` "labelled" = no events in the 40 rows below.

    Source: Sun et al. 2022, "ESS: Learning Event-based Semantic Segmentation from Still Images".
    """
    published = {"train": SEMANTIC_TRAIN, "test": SEMANTIC_TEST, "all": SEMANTIC_TRAIN + SEMANTIC_TEST}
    if split not in published:
        raise ValueError(f"DSEC-Semantic: no split {split!r}; choose one of {', '.join(sorted(published))}")
    if not options.rectify:
        raise ValueError("data.rectify=false: DSEC-Semantic's labels are in the rectified view, and events must be too")
    # The same root may hold DSEC's other sequences, which have no labels.
    found = [d for d in drives(root, "all", published, SEMANTIC_LAYOUT) if d.name in published[split]]
    if not found:
        raise FileNotFoundError(
            f"DSEC-Semantic: none of {', '.join(published[split])} is below data.root={root}, which should hold "
            f"{SEMANTIC_LAYOUT}"
        )
    samples = _Samples()
    for drive in found:
        maps, times = drive.labels()
        spans = spans_before(times)
        if options.subsampling == "ess":
            maps, spans = maps[6::2], spans[6::2]
        samples.masks += maps
        samples.add(drive, [path.stem for path in maps], spans)
        pictures = drive.pictures(required=False)
        if pictures:
            chosen = nearest(drive.times(), spans[:, 1], drive.folder("images"))
            samples.show(drive, [pictures[i] for i in chosen])
    notes = coverage([drive.name for drive in found], published[split])
    notes["subsampling"] = "ESS (first 6 skipped, every second)" if options.subsampling == "ess" else "none"
    rows = LABELLED_ROWS if options.rows == "labelled" else SENSOR[0]
    if rows < SENSOR[0]:
        notes["events"] = f"of the top {rows} rows"
    return samples.listing("dsec_semantic", split, CLASSES, found, notes, rows=rows)


class _Samples:
    """Collects the samples of several sequences into one listing."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.files: list[Path] = []
        self.maps: list[Path] = []
        self.spans: list[np.ndarray] = []
        self.pictures: list[Path] = []
        self.views: list[View] = []
        self.masks: list[Path] = []
        self.depth: list[tuple[Path, tuple[float, float, float]]] = []

    def add(self, drive: Drive, names: Sequence[str], spans: np.ndarray) -> None:
        self.keys += [f"{drive.name}/{name}" for name in names]
        self.files += [drive.events] * len(names)
        self.maps += [drive.events.with_name("rectify_map.h5")] * len(names)
        self.spans.append(spans)

    def show(self, drive: Drive, pictures: Sequence[Path]) -> None:
        matrix: Matrix = homography_to_picture(load_calibration(drive.calibration), str(drive.calibration))
        self.pictures += pictures
        self.views += [View(SENSOR, homography=matrix)] * len(pictures)

    def listing(
        self,
        name: str,
        split: str,
        classes: tuple[str, ...],
        found: Sequence[Drive],
        notes: dict[str, str],
        *,
        rectify: bool = True,
        rows: int = SENSOR[0],
    ) -> Listing:
        if not self.keys:
            raise ValueError(f"{name} {split}: no sample in {', '.join(drive.name for drive in found[:3])} …")
        if self.pictures and len(self.pictures) < len(self.keys):
            raise FileNotFoundError(
                f"{name} {split}: pictures for {len(self.pictures)} of {len(self.keys)} samples; complete images/ in "
                "every sequence, or move all of them away"
            )
        for drive in found if rectify else ():
            _ = drive.rectify_map  # a missing one is named now, not by a data worker
        targets: dict[str, TargetOf] = {
            **({"mask": MaskFiles(tuple(self.masks), SENSOR)} if self.masks else {}),
            **({"depth": DisparityDepth(tuple(self.depth))} if self.depth else {}),
        }
        return Listing(
            name,
            split,
            tuple(self.keys),
            tuple(self.files),
            np.full(len(self.keys), -1, np.int64),
            classes,
            SENSOR,
            ImageFiles(tuple(self.pictures), SENSOR, tuple(self.views)) if self.pictures else None,
            spans=np.concatenate(self.spans),
            anchor="end",
            targets=targets,
            rectify=RectifyMaps(tuple(self.maps), rows) if rectify else None,
            notes=notes,
        )


@dataclass(frozen=True)
class DisparityDepth:
    """Depth [m] from disparity maps: uint16 PNG, 256 = one pixel of disparity, 0 = none."""

    samples: tuple[tuple[Path, tuple[float, float, float]], ...]

    def __call__(self, index: int) -> np.ndarray:
        path, (focal, inverse_baseline, offset) = self.samples[index]
        stored = read_plane(path).astype(np.float64)
        if stored.shape != SENSOR:
            raise ValueError(f"{path}: a disparity map of {stored.shape}, expected {SENSOR}")
        with np.errstate(divide="ignore"):
            depth = focal / (stored / 256 * inverse_baseline + offset)
        return np.where((stored > 0) & (depth > 0), depth, np.nan).astype(np.float32)


@dataclass(frozen=True)
class RectifyMaps:
    """`rectify_map.h5` of each sample's sequence, read once a process; no place for what lands below the top `rows`."""

    paths: tuple[Path, ...]
    rows: int = SENSOR[0]

    def __call__(self, index: int) -> np.ndarray:
        return _rectify_map(self.paths[index], self.rows)


@functools.lru_cache(maxsize=64)
def _rectify_map(path: Path, rows: int) -> np.ndarray:
    table = read_h5(path, "rectify_map").astype(np.float32, copy=False)
    if table.shape != (*SENSOR, 2):
        raise ValueError(f"{path}: rectify_map has the shape {table.shape}, expected {(*SENSOR, 2)}")
    if rows < SENSOR[0]:
        table = np.where(np.rint(table[..., 1:]) < rows, table, np.float32(np.nan))
    return table
