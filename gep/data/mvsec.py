"""MVSEC: DAVIS346 driving by day and night, 260 × 346, with depth from lidar."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gep.data.hdf5 import has_h5, read_h5
from gep.data.layout import coverage, nearest, spans_before
from gep.data.listing import Listing
from gep.data.options import ListingOptions
from gep.data.view import View, encode_png

SENSOR = (260, 346)
SPLITS = {
    "train": ("outdoor_day2",),
    "test": ("outdoor_day1", "outdoor_night1", "outdoor_night2", "outdoor_night3"),
    "all": ("outdoor_day1", "outdoor_day2", "outdoor_night1", "outdoor_night2", "outdoor_night3"),
}
_LAYOUT = (
    "<sequence>_data.hdf5 and <sequence>_gt.hdf5, and for rectified depth <scene>_left_x_map.txt and "
    "<scene>_left_y_map.txt (outdoor_day_left_x_map.txt, …, in the calibration archive), anywhere below the root"
)
_PICTURE_OFF_US = 120_000  # at night a frame takes 100 ms
_ROUNDS = 20  # of the map's inversion; lens maps bend little, so that a pixel's error falls below 1e-3 long before


def mvsec(root: Path, split: str, options: ListingOptions) -> Listing:
    """MVSEC: one sample a depth map, spanning the time since the map before it (50 ms); the first one is left out.

    Depth (and the frames) are in the rectified view, and events are moved there by the calibration's tables; or all
    stay in the raw view. Times are unix seconds in the files (float64) and µs here. The picture of a sample is the
    camera's nearest frame; there are none where that is more than 120 ms off, which the notes say. The names inside
    the files are the published ones, their dtypes from memory.

    Args:
        root: see the layout in the message for a missing file.
        split: train, test, all, or the name of one sequence such as outdoor_night1.
        options: `depth` "rect" or "raw"; `rectify` off with rectified depth is refused.

    Source: Zhu et al. 2018, "The Multivehicle Stereo Event Camera Dataset"; split of E2Depth (Hidalgo-Carrió 2020).
    """
    notes: dict[str, str] = {}
    names = SPLITS.get(split, (split,) if re.fullmatch(r"[a-z_]+\d+", split) else ())
    if not names:
        raise ValueError(f"MVSEC: no split {split!r}; choose one of {', '.join(sorted(SPLITS))}, or name a sequence")
    rect = options.depth == "rect"
    if rect and not options.rectify:
        raise ValueError(
            "data.rectify=false leaves events raw beside data.depth=rect, so that no depth would lie at its events; "
            "set data.depth=raw, or rectify"
        )
    data = {name: path for name in names if (path := _find(root, f"{name}_data.hdf5")) is not None}
    if not data:
        raise FileNotFoundError(f"MVSEC: {names[0]}_data.hdf5 is missing; data.root={root} should hold {_LAYOUT}")
    keys: list[str] = []
    files: list[Path] = []
    spans: list[np.ndarray] = []
    truth: list[tuple[Path, int]] = []
    frames: list[tuple[Path, int]] = []
    maps: list[tuple[Path, Path]] = []
    for name, path in data.items():
        gt = _find(root, f"{name}_gt.hdf5")
        if gt is None:
            raise FileNotFoundError(f"MVSEC: {name}_gt.hdf5 is missing; data.root={root} should hold {_LAYOUT}")
        stamps = _micros(gt, f"davis/left/depth_image_{options.depth}_ts")
        count = len(stamps) - 1
        keys += [f"{name}/{number:06d}" for number in range(1, len(stamps))]
        files += [path] * count
        spans.append(spans_before(stamps)[1:])
        truth += [(gt, number) for number in range(1, len(stamps))]
        if rect:
            maps += [_maps_of(root, name)] * count
        if has_h5(path, "davis/left/image_raw_ts"):
            shown = _micros(path, "davis/left/image_raw_ts")
            try:
                frames += [(path, int(number)) for number in nearest(shown, stamps[1:], path, _PICTURE_OFF_US)]
            except ValueError as error:
                notes["pictures"] = f"none ({error})"
    pictures = len(frames) == len(keys)
    return Listing(
        "mvsec",
        split,
        tuple(keys),
        tuple(files),
        np.full(len(keys), -1, np.int64),
        (),
        SENSOR,
        H5Frames(tuple(frames), tuple(maps)) if pictures else None,
        spans=np.concatenate(spans),
        anchor="end",
        targets={"depth": H5Depth(tuple(truth), f"davis/left/depth_image_{options.depth}")},
        rectify=TextMaps(tuple(maps)) if rect else None,
        notes=coverage(list(data), names) | {"depth": options.depth} | notes,
    )


@dataclass(frozen=True)
class H5Depth:
    """Depth [m] of each sample from its sequence's ground truth; what is not finite and positive is NaN."""

    samples: tuple[tuple[Path, int], ...]
    name: str

    def __call__(self, index: int) -> np.ndarray:
        path, number = self.samples[index]
        depth = read_h5(path, self.name, number).astype(np.float32)
        if depth.shape != SENSOR:
            raise ValueError(f"{path}: {self.name}[{number}] has the shape {depth.shape}, expected {SENSOR}")
        with np.errstate(invalid="ignore"):
            return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(np.nan))


@dataclass(frozen=True)
class TextMaps:
    """The calibration's tables of rectified coordinates, one text file each for x and y, read once a process."""

    samples: tuple[tuple[Path, Path], ...]

    def __call__(self, index: int) -> np.ndarray:
        return _table(*self.samples[index])


@dataclass(frozen=True)
class H5Frames:
    """The camera's frames, brought to the rectified view where there are tables for it."""

    samples: tuple[tuple[Path, int], ...]
    maps: tuple[tuple[Path, Path], ...]

    def encoded(self, index: int) -> tuple[bytes, str]:
        return encode_png(self._frame(index)), ".png"

    def view(self, index: int) -> View:
        return View(SENSOR)

    def __call__(self, index: int) -> np.ndarray:
        return self.view(index).apply(np.repeat(self._frame(index)[..., None], 3, axis=2))

    def _frame(self, index: int) -> np.ndarray:
        path, number = self.samples[index]
        frame = read_h5(path, "davis/left/image_raw", number)
        if frame.shape != SENSOR or frame.dtype != np.uint8:
            raise ValueError(f"{path}: image_raw[{number}] is {frame.dtype} {frame.shape}, expected uint8 {SENSOR}")
        return _sample(frame.astype(np.float64), _inverse(*self.maps[index])) if self.maps else frame


@functools.lru_cache(maxsize=8)
def _table(x_map: Path, y_map: Path) -> np.ndarray:
    """float32 (H, W, 2): at [y, x] the rectified (x, y) of a raw pixel."""
    planes = []
    for path in (x_map, y_map):
        try:
            plane = np.loadtxt(path, dtype=np.float64)
        except ValueError as error:
            raise ValueError(f"{path}: not a table of numbers ({error})") from error
        if plane.shape != SENSOR:
            raise ValueError(f"{path}: a table of {plane.shape}, expected {SENSOR}")
        planes.append(plane)
    return np.stack(planes, axis=-1).astype(np.float32)


@functools.lru_cache(maxsize=8)
def _inverse(x_map: Path, y_map: Path) -> np.ndarray:
    """float64 (H, W, 2): at [y, x] the raw (x, y) of a rectified pixel; NaN where the camera does not look."""
    table = _table(x_map, y_map).astype(np.float64)
    height, width = SENSOR
    wanted = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float64)
    raw = wanted.copy()
    for _ in range(_ROUNDS):
        raw += wanted - _bilinear(table, np.clip(raw, 0, (width - 1, height - 1)))
    inside = (raw >= -0.5).all(axis=-1) & (raw <= (width - 0.5, height - 0.5)).all(axis=-1)
    clipped = np.clip(raw, 0, (width - 1, height - 1))
    return np.where(inside[..., None], clipped, np.nan)


def _sample(frame: np.ndarray, at: np.ndarray) -> np.ndarray:
    """uint8: the frame at (x, y) positions, bilinear, black where they are NaN."""
    known = ~np.isnan(at).any(axis=-1)
    values = _bilinear(frame[..., None], np.where(known[..., None], at, 0))[..., 0]
    return np.where(known, np.rint(values), 0).astype(np.uint8)


def _bilinear(planes: np.ndarray, at: np.ndarray) -> np.ndarray:
    """(H, W, C) at positions (…, 2) of (x, y) inside it -> (…, C)."""
    height, width = planes.shape[:2]
    x0 = np.clip(np.floor(at[..., 0]).astype(np.int64), 0, width - 2)
    y0 = np.clip(np.floor(at[..., 1]).astype(np.int64), 0, height - 2)
    fx, fy = (at[..., 0] - x0)[..., None], (at[..., 1] - y0)[..., None]
    top = planes[y0, x0] * (1 - fx) + planes[y0, x0 + 1] * fx
    bottom = planes[y0 + 1, x0] * (1 - fx) + planes[y0 + 1, x0 + 1] * fx
    return top * (1 - fy) + bottom * fy


def _micros(path: Path, name: str) -> np.ndarray:
    """(N,) float64 unix seconds -> int64 µs, ascending."""
    seconds = read_h5(path, name)
    if seconds.dtype != np.float64 or seconds.ndim != 1 or len(seconds) < 2 or not np.isfinite(seconds).all():
        raise ValueError(f"{path}: {name} is {seconds.dtype} {seconds.shape}, expected at least two float64 times")
    stamps = np.rint(seconds * 1e6).astype(np.int64)
    if (np.diff(stamps) <= 0).any():
        at = int(np.argmax(np.diff(stamps) <= 0)) + 1
        raise ValueError(f"{path}: {name}[{at}] is not after the time before it")
    return stamps


def _maps_of(root: Path, name: str) -> tuple[Path, Path]:
    scene = name.rstrip("0123456789")
    found = [_find(root, f"{scene}_left_{axis}_map.txt") for axis in "xy"]
    if found[0] is None or found[1] is None:
        missing = f"{scene}_left_{'x' if found[0] is None else 'y'}_map.txt"
        raise FileNotFoundError(
            f"MVSEC: {missing} is missing, without which events do not lie in the view of the rectified depth; "
            f"data.root={root} should hold {_LAYOUT}; or set data.depth=raw"
        )
    return found[0], found[1]


def _find(root: Path, name: str) -> Path | None:
    """The file of that name at most three folders deep."""
    for depth in range(4):
        for path in sorted(root.glob("/".join(["*"] * depth + [name]))):
            return path
    return None
