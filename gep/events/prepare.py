"""How a raw recording becomes the windows that a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from gep.events import augment
from gep.events.slicing import Windows, by_bounds, cut_windows
from gep.events.types import EventBatch, Events

INPUT_KEYS = ("height", "width", "fit", "windows", "window_us", "num_events")
"""What `input_settings` holds, by the names that the data config uses."""


class InputSettings(Protocol):
    """How a recording becomes frames; the data config of the stages has these fields."""

    @property
    def height(self) -> int:
        """Rows of the encoder's input [px]."""

    @property
    def width(self) -> int:
        """Columns of the encoder's input [px]."""

    @property
    def fit(self) -> str:
        """ "pad" (centred) or "resize": how another sensor size becomes the input's."""

    @property
    def windows(self) -> int:
        """Windows T a recording."""

    @property
    def window_us(self) -> int:
        """Length of a window from the first event on [µs]; 0 = equal parts of the recording."""

    @property
    def num_events(self) -> int:
        """Only so many events, from the middle of the recording; 0 = all."""


def windows_of(
    events: Events | Sequence[Events] | EventBatch,
    settings: Mapping[str, Any],
    *,
    bounds: np.ndarray | None = None,
    num: int | None = None,
) -> tuple[EventBatch, int]:
    """Cut recordings into windows and put them on the model's canvas.

    Args:
        events: one recording, several, or B * T windows (sample-major) that have the canvas' size already.
        settings: the values of INPUT_KEYS.
        bounds: (T, 2) or (B, T, 2) integer µs [t0, t1); None = as `settings` say.
        num: T instead of the settings' number.
    Returns:
        B * T windows, sample-major, and B.
    Raises:
        ValueError: no recording, both bounds and num, or windows that do not divide up.
    """
    if bounds is not None and (num is not None or isinstance(events, EventBatch)):
        raise ValueError("bounds fix the windows of raw recordings: give them without `windows` or a batch")
    num = num or settings["windows"]
    if isinstance(events, EventBatch):
        size = (settings["height"], settings["width"])
        if len(events) % num or (events.height, events.width) != size:
            raise ValueError(
                f"a batch of {len(events)} windows of {events.height}x{events.width} is not B x {num} "
                f"windows of {size[0]}x{size[1]}: give `windows`, or the raw recordings"
            )
        return events, len(events) // num
    recordings = [events] if isinstance(events, Events) else list(events)
    if not recordings:
        raise ValueError("no recordings to encode: give at least one")
    count = len(recordings)
    given = [None] * count if bounds is None else np.broadcast_to(bounds, (count, *np.shape(bounds)[-2:]))
    cut = [_cut(recording, edges, settings, num) for recording, edges in zip(recordings, given)]
    windows = [window for part in cut for window in part.events]
    return EventBatch.from_windows(windows, np.concatenate([part.bounds for part in cut])), count


def _cut(events: Events, bounds: np.ndarray | None, settings: Mapping[str, Any], num: int) -> Windows:
    limit, window_us = settings["num_events"], settings["window_us"]
    if bounds is None and limit and len(events) > limit:
        start = (len(events) - limit) // 2
        events = events[start : start + limit]
    windows = cut_windows(events, num, window_us) if bounds is None else by_bounds(events, bounds)
    step = augment.fit((events.height, events.width), (settings["height"], settings["width"]), settings["fit"])
    return Windows(*step.apply_events(windows.events, windows.bounds))
