"""Rasterising speed on one core, as ratios to an int32 counter loop in the same process.

    python bench/represent.py --events 10_000_000 --height 480 --width 640

Beside gep's kernels: its torch path on CPU tensors (index_add_), NumPy, and tonic where the extra `bench` is
installed (GPL: never imported by gep itself). Compare ratios; absolute rates vary with the machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numba import njit

if __name__ == "__main__":  # run as a file: the checkout's root is not on the path then
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import medians, print_header, print_table
from gep.events import represent, represent_torch
from gep.events.types import EventBatch, Events

REQUIRED = {"histogram": 0.7, "latest_timestamp": 0.55, "time_surface": 0.4, "voxel_grid": 0.28}
"""Least ratio to the counter loop at 10 M events, 640x480, one core."""


def moving_edges(num: int, height: int, width: int, num_edges: int = 40, seed: int = 0) -> Events:
    """A second of straight edges that sweep the sensor, each of one polarity, blurred over a few pixels."""
    rng = np.random.default_rng(seed)
    t = np.sort(rng.integers(0, 1_000_000, num))
    edge, y = rng.integers(0, num_edges, num), rng.integers(0, height, num)
    speed = rng.uniform(-width, width, num_edges)
    offset, slope = rng.uniform(0, width, num_edges), rng.uniform(-0.5, 0.5, num_edges)
    x = offset[edge] + speed[edge] * (t / 1e6) + slope[edge] * y + rng.normal(0, 1.5, num)
    return Events.from_arrays(t, np.floor(x) % width, y, edge % 2, height=height, width=width)


@njit(nogil=True)
def _counter(x, y, p, height, width, counts):
    plane, w = np.uint64(height * width), np.uint64(width)
    for i in range(len(x)):
        counts[np.uint64(p[i]) * plane + np.uint64(y[i]) * w + np.uint64(x[i])] += 1


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns 1 when --check is given and a required ratio is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=10_000_000, help="events in the one window")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--repeats", type=int, default=7, help="rounds of which the median is taken")
    parser.add_argument("--no-peers", action="store_true", help="only gep's kernels and the counter loop")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a required ratio is missed")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)

    events = moving_edges(args.events, args.height, args.width)
    batch = EventBatch.from_windows([events])
    counts = np.zeros(2 * args.height * args.width, np.int32)
    functions: dict[str, Callable[[], object]] = {
        "counter": lambda: _counter(events.x, events.y, events.p, args.height, args.width, counts)
    }
    for name in represent.REPRESENTATIONS:
        functions[name] = _bind(represent.build(name), batch)
    functions["EventBatch.from_windows"] = lambda: EventBatch.from_windows([events])
    if not args.no_peers:
        functions |= _torch_path(batch) | _numpy(events) | _tonic(events)

    print_header("Rasterising events", ("torch", "numpy", "numba", "tonic"))
    print(f"One window of {args.events:,} events on {args.width}x{args.height}; median of {args.repeats}.\n")
    seconds = medians(functions, args.repeats)
    ratios = {name: seconds["counter"] / value for name, value in seconds.items()}
    rows = [
        [name, f"{args.events / seconds[name] / 1e6:.0f}", f"{ratios[name]:.2f}", str(REQUIRED.get(name, ""))]
        for name in functions
    ]
    print_table(("", "M events/s", "ratio to counter", "required"), rows)
    missed = [name for name, least in REQUIRED.items() if ratios[name] < least]
    if missed:
        print(f"Below the required ratio: {', '.join(missed)}")
    return int(args.check and bool(missed))


def _bind(representation: represent.Representation, batch: EventBatch) -> Callable[[], object]:
    out = representation(batch)
    return lambda: representation(batch, out)


def _torch_path(batch: EventBatch) -> dict[str, Callable[[], object]]:
    size = (batch.height, batch.width)
    return {
        "torch: histogram": lambda: represent_torch.counts(batch, 1, torch.zeros(1, 2, *size)),
        "torch: voxel_grid": lambda: represent_torch.voxels(batch, 5, False, torch.zeros(1, 5, *size)),
        "torch: latest_timestamp": lambda: represent_torch.latest(batch, torch.zeros(1, 2, *size)),
    }


def _numpy(events: Events) -> dict[str, Callable[[], object]]:
    height, width = events.height, events.width

    def cells(channel: np.ndarray) -> np.ndarray:
        return (channel.astype(np.int64) * height + events.y) * width + events.x

    def add_at() -> None:
        np.add.at(np.zeros(2 * height * width, np.int32), cells(events.p), 1)

    def voxels() -> None:
        tau = (events.t - events.t[0]) * (4 / max(events.duration_us, 1))
        first = np.minimum(tau.astype(np.int64), 3)
        later = (tau - first).astype(np.float32)
        sign, cell = events.p.astype(np.float32) * 2 - 1, cells(first)
        grid = np.zeros(5 * height * width, np.float32)
        np.add.at(grid, cell, sign * (1 - later))
        np.add.at(grid, cell + height * width, sign * later)

    def latest() -> None:
        np.zeros(2 * height * width, np.int64)[cells(events.p)] = events.t

    return {
        "NumPy bincount: histogram": lambda: np.bincount(cells(events.p), minlength=2 * height * width),
        "NumPy add.at: histogram": add_at,
        "NumPy add.at: voxel_grid": voxels,
        "NumPy assignment: latest_timestamp": latest,
    }


def _tonic(events: Events) -> dict[str, Callable[[], object]]:
    try:
        from tonic.transforms import ToFrame, ToVoxelGrid
    except ImportError as error:
        print(f"tonic cannot be imported (extra `bench`), its rows are left out: {error}\n")
        return {}
    fields = [("t", np.int64), ("x", np.int64), ("y", np.int64), ("p", np.int64)]
    rows = np.empty(len(events), fields)
    for name, _ in fields:
        rows[name] = getattr(events, name)
    size = (events.width, events.height, 2)
    frame, voxels = ToFrame(sensor_size=size, n_time_bins=1), ToVoxelGrid(sensor_size=size, n_time_bins=5)
    return {
        "tonic ToFrame: histogram": lambda: frame(rows),
        "tonic ToVoxelGrid: voxel_grid": lambda: voxels(rows.copy()),
    }


if __name__ == "__main__":
    sys.exit(main())
