"""One streamed window against the whole context computed again: `python bench/stream.py`.

A stream has seen 16 windows when the 17th is finished; without a cache the 17 windows are one call of `predict`. Both
take the same events through canvas, representation, encoder and backbone, and take turns in one process.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import medians, print_header, print_table
from gep.events.represent import Histogram
from gep.events.types import Events
from gep.hub import GEPModel
from gep.models import Backbone, EventEncoder, backbone_preset, preset

CONTEXT, WINDOW_US, TARGET = 16, 50_000, 1 / 8


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Prints the table; returns streamed over recomputed, by preset."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--presets", nargs="+", default=["nano", "small"], help="of encoder and backbone (nano small)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each; 10 times as many for nano (3)")
    parser.add_argument("--events", type=int, default=50_000, help="events a window (50,000)")
    parser.add_argument("--order", default="frame", choices=["frame", "token"], help="of the backbone (frame)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    print_header("Streaming", packages=("torch", "timm", "numpy"))
    rows, ratios = [], {}
    for name in options.presets:
        repeats = options.repeats * (10 if name == "nano" else 1)
        seconds, error = measure(name, repeats, options)
        streamed, whole = seconds["streamed"], seconds["recomputed"]
        ratios[name] = streamed / whole
        cells = [f"{1e3 * value:.1f}" for value in (streamed, seconds["encoder alone"], whole)]
        rows.append([name, *cells, f"{ratios[name]:.4f}", f"1/{whole / streamed:.1f}", f"{error:.0e}"])
    columns = ["preset", "a streamed window [ms]", "of it tokens alone", f"{CONTEXT + 1} windows again", "ratio", ""]
    print_table([*columns, "largest difference"], rows)
    print(f"{options.order} order, {options.events:,} events a window; asked of small: ratio <= {TARGET}")
    return ratios


def measure(name: str, repeats: int, options: argparse.Namespace) -> tuple[dict[str, float], float]:
    """Median seconds, and the largest difference of the 17th window's outputs between the two ways."""
    model, windows = _model(name, options.order), _windows(name, options.events)
    whole = _joined([next(windows) for _ in range(CONTEXT + 1)])
    bounds = WINDOW_US * (np.arange(CONTEXT + 1)[:, None] + [0, 1])
    stream = model.stream(whole.height, whole.width, span=CONTEXT + 1, t0_us=0)
    *_, last = _streamed(stream, whole)
    out = model.predict(whole, bounds=bounds)
    pairs = zip((last.tokens, last.hidden, last.image), (out.tokens, out.hidden, out.image))
    error = max((one - many[0, -1]).abs().max().item() for one, many in pairs)
    # The cache holds the 16 newest windows, now and after each further one.
    alone, same = model.stream(whole.height, whole.width, t0_us=0, backbone=False), _windows(name, options.events)
    functions = {
        "streamed": lambda: list(_streamed(stream, next(windows))),
        "encoder alone": lambda: list(_streamed(alone, next(same))),
        "recomputed": lambda: model.predict(whole, bounds=bounds).image.sum().item(),
    }
    return medians(functions, repeats), error


def _streamed(stream, events: Events) -> Iterator:
    stream.push(events)
    for window in stream.advance((int(events.t[-1]) // WINDOW_US + 1) * WINDOW_US):
        (window.tokens if window.image is None else window.image).sum().item()  # waits for a device
        yield window


def _model(name: str, order: str) -> GEPModel:
    torch.manual_seed(0)
    chosen = preset(name)
    encoder = EventEncoder(chosen.arch, 2, chosen.img_size)
    backbone = Backbone(encoder.embed_dim, **backbone_preset(name), order=order)
    height, width = chosen.img_size
    settings = SimpleNamespace(
        height=height, width=width, fit="resize", windows=CONTEXT, window_us=WINDOW_US, num_events=0
    )
    model = GEPModel.from_parts(encoder, Histogram(log1p=True), settings, backbone=backbone).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _windows(name: str, count: int) -> Iterator[Events]:
    """Windows of random events, one after the other, on the sensor that goes with a preset."""
    height, width = (34, 34) if name == "nano" else (480, 640)
    g, begin = np.random.default_rng(0), 0
    while True:
        t = begin + np.sort(g.integers(0, WINDOW_US, count))
        x, y, p = g.integers(0, width, count), g.integers(0, height, count), g.integers(0, 2, count)
        yield Events.from_arrays(t, x, y, p, height=height, width=width)
        begin += WINDOW_US


def _joined(windows: list[Events]) -> Events:
    columns = (np.concatenate([getattr(window, name) for window in windows]) for name in "txyp")
    return Events(*columns, windows[0].height, windows[0].width)


if __name__ == "__main__":
    main()
