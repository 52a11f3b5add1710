"""What a stage-1 step costs with the teacher's tokens from a cache, and without: `python bench/teacher_cache.py`.

All in one process, rounds in turn: the student alone (the teacher's tokens lie in memory as float32), the same step
with tokens read from the memory-mapped cache before it (in the training process, with nothing to hide behind), the
teacher's forward pass alone, and the step that asks the teacher. The teacher has random weights, which costs the same.
Batches of events lie in memory for all. The last table is reading a batch from pictures (JPEG) or from the cache.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import print_header, print_table
from gep.data.config import DataConfig
from gep.data.listing import Listing
from gep.data.paired import Recordings, collate
from gep.data.token_cache_fill import attach
from gep.data.token_cache_write import Teacher
from gep.data.view import decode
from gep.events.represent import Histogram
from gep.events.types import Events
from gep.models.encoder import EventEncoder
from gep.models.presets import preset
from gep.models.teacher import FrozenVFM, ImageModel
from gep.models.teacher_cache import fingerprint
from gep.optim import OptimConfig, make_optimizer, param_groups
from stage1_align.task import AlignLossConfig, Stage1Task

BATCHES = 4
EVENTS = {"nano": 2_000, "small": 30_000}


class Stream:
    """Recording of random events, seeded by the sample."""

    def __init__(self, index: int, side: int, count: int):
        rng = np.random.default_rng(index)
        x, y = rng.integers(0, side, (2, count))
        t = np.sort(rng.integers(0, 50_000, count))
        self.events = Events.from_arrays(t, x, y, rng.integers(0, 2, count), height=side, width=side)

    def read(self) -> Events:
        return self.events


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float]]:
    """Prints the tables; returns for each preset (cached / student, uncached / (student + teacher)) by CPU time."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--presets", nargs="+", default=["small", "nano"], choices=list(EVENTS), help="encoders")
    parser.add_argument("--batch", type=int, default=0, help="samples a step (small: 8, nano: 64)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds (7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    print_header("The teacher once", packages=("torch", "timm"))
    sizes = {name: options.batch or {"nano": 64, "small": 8}[name] for name in options.presets}
    return {name: measure(name, size, options.repeats) for name, size in sizes.items()}


def measure(name: str, size: int, repeats: int) -> tuple[float, float]:
    """Prints the tables of one preset."""
    side = preset(name).img_size[0]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        vfm = teacher_of(name, Path(folder))
        pictures, cached = (recordings(name, BATCHES * size) for _ in range(2))
        dims = {"grid": vfm.grid(side, side), "token_dim": vfm.embed_dim, "pooled_dim": vfm.pooled_dim}
        attach({name: (cached, True)}, folder, Teacher(vfm.features, fingerprint(vfm), **dims), say=lambda _: None)
        step = Step(name, vfm)

        def read(source: Recordings, start: int) -> dict[str, Any]:
            return collate([source.sample(start + row, None) for row in range(size)])

        def tokens(start: int) -> dict[str, Any]:
            rows = [cached.tokens.read(start + row) for row in range(size)]
            return {
                "teacher_tokens": torch.stack([t for t, _ in rows]),
                "teacher_pooled": torch.stack([p for _, p in rows]),
            }

        whole = [read(pictures, number * size) for number in range(BATCHES)]
        bare = [{key: value for key, value in batch.items() if key != "image"} for batch in whole]
        known = [{k: v.float() for k, v in tokens(number * size).items()} for number in range(BATCHES)]
        turn = Turn()
        arms = {
            "student alone": turn(lambda i: step({**bare[i], **known[i]})),
            "with the cache": turn(lambda i: step({**bare[i], **tokens(i * size)})),
            "teacher forward": turn(lambda i: vfm.features(whole[i]["image"])),
            "without the cache": turn(lambda i: step(whole[i])),
            "reading the cached tokens": turn(lambda i: tokens(i * size)),
            "reading the batch with pictures": turn(lambda i: read(pictures, i * size)),
            "reading the batch with tokens": turn(lambda i: read(cached, i * size)),
        }
        wall, cpu = rounds(arms, repeats)
    print(f"**{name}**, {side}×{side}, batch {size}, medians of {repeats} rounds\n")
    print_table(
        ["", "ms", "CPU ms", "CPU ÷ student alone"],
        [
            [key, f"{1e3 * wall[key]:.2f}", f"{1e3 * s:.2f}", f"{s / cpu['student alone']:.4f}"]
            for key, s in cpu.items()
        ],
    )
    ratios = []
    for clock, seconds in (("wall clock", wall), ("CPU time", cpu)):
        student, teacher = seconds["student alone"], seconds["teacher forward"]
        ratios = [seconds["with the cache"] / student, seconds["without the cache"] / (student + teacher)]
        print(
            f"by {clock}: with the cache / student alone = **{ratios[0]:.3f}**, without it / (student + teacher "
            f"forward) = **{ratios[1]:.3f}** (targets <= 1.03)"
        )
    print()
    return ratios[0], ratios[1]


def rounds(arms: dict[str, Callable[[], object]], repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of each arm, by the wall clock and of this process' CPU time, which other processes disturb less.

    Rounds take the arms in turn, forwards and backwards, after one that is not counted.
    """
    clocks = (time.perf_counter, time.process_time)
    spent: dict[str, list[list[float]]] = {name: [] for name in arms}
    for number in range(repeats + 1):
        for name in list(arms)[:: 1 if number % 2 else -1]:
            begin = [clock() for clock in clocks]
            arms[name]()
            spent[name].append([clock() - start for clock, start in zip(clocks, begin)])
    wall, cpu = (
        {name: statistics.median(lap[which] for lap in laps[1:]) for name, laps in spent.items()} for which in (0, 1)
    )
    return wall, cpu


class Turn:
    """Each function gets the batches in turn, each from the first one on."""

    def __call__(self, function: Callable[[int], object]) -> Callable[[], object]:
        count = iter(range(1 << 30))
        return lambda: function(next(count) % BATCHES)


class Step:
    """One optimiser step of stage 1."""

    def __init__(self, name: str, vfm: FrozenVFM):
        chosen = preset(name)
        encoder = EventEncoder(chosen.arch, in_chans=2, img_size=chosen.img_size, head_dim=vfm.pooled_dim)
        self.task = Stage1Task(encoder, vfm, Histogram(), AlignLossConfig())
        optim = OptimConfig()
        self.optimizer = make_optimizer(param_groups(self.task, lr=1e-5, weight_decay=0.05), optim)

    def __call__(self, batch: dict[str, Any]) -> None:
        self.optimizer.zero_grad()
        self.task(batch)["loss"].backward()
        nn.utils.clip_grad_norm_(self.task.parameters(), 1.0)
        self.optimizer.step()


def teacher_of(name: str, folder: Path) -> FrozenVFM:
    """The preset's teacher with random weights; nano's is an image model of its own shape."""
    chosen = preset(name)
    if chosen.teacher is not None:
        return FrozenVFM.from_spec(chosen.teacher, pretrained=False)
    model = ImageModel({"arch": chosen.arch, "in_chans": 3, "img_size": list(chosen.img_size)})
    return FrozenVFM.from_spec(f"export:{model.save(folder / 'teacher')}")


def recordings(name: str, count: int) -> Recordings:
    """Random events beside JPEGs of the sensor's size, in memory."""
    side = preset(name).img_size[0]
    coarse = np.random.default_rng(0).integers(0, 255, (count, 8, 8, 3)).astype(np.uint8)
    files = []
    for picture in coarse:
        buffer = io.BytesIO()
        Image.fromarray(picture).resize((side, side)).save(buffer, format="JPEG")
        files.append(buffer.getvalue())
    streams = [Stream(index, side, EVENTS[name]) for index in range(count)]
    listing = Listing(
        "random", "train", tuple(str(index) for index in range(count)), (), np.zeros(count, np.int64), ("one",),
        image=lambda index: np.ascontiguousarray(decode(files[index], str(index)).transpose(2, 0, 1)),
        recording=lambda index: streams[index],
    )  # fmt: skip
    return Recordings(listing, DataConfig(height=side, width=side, windows=1), paired=True)


if __name__ == "__main__":
    main()
