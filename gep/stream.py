"""Streaming: events go in as they come, each finished window comes out encoded, and memory stays bounded."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from gep.events.types import Events
from gep.models.backbone import Backbone, KVCache


class StreamedWindow(NamedTuple):
    """One finished window; tensors are on the model's device."""

    tokens: Tensor
    """(N, D) of the encoder, raster order."""
    pooled: Tensor
    """(D,) their mean."""
    hidden: Tensor | None
    """(N, width) of the backbone, which has seen the last `span` windows up to this one."""
    next: Tensor | None
    """(N, D) predicted layer-normed tokens of the next window."""
    image: Tensor | None
    """(N, D) predicted layer-normed tokens of the paired image."""
    t0_us: int
    """Begin of the window, inclusive [µs]."""
    t1_us: int
    """End of the window, exclusive, the time the backbone knows it by [µs]."""
    num_events: int
    """Events in it."""


class Streamable(Protocol):
    """What a stream needs of a model; GEPModel has it."""

    backbone: Backbone | None
    input_settings: dict[str, Any]

    def frames(self, events: Events, bounds: np.ndarray) -> tuple[Tensor, Tensor]:
        """Windows on the model's canvas (1, T, C, H, W), and their bounds (1, T, 2)."""

    def predict_frames(self, frames: Tensor, t_us: Tensor, *, backbone: bool, cache: KVCache | None) -> Any:
        """A GEPOutput, in evaluation mode and without gradients."""


class EventStream:
    """A recording in the making: what `GEPModel.predict` says of its windows, one at a time.

    Windows adjoin and are as long as in training; the first begins at the first event. Each is encoded once; of
    earlier ones only the backbone's keys and values are kept, for `span` windows. Windows come out in order, the same
    bits however the events were cut into pushes.

    Args:
        model: a GEPModel; its mode (training or evaluation) is left alone and does not matter.
        height, width: of the sensor [px]; a window is put on the model's canvas as in training.
        span: windows that the backbone sees, the newest included; None = the backbone's own span or else the number
            of windows it was trained on. Within it a window's outputs are those of the whole sequence; beyond it
            those of a whole sequence in which every window attends to the last `span`, itself included.
        window_us: length of a window [µs]; 0 = as in training.
        t0_us: begin of the first window [µs]; None = at the first event.
        backbone: False = tokens and pooled only, without the backbone's cost.
    Raises:
        ValueError: no window length, or a span that is none or beyond the backbone's own.
    """

    def __init__(
        self,
        model: Streamable,
        height: int,
        width: int,
        *,
        span: int | None = None,
        window_us: int = 0,
        t0_us: int | None = None,
        backbone: bool = True,
    ) -> None:
        settings = model.input_settings
        if window_us < 0 or not (window_us or settings["window_us"]):
            raise ValueError(
                f"window_us = {window_us}: give the length of a window in µs; this model's windows have "
                + (f"{settings['window_us']} µs" if settings["window_us"] else "no fixed length (window_us = 0)")
            )
        if settings["num_events"]:
            warnings.warn(
                f"num_events = {settings['num_events']} has no effect on a stream, whose windows hold all events",
                stacklevel=3,
            )
        self.model, self.height, self.width = model, height, width
        self.window_us = window_us or settings["window_us"]
        used = model.backbone if backbone else None
        self.backbone = used is not None
        self.span = None if used is None else _span(used, span, settings)
        if span is not None and not self.backbone:
            warnings.warn(f"span = {span} has no effect without a backbone", stacklevel=3)
        self._cache = KVCache(span=self.span) if self.backbone else None
        self._begin = t0_us
        self._now = t0_us  # no event from before it is still to come
        self._held: deque[Events] = deque()
        self._closed = False

    def push(self, events: Events) -> Iterator[StreamedWindow]:
        """Take events, any number of them: part of a window, or many windows at once.

        Args:
            events: of the stream's sensor, none before the last ones or before what `advance` was told. Copied: their
                memory may be used again.
        Returns:
            The windows that are now known to be whole, those left over by an earlier call first. Each is computed
            when it is asked for, so that memory does not grow with their number; what is not taken comes later.
        Raises:
            EventFormatError: damaged events.
            ValueError: another sensor size, events from before what was already taken, or a finished stream.
        """
        self._check_open()
        if (events.height, events.width) != (self.height, self.width):
            raise ValueError(
                f"events of a {events.height}x{events.width} sensor in a stream of {self.height}x{self.width}: "
                "give model.stream the sensor's size"
            )
        events.validate("pushed events")
        if len(events):
            self._until(int(events.t[0]), "the first pushed event")
            self._now = int(events.t[-1])
            self._begin = int(events.t[0]) if self._begin is None else self._begin
            self._held.append(_copy(events))
        return self._whole()

    def advance(self, t_us: int) -> Iterator[StreamedWindow]:
        """State that all events before a time were pushed: a still scene sends none, and time passes all the same.

        Args:
            t_us: µs on the events' clock. Before the first event it begins no window.
        Returns:
            As `push`.
        Raises:
            ValueError: t_us is before events already taken, or the stream is finished.
        """
        self._check_open()
        self._until(int(t_us), "advance")
        self._now = int(t_us)
        return self._whole()

    def finish(self) -> Iterator[StreamedWindow]:
        """The windows that are left, the last one with the events it has; after it the stream takes nothing more."""
        self._check_open()
        self._closed = True
        if self._begin is not None and self._now is not None:
            # An event at the very begin of a window lies in it.
            covered = self._now + 1 if self._held and self._held[-1].t[-1] == self._now else self._now
            self._now = self._begin + -(-(covered - self._begin) // self.window_us) * self.window_us
        return self._whole()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this stream is finished: make another with model.stream")

    def _until(self, t_us: int, what: str) -> None:
        if self._now is not None and t_us < self._now:
            raise ValueError(f"{what} is at {t_us} µs, before {self._now} µs, up to which all was taken: time goes on")

    def _whole(self) -> Iterator[StreamedWindow]:
        """The windows that end before any event still to come."""
        while self._begin is not None and self._now is not None and self._begin + self.window_us <= self._now:
            begin, end = self._begin, self._begin + self.window_us
            events, self._begin = self._take(end), end
            yield self._window(events, begin, end)
        if self._held and self._held[0].t.base is not None:
            self._held[0] = _copy(self._held[0])  # a view would keep all that was pushed with it

    def _take(self, end: int) -> Events:
        """Events before `end`, taken off those held."""
        parts = []
        while self._held and self._held[0].t[0] < end:
            events = self._held.popleft()
            cut = int(np.searchsorted(events.t, end))
            parts.append(events[:cut])
            if cut < len(events):
                self._held.appendleft(events[cut:])
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return Events.empty(self.height, self.width)
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in "txyp"}
        return Events(**columns, height=self.height, width=self.width)

    def _window(self, events: Events, begin: int, end: int) -> StreamedWindow:
        frames, bounds = self.model.frames(events, np.array([[begin, end]], np.int64))
        out = self.model.predict_frames(frames, bounds[..., 1], backbone=self.backbone, cache=self._cache)
        tensors = (None if value is None else value[0, 0] for value in out)
        return StreamedWindow._make([*tensors, begin, end, len(events)])


def _span(backbone: Backbone, span: int | None, settings: Mapping[str, Any]) -> int:
    """The span asked for, checked, or the default."""
    if span is None:
        return backbone.span or settings["windows"]
    if span < 1:
        raise ValueError(f"span = {span}: give a number of windows >= 1")
    if backbone.span is not None and span > backbone.span:
        raise ValueError(f"span = {span}: this backbone sees at most {backbone.span} windows; give no more")
    return span


def _copy(events: Events) -> Events:
    columns = {name: getattr(events, name).copy() for name in "txyp"}
    return Events(**columns, height=events.height, width=events.width)
