"""What a dense model makes of a recording or of a labelled data set, as a film, pictures and raw maps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from downstream.dense.model import DenseModel
from downstream.dense.output import MapWriter, is_film, map_writer, replacing_folder
from downstream.dense.pictures import ClassLegend, DepthLegend, Legend, Sheet
from downstream.dense.settings import data_of
from downstream.dense.streaming import Memory, depth_scale, ends_of, predictions, values_of
from downstream.dense.view import view_of
from downstream.depth.metrics import depth_rows, depth_summary
from downstream.depth.task import normalised
from downstream.metrics import confusion, segmentation_metrics
from downstream.segmentation.palette import palette
from gep.data.config import DataConfig
from gep.data.layout import IGNORE
from gep.data.listing import Listing
from gep.data.paired import Recordings
from gep.events import augment
from gep.events.io import EventSource
from gep.events.render import check_film, pictures, write_film
from gep.events.types import EventBatch, Events


class Frame(NamedTuple):
    """What is written for one prediction."""

    panels: tuple[np.ndarray, ...]
    """uint8 (h, w, 3) each."""
    left: str
    right: str
    values: np.ndarray
    """(h, w) class ids or metres."""
    t_us: int


def predict_recording(
    model: DenseModel,
    source: EventSource,
    out: str | Path,
    *,
    start_us: int = 0,
    stop_us: int | None = None,
    step_us: int = 0,
    rectify_map: str | Path | None = None,
    raw: bool = False,
    fps: float = 0.0,
    npz: bool = False,
    progress: bool = True,
) -> int:
    """Predicts a recording of any length step by step; memory does not grow with it (but for a GIF's frames).

    A model with `num_events` reads the last so many events before each time, however long they took. In training and
    evaluation it reads the last so many of a sample's own span, and all of those where the span holds fewer.

    Args:
        model: in evaluation mode, on the device to use.
        source: the open recording.
        out: .mp4 or .gif, or a folder of PNGs; whole or not there at all.
        start_us, stop_us, step_us: see `ends_of`.
        rectify_map, raw: see `downstream.dense.view.view_of`.
        fps: frames a second of a film; 0 = as fast as life, at most 30.
        npz: also write the maps, as `predictions.npz` in the folder or beside the film under its name.
        progress: whether to show a bar.
    Returns:
        Number of predictions.
    Raises:
        FileNotFoundError, ValueError: see `view_of`, `ends_of` and `gep.events.render.check_film`.
        FileExistsError: the folder holds other files.
    """
    view = view_of(model.input_settings, source, rectify_map=rectify_map, raw=raw)
    ends = ends_of(source, model.input_settings, start_us=start_us, stop_us=stop_us, step_us=step_us)
    begin = source.span[0]
    sheet = Sheet((source.height, source.width), ("events", model.kind), legend_of(model))

    def frames() -> Iterator[Frame]:
        for found in predictions(model, source, ends, view):
            panels = (_drawn(found.events), sheet.legend.picture(found.values))
            yield Frame(panels, f"t = {(found.t_us - begin) / 1e6:.3f} s", "", found.values, found.t_us)

    fps = fps or min(30.0, 1e6 / ends.step)
    _write(Path(out), frames(), sheet, model, len(ends), fps=fps, npz=npz, bar=progress)
    return len(ends)


def predict_data(
    model: DenseModel,
    listing: Listing,
    out: str | Path,
    *,
    data: DataConfig | None = None,
    fps: float = 0.0,
    npz: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Predicts every sample of a labelled data set in its order, with the truth beside it.

    Windows, canvas and cut-off are those of the model's evaluation, and the numbers are those in the results of its
    run. They are computed in float32, a sample at a time: to about 1e-5 of what a run with train.precision=no found,
    and as far from that of one in bf16 or fp16 as these round. There is no test-time augmentation here.

    Args:
        model, out, npz, progress: as `predict_recording`.
        listing: samples with masks or depth.
        data: what it was listed with, of `data_of`; None = as the model was trained.
        fps: frames a second of a film; 0 = 10.
    Returns:
        {"samples"} and the numbers of the whole split: mIoU and accuracy [%], or AbsRel, RMSE [m] and δ1.
    Raises:
        ValueError: a data set without this kind of truth, of other classes, or with sensors that differ.
        FileExistsError: the folder holds other files.
    """
    target = "mask" if model.kind == "segmentation" else "depth"
    if target not in listing.targets:
        raise ValueError(f"{listing.name} {listing.split} has no {target}; a {model.kind} model is compared with it")
    classes = tuple(model.task.get("classes", ()))
    if target == "mask" and tuple(listing.classes) != classes:
        raise ValueError(
            f"the model knows the classes {', '.join(classes)}; {listing.name} has {', '.join(listing.classes)}"
        )
    settings, sensor = model.input_settings, _sensor(listing, 0)
    given = data or data_of(model)
    # The sensor's own view first, for the pictures; what the model sees is fitted from it as in training.
    view = dataclasses.replace(given, height=sensor[0], width=sensor[1], fit="pad")
    samples = Recordings(listing, view, paired=False, targets=True)
    fit = augment.fit(sensor, (settings["height"], settings["width"]), settings["fit"])
    sheet = Sheet(sensor, ("events", model.kind, "ground truth"), legend_of(model))
    scores = Scores(model)

    def frames() -> Iterator[Frame]:
        for index in range(len(samples)):
            if _sensor(samples.listing, index) != sensor:
                raise ValueError(f"{samples.listing.keys[index]}: its sensor is not {sensor[0]}x{sensor[1]} as before")
            sample = samples.sample(index, None)
            bounds, windows = sample["t_us"], sample["events"]
            # Nothing is kept from one sample to the next: they may be of different recordings.
            output, newest = Memory(model, sensor).output(bounds, windows.__getitem__)
            apply = fit.apply_mask if target == "mask" else fit.apply_depth
            text = scores.add(output, apply(sample[target]), fit.apply_events([newest], bounds[-1:])[0][0])
            values = values_of(model, output, sensor)
            panels = (_drawn(newest), sheet.legend.picture(values), sheet.legend.picture(sample[target]))
            yield Frame(panels, sample["key"], text, values, int(bounds[-1, 1]))

    keys = {"key": np.array(samples.listing.keys)}
    _write(Path(out), frames(), sheet, model, len(samples), fps=fps or 10.0, npz=npz, bar=progress, extra=keys)
    return {"samples": len(samples), **scores.total()}


class Scores:
    """The numbers of samples, one by one and together, on the model's canvas as in its evaluation."""

    def __init__(self, model: DenseModel):
        self.model, self.rows = model, list[dict[str, Tensor]]()
        self.cutoff_m, self.averaging = 0.0, model.task.get("averaging", "frame")
        if model.kind == "depth":
            # Of a model that does not say: beyond 80 m the papers have no columns.
            self.cutoff_m = float(model.task.get("cutoff_m", min(80.0, depth_scale(model).max_m)))

    def add(self, output: Tensor, truth: np.ndarray, events: Events) -> str:
        """Counts a sample.

        Args:
            output: (1, out, H, W).
            truth: (H, W) mask or depth.
            events: of the last window, on the canvas.
        Returns:
            Its numbers, for people.
        """
        output, target = output.cpu(), torch.from_numpy(truth)[None]
        if self.model.kind == "segmentation":
            matrix = confusion(output.argmax(dim=1), target.long(), output.shape[1], ignore=IGNORE)
            self.rows.append({"confusion": matrix})
            return _text(self.total(matrix)) if matrix.any() else "no labels"
        active = torch.zeros(target.shape, dtype=torch.bool)
        active[0, torch.from_numpy(events.y.astype(np.int64)), torch.from_numpy(events.x.astype(np.int64))] = True
        metres = depth_scale(self.model).to_metres(normalised(output))
        self.rows.append(depth_rows(metres, target, active, (self.cutoff_m,)))
        numbers = self.total(self.rows[-1])
        return "no depth" if math.isnan(numbers["abs_rel"]) else _text(numbers)

    def total(self, rows: Tensor | dict[str, Tensor] | None = None) -> dict[str, float]:
        """Of all samples, or of the given rows: mIoU and accuracy [%], or AbsRel, RMSE [m], δ1 and the cut-off [m]."""
        if self.model.kind == "segmentation":
            matrix = rows if isinstance(rows, Tensor) else torch.cat([row["confusion"] for row in self.rows])
            found = segmentation_metrics(matrix.sum(dim=0), self.model.task["classes"])
            return {name: found[name] for name in ("miou", "acc")}
        if not isinstance(rows, dict):
            rows = {name: torch.cat([row[name] for row in self.rows]) for name in self.rows[0]}
        groups = ["all"] * len(next(iter(rows.values())))
        table = depth_summary(rows, groups, averaging=self.averaging)
        numbers = table[f"cut-off {self.cutoff_m:g} m"]["all"]
        return {**{name: numbers[name] for name in ("abs_rel", "rmse", "delta1")}, "cutoff_m": self.cutoff_m}


def _text(numbers: Mapping[str, float]) -> str:
    if "miou" in numbers:
        return f"mIoU {numbers['miou']:.1f} %, accuracy {numbers['acc']:.1f} %"
    return f"AbsRel {numbers['abs_rel']:.3f}, RMSE {numbers['rmse']:.2f} m (cut-off {numbers['cutoff_m']:g} m)"


def legend_of(model: DenseModel) -> Legend:
    """The colours of a model's classes (its own, else those of their names), or its range of metres."""
    if model.kind == "depth":
        scale = depth_scale(model)
        return DepthLegend(scale.min_m, scale.max_m)
    classes = model.task["classes"]
    return ClassLegend(classes, np.array(model.task.get("palette") or palette(classes), np.uint8))


def _sensor(listing: Listing, index: int) -> tuple[int, int]:
    if listing.sensor is not None:
        return listing.sensor
    source = listing.source(index)
    return source.height, source.width


def _drawn(events: Events) -> np.ndarray:
    bounds = np.array([[0, 1]]) if not len(events) else np.array([[events.t[0], events.t[-1] + 1]])
    return pictures(EventBatch.from_windows([events], bounds))[0]


def _write(
    out: Path,
    frames: Iterator[Frame],
    sheet: Sheet,
    model: DenseModel,
    count: int,
    *,
    fps: float,
    npz: bool,
    bar: bool,
    extra: Mapping[str, np.ndarray] | None = None,
) -> None:
    film = is_film(out)
    if film:
        check_film(out, fps=fps, frames=count, pixels=sheet.shape[0] * sheet.shape[1])
    model.eval()
    extra = dict(extra or {})
    if model.kind == "segmentation":
        extra["classes"] = np.array(model.task["classes"])

    def pages(maps: MapWriter | None) -> Iterator[np.ndarray]:
        for frame in tqdm(frames, total=count, desc=out.name, unit="frame", disable=None if bar else True, leave=False):
            if maps is not None:
                maps.add(frame.values, frame.t_us)
            yield sheet.draw(frame.panels, frame.left, frame.right)

    def archive(path: Path) -> AbstractContextManager[MapWriter | None]:
        return map_writer(path, count, extra) if npz else nullcontext()

    if film:
        with archive(out.with_suffix(".npz")) as maps:
            write_film(out, pages(maps), fps, palette=sheet.palette)
    else:
        with replacing_folder(out) as folder, archive(folder / "predictions.npz") as maps:
            for number, page in enumerate(pages(maps)):
                Image.fromarray(page).save(folder / f"{number:06d}.png")
