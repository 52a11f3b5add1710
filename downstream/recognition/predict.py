"""What a classifier makes of a recording of any length: a table of class probabilities, by window and for the whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from downstream.recognition.model import Classes, GEPClassifier
from gep.events.io import EventSource
from gep.events.types import Events

_MOST_ROWS = 40  # windows printed


def recognise(model: GEPClassifier, source: EventSource) -> Classes:
    """Classes of a recording, which is cut into samples such as the model was trained on, one after the other.

    A last sample that the recording has not the time (or events) for is left out, but for the only one.

    Args:
        model: in evaluation mode, on the device to use.
        source: the open recording.
    Returns:
        B = 1: the mean of the samples' probabilities, and all their windows; on the CPU.
    Raises:
        ValueError: a recording without events.
    """
    if len(source) == 0:
        raise ValueError(f"{source.path}: holds no events; there is nothing to recognise")
    found = [model.predict(events, bounds) for events, bounds in _samples(model, source)]
    return Classes(
        torch.cat([part.whole for part in found]).mean(dim=0, keepdim=True),
        torch.cat([part.windows for part in found], dim=1),
        torch.cat([part.t_us for part in found], dim=1),
    )


def _samples(model: GEPClassifier, source: EventSource) -> Iterator[tuple[Events, np.ndarray | None]]:
    """(events, bounds (T, 2) of their windows or None = as `GEPModel.frames` cuts them)."""
    settings = model.model.input_settings
    num, count = settings["windows"], settings["num_events"]
    span = num * settings["window_us"] or model.sample_us
    if count:
        for start in range(0, max(len(source) - count, 0) + 1, count):
            yield source.by_index(start, min(start + count, len(source))), None
    elif span:
        first, end = source.span
        shares = span * np.arange(num + 1, dtype=np.int64) // num
        for begin in range(first, max(end - span, first) + 1, span):
            edges = begin + shares
            yield source.by_time(begin, begin + span), np.stack([edges[:-1], edges[1:]], axis=1)
    else:
        yield source.read(), None


def table(model: GEPClassifier, found: Classes, top: int = 5) -> str:
    """For people: the likeliest classes of the whole, and their probabilities window by window.

    Args:
        found: of one recording (B = 1).
        top: classes shown, the likeliest of the whole first; a window's own likeliest is named beside it.
    """
    whole, windows, t_us = found.whole[0], found.windows[0], found.t_us[0]
    best = whole.topk(min(top, len(whole))).indices.tolist()
    names = [model.classes[index] for index in best]
    widths = [max(7, len(name)) for name in names]

    def row(title: str, values: list[str], beside: str = "") -> str:
        cells = "  ".join(f"{value:>{width}}" for value, width in zip(values, widths))
        return f"{title:<21} {cells}  {beside}".rstrip()

    def numbers(values: torch.Tensor) -> list[str]:
        return [f"{100 * float(values[index]):.1f} %" for index in best]

    lines = [row("", names), row("whole", numbers(whole), model.classes[best[0]])]
    start = int(t_us[0, 0])
    shown = np.unique(np.linspace(0, len(windows) - 1, min(len(windows), _MOST_ROWS)).round().astype(int))
    for index in shown.tolist():
        begin, end = ((int(value) - start) / 1e6 for value in t_us[index])
        own = model.classes[int(windows[index].argmax())]
        lines.append(row(f"{begin:.3f} to {end:.3f} s", numbers(windows[index]), own))
    if len(shown) < len(windows):
        lines.append(f"({len(shown)} of {len(windows):,} windows)")
    return "\n".join(lines)


def as_json(model: GEPClassifier, found: Classes) -> Mapping[str, Any]:
    """All of it, plain JSON: classes, probabilities of the whole (K), and of each window with its times."""
    windows = [
        {"t_us": bounds, "probabilities": values}
        for bounds, values in zip(found.t_us[0].tolist(), found.windows[0].tolist())
    ]
    return {"classes": model.classes, "whole": found.whole[0].tolist(), "windows": windows}
