"""Packed tokens beside one fp32 file a frame: bytes on disk and samples/s of the loader, in one process.

The files hold the same tokens, .npy or .pt as torch.save writes them, loaded frame by frame and stacked into the batch.
Ours is what stage 2 iterates over: the seeded order, the layout, and the batch copied out of the mapped shards. Both
are read in shuffled order, from a warm page cache; what is measured is the loader, and not the disk.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import print_header, print_table
from gep.data.sampler import Batches
from gep.data.sequence import SequenceConfig
from gep.data.token_samples import TokenSamples, TokenSequences, collate_tokens
from gep.data.token_store import TokenPart, TokenPlan, TokenStore, finish, prepare, write_shard
from gep.engine import TrainConfig, make_accelerator

WINDOWS = 6
SIZES = {"nano 36×36": ((6, 6), 96), "small 224×224": ((14, 14), 384), "base 224×224": ((14, 14), 768)}
REQUIRED = {"bytes": 0.5, "rate": 20.0}
CHECKED = "small 224×224"


class FilePerFrame(Dataset):
    """Six event frames and the image, a file each."""

    def __init__(self, folder: Path, samples: int, load: Callable[[Path], Tensor], suffix: str):
        self.folder, self.samples, self.load, self.suffix = folder, samples, load, suffix

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Tensor:
        return torch.stack([self.load(self.folder / f"{index}_{k}{self.suffix}") for k in range(WINDOWS + 1)])


def from_npy(path: Path) -> Tensor:
    """A frame's tokens."""
    return torch.from_numpy(np.load(path))


def from_pt(path: Path) -> Tensor:
    """A frame's tokens."""
    return torch.load(path)


def write(folder: Path, samples: int, grid: tuple[int, int], dim: int) -> TokenStore:
    """The same random tokens as files a frame and as bf16 shards."""
    part = TokenPart("train", "random", "random tokens", samples, 1, False)
    plan = TokenPlan({}, (part,), WINDOWS, grid, dim, sparse=False, dtype="bf16", shard_bytes=256_000_000)
    draw = torch.Generator().manual_seed(0)
    (folder / "frames").mkdir()
    for shard in prepare(folder / "shards", plan):
        count = shard.stop - shard.start
        tokens = torch.randn(count, WINDOWS + 1, plan.num_tokens, dim, generator=draw)
        for row, sample in enumerate(tokens, start=shard.start):
            for k, frame in enumerate(sample):
                np.save(folder / "frames" / f"{row}_{k}.npy", frame.numpy())
                torch.save(frame.clone(), folder / "frames" / f"{row}_{k}.pt")
        bounds = torch.arange(WINDOWS * 2).view(WINDOWS, 2).expand(count, -1, -1).contiguous()
        facts = {
            "t_us": bounds,
            "label": torch.zeros(count, dtype=torch.int64),
            "bad": torch.zeros(count, dtype=torch.uint8),
        }
        tensors = {"tokens": tokens.bfloat16(), **facts}
        write_shard(folder / "shards", plan, shard, tensors, [str(row) for row in range(shard.start, shard.stop)])
    finish(folder / "shards", plan)
    return TokenStore(folder / "shards")


def loaders(folder: Path, store: TokenStore, samples: int, batch_size: int) -> dict[str, Iterator[object]]:
    """Endless batches of each."""

    def files(load: Callable[[Path], Tensor], suffix: str) -> Iterator[object]:
        dataset = FilePerFrame(folder / "frames", samples, load, suffix)
        while True:
            yield from DataLoader(dataset, batch_size, shuffle=True, drop_last=True)

    source = TokenSequences(TokenSamples(store, 0), SequenceConfig())
    ours = Batches(source, collate=collate_tokens, batch_size=batch_size)(0)
    return {
        "fp32 .npy a frame": files(from_npy, ".npy"),
        "fp32 .pt a frame": files(from_pt, ".pt"),
        "packed bf16": ours,
    }


def size_of(folder: Path, pattern: str) -> int:
    """Bytes of the files' contents."""
    return sum(path.stat().st_size for path in folder.glob(pattern))


def rates(streams: dict[str, Iterator[object]], batches: int, batch_size: int, rounds: int) -> dict[str, float]:
    """Median samples/s; all take turns, so that a busy spell hits them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in streams}
    for stream in streams.values():
        for _ in range(batches):  # maps, page tables, page cache
            next(stream)
    for _ in range(rounds):
        for name, stream in streams.items():
            begin = time.perf_counter()
            for _ in range(batches):
                next(stream)
            seconds[name].append(time.perf_counter() - begin)
    return {name: batches * batch_size / statistics.median(values) for name, values in seconds.items()}


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns 1 when --check is given and a required ratio is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=240, help="samples, of seven frames each")
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=9, help="rounds of which the median is taken")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), help=f"of {', '.join(SIZES)}")
    parser.add_argument(
        "--keep-memory", action="store_true", help="keep freed memory, as training on a CPU does: spares page faults"
    )
    parser.add_argument("--quick", action="store_true", help="few samples: to see that it runs")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a required ratio is missed")
    args = parser.parse_args(argv)
    if args.quick:
        args.samples, args.rounds, args.sizes = 48, 1, [CHECKED]
    torch.set_num_threads(1)
    if args.keep_memory:
        make_accelerator(TrainConfig(), "")
    rows, missed = [], []
    for name in args.sizes:
        grid, dim = SIZES[name]
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            store = write(folder, args.samples, grid, dim)
            streams = loaders(folder, store, args.samples, args.batch_size)
            speed = rates(streams, max(1, args.samples // args.batch_size), args.batch_size, args.rounds)
            sizes = {kind: size_of(folder / "frames", f"*{kind.split()[1]}") for kind in speed if "." in kind}
            sizes["packed bf16"] = size_of(folder / "shards", "*")
        base = "fp32 .npy a frame"
        for kind, value in speed.items():
            ratio = value / speed[base]
            rows.append([name, kind, f"{sizes[kind] / args.samples / 1e3:.0f}", f"{sizes[kind] / sizes[base]:.3f}",
                         f"{value:.0f}", f"{ratio:.1f}", f"{value / speed['fp32 .pt a frame']:.1f}"])  # fmt: skip
        share, ratio = sizes["packed bf16"] / sizes[base], speed["packed bf16"] / speed["fp32 .pt a frame"]
        if name == CHECKED and (share > REQUIRED["bytes"] or ratio < REQUIRED["rate"]):
            missed.append(f"{name}: {share:.4f} of the bytes, {ratio:.1f} × the samples/s")
    print_header("Tokens once", ("torch", "numpy", "safetensors"))
    print(f"{args.samples} samples of {WINDOWS} event frames and an image, batches of {args.batch_size}, no workers.\n")
    columns = ("tokens", "loader", "kB a sample", "of .npy's bytes", "samples/s", "to .npy", "to .pt")
    print_table(columns, rows)
    print(f"required at {CHECKED}: at most {REQUIRED['bytes']} of the bytes, {REQUIRED['rate']:.0f} × .pt's samples/s")
    if args.check and missed:
        print(f"missed: {', '.join(missed)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
