"""Images to frames on one device: simulate and rasterise 224x224 samples of T windows, beside an encoder's step.

    python bench/simulate.py --device cuda --preset small
    python bench/simulate.py --quick

The stills are synthetic photographs (smooth random textures), the camera and the sensor those that
`configs/stage1/images.yaml` starts from. What is timed is what a training step does on the device: a batch of stills to
(B * T, C, H, W), and the encoder's forward and backward pass over these.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

if __name__ == "__main__":  # run as a file: the checkout's root is not on the path then
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import print_header, print_table
from gep.data.config import DataConfig
from gep.data.images import ImagesConfig, collate_stills, film
from gep.events.frames import frames
from gep.events.represent import Histogram, Representation, VoxelGrid
from gep.events.stills import StillBatch
from gep.models.encoder import EventEncoder
from gep.models.presets import preset


def main(argv: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", default="small", help="encoder beside which it is timed")
    parser.add_argument("--batch", type=int, default=16, help="samples")
    parser.add_argument("--size", type=int, default=224, help="canvas side [px]")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a CPU")
    parser.add_argument("--quick", action="store_true", help="2 samples of 72x72, nano: does it run?")
    args = parser.parse_args(argv)
    if args.quick:
        args.batch, args.preset, args.repeats, args.size = 2, "nano", 2, 72
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)

    everything, picked = (stills(args, pick).to(device) for pick in (0, 1))
    counts = everything.counts()
    rate = counts.sum().item() / (counts.shape[0] * args.size**2 * 0.05)
    rows = []
    for name, batch, represent in (
        ("histogram, all windows", everything, Histogram(log1p=True)),
        ("voxel grid of 5, all windows", everything, VoxelGrid(5)),
        ("histogram, one picked window", picked, Histogram(log1p=True)),
    ):
        spent = seconds(_make(represent, batch), device, args.repeats)
        step = seconds(training_step(args, represent, batch), device, args.repeats)
        figures = (1e3 * spent, args.batch / spent, 1e3 * step, args.batch / step, spent / step)
        rows.append([name, *(f"{value:.3g}" for value in figures)])

    print_header("Images to frames")
    print(
        f"{args.batch} samples, {args.windows} windows of 50 ms, {args.size}x{args.size}, {args.device}; "
        f"{rate:.1f} events a pixel and second; median of {args.repeats}; encoder {args.preset}, "
        f"{'float32' if device.type == 'cpu' else 'bf16'}.\n"
    )
    columns = ("", "simulate [ms]", "samples/s", "encoder step [ms]", "its samples/s", "simulate ÷ step")
    print_table(columns, rows)
    return 0


def stills(args: argparse.Namespace, pick: int) -> StillBatch:
    """A batch of samples as the data workers would send it."""
    config = DataConfig(
        name="images", height=args.size, width=args.size, windows=args.windows, window_us=50_000, pick=pick,
        images=ImagesConfig(path="synthetic"),
    )  # fmt: skip
    samples = []
    for number in range(args.batch):
        rng = np.random.default_rng(number)
        samples.append(film(texture(rng), config, key=str(number), label=-1, number=number, rng=rng))
    return collate_stills(samples)


def texture(rng: np.random.Generator, side: int = 320) -> np.ndarray:
    """uint8 (side, side, 3): noise that fires about as many events as photographs do (10 a pixel and second)."""
    fy, fx = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)
    falloff = 1 / np.maximum(np.hypot(fy, fx), 1 / side) ** 1.5
    spectrum = np.fft.rfft2(rng.normal(size=(3, side, side))) * falloff
    planes = np.fft.irfft2(spectrum, s=(side, side))
    scaled = 110 + 50 * (planes - planes.mean()) / planes.std()
    return scaled.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def training_step(args: argparse.Namespace, represent: Representation, batch: StillBatch) -> Callable[[], object]:
    """Forward and backward of the encoder over the frames of a batch."""
    chosen = preset(args.preset)
    encoder = EventEncoder(chosen.arch, in_chans=represent.channels, img_size=(args.size, args.size)).to(batch.device)
    made = frames(represent, batch)

    def step() -> None:
        with torch.autocast(batch.device.type, dtype=torch.bfloat16, enabled=batch.device.type != "cpu"):
            tokens, _ = encoder(made)
        tokens.float().square().mean().backward()

    return step


def seconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of a call, after one that is not timed."""
    spent = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent.append(time.perf_counter() - begin)
    return statistics.median(spent[1:])


def _make(represent: Representation, batch: StillBatch) -> Callable[[], object]:
    return lambda: frames(represent, batch)


if __name__ == "__main__":
    sys.exit(main())
