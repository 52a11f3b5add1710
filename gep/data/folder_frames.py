"""The pictures, masks and depth maps beside a user's recording, and when each was taken."""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gep.data.layout import IGNORE, files_in, read_plane, read_stamps, stamped

_SUFFIXES = {
    "images": (".png", ".jpg", ".jpeg", ".bmp", ".webp"),
    "masks": (".png",),
    "depth": (".npy", ".png"),
}
_CLASS = re.compile(r"(.+?)(?:\s+(#[0-9a-fA-F]{6}))?")
_NPZ_KEYS = ("frame_index", "frame_exposure_start_us", "frame_exposure_end_us")


@dataclass(frozen=True)
class Frames:
    """N moments of a recording at which something was seen."""

    stems: tuple[str, ...]
    """File names without suffix."""
    spans: np.ndarray
    """(N, 2) int64 µs [t0, t1): each exposure, its last µs included, or from the time before to the time itself."""
    exposures: bool
    """Whether the spans are exposures."""
    images: tuple[Path, ...] | None
    masks: tuple[Path, ...] | None
    depth: tuple[Path, ...] | None


def find_frames(home: Path, events: Path) -> Frames | None:
    """What belongs to the recording in a folder; None where there are no pictures and no targets.

    The moments are those of `timestamps.txt` in images/, masks/ or depth/ (the first that has one), or of the arrays
    frame_index, frame_exposure_start_us and frame_exposure_end_us in events.npz, whose images are named by their
    number. What has no stamps of its own goes by the file names of what has.

    Raises:
        ValueError, FileNotFoundError: no stamps, stamps that do not fit the files, or a missing partner.
    """
    found = {name: files_in(home / name, suffixes) for name, suffixes in _SUFFIXES.items()}
    found = {name: files for name, files in found.items() if files}
    if not found:
        return None
    stamps = next((home / name / "timestamps.txt" for name in found if (home / name / "timestamps.txt").exists()), None)
    if stamps is not None:
        files = found[stamps.parent.name]
        times = read_stamps(stamps, (1, 2))
        stamped(files, times[:, -1], stamps.parent, stamps)
        if times.shape[1] == 2 and (times[:, 1] <= times[:, 0]).any():
            raise ValueError(f"{stamps}: an exposure ends before it begins; a line is begin and end in µs")
        stems, exposures = [path.stem for path in files], times.shape[1] == 2
        # The first time has none before it, and so no span: it is left out.
        spans = times + (0, 1) if exposures else np.stack([times[:-1, 0], times[1:, 0]], axis=1)
        stems = stems if exposures else stems[1:]
    else:
        arrays = _npz_frames(events)
        if arrays is None:
            name = next(iter(found))
            raise ValueError(
                f"{home / name / 'timestamps.txt'} is missing: one line a picture, its time in µs (or begin and end of "
                "its exposure); or move the folder away to use the events alone"
            )
        numbers, spans = arrays
        exposures = True
        by_number = {int(path.stem): path.stem for path in found.get("images", []) if path.stem.isdigit()}
        missing = [number for number in numbers if number not in by_number]
        if missing:
            raise FileNotFoundError(f"{home / 'images'}: no picture {missing[0]:06d}, whose exposure {events} has")
        stems = [by_number[number] for number in numbers]
    return Frames(
        tuple(stems),
        spans.astype(np.int64),
        exposures,
        *(_by_stem(home / name, found.get(name), stems) for name in ("images", "masks", "depth")),
    )


def _by_stem(folder: Path, files: list[Path] | None, stems: list[str]) -> tuple[Path, ...] | None:
    if files is None:
        return None
    of = {path.stem: path for path in files}
    missing = [stem for stem in stems if stem not in of]
    if missing:
        raise FileNotFoundError(
            f"{folder}: no file {missing[0]}.* ({len(missing)} of {len(stems)} are missing); complete the folder, or "
            "move it away"
        )
    return tuple(of[stem] for stem in stems)


def _npz_frames(events: Path) -> tuple[list[int], np.ndarray] | None:
    if events.suffix.lower() != ".npz":
        return None
    try:
        with np.load(events, allow_pickle=False) as archive:
            if not set(_NPZ_KEYS) <= set(archive.files):
                return None
            index, begin, end = (archive[key].astype(np.int64) for key in _NPZ_KEYS)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{events}: not a readable .npz archive: {error}") from error
    if index.ndim != 1 or index.shape != begin.shape or begin.shape != end.shape or (end <= begin).any():
        raise ValueError(f"{events}: {', '.join(_NPZ_KEYS)} are not N numbers with N exposures")
    if (np.diff(end) <= 0).any():
        raise ValueError(f"{events}: the exposures are not in the order of time")
    return index.tolist(), np.stack([begin, end + 1], axis=1)


def mask_classes(root: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """What `ROOT/classes.txt` calls the ids of masks: line 1 names id 0; a colour may follow the name as #rrggbb.

    Returns:
        The names, () without the file; and the colours as a listing's note, "-" for those without one.
    Raises:
        ValueError: no names, a name twice, or more than masks can tell apart.
    """
    path = root / "classes.txt"
    if not path.is_file():
        return (), {}
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except ValueError as error:
        raise ValueError(f"{path}: is no UTF-8 text ({error})") from error
    found = [match.groups() for line in lines if (match := _CLASS.fullmatch(line))]
    names = tuple(name for name, _ in found)
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names or twice or len(names) > IGNORE:
        fault = f"names {', '.join(twice)} twice" if twice else f"holds {len(names)} names"
        raise ValueError(f"{path}: {fault}; write one name a line, of id 0, 1, 2, …, at most {IGNORE} of them")
    colours = " ".join(colour or "-" for _, colour in found)
    return names, {"colours": colours} if "#" in colours else {}


@dataclass(frozen=True)
class DepthFiles:
    """Depth [m] of each sample: `.npy` in metres, or 16-bit `.png` in millimetres; 0 and what is not finite is none."""

    paths: tuple[Path, ...]
    sensor: tuple[int, int]

    def __call__(self, index: int) -> np.ndarray:
        path = self.paths[index]
        if path.suffix.lower() == ".npy":
            try:
                depth = np.load(path, allow_pickle=False).astype(np.float32)
            except (ValueError, OSError, EOFError) as error:
                raise ValueError(f"{path}: not a readable .npy array ({error})") from error
        else:
            depth = (read_plane(path).astype(np.float64) / 1000).astype(np.float32)
        if depth.shape != self.sensor:
            raise ValueError(f"{path}: a depth map of {depth.shape} is none of a {self.sensor} view")
        with np.errstate(invalid="ignore"):
            return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(np.nan))
