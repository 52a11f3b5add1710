"""Monocular depth from the command line.

accelerate launch downstream/depth/run.py configs/downstream/depth/mvsec.yaml \
    model=runs/gep_small/stage2/export data.root=DIR mode=finetune
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from downstream.dense.run import run_dense
from downstream.depth.task import Depth, DepthConfig
from gep import config


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains and evaluates; writes results_<mode>.json and export/ into the run folder, and prints the tables.

    Args:
        argv: YAML files and dotted key=value; None = the command line's.
    Returns:
        What is in results_<mode>.json.
    """
    cfg = config.load(DepthConfig, argv)
    return run_dense(cfg, lambda listing: Depth.of(listing, cfg), argv)


if __name__ == "__main__":
    config.run_cli(main)
