"""Size and reading speed of the containers, as ratios to an int32 counter loop in the same process.

    python bench/decode_containers.py --events 20_000_000

One synthetic stream of moving edges decides the required ratios; --data adds real recordings, for size above all.
Windows are 50 ms, read one after the other as training does; "whole" is the recording in reused buffers (views where
the container has them). First pass: the file just opened, every batch checked; later passes: checked before.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

if __name__ == "__main__":  # run as a file: the checkout's root is not on the path then
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import medians, print_header, print_table
from bench.represent import _counter, moving_edges
from gep.events.io import open_events, read_events, write_events
from gep.events.io.source import EventSource
from gep.events.types import Events

REQUIRED = {"DSEC HDF5, blosc-lz4: 50 ms windows": 0.15, "native, plain: later pass, copied": 0.5}
"""Least ratio to the counter loop at 20 M events, 640x480, one core."""
CONTAINERS = {
    "native, plain": (".arrow", "none"),
    "native, lz4": (".arrow", "lz4"),
    "native, zstd": (".arrow", "zstd"),
    "DSEC HDF5, blosc-lz4": (".h5", "lz4"),
    "DSEC HDF5, blosc-zstd": (".h5", "zstd"),
    "DSEC HDF5, gzip": (".h5", "gzip"),
    "npz, deflate": (".npz", None),
    "npy, structured": (".npy", None),
}
"""Name -> (suffix, compression)."""

_WINDOW = 50_000  # µs


def rows(events: Events, repeats: int, containers: dict[str, tuple[str, str | None]] = CONTAINERS) -> list[dict]:
    """Measures every container on one recording.

    Returns:
        Dicts of name ("container: what"), bytes_per_event, events_per_second, ratio (to the counter loop).
    """
    counts = np.zeros(2 * events.height * events.width, np.int32)
    functions: dict[str, Callable[[], object]] = {
        "counter": lambda: _counter(events.x, events.y, events.p, events.height, events.width, counts)
    }
    sizes, kept = {}, Events(*(np.empty_like(getattr(events, n)) for n in "txyp"), events.height, events.width)
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (suffix, compression)) in enumerate(containers.items()):
            path = Path(folder) / f"{number}{suffix}"
            write_events(path, events, compression=compression)
            for what, function in _readings(path, events, kept).items():
                functions[f"{name}: {what}"] = function
                sizes[f"{name}: {what}"] = path.stat().st_size / max(len(events), 1)
        seconds = medians(functions, repeats)
    return [
        {
            "name": name,
            "bytes_per_event": sizes.get(name, 0.0),
            "events_per_second": len(events) / value,
            "ratio": seconds["counter"] / value,
        }
        for name, value in seconds.items()
    ]


def _readings(path: Path, events: Events, kept: Events) -> dict[str, Callable[[], object]]:
    size = {"height": events.height, "width": events.width}
    if path.suffix == ".npz":
        return {"whole": lambda: read_events(path, **size)}
    source = open_events(path, **size)
    readings = {"50 ms windows": lambda: _windows(source)}
    if path.suffix == ".arrow":
        readings["first pass, opened anew"] = lambda: _whole(open_events(path))
        readings["later pass"] = lambda: _whole(source)
        readings["later pass, copied"] = lambda: _copied(source, kept)
    else:
        readings["whole"] = lambda: _whole(source)
    return readings


def _windows(source: EventSource) -> int:
    begin, end = source.span
    total = sum(len(source.by_time(t0, t0 + _WINDOW)) for t0 in range(begin, end, _WINDOW))
    assert total == len(source), "windows must hold every event"
    return total


def _whole(source: EventSource) -> int:
    return sum(len(chunk) for chunk in source.chunks(1 << 16))


def _copied(source: EventSource, kept: Events) -> None:
    start = 0
    for chunk in source.chunks(1 << 16):
        for name in "txyp":
            np.copyto(getattr(kept, name)[: len(chunk)], getattr(chunk, name))
        start += len(chunk)


def recordings(data: Path) -> Iterator[tuple[str, Events]]:
    """(name, events) of the real recordings in a folder laid out as the tests' data is."""
    sizes = {"evt2.raw": (480, 640)}
    patterns = (
        "recordings/*.raw",
        "recordings/*.bin",
        "recordings/*.aedat4",
        "dvs128_objects/*.aedat",
        "davis346/*.npz",
    )
    for pattern in patterns:
        for path in sorted(data.glob(pattern))[:3]:
            height, width = sizes.get(path.name, (None, None))
            try:
                yield path.name, read_events(path, height=height, width=width)
            except (ValueError, ImportError) as error:
                print(f"{path.name} is left out: {error}\n")


def main(argv: list[str] | None = None) -> int:
    """Prints the tables; returns 1 when --check is given and a required ratio is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=20_000_000, help="events of the synthetic stream")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of which the median is taken")
    parser.add_argument("--data", type=Path, help="folder of real recordings, measured too")
    parser.add_argument("--quick", action="store_true", help="1 M events, one round: shows that it runs")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a required ratio is missed")
    args = parser.parse_args(argv)
    if args.quick:
        args.events, args.repeats = 1_000_000, 1
    torch.set_num_threads(1)
    print_header("Containers", ("numpy", "numba", "pyarrow", "h5py", "hdf5plugin"))
    events = moving_edges(args.events, 480, 640)
    # Two million events a second, as a street at VGA resolution gives.
    events = Events(events.t * max(args.events // 2_000_000, 1), events.x, events.y, events.p, 480, 640)
    found = rows(events, args.repeats)
    print(f"Moving edges, {args.events:,} events in {events.duration_us / 1e6:.0f} s on 640x480.\n")
    _print(found, REQUIRED)
    for name, recording in recordings(args.data) if args.data else ():
        print(f"{name}: {len(recording):,} events, {recording.width}x{recording.height}.\n")
        _print(rows(recording, args.repeats), {})
    ratios = {row["name"]: row["ratio"] for row in found}
    missed = [name for name, least in REQUIRED.items() if ratios[name] < least]
    if missed:
        print(f"Below the required ratio: {', '.join(missed)}")
    return int(args.check and bool(missed))


def _print(found: list[dict], required: dict[str, float]) -> None:
    print_table(
        ("", "bytes an event", "M events/s", "ratio to counter", "required"),
        [
            [
                row["name"],
                f"{row['bytes_per_event']:.2f}" if row["bytes_per_event"] else "",
                f"{row['events_per_second'] / 1e6:.0f}",
                f"{row['ratio']:.2f}",
                str(required.get(row["name"], "")),
            ]
            for row in found
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
