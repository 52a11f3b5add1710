"""Samples/s from N-ImageNet-style files and from shards to voxel grids, against a plain NumPy loader; DSEC windows.

    python bench/loader.py

Ways to have the recordings: the published compressed npz files, the same decoded once (`data.cache_dir`), and shards
(`gep shard`); with two data workers, one data thread or two. A sample: 30,000 consecutive events at a random place
of a 480x640 recording of 100,000 to 200,000, at coordinates scaled to 224x224, as a voxel grid of 5 bins. The NumPy
loader is what the description of the data set asks for, written plainly: `np.load` of the compressed archive, a float32
stack of its columns, a random slice, `np.add.at`. The other part cuts a DSEC-style recording of 60 s into windows of
50 ms, and compares with a Python loop over events, which is timed on a piece and scaled up: at 0.3 M events/s, and
at 2.5 (DSEC's own recordings have more, about 5).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

if __name__ == "__main__":  # run as a file: the checkout's root is not on the path then
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import print_header, print_table
from bench.represent import moving_edges
from gep.data.config import DataConfig
from gep.data.listing import Listing
from gep.data.paired import Recordings, collate
from gep.data.registry import list_recordings
from gep.data.sampler import Batch, Batches, Sample
from gep.data.shard_write import write_shards
from gep.data.shards import open_shards
from gep.events.io import open_events
from gep.events.represent import VoxelGrid
from gep.events.types import EventBatch, Events

REQUIRED = {"npz files": 8.0, "shards": 12.0, "DSEC": 100.0}
"""Least ratios of the best of gep's ways to the NumPy loader, and of DSEC windows to the loop."""
SENSOR, CANVAS, EVENTS, BINS, WINDOW_US = (480, 640), (224, 224), 30_000, 5, 50_000
COLUMNS = np.dtype([("x", "<u2"), ("y", "<u2"), ("t", "<i8"), ("p", "?")])


def write_files(root: Path, count: int) -> Listing:
    """N-ImageNet's layout: `extracted_train/<synset>/*.npz`, one compressed structured array each."""
    rng = np.random.default_rng(0)
    for number in range(count):
        folder = root / "extracted_train" / f"n{number % 8:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        events = moving_edges(int(rng.integers(100_000, 200_001)), *SENSOR, seed=number)
        data = np.empty(len(events), COLUMNS)
        for name in COLUMNS.names:
            data[name] = getattr(events, name) if name != "t" else events.t // 20  # N-ImageNet lasts about 50 ms
        np.savez_compressed(folder / f"{number:05d}.npz", event_data=data)
    return list_recordings("nimagenet", root, "train")


class PlainNumPy(Dataset):
    """The loader that the data set's description asks for."""

    def __init__(self, files: Sequence[Path], samples: int):
        self.files, self.samples = files, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> torch.Tensor:
        data = np.load(self.files[index % len(self.files)])["event_data"]
        events = np.stack([data["x"], data["y"], data["t"], data["p"]], axis=1).astype(np.float32)
        start = np.random.default_rng(index).integers(len(events) - EVENTS + 1)
        x, y, t, p = events[start : start + EVENTS].T
        x, y = (x * (CANVAS[1] / SENSOR[1])).astype(np.int64), (y * (CANVAS[0] / SENSOR[0])).astype(np.int64)
        place = (BINS - 1) * (t - t[0]) / max(t[-1] - t[0], 1)
        left, sign = place.astype(np.int64), 2 * p - 1
        grid = np.zeros((BINS, *CANVAS), np.float32)
        np.add.at(grid, (left, y, x), sign * (left + 1 - place))
        right = np.minimum(left + 1, BINS - 1)
        np.add.at(grid, (right, y, x), sign * (place - left))
        return torch.from_numpy(grid)


class Rasterised:
    """`collate`, then the voxel grid in the data worker."""

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        return {"frames": VoxelGrid(BINS)(collate(samples)["events"])}


def gep_loader(
    listing: Listing, batch_size: int, workers: int, in_worker: bool, threads: int = 0, cache_dir: str = ""
) -> Iterator[object]:
    """Endless batches of grids (B, 5, 224, 224)."""
    config = DataConfig(height=CANVAS[0], width=CANVAS[1], fit="resize", windows=1, window_us=0, num_events=EVENTS,
                        cache_dir=cache_dir)  # fmt: skip
    source = Recordings(listing, config, paired=False)
    batches = Batches(
        source,
        collate=Rasterised() if in_worker else collate,
        batch_size=batch_size,
        num_workers=workers,
        threads=threads,
    )
    represent = VoxelGrid(BINS)
    for (batch,) in batches(0):
        yield batch["frames"] if in_worker else represent(batch["events"])


def rate(loader: Callable[[], Iterator[object]], batch_size: int, samples: int) -> float:
    """Samples/s once the workers are up."""
    batches = loader()
    for _ in range(4):
        next(batches)
    count = max(2, samples // batch_size)
    begin = time.perf_counter()
    for _ in range(count):
        next(batches)
    seconds = time.perf_counter() - begin
    if hasattr(batches, "close"):
        batches.close()
    return count * batch_size / seconds


def dsec_grids(path: Path) -> int:
    """Every 50 ms window of a recording as a voxel grid, one after the other; the number of windows."""
    represent, grid, count = VoxelGrid(BINS), None, 0
    with open_events(path, height=SENSOR[0], width=SENSOR[1]) as source:
        for events, bounds in source.windows(WINDOW_US):
            grid = represent(EventBatch.from_windows([events], np.array([bounds]), copy=False), out=grid)
            count += 1
    return count


def dsec_cut(path: Path) -> int:
    """The windows alone, checked and counted."""
    with open_events(path, height=SENSOR[0], width=SENSOR[1]) as source:
        return sum(1 for _ in source.windows(WINDOW_US))


def loop_grids(events: Events) -> np.ndarray:
    """The same grids, an event at a time."""
    first = int(events.t[0])
    grids = np.zeros((events.duration_us // WINDOW_US + 1, BINS, *SENSOR), np.float32)
    for t, x, y, p in zip(events.t.tolist(), events.x.tolist(), events.y.tolist(), events.p.tolist()):
        window, inside = divmod(t - first, WINDOW_US)
        place = (BINS - 1) * inside / WINDOW_US
        left = int(place)
        sign = 1.0 if p else -1.0
        grids[window, left, y, x] += sign * (left + 1 - place)
        if left + 1 < BINS:
            grids[window, left + 1, y, x] += sign * (place - left)
    return grids


def loop_cut(events: Events) -> list[list[tuple[int, int, int, int]]]:
    """The windows alone, an event at a time."""
    first = int(events.t[0])
    windows: list[list[tuple[int, int, int, int]]] = [[] for _ in range(events.duration_us // WINDOW_US + 1)]
    for t, x, y, p in zip(events.t.tolist(), events.x.tolist(), events.y.tolist(), events.p.tolist()):
        windows[(t - first) // WINDOW_US].append((t, x, y, p))
    return windows


def dsec_recording(path: Path, pieces: int, events: int) -> Events:
    """60 s of a 480x640 sensor in DSEC's HDF5 layout (Blosc with zstd, as the data set has it).

    Made of one scene of `events` events again and again, as many as `pieces`; returns the first.
    """
    import h5py
    import hdf5plugin

    lasts = 60_000_000 // pieces
    piece = moving_edges(events, *SENSOR)
    piece = Events(piece.t * lasts // 1_000_000, piece.x, piece.y, piece.p, *SENSOR)
    first = np.searchsorted(piece.t, np.arange(0, lasts, 1000))
    with h5py.File(path, "w") as file:
        packed = hdf5plugin.Blosc(cname="zstd", clevel=1, shuffle=hdf5plugin.Blosc.SHUFFLE)
        for name, dtype in (("x", "u2"), ("y", "u2"), ("p", "u1"), ("t", "u4")):
            data = file.create_dataset(f"events/{name}", (pieces * events,), dtype, chunks=(1 << 16,), **packed)
            for k in range(pieces):
                values = getattr(piece, name)
                data[k * events : (k + 1) * events] = values + k * lasts if name == "t" else values
        index = np.concatenate([*(first + k * events for k in range(pieces)), [pieces * events]])
        file.create_dataset("ms_to_idx", data=index.astype("u8"), **packed)
        file.create_dataset("t_offset", data=np.int64(1_000_000))
    return piece


def dsec_rows(folder: Path, sizes: dict[str, tuple[int, int]], rounds: int) -> tuple[list[list[str]], float]:
    """The table of DSEC windows, and the ratio of grids at the last of the sizes (name -> (pieces, events))."""
    rows, ratio = [], 0.0
    for name, (pieces, events) in sizes.items():
        path, total = folder / "events.h5", pieces * events
        piece = dsec_recording(path, pieces, events)
        few = piece[: min(300_000, len(piece))]
        ways = {"windows only": (dsec_cut, loop_cut), "5-bin voxel grids": (dsec_grids, loop_grids)}
        for what, (ours, loop) in ways.items():
            windows = ours(path)  # compiles
            seconds: dict[str, list[float]] = {"ours": [], "loop": []}
            for _ in range(rounds):  # in turn, so that a busy spell hits both
                for who, function, argument in (("ours", ours, path), ("loop", loop, few)):
                    begin = time.perf_counter()
                    function(argument)
                    seconds[who].append(time.perf_counter() - begin)
            mine, theirs = statistics.median(seconds["ours"]), statistics.median(seconds["loop"]) * total / len(few)
            ratio = theirs / mine
            asked = f"{REQUIRED['DSEC']:.0f}" if name == "realistic" and ours is dsec_grids else ""
            rate = f"{total / 60e6:.1f}"
            rows.append([f"{name}: {what}", f"{total:,}", rate, f"{windows:,}", f"{mine:.2f}", f"{theirs:.0f}",
                         f"{ratio:.0f}", asked])  # fmt: skip
    return rows, ratio


def main(argv: list[str] | None = None) -> int:
    """Prints the tables; returns 1 when --check is given and a required ratio is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=64, help="recordings")
    parser.add_argument("--samples", type=int, default=1024, help="samples timed, of each loader a round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of which the median is taken")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dsec-events", type=int, default=150_000_000, help="events in the 60 s, at a realistic rate")
    parser.add_argument("--quick", action="store_true", help="few samples: to see that it runs")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a required ratio is missed")
    args = parser.parse_args(argv)
    if args.quick:
        args.files, args.samples, args.rounds, args.dsec_events = 16, 128, 1, 3_000_000
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")

    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder), args.files)
        shards = {}
        for compression in ("lz4", "none"):
            out = Path(folder) / compression
            write_shards(files, out, compression=compression, samples_per_shard=16, progress=False)
            shards[compression] = open_shards(out)
        cache_dir = str(Path(folder) / "decoded")
        warm = DataConfig(height=CANVAS[0], width=CANVAS[1], windows=1, window_us=0, cache_dir=cache_dir)
        warm_source = Recordings(files, warm, paired=False)
        for index in range(len(files)):  # the first epoch
            warm_source.sample(index, None)
        sizes = {name: sum(path.stat().st_size for path in Path(folder, name).rglob("*.*")) for name in shards}
        sizes["npz"] = sum(path.stat().st_size for path in files.files)

        def plain() -> Iterator[object]:
            return iter(
                DataLoader(
                    PlainNumPy(files.files, 1 << 30), args.batch_size, sampler=range(1 << 30), num_workers=args.workers
                )
            )

        loaders: dict[str, Callable[[], Iterator[object]]] = {"plain NumPy": plain}
        ways = {"npz files": (files, ""), "npz files decoded once (data.cache_dir)": (files, cache_dir)}
        ways |= {f"shards, {kind}": (shards[key], "") for kind, key in (("lz4", "lz4"), ("plain", "none"))}
        for name, (listing, cache) in ways.items():
            for place, inside in (("worker", True), ("main process", False)):
                loaders[f"{name}; grid in the {place}"] = lambda listing=listing, inside=inside, cache=cache: (
                    gep_loader(listing, args.batch_size, args.workers, inside, 0, cache)
                )
            for threads in (1, 2):
                loaders[f"{name}; {threads} thread{'s' * (threads > 1)}, grid in the main one"] = (
                    lambda listing=listing, threads=threads, cache=cache: gep_loader(
                        listing, args.batch_size, 0, False, threads, cache
                    )
                )
        rounds = [
            {name: rate(loader, args.batch_size, args.samples) for name, loader in loaders.items()}
            for _ in range(args.rounds)
        ]
        speed = {name: statistics.median(round[name] for round in rounds) for name in loaders}

        sparse = min(20_000_000, args.dsec_events)
        recordings = {"sparse": (1, sparse), "realistic": (15, args.dsec_events // 15)}
        dsec, dsec_ratio = dsec_rows(Path(folder), recordings, args.rounds)

    print_header("Loading samples", ("torch", "numpy", "numba", "pyarrow"))
    megabytes = ", ".join(f"{name} {size / args.files / 1e6:.2f} MB" for name, size in sizes.items())
    print(f"{args.files} recordings ({megabytes} each), {args.workers} workers, batches of {args.batch_size}.\n")
    base = speed["plain NumPy"]
    ratios = {name: max(v / base for k, v in speed.items() if k.startswith(name)) for name in ("npz files", "shards")}
    ratios["DSEC"] = dsec_ratio
    rows = [
        [
            name,
            f"{value:.0f}",
            f"{value / base:.1f}",
            "".join(f"{v:.0f}" for k, v in REQUIRED.items() if name.startswith(k)),
        ]
        for name, value in speed.items()
    ]
    print_table(("loader", "samples/s", "to plain NumPy", "required of the best"), rows)
    print("60 s of DSEC's HDF5, 480x640, in windows of 50 ms (`EventSource.windows`); the loops were timed on the")
    print("first 300,000 events and scaled up.\n")
    columns = ("", "events", "M events/s recorded", "windows", "seconds", "a Python loop, s", "ratio", "required")
    print_table(columns, dsec)
    missed = [name for name, value in ratios.items() if value < REQUIRED[name]]
    if args.check and missed:
        print(f"missed: {', '.join(missed)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
