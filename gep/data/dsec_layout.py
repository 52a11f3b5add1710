"""Where DSEC's releases put a sequence's files, and which sequences are in which split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gep.data.layout import files_in, read_stamps, stamped

TRAIN = (
    *(f"interlaken_00_{x}" for x in "cdefg"), "thun_00_a", *(f"zurich_city_00_{x}" for x in "ab"),
    *(f"zurich_city_01_{x}" for x in "abcdef"), *(f"zurich_city_02_{x}" for x in "abcde"), "zurich_city_03_a",
    *(f"zurich_city_04_{x}" for x in "abcdef"), *(f"zurich_city_05_{x}" for x in "ab"), "zurich_city_06_a",
    "zurich_city_07_a", "zurich_city_08_a", *(f"zurich_city_09_{x}" for x in "abcde"),
    *(f"zurich_city_10_{x}" for x in "ab"), *(f"zurich_city_11_{x}" for x in "abc"),
)  # fmt: skip
TEST = (
    "interlaken_00_a", "interlaken_00_b", "interlaken_01_a", "thun_01_a", "thun_01_b", "zurich_city_12_a",
    "zurich_city_13_a", "zurich_city_13_b", "zurich_city_14_a", "zurich_city_14_b", "zurich_city_14_c",
    "zurich_city_15_a",
)  # fmt: skip
# Ours, by whole drives; those of zurich_city_03, 09 and 10 are at night.
_DEPTH_VAL = ("zurich_city_03_a", "zurich_city_06_a", "zurich_city_08_a")
_DEPTH_TEST = ("thun_00_a", "zurich_city_05_a", "zurich_city_05_b", "zurich_city_07_a", "zurich_city_10_a",
               "zurich_city_10_b")  # fmt: skip
DEPTH_SPLITS = {
    "depth_train": tuple(name for name in TRAIN if name not in _DEPTH_VAL + _DEPTH_TEST),
    "depth_val": _DEPTH_VAL,
    "depth_test": _DEPTH_TEST,
}
SEMANTIC_TRAIN = tuple(f"zurich_city_{number:02d}_a" for number in (0, 1, 2, 4, 5, 6, 7, 8))
SEMANTIC_TEST = ("zurich_city_13_a", "zurich_city_14_c", "zurich_city_15_a")
LAYOUT = (
    "<sequence>/events/left/{events.h5,rectify_map.h5}, <sequence>/images/{left/rectified/%06d.png,timestamps.txt}, "
    "<sequence>/disparity/{event/%06d.png,timestamps.txt} and <sequence>/calibration/cam_to_cam.yaml, the sequences in "
    "the root, in train/ and test/, or in the archives' own {train,test}_{events,images,disparity,calibration}/"
)
SEMANTIC_LAYOUT = (
    "<sequence>/events/left/{events.h5,rectify_map.h5} and <sequence>/semantic/left/11classes/%06d.png with "
    "<sequence>/semantic/timestamps.txt (or <sequence>/11classes with <sequence>_semantic_timestamps.txt)"
)


@dataclass(frozen=True)
class Drive:
    """One sequence's folders, wherever the release has put them."""

    root: Path
    name: str

    def folder(self, part: str) -> Path:
        """The folder `part` ("events", "images", …) of the sequence; where the first layout has it if there is none."""
        places = [self.root / self.name / part]
        for split in ("train", "test"):
            places += [self.root / split / self.name / part, self.root / f"{split}_{part}" / self.name / part]
        return next((place for place in places if place.is_dir()), places[0])

    @property
    def events(self) -> Path:
        """events.h5 of the left event camera."""
        return self.folder("events") / "left" / "events.h5"

    @property
    def calibration(self) -> Path:
        """cam_to_cam.yaml."""
        path = self.folder("calibration") / "cam_to_cam.yaml"
        if not path.exists():
            raise FileNotFoundError(f"DSEC: {path} is missing; data.root={self.root} should hold {LAYOUT}")
        return path

    @property
    def rectify_map(self) -> Path:
        """rectify_map.h5 of the left event camera."""
        path = self.events.with_name("rectify_map.h5")
        if not path.exists():
            raise FileNotFoundError(
                f"DSEC: {path} is missing, without which events do not lie in the view of pictures and targets; it is "
                "in the events archive"
            )
        return path

    def times(self) -> np.ndarray:
        """(N,) µs of the pictures.

        Raises:
            FileNotFoundError: the sequence has no stamps.
        """
        path = self.folder("images") / "timestamps.txt"
        if not path.exists():
            raise FileNotFoundError(f"DSEC: {path} is missing; data.root={self.root} should hold {LAYOUT}")
        return read_stamps(path)[:, 0]

    def pictures(self, *, required: bool) -> list[Path]:
        """The left rectified pictures, as many as there are stamps; [] where there are none and none are required."""
        folder = self.folder("images") / "left" / "rectified"
        files = files_in(folder, (".png", ".jpg"))
        if files:
            stamped(files, self.times(), folder, self.folder("images") / "timestamps.txt")
        elif required:
            raise FileNotFoundError(f"DSEC: {folder} is missing; data.root={self.root} should hold {LAYOUT}")
        return files

    def disparity(self) -> tuple[list[Path], np.ndarray]:
        """N disparity maps of the event view and their (N,) times [µs]."""
        folder, stamps = self.folder("disparity") / "event", self.folder("disparity") / "timestamps.txt"
        files = files_in(folder, (".png",))
        if not files or not stamps.exists():
            raise FileNotFoundError(
                f"DSEC: {stamps if files else folder} is missing; data.root={self.root} should hold {LAYOUT}"
            )
        times = read_stamps(stamps)[:, 0]
        stamped(files, times, folder, stamps)
        return files, times

    def labels(self) -> tuple[list[Path], np.ndarray]:
        """N label maps of 11 classes and their (N,) times [µs]."""
        bases = [self.folder("semantic"), self.root / self.name]
        for split in ("train", "test"):
            bases += [self.root / split / self.name]
            bases += [self.root / f"{split}_semantic_segmentation" / part / self.name for part in (split, "")]
        for base in bases:
            for folder in (base / "left" / "11classes", base / "11classes"):
                folder = folder / "data" if (folder / "data").is_dir() else folder
                files = files_in(folder, (".png",))
                if files:
                    near = [base, base / "left", base.parent]
                    names = ("timestamps.txt", f"{self.name}_semantic_timestamps.txt", "semantic_timestamps.txt")
                    stamps = next((at / n for at in near for n in names if (at / n).exists()), base / names[0])
                    if not stamps.exists():
                        raise FileNotFoundError(f"DSEC-Semantic: {stamps} is missing; expected {SEMANTIC_LAYOUT}")
                    times = read_stamps(stamps)[:, 0]
                    stamped(files, times, folder, stamps)
                    return files, times
        raise FileNotFoundError(
            f"DSEC-Semantic: {bases[0] / 'left' / '11classes'} is missing; data.root={self.root} should hold "
            f"{SEMANTIC_LAYOUT}"
        )


def drives(root: Path, split: str, published: Mapping[str, Sequence[str]], layout: str) -> list[Drive]:
    """The split's sequences on disk, sorted by name.

    Args:
        root: the data set's.
        split: "all", or a key of `published`.
        published: split -> its sequences' names; others belong to the split whose folder they are in.
        layout: for the message.

    Raises:
        FileNotFoundError: there is none.
    """
    homes = {"": root, "train": root / "train", "test": root / "test"}
    homes |= {f"{name}_": root / f"{name}_events" for name in ("train", "test")}
    of: dict[str, str] = {}
    for home, folder in homes.items():
        for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
            if (entry / "events" / "left" / "events.h5").exists():
                listed = [name for name, names in published.items() if entry.name in names]
                of[entry.name] = listed[0] if listed else home.rstrip("_")
    chosen = [name for name in sorted(of) if split == "all" or of[name] == split]
    if not chosen:
        here = f"; here are {', '.join(sorted(of)[:4])} …" if of else ""
        raise FileNotFoundError(
            f"DSEC: no sequence of {split!r} below data.root={root}, which should hold {layout}{here}"
        )
    return [Drive(root, name) for name in chosen]
