"""What the page shows of events alone: the window, the rates over time, a time surface, the pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from downstream.dense.pictures import viridis
from gep.app import html
from gep.app.recording import BINS, Recording, Shown
from gep.events.render import pictures
from gep.events.represent import time_surface
from gep.events.types import EventBatch

_HOT = 10  # times the median of the pixels that have events
_LISTED = 5


class View(NamedTuple):
    """Something that the page can show of a window."""

    title: str
    draw: Callable[[Shown], str]
    """Window -> HTML; a ValueError or OSError tells people what is wrong."""
    asks: str = ""
    """What the box for words says; empty = no box."""


def batch_of(shown: Shown) -> EventBatch:
    """The window as a batch of one."""
    return EventBatch.from_windows([shown.events], np.array([[shown.t0, shown.t1]]))


def player(shown: Shown) -> str:
    """The events of a window, and below them where it lies in the recording."""
    events, begin = shown.events, shown.recording.span[0]
    on = int(np.count_nonzero(events.p))
    seconds = f"{(shown.t0 - begin) / 1e6:.3f} to {(shown.t1 - begin) / 1e6:.3f} s"
    drawn = html.picture(pictures(batch_of(shown))[0], f"Events from {seconds}: ON red, OFF blue")
    key = html.legend([(f"ON {on:,}", (255, 0, 0)), (f"OFF {len(events) - on:,}", (0, 0, 255))])
    return html.figure(drawn + f'<div class="gep-under"><span>{seconds}</span>{key}</div>' + timeline(shown))


def timeline(shown: Shown, height: int = 56) -> str:
    """Events over the recording's time, ON above the line and OFF below, with the window marked.

    Args:
        shown: the window.
        height: of the drawing [px].
    """
    off, on = shown.recording.rates
    begin, end = shown.recording.span
    middle, top = height / 2, max(int(on.max()), int(off.max()), 1)

    def area(counts: np.ndarray, sign: int) -> str:
        points = [f"{number},{middle - sign * (middle - 2) * count / top:.1f}" for number, count in enumerate(counts)]
        return f"M0,{middle} L{' L'.join(points)} L{BINS - 1},{middle} Z"

    left = (shown.t0 - begin) / (end - begin) * (BINS - 1)
    width = max((min(shown.t1, end) - shown.t0) / (end - begin) * (BINS - 1), 0.6)
    return (
        f'<svg class="gep-timeline" viewBox="0 0 {BINS - 1} {height}" preserveAspectRatio="none" '
        f'style="height:{height}px" role="img" aria-label="Events over time">'
        f'<rect class="now" x="{left:.2f}" y="0" width="{width:.2f}" height="{height}"/>'
        f'<path class="on" d="{area(on, 1)}"/><path class="off" d="{area(off, -1)}"/></svg>'
    )


def statistics(recording: Recording) -> str:
    """Sensor, duration, events, rate and the share of ON in one line."""
    events = recording.events
    seconds = (recording.span[1] - recording.span[0]) / 1e6
    pairs = [
        ("Sensor", f"{events.width} × {events.height} px"),
        ("Duration", f"{seconds:.3f} s"),
        ("Events", f"{len(events):,}"),
        ("Rate", f"{html.number(len(events) / seconds)} events/s"),
        ("ON share", f"{100 * np.count_nonzero(events.p) / len(events):.1f} %"),
    ]
    return html.facts(pairs, recording.note)


def activity(shown: Shown) -> str:
    """The rates over time, larger and with their scale."""
    off, on = shown.recording.rates
    begin, end = shown.recording.span
    seconds = (end - begin) / BINS / 1e6
    quiet = np.mean((on + off) == 0)
    pairs = [
        ("Most ON", f"{html.number(on.max() / seconds)} events/s"),
        ("Most OFF", f"{html.number(off.max() / seconds)} events/s"),
        ("Silent", f"{100 * quiet:.0f} % of the time"),
        ("This window", f"{html.number(len(shown.events) / (shown.window_us / 1e6))} events/s"),
    ]
    axis = f'<div class="gep-axis"><span>0 s</span><span>{(end - begin) / 1e6:.3f} s</span></div>'
    key = html.legend([("ON, above the line", (255, 0, 0)), ("OFF, below it", (0, 0, 255))])
    return html.figure(
        timeline(shown, 220) + axis + key + html.facts(pairs), f"Rates in {BINS} parts; this window is marked."
    )


def surface(shown: Shown) -> str:
    """How long ago each pixel had its last event, at the window's end."""
    tau_us = max(1.0, shown.window_us / 2)
    both = time_surface(batch_of(shown), tau_us).amax(dim=1)[0].numpy()
    bar = html.ramp(viridis(np.linspace(0, 1, 12)), [(0.0, "none, long ago"), (1.0, "just now")])
    return html.figure(
        html.picture(viridis(both), "Time surface of the window") + bar,
        f"exp(−age / {tau_us / 1000:g} ms) of each pixel's last event.",
    )


def pixels(shown: Shown) -> str:
    """Events of each pixel over the whole recording, and those that fire far more than others."""
    counts = shown.recording.counts
    median = float(np.median(counts[counts > 0]))
    hot = np.argwhere(counts > _HOT * median)
    hot = hot[np.argsort(-counts[tuple(hot.T)], kind="stable")]
    most = int(counts.max())
    drawn = viridis(np.log1p(counts) / np.log1p(most))
    bar = html.ramp(viridis(np.linspace(0, 1, 12)), [(0.0, "0"), (1.0, f"{most:,} events")])
    pairs = [
        ("Never fired", f"{100 * np.mean(counts == 0):.1f} %"),
        ("Median", f"{median:,.0f} events"),
        ("Hot pixels", f"{len(hot):,}"),
    ]
    worst = ", ".join(f"({x}, {y}): {counts[y, x]:,}" for y, x in hot[:_LISTED].tolist())
    caption = f"Whole recording, logarithmic. Hot: over {_HOT} times the median of the pixels that fired."
    return html.figure(
        html.picture(drawn, "Events of each pixel over the whole recording") + bar + html.facts(pairs),
        caption + (f" Hottest (x, y): {worst}." if worst else ""),
    )


EVENT_VIEWS = (View("Time surface", surface), View("Activity", activity), View("Pixels", pixels))
"""What needs no model."""
