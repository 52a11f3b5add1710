"""Scenes on disk: recordings with stamped pictures, masks and depth maps, in the layout of `folder`."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from gep.data.folder import folder
from gep.data.listing import Listing
from gep.data.options import ListingOptions
from gep.data.scene_textures import Thing
from gep.data.scenes import SceneConfig, Scenes, draw_scenes
from gep.events.io import write_events
from gep.events.sensor import SensorModel
from gep.events.simulate import NMNIST_SENSOR, simulate_view
from gep.events.types import Events

INDEX = "scenes.json"
"""What the scenes were made of, written last: a folder without it is not whole."""
_CHUNK = 64  # scenes drawn together


class Textures(NamedTuple):
    """What a split's scenes are made of."""

    things: list[Thing]
    """The classes 1 … of the masks, the same names in every split."""
    backgrounds: list[np.ndarray]
    """Pictures float32 (h, w) in [0, 1]."""


def write_scenes(
    root: str | os.PathLike[str],
    counts: Mapping[str, int],
    textures: Mapping[str, Textures],
    *,
    config: SceneConfig | None = None,
    sensor: SensorModel = NMNIST_SENSOR,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Writes a data set of scenes, read by `data.name=scenes data.root=ROOT`.

    `ROOT/<split>/<number>/` holds events.arrow, and images/, masks/ and depth/ (metres, .npy) at the begin of the
    recording and at the end of each window, with their times.

    Args:
        root: a new or empty folder.
        counts: scenes of each split (train, val, test).
        textures: of each split.
        config: sizes, depths, motion.
        sensor: the camera's pixel.
        seed: of everything.
        progress: whether to show a bar.
    Returns:
        The folder.
    Raises:
        FileExistsError: the folder holds something, or is a file.
        ValueError: nothing to make, or splits whose classes differ.
    """
    root, config = Path(root), config or SceneConfig()
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} holds something already; name a new folder for the scenes")
    if not counts or min(counts.values()) < 1:
        raise ValueError(f"{dict(counts)} scenes: give at least one scene of each split, and at least one split")
    names = {tuple(thing.name for thing in textures[split].things) for split in counts}
    if len(names) != 1:
        raise ValueError(f"the splits' classes differ: {sorted(names)}")
    hidden = None if progress else True
    total = sum(counts.values())
    with _appearing(root) as partial, tqdm(total=total, desc="scenes", leave=False, disable=hidden) as bar:
        for number, (split, count) in enumerate(counts.items()):
            rng = np.random.default_rng([seed, number])
            for first in range(0, count, _CHUNK):
                drawn = draw_scenes(min(_CHUNK, count - first), *textures[split], config, rng)
                seeds = rng.integers(2**62, size=len(drawn.labels)).tolist()
                recordings = simulate_view(drawn.layers, sensor=sensor, seeds=seeds)
                _write(partial / split, first, drawn, recordings, config)
                bar.update(len(recordings))
        index = {"classes": list(drawn.classes), "seed": seed, "counts": dict(counts)}
        index |= {"config": dataclasses.asdict(config), "sensor": dataclasses.asdict(sensor)}
        (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return root


def scenes(root: Path, split: str, options: ListingOptions) -> Listing:
    """Scenes that `write_scenes` (`gep scenes DIR`) wrote; `classes` are those of the masks.

    Args:
        root: their folder.
        split: train, val, test or all.
        options: as for `folder`; a scene has no class of its own, so that `label_from` must be left alone.
    Raises:
        FileNotFoundError: a folder that holds none, or not all of them.
        ValueError: an index that cannot be read, or `label_from`.
    """
    if options.label_from != "folder":
        raise ValueError(f"data.label_from={options.label_from}: scenes have no classes of their own; leave it out")
    index = root / INDEX
    if not index.is_file():
        raise FileNotFoundError(f"{index} is missing: {root} should hold scenes as they are made with: gep scenes DIR")
    try:
        classes = tuple(str(name) for name in json.loads(index.read_text(encoding="utf-8"))["classes"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index}: not an index of scenes ({error}); make them again: gep scenes DIR") from error
    return dataclasses.replace(folder(root, split, options), name="scenes", classes=classes)


@contextmanager
def _appearing(root: Path) -> Iterator[Path]:
    """A folder beside `root` that takes its place when the block ends well, and is removed when not."""
    root = root.absolute()
    partial = root.with_name(f".{root.name}.{os.getpid()}.tmp")
    partial.mkdir(parents=True)
    try:
        yield partial
        if root.is_dir():
            root.rmdir()
        partial.rename(root)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write(base: Path, first: int, scenes: Scenes, recordings: list[Events], config: SceneConfig) -> None:
    stride = config.window_us // config.step_us
    steps = [stride * window for window in range(config.windows + 1)]
    see = scenes.layers.watch()
    views = [((see(step) * 255).round().byte().numpy(), *scenes.truth(step)) for step in steps]
    stamps = "".join(f"{step * config.step_us}\n" for step in steps)
    for number, events in enumerate(recordings):
        home = base / f"{first + number:05d}"
        for name in ("images", "masks", "depth"):
            (home / name).mkdir(parents=True)
        write_events(home / "events.arrow", events)
        (home / "images" / "timestamps.txt").write_text(stamps, encoding="ascii")
        for index, (picture, mask, depth) in enumerate(views):
            Image.fromarray(picture[number]).save(home / "images" / f"{index:03d}.png", compress_level=1)
            Image.fromarray(mask[number]).save(home / "masks" / f"{index:03d}.png", compress_level=1)
            np.save(home / "depth" / f"{index:03d}.npy", depth[number])
