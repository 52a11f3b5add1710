"""Stage 1 on real files: shards, parquet, photographs and their mix, on one process and on two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gep import cli
from gep.models.teacher import ImageModel

ROOT = Path(__file__).resolve().parents[1]
COMMON = ["data.height=36", "data.width=36", "encoder.preset=nano", "represent.log1p=true", "represent.scale=0.5",
          "train.steps=4", "train.batch_size=16", "train.progress=false",
          "train.save_every=0", "train.log_every=1"]  # fmt: skip


@pytest.fixture(scope="module")
def prepared(real_data, tmp_path_factory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("sources")
    encoder = {"arch": "nano", "in_chans": 3, "img_size": (36, 36)}
    ImageModel(encoder, [str(digit) for digit in range(10)]).save(base / "teacher")
    cli.main(["shard", "nmnist", str(base / "shards"), "--root", str(real_data / "nmnist"), "--split", "train",
              "--samples", "100", "--workers", "2"])  # fmt: skip
    return {
        "teacher": f"teacher.name=export:{base / 'teacher'}",
        "shards": str(base / "shards"),
        "nmnist": str(real_data / "nmnist"),
        "cifar10": str(real_data / "cifar10"),
        "photos": str(real_data / "images"),
    }


def settings(prepared: dict[str, str], kind: str, folder: Path) -> list[str]:
    sources = {
        "shards": ["name=shards", f"root={prepared['shards']}"],
        "cifar10": ["name=images", f"images.path={prepared['cifar10']}"],
        "photos": ["name=images", f"images.path={prepared['photos']}"],
        "nmnist": ["name=nmnist", f"root={prepared['nmnist']}"],
    }
    if kind == "mix":
        # The first one is evaluated on: a small part of the recordings.
        sources["shards"].append("holdout=0.05")
        given = [f"data.mix.{name}.{item}" for name, items in sources.items() for item in (*items, "window_us=50000")]
    else:
        given = [f"data.{item}" for item in sources[kind]] + ["data.holdout=0.02", "data.window_us=50000"]
    return [*given, *COMMON, "data.windows=2", "data.pick=1", prepared["teacher"], f"run={folder}"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shards", "cifar10", "photos", "mix"])
def test_one_process_and_two_take_the_same_steps(prepared, kind, tmp_path):
    losses = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes),
                   "stage1_align/run.py", *settings(prepared, kind, folder), "train.num_workers=1"]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[processes] = [row["loss"] for row in rows if "loss" in row]
        assert len(losses[processes]) >= 4
        assert (folder / "export" / "model.safetensors").exists()
    if kind not in ("shards", "mix"):  # whose order is split by rank
        assert losses[1] == pytest.approx(losses[2], rel=1e-4)
