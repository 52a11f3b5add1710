"""Semantic segmentation from the command line.

accelerate launch downstream/segmentation/run.py configs/downstream/segmentation/dsec.yaml \
    model=runs/gep_small/stage2/export data.root=DIR mode=finetune
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from downstream.dense.run import run_dense
from downstream.segmentation.task import Segmentation, SegmentationConfig
from gep import config


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains and evaluates; writes results_<mode>.json and export/ into the run folder.

    Args:
        argv: YAML files and dotted key=value; None = the command line's.
    Returns:
        What is in results_<mode>.json.
    """
    cfg = config.load(SegmentationConfig, argv)
    return run_dense(cfg, lambda listing: Segmentation.of(listing, cfg.dice), argv)


if __name__ == "__main__":
    config.run_cli(main)
