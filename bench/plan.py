"""`gep plan` against what happens: operations, peak memory and time of real steps, `python -m bench.plan`.

The time is predicted twice: from the rates of this processor, measured just before, and by calibration on a step of
another batch size (what `gep plan --measure` does). Under load from elsewhere the first is worth little.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import print_header, print_table
from gep.plan.devices import device_of
from gep.plan.measure import Measured, measure
from gep.plan.workload import read

ROOT = Path(__file__).resolve().parent.parent
NO_DOWNLOAD = "teacher.name=export:none"
CASES = {
    "nano, stage 1": (["configs/stage1/nmnist.yaml", NO_DOWNLOAD], 32),
    "nano, stage 1, bf16": (["configs/stage1/nmnist.yaml", NO_DOWNLOAD, "train.precision=bf16"], 32),
    "nano, stage 2": (["configs/stage2/nmnist.yaml", NO_DOWNLOAD], 8),
    "small, stage 1": (["configs/stage1/gep_small.yaml", "train.precision=no"], 1),
    "small, stage 1, bf16": (["configs/stage1/gep_small.yaml"], 1),
    "small, stage 2, bf16": (["configs/stage2/gep_small.yaml"], 1),
}
"""Name -> config and samples a step of the calibration; the step that is judged has twice as many."""


def main(argv: list[str] | None = None) -> dict[str, Measured]:
    """Prints the table; returns the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each (3)")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--scale", type=int, default=1, help="times as many samples a step (1); more on a GPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    print_header("Plan against measurement: predicted / measured", packages=("torch", "timm"))
    found, rows = {}, []
    for name, (config, batch) in CASES.items():
        if options.only not in name:
            continue
        config = [str(ROOT / item) if item.endswith(".yaml") else item for item in config]
        work, device = read(config), device_of("auto")
        calibration = measure(work, device, batch=batch * options.scale, steps=options.steps)
        judged = measure(work, device, batch=2 * batch * options.scale, steps=options.steps)
        found[name] = judged
        calibrated = calibration.scale * judged.seconds_predicted
        ratios = (
            judged.flops_predicted / judged.flops,
            judged.bytes_predicted / judged.bytes,
            judged.seconds_predicted / judged.seconds,
            calibrated / judged.seconds,
        )
        sizes = [str(judged.batch), f"{judged.flops / 1e9:.1f}", f"{judged.bytes / 2**30:.3f}", f"{judged.seconds:.3f}"]
        rows.append([name, *sizes, *(f"{ratio:.3f}" for ratio in ratios)])
    columns = ["case", "samples", "GFLOP", "peak GiB", "s", "operations", "memory", "time", "time, calibrated"]
    print_table(columns, rows)
    return found


if __name__ == "__main__":
    main()
