"""A user's own recordings: classes by folder or file name, cut into samples, or paired with pictures by their times."""

from __future__ import annotations

import dataclasses
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gep.data.folder_frames import DepthFiles, Frames, find_frames, mask_classes
from gep.data.layout import ImageFiles, MaskFiles
from gep.data.listing import Listing, TargetOf
from gep.data.options import ListingOptions
from gep.events.io import FORMATS, EventSource, open_events

LAYOUT = """one of
  ROOT/<class>/<recording>.<ext>      recordings with labels (data.label_from=folder)
  ROOT/<recording>.<ext>              without labels, or with data.label_from=file the file's stem as the class
  ROOT/<recording>/events.<ext>       the same with what belongs to it beside it: images/, masks/, depth/ and
                                      images/timestamps.txt (µs, one line a picture: its time, or begin and end of
                                      its exposure); such folders may also lie in <class>/, and ROOT may be one
  ROOT/classes.txt                    what the ids in masks/ are called, a name a line (and a colour: road #736e92);
                                      folders are then no labels
and any of these below ROOT/train, ROOT/val and ROOT/test, or listed in ROOT/train.txt, … (a path a line)"""
_SPLITS = ("train", "val", "test")
_NO_RECORDINGS = ("timestamps.txt", "classes.txt", "readme.txt", "license.txt", *(f"{name}.txt" for name in _SPLITS))
_RANGE = re.compile(r"(\d+(?:\.\d+)?)\s*-\s*(\d+(?:\.\d+)?)\s*%")


def folder(root: Path, split: str, options: ListingOptions) -> Listing:
    """A folder of recordings in any format that gep reads; its layout is `LAYOUT`.

    A recording with stamped pictures gives a sample a picture, spanning its exposure, or the time since the picture
    before it. Any other gives one sample, or with `sample_us` as many as fit, from its first event on. With masks and
    a `classes.txt` the classes are those of the masks, and no sample has a label.

    Args:
        root: the folder.
        split: train, val or test where there are such folders or lists; "all"; or "A-B%": of each recording the
            samples that lie wholly between A and B per cent of its duration. Without folders and lists, train is all.
        options: `label_from`, `sample_us`, `sample_stride_us`, `min_events`, `sensor_height`, `sensor_width`.

    Raises:
        FileNotFoundError: no such split, or a listed recording is missing.
        ValueError: no recording, several layouts at once, `sample_us` of recordings with pictures, or pictures that do
            not go with their time stamps.
    """
    part = _range(split)
    recordings = _of_split(root, split if part is None else "all")
    if not recordings:
        raise ValueError(f"{root}: no recording found; the folder should hold {LAYOUT}")
    classes = _classes(root, recordings, options)
    samples = _Samples(root)
    for recording in recordings:
        label = classes.index(recording.label(options)) if classes else -1
        _add(samples, recording, label, part or (0.0, 1.0), options, cut=part is not None)
    listing = samples.listing(split, classes, options)
    if "mask" not in listing.targets and (root / "classes.txt").is_file():
        warnings.warn(f"{root / 'classes.txt'} has no effect: it says what the ids in masks/ are called", stacklevel=2)
    return listing


@dataclass(frozen=True)
class Recording:
    """One recording on disk."""

    path: Path
    """The file of events."""
    home: Path | None
    """The folder with its pictures and targets; None where it is a bare file."""
    parent: str | None
    """Name of the class folder that it is in; None for a flat layout."""

    def label(self, options: ListingOptions) -> str | None:
        """Its class; None where there is none."""
        if options.label_from == "folder":
            return self.parent
        return self.path.name.split(".")[0] if self.home is None else self.home.name


def _of_split(root: Path, split: str) -> list[Recording]:
    folders = [name for name in _SPLITS if (root / name).is_dir()]
    lists = [name for name in _SPLITS if (root / f"{name}.txt").is_file()]
    if split == "all":
        bases = [root / name for name in folders] or [root]
        return [recording for base in bases for recording in _recordings(base)]
    if split in folders:
        return _recordings(root / split)
    if split in lists:
        return _listed(root, root / f"{split}.txt")
    if split == "train" and not folders and not lists:
        return _recordings(root)
    there = ", ".join(dict.fromkeys([*folders, *lists])) or "neither folders nor lists of splits"
    raise FileNotFoundError(
        f"{root}: no split {split!r}; the folder has {there}. Make {root / split} or {root / f'{split}.txt'}, or use "
        '"all" or a range of every recording such as "0-60%"'
    )


def _recordings(base: Path) -> list[Recording]:
    """What is directly in `base`: recordings, or classes of them."""
    here = _direct(base, None)
    deeper = [(entry.name, _direct(entry, entry.name)) for entry in _folders(base)]
    deeper = [(name, found) for name, found in deeper if found]
    if _events_of(base):
        return here
    if here and deeper:
        raise ValueError(
            f"{base}: holds recordings ({here[0].path.name}) and class folders ({deeper[0][0]}/) side by side; move "
            f"the recordings into class folders. The folder should hold {LAYOUT}"
        )
    return here or [recording for _, found in deeper for recording in found]


def _direct(base: Path, parent: str | None) -> list[Recording]:
    """The recording that `base` is, or the files and recording folders in it."""
    own = _events_of(base)
    if own:
        return [Recording(own, base, None)] if parent is None else []
    found = [Recording(path, None, parent) for path in sorted(base.iterdir()) if _is_recording(path)]
    for entry in _folders(base):
        path = _events_of(entry)
        if path:
            found.append(Recording(path, entry, parent))
    return sorted(found, key=lambda recording: recording.path.relative_to(base).as_posix())


def _listed(root: Path, file: Path) -> list[Recording]:
    by_path = {}
    for recording in _recordings(root):
        for path in (recording.path, recording.home):
            if path is not None:
                by_path[path.relative_to(root).as_posix()] = recording
    found = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        name = line.split("#")[0].strip().rstrip("/")
        if not name:
            continue
        if name not in by_path:
            raise FileNotFoundError(f"{file}: line {number}: {name} is no recording in {root}")
        found[name] = by_path[name]
    return list(found.values())


def _classes(root: Path, recordings: list[Recording], options: ListingOptions) -> tuple[str, ...]:
    """Sorted; of all splits together, so that one label means the same in each of them."""
    everything = list(recordings)
    if any((root / name).is_dir() for name in _SPLITS) or any((root / f"{n}.txt").is_file() for n in _SPLITS):
        everything += _of_split(root, "all")
    labels = {recording.label(options) for recording in everything}
    return () if None in labels else tuple(sorted(label for label in labels if label is not None))


def _is_recording(path: Path) -> bool:
    if not path.is_file() or path.name.startswith(".") or path.name.lower() in _NO_RECORDINGS:
        return False
    return path.name.lower().endswith(tuple(suffix for found in FORMATS for suffix in found.suffixes))


def _events_of(base: Path) -> Path | None:
    """The file `events.<ext>` in a folder."""
    if not base.is_dir():
        return None
    return next((path for path in sorted(base.glob("events.*")) if _is_recording(path)), None)


def _folders(base: Path) -> list[Path]:
    return sorted(entry for entry in base.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _range(split: str) -> tuple[float, float] | None:
    """The shares of "A-B%", None for a name."""
    match = _RANGE.fullmatch(split.strip())
    if match is None:
        if "%" in split:
            raise ValueError(f"split {split!r}: a range of each recording reads as 0-60%")
        return None
    low, high = (float(value) / 100 for value in match.groups())
    if not 0 <= low < high <= 1:
        raise ValueError(f"split {split!r}: not a range within 0-100%")
    return low, high


# ---- samples ----------------------------------------------------------------------------------------


@dataclass
class _Samples:
    root: Path
    keys: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    spans: list[tuple[int, int] | None] = field(default_factory=list)
    frames: list[Frames | None] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    sensors: set[tuple[int, int]] = field(default_factory=set)

    def listing(self, split: str, classes: tuple[str, ...], options: ListingOptions) -> Listing:
        if not self.keys:
            raise ValueError(
                f"{self.root}: no sample is left of split {split!r} with data.sample_us={options.sample_us} and "
                f"data.min_events={options.min_events}; take a longer part or shorter samples"
            )
        framed = [frames is not None for frames in self.frames]
        if any(framed) and not all(framed):
            without, with_ = self.files[framed.index(False)], self.files[framed.index(True)]
            raise ValueError(f"{without}: has no stamped pictures, {with_} has; complete them, or keep the two apart")
        if any(framed) and len(self.sensors) > 1:
            raise ValueError(f"{self.root}: recordings with pictures are of one sensor size, here are {self.sensors}")
        notes = {}
        if options.sample_us and not any(framed):
            stride = options.sample_stride_us or options.sample_us
            notes["samples"] = f"of {options.sample_us / 1000:g} ms every {stride / 1000:g} ms"
        sensor = next(iter(self.sensors)) if len(self.sensors) == 1 else options.sensor
        listing = Listing(
            "folder",
            split,
            tuple(self.keys),
            tuple(self.files),
            np.array(self.labels, np.int64),
            classes,
            sensor,
            spans=None if None in self.spans else np.array(self.spans, np.int64).reshape(-1, 2),
            anchor="end" if any(framed) else "start",
            notes=notes,
        )
        return listing if not any(framed) or sensor is None else self._paired(listing, sensor)

    def _paired(self, listing: Listing, sensor: tuple[int, int]) -> Listing:
        parts = {}
        for name in ("images", "masks", "depth"):
            of = [getattr(frames, name) for frames in self.frames]
            there = [paths is not None for paths in of]
            if any(there) and not all(there):
                missing = self.files[there.index(False)].parent / name
                raise FileNotFoundError(f"{missing} is missing; other recordings have {name}/: complete it everywhere")
            if all(there):
                parts[name] = tuple(paths[row] for paths, row in zip(of, self.rows))
        targets: dict[str, TargetOf] = {}
        named: dict[str, Any] = {}
        if "masks" in parts:
            names, colours = mask_classes(self.root)
            targets["mask"] = MaskFiles(parts["masks"], sensor, len(names))
            if names:
                unlabelled = np.full(len(self.labels), -1, np.int64)
                named = {"classes": names, "labels": unlabelled, "notes": {**listing.notes, **colours}}
        if "depth" in parts:
            targets["depth"] = DepthFiles(parts["depth"], sensor)
        image = ImageFiles(parts["images"], sensor) if "images" in parts else None
        return dataclasses.replace(listing, image=image, targets=targets, **named)


def _add(
    samples: _Samples,
    recording: Recording,
    label: int,
    part: tuple[float, float],
    options: ListingOptions,
    *,
    cut: bool,
) -> None:
    """Adds one recording's samples that lie in `part` of it."""
    frames = None if recording.home is None else find_frames(recording.home, recording.path)
    name = (recording.path if recording.home in (None, samples.root) else recording.home).relative_to(samples.root)

    def add(key: str, span: tuple[int, int] | None, row: int = 0) -> None:
        samples.keys.append(key)
        samples.files.append(recording.path)
        samples.labels.append(label)
        samples.spans.append(span)
        samples.frames.append(frames)
        samples.rows.append(row)

    if frames is None and not cut and not options.sample_us and not options.min_events:
        add(name.as_posix(), None)  # nothing to know that the file would have to be opened for
        return
    height, width = options.sensor or (None, None)
    with open_events(recording.path, height=height, width=width) as source:
        samples.sensors.add((source.height, source.width))
        first, end = source.span
        low, high = (first + round(share * (end - first)) for share in part)
        if frames is not None:
            if options.sample_us:
                raise ValueError(
                    f"data.sample_us={options.sample_us} cuts recordings without pictures, and {recording.path} has "
                    "some: a sample is a picture there. Set it to 0; data.windows and data.window_us say how far back "
                    "from a picture events are read"
                )
            for row, (stem, (t0, t1)) in enumerate(zip(frames.stems, frames.spans.tolist())):
                # An exposure may begin before the first event and end after the last.
                within = (part[0] == 0 or low <= t0) and (part[1] == 1 or t1 <= high)
                if within and _enough(source, t0, t1, options):
                    add(f"{name.as_posix()}#{stem}", (t0, t1), row)
        elif options.sample_us:
            for t0 in range(low, high - options.sample_us + 1, options.sample_stride_us or options.sample_us):
                if _enough(source, t0, t0 + options.sample_us, options):
                    add(f"{name.as_posix()}@{t0 - first}", (t0, t0 + options.sample_us))
        elif low < high and _enough(source, low, high, options):
            add(name.as_posix() if not cut else f"{name.as_posix()}@{low - first}-{high - first}", (low, high))


def _enough(source: EventSource, t0: int, t1: int, options: ListingOptions) -> bool:
    return not options.min_events or len(source.by_time(t0, t1)) >= options.min_events
