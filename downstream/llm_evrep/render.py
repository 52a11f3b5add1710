"""A recording through a generator: the events of each window and the image that a reader would be shown."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from downstream.dense.streaming import on_sensor
from downstream.dense.view import RecordingView, view_of
from downstream.llm_evrep.model import EvRep
from gep.events import augment
from gep.events.io import EventSource
from gep.events.render import check_film, magnified, pictures, write_film
from gep.events.slicing import Windows, into_windows
from gep.events.types import EventBatch, Events


class Read(NamedTuple):
    """What a model is given for one image."""

    events: Events
    """In the sensor's view."""
    windows: Windows
    """The same, cut into the model's T windows."""


_GAP = 4  # px
_SMALLEST = 160  # px: a 34-pixel sensor would be a dot on a screen
_BEYOND = 222 / 255  # grey of what the model's canvas did not reach


def draw_strip(
    model: EvRep,
    source: EventSource,
    *,
    windows: int | None = None,
    rectify_map: str | Path | None = None,
    raw: bool = False,
) -> Image.Image:
    """Equal parts of a recording from left to right: above the events that the model reads, below its image.

    At the end of each part a model of windows with a length reads its last windows, one of a number of events so many,
    and one of parts the part itself.

    Args:
        model: in evaluation mode, on the device to use.
        source: the open recording.
        windows: parts; None = six, or the whole recording for a model of parts.
        rectify_map, raw: see `downstream.dense.view.view_of`.
    Returns:
        RGB picture in the sensor's view; small sensors are magnified by a whole number.
    Raises:
        FileNotFoundError, ValueError: see `view_of`; a recording without events, or no window to draw.
    """
    view, (begin, stop) = view_of(model.input_settings, source, rectify_map=rectify_map, raw=raw), _span(source)
    count = windows if windows is not None else 1 if _in_parts(model.input_settings) else 6
    if count < 1:
        raise ValueError(f"windows={count}: at least one is drawn")
    edges = [begin + k * (stop - begin) // count for k in range(count + 1)]
    zoom = _zoom(source)
    columns = []
    for start, end in itertools.pairwise(edges):
        panels = _panels(model, source, _read(model.input_settings, source, start, max(end, start + 1), view))
        columns.append(_joined([magnified(panel, zoom) for panel in panels], axis=0))
    return Image.fromarray(_joined(columns, axis=1))


def draw_film(
    model: EvRep,
    source: EventSource,
    out: str | Path,
    *,
    fps: float = 30.0,
    slowdown: float = 1.0,
    window_us: int = 0,
    rectify_map: str | Path | None = None,
    raw: bool = False,
    progress: bool = True,
) -> int:
    """A recording as a film: on the left the events that the model reads, on the right its image.

    Args:
        model, rectify_map, raw: as `draw_strip`.
        source: the open recording, read window by window.
        out: .mp4 or .gif; replaced only once the film is complete.
        fps, slowdown: as `gep.events.render.video`.
        window_us: for a model of parts, how long a part of the recording is one image; others say it themselves.
        progress: whether to show a bar.
    Returns:
        Number of frames.
    Raises:
        FileNotFoundError, ValueError: see `draw_strip` and `check_film`; or a window_us that is missing or not used.
    """
    out, settings = Path(out), model.input_settings
    check_film(out, fps=fps)
    if not 0 < slowdown < 1e9:
        raise ValueError(f"slowdown={slowdown} must be positive")
    if _in_parts(settings) and window_us <= 0:
        raise ValueError(
            "this model's windows are parts of a recording, of no length of their own: say how much of it makes an "
            "image (--window-ms)"
        )
    if window_us and not _in_parts(settings):
        raise ValueError(f"window_us={window_us} (--window-ms) has no effect: the model says what it reads; leave it")
    view, (begin, stop) = view_of(settings, source, rectify_map=rectify_map, raw=raw), _span(source)
    gif = out.suffix.lower() == ".gif"
    fps = 100 / max(2, round(100 / fps)) if gif else fps  # a GIF counts in hundredths of a second
    step, zoom = 1e6 / (fps * slowdown), _zoom(source)
    count = max(1, int(np.ceil((stop - begin) / step - 1e-9)))
    pixels = source.height * zoom * (2 * source.width * zoom + _GAP)
    check_film(out, fps=fps, frames=count, pixels=pixels)

    def frames() -> Iterator[np.ndarray]:
        for number in tqdm(range(count), desc=out.name, unit="frame", disable=not progress, leave=False):
            end = begin + max(1, round((number + 1) * step))
            panels = _panels(model, source, _read(settings, source, end - window_us, end, view))
            page = _joined([magnified(panel, zoom) for panel in panels], axis=1)
            # Few colours: those of a GIF are searched for one by one.
            yield (page // 17 * 17 if gif else page)

    write_film(out, frames(), fps, palette=_palette() if gif else None)
    return count


def _in_parts(settings: Mapping[str, Any]) -> bool:
    return not (settings["window_us"] or settings["num_events"])


def _span(source: EventSource) -> tuple[int, int]:
    begin, stop = source.span
    if stop <= begin:
        raise ValueError(f"{source.path}: holds no events to draw")
    return begin, stop


def _read(settings: Mapping[str, Any], source: EventSource, start: int, end: int, view: RecordingView) -> Read:
    """What a model reads at `end` [µs] of a recording, of which a part begins at `start`."""
    num, length = settings["windows"], settings["window_us"]
    if settings["num_events"]:
        last = source.before(end)
        events = view(source.by_index(max(0, last - settings["num_events"]), last))
        return Read(events, into_windows(events, num))
    start = end - num * length if length else start
    events = view(source.by_time(start, end))
    return Read(events, into_windows(events, num, t0=start, t1=end))


@torch.no_grad()
def _panels(model: EvRep, source: EventSource, read: Read) -> tuple[np.ndarray, np.ndarray]:
    """The events and their image: uint8 (h, w, 3) each, in the sensor's view."""
    settings, sensor = model.input_settings, (source.height, source.width)
    fit = augment.fit(sensor, (settings["height"], settings["width"]), settings["fit"])
    batch = EventBatch.from_windows(*fit.apply_events(*read.windows))
    image = model({"events": batch.to(model.device), "windows": len(read.windows.events)})[0]
    bounds = read.windows.bounds
    drawn = EventBatch.from_windows([read.events], np.array([[bounds[0, 0], bounds[-1, 1]]]))
    return pictures(drawn)[0], _picture(on_sensor(image, sensor, settings["fit"]))


def _picture(image: Tensor) -> np.ndarray:
    """(3, h, w) in [0, 1], NaN beyond the canvas, to uint8 (h, w, 3)."""
    return (255 * image.nan_to_num(_BEYOND)).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()


def _joined(panels: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """Pictures of one size in a row (axis 1) or a column (axis 0), with white between them."""
    shape = list(panels[0].shape)
    shape[axis] = _GAP
    gap = np.full(shape, 255, np.uint8)
    return np.concatenate([piece for panel in panels for piece in (panel, gap)][:-1], axis=axis)


def _zoom(source: EventSource) -> int:
    return max(1, -(-_SMALLEST // max(source.height, source.width)))


def _palette() -> np.ndarray:
    """uint8 (244, 3): six levels of each channel, and finer steps of grey and of the events' red and blue."""
    levels = np.arange(0, 256, 51)
    cube = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    fine = np.setdiff1d(np.arange(0, 256, 17), levels)
    full = np.full_like(fine, 255)
    ramps = [np.stack(ramp, axis=-1) for ramp in ((fine, fine, fine), (full, fine, fine), (fine, fine, full))]
    return np.concatenate([cube, *ramps]).astype(np.uint8)
