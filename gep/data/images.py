"""Image data sets as event data: each picture is filmed by a camera in a hand, and becomes events on the device."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image

from gep.data.bad import BadSample
from gep.data.boxes import centre, crop, lay_out
from gep.data.image_list import list_images
from gep.data.listing import Listing
from gep.data.sampler import Sample
from gep.data.view import decode
from gep.events.camera import Wander
from gep.events.sensor import NATURAL_SENSOR, VARIABLE, SensorModel
from gep.events.stepping import Outside, render
from gep.events.stills import StillBatch

if TYPE_CHECKING:
    from gep.data.config import DataConfig
    from gep.data.image_stream import StillStream

_IDLE = ("cache", "cache_dir", "jitter_us")  # what belongs to recordings alone
_STREAM = 0x737469  # keeps the fixed versions' randomness apart from other uses of small seeds
Pair = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Which pictures, how the camera moves over them, and what its pixels are like."""

    path: str = ""
    """folder of pictures, parquet file, glob or folder of them, or a Hugging Face data set's id"""
    image_column: str = ""
    """column of the pictures; empty = found by type and usual name (image, img, …)"""
    label_column: str = ""
    """column of the labels; empty = found by type and usual name (label, fine_label, …); none is fine"""
    streaming: bool = False
    """read the rows in the order they come in, without a copy on disk"""
    buffer: int = 2000
    """streaming: rows held in memory to be shuffled"""
    held_rows: int = 1000
    """streaming: rows that evaluation takes, the first ones; without data.eval_split training leaves them out"""
    speed: Pair = (20.0, 200.0)
    """range of a recording's typical speed, drawn log-uniformly [canvas px/s]"""
    turn_hz: Pair = (0.4, 2.5)
    """range of the frequencies that the motion is made of [Hz]"""
    rotation: float = 0.3
    """largest typical rate of rotation about the canvas' centre [rad/s]"""
    zoom: float = 0.1
    """largest typical rate at which the picture grows or shrinks [1/s, natural logarithm]"""
    margin: int = 24
    """how far the picture reaches beyond the canvas at rest; the shift is bounded by it [px]"""
    step_us: int = 5000
    """longest time in which brightness is taken to change linearly [µs]"""
    outside: Literal["reflection", "border", "zeros"] = "reflection"
    """what lies beyond a picture: itself mirrored, its last pixel, or black"""
    crop: Pair = (0.35, 1.0)
    """training: share of the picture's largest box that fills the canvas; above 1 the picture is smaller than it"""
    crop_aspect: float = 1.2
    """training: largest change of the box's aspect ratio"""
    flip: float = 0.5
    """training: odds of mirroring left and right"""
    grey: bool = False
    """pair the events with the picture's luminance: events carry no colour"""
    target: Literal["window", "rest"] = "window"
    """the paired image: as seen at the middle of the kept windows' time, or with the camera at rest"""
    sensor: SensorModel = NATURAL_SENSOR
    """the camera's pixels"""
    vary: dict[str, float] = field(
        default_factory=lambda: {"threshold": 1.4, "off_ratio": 1.2, "cutoff_hz": 2.0, "shot_noise_hz": 5.0}
    )
    """training: sensor parameter -> factor; each recording's is its value times or divided by up to this"""

    def __post_init__(self) -> None:
        for name in ("speed", "turn_hz", "crop"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"data.images.{name}={[low, high]} must ascend, above 0")
        for name in ("rotation", "zoom"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.images.{name}={getattr(self, name)} is negative")
        for name in ("margin", "step_us", "buffer", "held_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.images.{name}={getattr(self, name)} must be at least 1")
        if not self.crop_aspect >= 1 or not 0 <= self.flip <= 1:
            raise ValueError(
                f"data.images: crop_aspect={self.crop_aspect} must be at least 1, flip={self.flip} in [0, 1]"
            )
        for name, factor in self.vary.items():
            if name not in VARIABLE:
                raise ValueError(f"data.images.vary.{name}: no such parameter; choose from {', '.join(VARIABLE)}")
            if not factor >= 1:
                raise ValueError(f"data.images.vary.{name}={factor} must be at least 1, which leaves it as it is")


class StillImages:
    """Samples of an image data set: a still in motion, which `StillBatch` turns into events, and the image it shows.

    A sample holds `still` uint8 (3, H0, W0), `homography` float32 (G, S, 3, 3), `path_us` (S,), `bounds_us` (W, 2),
    `seed` (G,), `sensor` and `canvas` (H, W), beside the `t_us`, `label` and `image` of every sample. Windows kept by
    `data.pick` are G recordings by themselves, from each window's begin on: only they are simulated, and a pixel begins
    with a random part of its threshold used up (`initial_spread`) as after a long history.

    Args:
        listing: of pictures; any listing with images will do.
        config: canvas, windows and `images`; warns of settings that have no effect on pictures.
        paired: whether samples hold the `image`.
    Raises:
        ValueError: windows that have no length of their own, or `data.clip`.
    """

    def __init__(self, listing: Listing, config: DataConfig, *, paired: bool = True):
        if not config.window_us or config.num_events:
            raise ValueError(
                f"data.window_us={config.window_us} data.num_events={config.num_events}: pictures have no recording to "
                "divide; give windows a length, data.window_us, and leave data.num_events at 0"
            )
        if config.clip:
            raise ValueError("data.clip=true needs a video set; name=images holds single pictures: unset it")
        default = type(config)()
        pairs = [(f"data.{name}", getattr(config, name), getattr(default, name)) for name in _IDLE]
        pairs += [
            (f"data.augment.{name}", value, getattr(default.augment, name))
            for name, value in vars(config.augment).items()
        ]
        idle = [f"{name}={value}" for name, value, usual in pairs if value != usual]
        if idle:
            warnings.warn(
                f"{', '.join(idle)} has no effect on name=images: every sample is decoded and filmed anew, as "
                "data.images says",
                stacklevel=2,
            )
        self.listing, self.config, self.images, self.paired = listing, config, config.images, paired

    @classmethod
    def split(cls, config: DataConfig, *, paired: bool = True) -> tuple[StillImages | StillStream, StillImages]:
        """(training, evaluation) sets of a config.

        Raises:
            FileNotFoundError, ValueError: see `list_images`; or splits of different classes, or an empty one.
        """
        if config.images.streaming:
            from gep.data.image_stream import StillStream

            return StillStream.split(config, paired=paired)
        train, path = _listed(config, config.train_split), config.images.path
        train, held = (
            (train, _listed(config, config.eval_split)) if config.eval_split else train.hold_out(config.holdout)
        )
        if train.classes != held.classes:
            raise ValueError(
                f"data.images.path={path}: {train.split} and {held.split} do not hold the same classes "
                f"({len(train.classes)} and {len(held.classes)}); complete the splits"
            )
        for name, part in (("training", train), ("evaluation", held)):
            if len(part) == 0:
                raise ValueError(f"data.images.path={path}: the {name} set is empty; set data.holdout higher")
        source = cls(train, config, paired=paired)
        return source, source._over(held)

    @classmethod
    def whole(cls, config: DataConfig, *, paired: bool = True) -> StillImages:
        """The whole training split, of which nothing is held back: for a set that is not evaluated on.

        Raises:
            FileNotFoundError, ValueError: see `list_images`; or a stream.
        """
        if config.images.streaming:
            raise ValueError(
                "data.images.streaming=true: a stream cannot be mixed, as its rows have no numbers; read it without "
                "streaming, or pack it into shards"
            )
        return cls(_listed(config, config.train_split), config, paired=paired)

    def subset(self, indices: Sequence[int] | np.ndarray, split: str) -> StillImages:
        """Some of the samples, in that order, under the name `split`."""
        return self._over(self.listing.subset(indices, split))

    def _over(self, listing: Listing) -> StillImages:
        other = copy.copy(self)
        other.listing = listing
        return other

    def __len__(self) -> int:
        return len(self.listing)

    def describe(self) -> str:
        """One line for people."""
        return self.listing.describe()

    def sample(self, index: int, rng: np.random.Generator | None) -> Sample:
        """Sample `index`; `rng=None` gives its fixed version: centre, all windows, the sensor as it is.

        Raises:
            BadSample: the picture cannot be read.
        """
        key = self.listing.keys[index]
        assert self.listing.image is not None
        try:
            data, _ = self.listing.image.encoded(index)
            picture = decode(data, key)
        except (ValueError, OSError) as error:
            raise BadSample(key, str(error)) from error
        label = int(self.listing.labels[index])
        return film(picture, self.config, key=key, label=label, number=index, rng=rng, paired=self.paired)


def _listed(config: DataConfig, split: str) -> Listing:
    images, size = config.images, (config.height, config.width)
    return list_images(images.path, split, size, image_column=images.image_column, label_column=images.label_column)


def film(
    picture: np.ndarray,
    config: DataConfig,
    *,
    key: str,
    label: int,
    number: int,
    rng: np.random.Generator | None,
    paired: bool = True,
) -> Sample:
    """The sample that `StillImages` describes, of a decoded picture uint8 (h, w, 3).

    Args:
        number: seeds the fixed version where there is no rng.
        paired: whether it holds the `image`.
    """
    images, canvas = config.images, (config.height, config.width)
    if images.grey:
        grey = np.asarray(Image.fromarray(picture).convert("L"))
        picture = np.repeat(grey[..., None], 3, axis=2)
    draw = np.random.default_rng([_STREAM, number]) if rng is None else rng
    box, flip = centre(picture.shape, canvas), False
    if rng is not None:
        box, flip = crop(box, images.crop, images.crop_aspect, rng), bool(rng.random() < images.flip)
    still = lay_out(picture, box, canvas, images.margin, images.outside)
    still = np.ascontiguousarray(still[..., ::-1]) if flip else still
    motion = Wander.draw(
        draw,
        speed_px_s=images.speed,
        turn_hz=images.turn_hz,
        rotation_rad_s=images.rotation,
        zoom_s=images.zoom,
        max_shift_px=images.margin,
    )
    all_bounds = config.window_us * np.stack([np.arange(config.windows), np.arange(1, config.windows + 1)], axis=1)
    if rng is not None and 0 < config.pick < config.windows:
        t_us = all_bounds[np.sort(rng.choice(config.windows, config.pick, replace=False))]
        starts, span, bounds = t_us[:, 0], config.window_us, all_bounds[:1]
    else:
        t_us, bounds = all_bounds, all_bounds
        starts, span = t_us[:1, 0], config.window_us * config.windows
    steps = len(bounds) * math.ceil(config.window_us / images.step_us)
    path_us = np.arange(steps + 1, dtype=np.int64) * span // steps
    sizes = {"image_size": still.shape[1:], "sensor_size": canvas}
    middle = (t_us[0, 0] + t_us[-1, 1]) / 2
    sample = {
        "key": key,
        "still": still,
        "homography": motion.homography(starts[:, None] + path_us, **sizes),
        "path_us": path_us,
        "bounds_us": bounds,
        "seed": draw.integers(2**62, size=len(starts)),
        "sensor": images.sensor if rng is None else vary(images.sensor, images.vary, rng),
        # The mirrored margin is part of the still; beyond it, where only a turned corner looks, this is quicker.
        "outside": _beyond(images.outside),
        "canvas": canvas,
        "t_us": t_us,
        "label": label,
    }
    if paired:
        seen = motion.homography(middle, **sizes) if images.target == "window" else _rest(still.shape[1:], canvas)
        sample["image"] = _seen(still, seen, canvas, _beyond(images.outside))
    return sample


def collate_stills(samples: Sequence[Sample]) -> StillBatch:
    """Samples of `StillImages` -> their `StillBatch`.

    Raises:
        ValueError: samples of different lengths in time, or canvases.
    """
    first = samples[0]
    for name in ("path_us", "bounds_us", "canvas"):
        if any(not np.array_equal(sample[name], first[name]) for sample in samples):
            raise ValueError(
                f"samples {first['key']} … of one batch differ in {name}: canvas and windows must be alike"
            )
    sensors = tuple(sample["sensor"] for sample in samples for _ in sample["seed"])
    height, width = first["canvas"]
    return StillBatch(
        images=torch.from_numpy(np.stack([sample["still"] for sample in samples])),
        homography=torch.from_numpy(np.concatenate([sample["homography"] for sample in samples])),
        t_us=torch.from_numpy(first["path_us"]),
        bounds=torch.from_numpy(first["bounds_us"]),
        seeds=torch.from_numpy(np.concatenate([sample["seed"] for sample in samples])),
        sensors=sensors[:1] if len(set(sensors)) == 1 else sensors,
        height=height,
        width=width,
        outside=first["outside"],
    )


def vary(sensor: SensorModel, factors: Mapping[str, float], rng: np.random.Generator) -> SensorModel:
    """The sensor with each named parameter times exp(u ln f), u uniform in [-1, 1]; fractions stay at most 1."""
    drawn = {name: getattr(sensor, name) * factor ** rng.uniform(-1, 1) for name, factor in factors.items()}
    limits = {name: 1.0 for name in ("initial_spread", "shot_noise_on", "shot_noise_bright")}
    return dataclasses.replace(sensor, **{name: min(value, limits.get(name, value)) for name, value in drawn.items()})


# ---- what the camera sees ------------------------------------------------------------------------------


def _beyond(outside: str) -> Outside:
    return "zeros" if outside == "zeros" else "border"


def _rest(still: Sequence[int], canvas: tuple[int, int]) -> np.ndarray:
    matrix = np.eye(3, dtype=np.float32)
    matrix[0, 2], matrix[1, 2] = (still[1] - canvas[1]) / 2, (still[0] - canvas[0]) / 2
    return matrix


def _seen(still: np.ndarray, homography: np.ndarray, canvas: tuple[int, int], outside: Outside) -> np.ndarray:
    matrices = torch.from_numpy(homography).expand(len(still), 3, 3)
    view: Any = render(torch.from_numpy(still).float(), matrices, height=canvas[0], width=canvas[1], outside=outside)
    return view.round().clamp_(0, 255).byte().numpy()
