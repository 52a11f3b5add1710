"""A recording of any length predicted step by step: no more is kept of it than the next prediction needs."""

from __future__ import annotations

import bisect
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from downstream.dense.features import DenseFeatures, FeatureMaps, pad_to_multiple
from downstream.dense.model import DenseModel
from downstream.depth.scale import DepthScale
from downstream.depth.task import normalised
from gep.data.layout import IGNORE
from gep.events import augment
from gep.events.io import EventSource
from gep.events.slicing import into_windows
from gep.events.transform import centred
from gep.events.types import EventBatch, Events

Size = tuple[int, int]


class Prediction(NamedTuple):
    """What a model says at one time."""

    t_us: int
    """End of the last window, as the recording counts time [µs]."""
    events: Events
    """Of the last window, in the sensor's view."""
    output: Tensor
    """(1, out, H, W) float32 raw outputs on the model's canvas."""
    values: np.ndarray
    """(h, w) in the sensor's view: uint8 class ids, 255 beyond the canvas, or float32 metres, NaN beyond it."""


class Memory:
    """The last T windows, as far as a model needs them again: as tokens before a backbone, else as frames.

    Args:
        model: in evaluation mode.
        sensor: (height, width) of the recording.
    """

    def __init__(self, model: DenseModel, sensor: Size):
        self.model, self.kept = model, dict[tuple[int, int], Tensor]()
        settings = model.input_settings
        self._fit = augment.fit(sensor, (settings["height"], settings["width"]), settings["fit"])
        self._device = next(model.parameters()).device

    @torch.no_grad()
    def output(self, bounds: np.ndarray, read: Callable[[int], Events]) -> tuple[Tensor, Events]:
        """Raw outputs at the end of the last window, as `DenseModel.forward` gives them of these windows alone.

        Args:
            bounds: (T, 2) int64 µs.
            read: number of a window -> its events in the sensor's view; not called for windows that are kept.
        Returns:
            (1, out, H, W) float32, and the last window's events.
        """
        features, newest = self.model.features, read(len(bounds) - 1)
        frame = self._frame(newest, bounds[-1])
        ends = torch.from_numpy(bounds[:, 1].copy())[None].to(self._device)
        if isinstance(features, DenseFeatures) and features.backbone is None:
            return self.model.predict_frames(frame, ends[:, -1:]), newest
        keys = [(int(begin), int(end)) for begin, end in bounds]
        before = [
            self.kept[key] if key in self.kept else self._earlier(read(number), bounds[number])
            for number, key in enumerate(keys[:-1])
        ]
        if isinstance(features, DenseFeatures):
            maps, own = _streamed(features, frame, before, ends)
        else:
            maps, own = features(torch.cat([*before, frame], dim=1), ends), frame
        self.kept = dict(zip(keys, [*before, own]))
        return self.model.from_levels(maps), newest

    def _frame(self, events: Events, bounds: np.ndarray) -> Tensor:
        """(1, 1, C, H, W) on the model's device."""
        batch = EventBatch.from_windows(*self._fit.apply_events([events], bounds[None])).to(self._device)
        return self.model.features.frames({"events": batch, "windows": 1})

    def _earlier(self, events: Events, bounds: np.ndarray) -> Tensor:
        frame, features = self._frame(events, bounds), self.model.features
        if not isinstance(features, DenseFeatures):
            return frame
        frame, _ = pad_to_multiple(frame, features.patch_size, features.encoder.background)
        return features.encoder(frame[:, -1])[0].float()[:, None]


def _streamed(features: DenseFeatures, frame: Tensor, before: list[Tensor], ends: Tensor) -> tuple[FeatureMaps, Tensor]:
    """`DenseFeatures.forward` with the tokens (1, 1, N, D) of earlier windows at hand; also gives the last one's."""
    assert features.backbone is not None
    frame, size = pad_to_multiple(frame, features.patch_size, features.encoder.background)
    padded = (frame.shape[-2], frame.shape[-1])
    grid = features.encoder.grid(*padded)
    levels = features.encoder.intermediates(frame[:, -1], features.num_levels)
    own = levels[-1].float()[:, None]
    tokens = torch.cat([*before, own], dim=1)
    tokens = F.layer_norm(tokens, tokens.shape[-1:])
    modality = torch.zeros(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
    output, states = features.backbone.intermediates(tokens, modality, ends, grid, features.depths)
    seen = [state[:, -1].float() for state in states]
    seen[-1] = torch.cat([seen[-1], output.image[:, -1].float()], dim=-1)
    levels = features.join(levels, seen)
    return FeatureMaps([level.mT.unflatten(-1, grid) for level in levels], size, padded), own


def _read(source: EventSource, view: Callable[[Events], Events], bounds: np.ndarray, number: int) -> Events:
    return view(source.by_time(*bounds[number].tolist()))


def predictions(
    model: DenseModel, source: EventSource, ends: range, view: Callable[[Events], Events] = lambda events: events
) -> Iterator[Prediction]:
    """Predictions of a recording at the given times, read window by window.

    Args:
        model: in evaluation mode.
        source: the open recording.
        ends: µs, as `ends_of` gives them.
        view: what is done to the events of a window, see `downstream.dense.view`.
    """
    sensor, settings = (source.height, source.width), model.input_settings
    memory, num = Memory(model, sensor), settings["windows"]
    length, stop = settings["window_us"] * num or ends.step, 0
    read: Callable[[int], Events]
    for end in ends:
        if settings["num_events"]:
            # By index, so that as many are read as are needed, however dense the recording is.
            stop = _index(source, end, stop)
            cut = into_windows(source.by_index(max(0, stop - settings["num_events"]), stop), num)
            bounds, read = cut.bounds, [view(window) for window in cut.events].__getitem__
            memory.kept.clear()  # windows of the same bounds may hold other events
        else:
            edges = np.array([end - length + k * length // num for k in range(num + 1)], np.int64)
            bounds = np.stack([edges[:-1], edges[1:]], axis=1)
            read = partial(_read, source, view, bounds)

        output, newest = memory.output(bounds, read)
        yield Prediction(end, newest, output, values_of(model, output, sensor))


def ends_of(
    source: EventSource,
    settings: Mapping[str, Any],
    *,
    start_us: int = 0,
    stop_us: int | None = None,
    step_us: int = 0,
) -> range:
    """When to predict: every step, from the first on at which all windows lie in the recording.

    Args:
        source: the open recording.
        settings: `DenseModel.input_settings`.
        start_us, stop_us: the part to predict, counted from the first event; windows may reach to before it.
        step_us: from one prediction to the next; 0 = the length of a window, or 50 ms where it has none.
    Returns:
        µs as the file counts time; at least one. A recording (or part) that is too short is predicted once, at its
        end, with a warning.
    Raises:
        ValueError: no events, an empty part, or no step for a model whose windows are parts of it.
    """
    begin, last = source.span
    if last <= begin:
        raise ValueError(f"{source.path}: holds no events to predict from")
    if start_us < 0 or step_us < 0:
        raise ValueError(f"start {start_us} µs and step {step_us} µs must not be negative")
    num, window_us, num_events = (settings[name] for name in ("windows", "window_us", "num_events"))
    if not (step_us or window_us or num_events):
        raise ValueError(
            "this model's windows are parts of the time between two labels (window_us = 0): give the step (--step-ms)"
        )
    step_us = step_us or window_us or 50_000
    start, stop = begin + start_us, last if stop_us is None else min(last, begin + stop_us)
    if stop <= start:
        raise ValueError(
            f"{source.path}: nothing to predict between {start_us} and {stop_us or last - begin} µs of a recording "
            f"that lasts {last - begin} µs"
        )
    if num_events:
        enough = int(source.by_index(num_events - 1, num_events).t[0]) + 1 if len(source) >= num_events else last
    else:
        enough = begin + (num * window_us or step_us)
    first = start + step_us * max(1, -(-(enough - start) // step_us))
    if first > stop:
        if enough > stop:
            what = f"{num_events} events" if num_events else f"{num} windows of {window_us or step_us // num} µs"
            warnings.warn(f"{source.path}: ends before {what}; the earliest windows are empty", stacklevel=2)
        first = stop
    return range(first, stop + 1, step_us)


def _index(source: EventSource, t_us: int, low: int) -> int:
    """Number of events before a time, at least `low`."""
    return bisect.bisect_left(
        range(len(source)), t_us, lo=low, key=lambda index: int(source.by_index(index, index + 1).t[0])
    )


def depth_scale(model: DenseModel) -> DepthScale:
    """The scale that a depth model was trained with."""
    return DepthScale(float(model.task["max_depth_m"]), float(model.task["alpha"]))


def values_of(model: DenseModel, output: Tensor, sensor: Size) -> np.ndarray:
    """What raw outputs mean, in the sensor's view.

    Args:
        model: says which kind of outputs they are.
        output: (1, out, H, W) on the canvas.
        sensor: (h, w).
    Returns:
        (h, w) uint8 class ids, 255 beyond the canvas, or float32 metres, NaN beyond it.
    """
    maps = on_sensor(output[0].float(), sensor, model.input_settings["fit"])
    if model.kind == "depth":
        return depth_scale(model).to_metres(normalised(maps[None])[0]).cpu().numpy()
    return maps.argmax(dim=0).masked_fill(maps[0].isnan(), IGNORE).to(torch.uint8).cpu().numpy()


def on_sensor(maps: Tensor, sensor: Size, fit: str) -> Tensor:
    """Maps on the canvas brought back to the view that was fitted to it; the inverse of `gep.events.augment.fit`.

    Args:
        maps: (C, H, W) float.
        sensor: (h, w).
        fit: "pad" or "resize".
    Returns:
        (C, h, w), NaN where the canvas did not reach.
    """
    canvas = (maps.shape[-2], maps.shape[-1])
    if fit == "resize":
        return F.interpolate(maps[None], sensor, mode="bilinear", align_corners=False, antialias=True)[0]
    top, left = centred(sensor, canvas)[:2]
    out = maps.new_full((len(maps), *sensor), float("nan"))
    rows = slice(max(top, 0), min(top + canvas[0], sensor[0]))
    columns = slice(max(left, 0), min(left + canvas[1], sensor[1]))
    out[:, rows, columns] = maps[:, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return out
