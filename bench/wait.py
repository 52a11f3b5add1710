"""How much of a stage-1 run is waiting for data: `python -m bench.wait`.

Whole runs of stage1_align on the demo's simulated digits, one after the other: its own settings (`nano`), and `small`
on the same recordings at 224 x 224. Each with batches made in the training thread (`train.threads=0`) and by one thread
ahead of it (`train.threads=1`, as the demo has it); the share is `data_wait` of the run's speed.jsonl, without its
first line.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import stage1_align.run
from bench.common import print_header, print_table
from bench.teacher_cache import teacher_of
from gep.demo.digits import load_digits
from gep.demo.recordings import simulate_digits

CONFIG = str(Path(__file__).resolve().parent.parent / "configs/stage1/nmnist.yaml")
TARGET = 0.03
CASES = {
    "nano": ["train.batch_size=64", "data.cache=true"],
    "small": ["train.batch_size=8", "encoder.preset=small", "data.height=224", "data.width=224", "data.fit=resize"],
}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Prints the table; returns the share of each row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--presets", nargs="+", default=list(CASES), choices=list(CASES), help="encoders")
    parser.add_argument("--steps", type=int, nargs=2, default=[200, 20], help="of nano, of small (200 20)")
    parser.add_argument("--digits", type=int, default=600, help="recordings simulated (600)")
    options = parser.parse_args(argv)
    print_header("Waiting for data", packages=("torch", "numpy", "timm"))
    found: dict[str, float] = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        with contextlib.redirect_stdout(io.StringIO()):
            for split, start in (("train", 0), ("test", options.digits)):
                digits = load_digits()
                chosen = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))[start:][
                    : options.digits if split == "train" else 64
                ]
                simulate_digits(digits.subset(chosen.numpy()), data, split=split, copies=1, seed=0)
        for name in options.presets:
            steps = options.steps[list(CASES).index(name)]
            teacher = teacher_of(name, Path(folder)).spec
            for threads in (0, 1):
                share, rate = _run(name, data, Path(folder) / f"{name}{threads}", teacher, steps, threads)
                found[f"{name} {threads}"] = share
                rows.append([name, str(threads), f"{100 * share:.1f} %", f"{rate:.1f}"])
    print_table(["encoder", "train.threads", "waiting for data", "samples/s"], rows)
    print(f"asked: <= {TARGET:.0%}")
    return found


def _run(name: str, data: Path, folder: Path, teacher: str, steps: int, threads: int) -> tuple[float, float]:
    """(share of the time, samples/s), medians over the lines of a run's speed.jsonl."""
    options = [f"run={folder}", f"data.root={data}", f"teacher.name={teacher}", f"train.steps={steps}"]
    more = [f"train.threads={threads}", f"train.log_every={max(1, steps // 10)}", "train.progress=false"]
    if teacher.startswith("timm:"):
        more.append("teacher.random=true")
    with contextlib.redirect_stdout(io.StringIO()):
        stage1_align.run.main([CONFIG, *CASES[name], *options, *more, "train.save_every=0"])
    lines = [json.loads(line) for line in (folder / "speed.jsonl").read_text().splitlines()][1:]
    return tuple(statistics.median(line[key] for line in lines) for key in ("data_wait", "samples_per_s"))


if __name__ == "__main__":
    main()
