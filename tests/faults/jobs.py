"""What is killed: jobs that do their work in the current folder and go on there when they are started again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import stage1_align.run as stage1
import stage2_autoregress.pack as pack
from gep import cli
from gep.data.cache import cached_source
from gep.data.config import DataConfig
from gep.data.listing import Listing
from gep.data.paired import Recordings
from gep.data.registry import list_recordings
from gep.data.token_cache_fill import attach
from gep.data.token_cache_write import Teacher
from gep.demo.digits import Digits
from gep.demo.recordings import simulate_digits
from gep.events.io import read_events
from gep.events.io.npz import write_npz
from gep.events.represent import Histogram
from gep.hub import GEPModel
from gep.models.encoder import EventEncoder
from gep.models.teacher import FrozenVFM, ImageModel
from gep.models.teacher_cache import fingerprint

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Scenario:
    """Something to kill."""

    name: str
    job: Callable[[Path], object]
    """Given the folder of `make_world`."""
    within: str = ""
    """Kills fall on changes of paths that contain this."""
    timed: bool = False
    """Kills fall on random moments."""


def make_world(folder: Path) -> None:
    """20 recordings, `nmnist` with their pictures and `recorded` without, and untrained `teacher` and `model`."""
    rng = np.random.default_rng(0)
    images = np.zeros((20, 28, 28), np.uint8)
    for image in images:
        x, y = rng.integers(6, 18, 2)
        image[y : y + rng.integers(4, 10), x : x + rng.integers(2, 8)] = 255
    digits = Digits(images, np.arange(20) % 10, np.arange(20) // 10)
    simulate_digits(digits, folder / "nmnist", split="train", copies=1, seed=0)
    (folder / "recorded").mkdir()
    for number, file in enumerate(sorted((folder / "nmnist").rglob("*.bin"))):
        write_npz(folder / "recorded" / f"{number:02d}.npz", read_events(file))
    torch.manual_seed(0)
    ImageModel({"arch": "nano", "in_chans": 3, "img_size": (36, 36)}, list("0123456789")).save(folder / "teacher")
    model().save_pretrained(folder / "model")


def model(seed: int = 1) -> GEPModel:
    """An untrained model."""
    torch.manual_seed(seed)
    return GEPModel.from_parts(EventEncoder("nano", in_chans=2, img_size=(36, 36)), Histogram(), DataConfig())


def train(world: Path, *more: str) -> dict[str, float]:
    """Six steps of stage 1 with three checkpoints and an export, into `run`."""
    return stage1.main(
        [
            *(str(ROOT / "configs/stage1/nmnist.yaml"), f"data.root={world / 'nmnist'}", "data.holdout=0.2"),
            *(f"teacher.name=export:{world / 'teacher'}", "run=run", "train.steps=6", "train.batch_size=4"),
            *("train.save_every=2", "train.log_every=1", "train.progress=false", *more),
        ]
    )


def export_again(world: Path) -> None:
    """An export in the place of another one."""
    if not Path("made").exists():
        model(1).save_pretrained("out")
        Path("made").touch()
    model(2).save_pretrained("out")


def shard(world: Path) -> None:
    """Five shards of `gep shard`."""
    cli.main(["shard", "nmnist", "out", "--root", str(world / "nmnist"), "--samples", "4"])


def cache_tokens(world: Path) -> None:
    """The teacher's tokens of all pictures in parts of a few rows."""
    vfm = FrozenVFM.from_spec(f"export:{world / 'teacher'}")
    data = DataConfig(height=36, width=36, fit="pad")
    source = Recordings(list_recordings("nmnist", world / "nmnist", "train", data), data, paired=True, crops=True)
    teacher = Teacher(vfm.features, fingerprint(vfm), vfm.grid(36, 36), vfm.embed_dim, vfm.pooled_dim)
    attach({"training": (source, True)}, "tokens", teacher, batch_size=2, part_bytes=20_000)


def cache_recordings(world: Path) -> None:
    """`data.cache_dir` filled by reading each recording once."""
    files = tuple(sorted((world / "recorded").iterdir()))
    keys, labels = tuple(file.stem for file in files), np.zeros(len(files), np.int64)
    listing = Listing("made", "train", keys, files, labels, ("any",), (34, 34))
    for index in range(len(files)):
        cached_source(listing, index, Path("decoded")).read()


def pack_tokens(world: Path) -> None:
    """Tokens for stage 2 in shards of a few samples."""
    pack.main(
        [
            *(str(ROOT / "configs/stage2/nmnist.yaml"), f"data.root={world / 'nmnist'}", "data.holdout=0.2"),
            *(f"teacher.name=export:{world / 'teacher'}", f"model={world / 'model'}", "run=run", "pack=packed"),
            *("pack_dtype=fp32", "shard_mb=1", "train.batch_size=4", "train.progress=false"),
        ]
    )


SCENARIOS = (
    Scenario("stage 1: steps", train, timed=True),
    Scenario("stage 1: checkpoint", train, within="/step_"),
    Scenario("stage 1: run folder", train, within="run/"),
    Scenario("stage 1: export", train, within="run/.export"),
    Scenario("export over another", export_again, within="/.out."),
    Scenario("gep shard", shard),
    Scenario("teacher cache", cache_tokens),
    Scenario("data.cache_dir", cache_recordings),
    Scenario("token packing", pack_tokens),
)
