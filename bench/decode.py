"""Decoding speed on one core, as ratios to an int32 counter loop in the same process.

    python -m bench.decode

Each file is read from the page cache: "reused" decodes it in parts into the same buffers (`EventSource.chunks`),
"fresh" into new arrays (`read_events`), "index" only finds where slices begin. The containers (HDF5, native, npz, npy)
follow in a table of their own, from bench/decode_containers.py. Beside gep's decoders: evt3 and faery
(extra `test`), tonic, evutils and expelliarmus (extra `bench`; GPL: never imported by gep itself), where installed.
Compare ratios; absolute rates vary with the machine.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

if __name__ == "__main__":  # run as a file: the checkout's root is not on the path then
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import decode_containers
from bench.common import medians, print_header, print_table
from bench.represent import _counter, moving_edges
from gep.events.io import open_events, read_events, write_bin, write_dat, write_evt2, write_evt3
from gep.events.types import Events

PART = 1 << 18
_SENSOR = (480, 640)
_SMALL = (180, 240)  # what `.bin` holds
_PEERS = ("evt3", "faery", "tonic", "evutils", "expelliarmus")


class Case(NamedTuple):
    """One row of the table."""

    name: str
    run: Callable[[], object]
    """What is timed: returns the number of events that it has read."""
    num_events: int
    required: float | None = None
    """Least ratio to the counter loop; None = no demand."""


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns 1 when --check is given and a required ratio is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=10_000_000, help="events of each recording")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of which the median is taken")
    parser.add_argument("--quick", action="store_true", help="1,000,000 events, 3 rounds, no peers")
    parser.add_argument("--no-peers", action="store_true", help="only gep's decoders and the counter loop")
    parser.add_argument("--no-containers", action="store_true", help="leave bench/decode_containers.py's table out")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a required ratio is missed")
    args = parser.parse_args(argv)
    num, repeats = (1_000_000, 3) if args.quick else (args.events, args.repeats)
    torch.set_num_threads(1)

    events = moving_edges(num, *_SENSOR)
    counts = np.zeros(2 * events.height * events.width, np.int32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = recordings(events, folder)
        cases = [Case("counter", lambda: _counter(events.x, events.y, events.p, *_SENSOR, counts), num)]
        cases += [case for row in files for case in own(*row)]
        if not (args.no_peers or args.quick):
            cases += [case for row in files for case in peers(row[0], row[1], row[2])]
        for case in cases[1:]:
            found = case.run()
            assert found in (None, case.num_events), f"{case.name} read {found} of {case.num_events} events"
        print_header("Decoding events", ("numpy", "numba", *_PEERS))
        print(f"{num:,} events on {_SENSOR[1]}x{_SENSOR[0]} (.bin: {_SMALL[1]}x{_SMALL[0]}); median of {repeats}.\n")
        seconds = medians({case.name: case.run for case in cases}, repeats)
    rates = {case.name: case.num_events / seconds[case.name] for case in cases}
    ratios = {name: rate / rates["counter"] for name, rate in rates.items()}
    rows = [
        [case.name, f"{rates[case.name] / 1e6:.0f}", f"{ratios[case.name]:.2f}", str(case.required or "")]
        for case in cases
    ]
    print_table(("", "M events/s", "ratio to counter", "required"), rows)
    missed = [case.name for case in cases if case.required is not None and ratios[case.name] < case.required]
    if missed:
        print(f"Below the required ratio: {', '.join(missed)}")
    code = int(args.check and bool(missed))
    if not args.no_containers:
        passed = [flag for flag in ("--quick", "--check") if getattr(args, flag[2:])]
        code |= decode_containers.main(["--events", str(num), *passed])
    return code


def vectors(num: int, height: int, width: int, seed: int = 0) -> Events:
    """A second of row segments: up to 32 neighbours of one time and polarity, as a dense EVT3 stream has them."""
    rng = np.random.default_rng(seed)
    segments = num // 16
    kept = rng.random((segments, 32)) < rng.uniform(0.3, 1, segments)[:, None]
    segment, offset = (index[:num] for index in np.nonzero(kept))
    t = np.sort(rng.integers(0, 1_000_000, segments))
    x, y, p = (rng.integers(0, limit, segments) for limit in (width - 32, height, 2))
    return Events.from_arrays(t[segment], x[segment] + offset, y[segment], p[segment], height=height, width=width)


def recordings(events: Events, folder: Path) -> list[tuple[str, Path, Events, float]]:
    """Writes each format; rows of name, file, events, required ratio of decoding into reused buffers."""
    dense = vectors(len(events), *_SENSOR)
    x, y = events.x * _SMALL[1] // events.width, events.y * np.uint32(_SMALL[0]) // events.height
    small = Events.from_arrays(events.t, x, y, events.p, height=_SMALL[0], width=_SMALL[1])
    table = (
        ("EVT2", "evt2.raw", write_evt2, events, 0.6),
        ("EVT3 sparse", "sparse.raw", write_evt3, events, 0.15),
        ("EVT3 vector-heavy", "dense.raw", write_evt3, dense, 0.2),
        ("DAT", "cd.dat", write_dat, events, 0.6),
        (".bin", "small.bin", write_bin, small, 0.6),
    )
    for _, file, write, given, _ in table:
        write(folder / file, given)
    return [(name, folder / file, given, required) for name, file, _, given, required in table]


def own(name: str, path: Path, events: Events, required: float) -> list[Case]:
    """gep's decoder on one file."""
    size = {"height": events.height, "width": events.width}

    def reused() -> int:
        with open_events(path, **size) as source:
            return sum(len(part) for part in source.chunks(PART))

    def index() -> int:
        with open_events(path, **size) as source:
            return len(source)

    return [
        Case(f"{name}, reused", reused, len(events), required),
        Case(f"{name}, fresh", lambda: len(read_events(path, **size)), len(events)),
        Case(f"{name}, index", index, len(events)),
    ]


def peers(name: str, path: Path, events: Events) -> list[Case]:
    """Other libraries on the same file, into fresh arrays; those that are not installed are left out."""
    size = (events.width, events.height)
    readers: dict[str, Callable[[], int]] = {}
    evt3, faery, evutils, expelliarmus, tonic = (
        _optional(module) for module in ("evt3", "faery", "evutils.io", "expelliarmus", "tonic.io")
    )
    if evt3 and name.startswith("EVT3"):
        readers["evt3"] = lambda: len(evt3.decode_file(str(path)))
    if faery and name != ".bin":
        readers["faery"] = lambda: len(faery.events_stream_from_file(path, dimensions_fallback=size).to_array())
    if evutils and name != ".bin":

        def with_evutils() -> int:
            with evutils.EventReader(path) as reader:
                return len(reader.read_all())

        readers["evutils"] = with_evutils
    if expelliarmus and name != ".bin":
        wizard = expelliarmus.Wizard(encoding=name.split()[0].lower())
        readers["expelliarmus"] = lambda: len(wizard.read(str(path)))
    if tonic and name == ".bin":
        fields = np.dtype([("x", int), ("y", int), ("t", int), ("p", int)])
        readers["tonic"] = lambda: len(tonic.read_mnist_file(str(path), dtype=fields))
    return [Case(f"{peer}: {name}", run, len(events)) for peer, run in readers.items()]


def _optional(module: str):
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


if __name__ == "__main__":
    sys.exit(main())
