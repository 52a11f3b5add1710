"""A plain recording brought into the view that a model was trained on: rectified, and cut to the labelled rows."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gep.data.dsec import RectifyMaps
from gep.data.mvsec import TextMaps
from gep.data.paired import rectified
from gep.events.io import EventSource
from gep.events.types import Events

_BESIDE = "rectify_map.h5"  # as DSEC has it beside each events.h5


@dataclass(frozen=True, eq=False)
class RecordingView:
    """What is done to the events of a recording before they are windows of the model; nothing by default."""

    table: np.ndarray | None = None
    """float32 (H, W, 2), at [y, x] the rectified (x, y) of a raw pixel."""
    rows: int = 0
    """Events of so many rows from the top alone; 0 = all."""

    def __call__(self, events: Events) -> Events:
        """The events in that view."""
        if self.table is not None:
            events = rectified(events, self.table)
        if self.rows:
            kept = events.y < self.rows
            columns = {name: getattr(events, name)[kept] for name in "txyp"}
            events = Events(**columns, height=events.height, width=events.width)
        return events


def view_of(
    settings: Mapping[str, Any], source: EventSource, *, rectify_map: str | Path | None = None, raw: bool = False
) -> RecordingView:
    """How a recording is seen as the model's training data were.

    Args:
        settings: `DenseModel.input_settings`.
        source: the open recording.
        rectify_map: a file of rectified coordinates: DSEC's `rectify_map.h5`, or MVSEC's `…_x_map.txt`, with the
            `…_y_map.txt` beside it; None = `rectify_map.h5` beside the recording, where there is one.
        raw: leave events as they are, as is right for a camera without distortion.
    Raises:
        FileNotFoundError, ValueError: no such file; none for a model that was trained on rectified events; one for a
            model that was not; a map of another sensor.
    """
    moved = settings.get("rectified", False)
    if rectify_map is not None and (raw or not moved):
        cause = "raw=True (--raw) asks for raw events" if raw else "the model was trained on events as they are"
        raise ValueError(f"rectify map {rectify_map}: {cause}; leave it out")
    table = None
    if moved and not raw:
        beside = source.path.parent / _BESIDE
        if rectify_map is None and not beside.is_file():
            raise ValueError(
                f"{source.path}: the model was trained on rectified events, and {beside} is missing; name the camera's "
                "map (--rectify-map FILE), or go on with events as they are (--raw), as is right without distortion"
            )
        table = _read(beside if rectify_map is None else Path(rectify_map))
        if table.shape[:2] != (source.height, source.width):
            raise ValueError(
                f"{rectify_map or beside}: a map of {table.shape[0]}x{table.shape[1]} pixels does not belong to the "
                f"{source.height}x{source.width} sensor of {source.path}; name another map (--rectify-map FILE)"
            )
    rows = settings.get("top_rows", 0)
    sensor = settings.get("sensor")
    if rows and sensor and list(sensor) != [source.height, source.width]:
        height, width = sensor
        warnings.warn(
            f"{source.path}: the model was trained on the top {rows} rows of a {height}x{width} sensor; this one has "
            f"{source.height}x{source.width} pixels, and keeps all of them",
            stacklevel=2,
        )
        rows = 0
    return RecordingView(table, rows)


def _read(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"rectify map {path}: no such file")
    if path.suffix == ".txt":
        other = path.with_name(path.name.replace("_x_map", "_y_map"))
        if other == path or not other.is_file():
            raise FileNotFoundError(f"rectify map {path}: name the …_x_map.txt, with its …_y_map.txt beside it")
        return TextMaps(((path, other),))(0)
    return RectifyMaps((path,))(0)
