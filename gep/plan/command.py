"""`gep plan`: from the command line to the tables."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from gep.accelerator import precision_of
from gep.plan import report
from gep.plan.devices import device_of, present
from gep.plan.measure import Measured, measure
from gep.plan.plan import Setup, plan
from gep.plan.workload import read


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    """Prints the plan.

    Args:
        arguments: the options of `gep plan`.
        argv: YAML files and dotted key=value.
    Raises:
        ValueError: a config, device or number that is wrong.
    """
    if arguments.gpus < 1 or arguments.batch < 0 or arguments.events < 0 or not 0 <= arguments.mfu <= 1:
        raise ValueError(
            f"--gpus {arguments.gpus} --batch {arguments.batch} --events {arguments.events} --mfu {arguments.mfu}: "
            "give --gpus >= 1, --batch and --events >= 0, and --mfu in [0, 1]"
        )
    if not any(item.endswith((".yaml", ".yml")) for item in argv) and not arguments.stage:
        raise ValueError("gep plan: name a stage's config, such as configs/stage1/gep_small.yaml, or --stage")
    if arguments.batch and not arguments.measure:
        raise ValueError("--batch has no effect without --measure; the run's own is train.batch_size=N")
    device = device_of(arguments.device)
    work = read(argv, gpus=arguments.gpus, stage=arguments.stage, stage1=arguments.stage1)
    if work.cfg.train.precision == "auto":
        work = work.with_train(precision="bf16" if device.name != "cpu" else precision_of("auto"))
    setup = Setup(
        device=device,
        gpus=arguments.gpus,
        sharded=arguments.sharding == "fsdp",
        mfu=arguments.mfu,
        events=arguments.events,
    )
    measured: Measured | None = None
    if arguments.measure:
        here = device if device.name == present() else device_of("auto")
        measured = measure(work, here, batch=arguments.batch, events=arguments.events)
        print(report.measured_text(measured, here.name))
        if here is device and not arguments.mfu:
            setup = dataclasses.replace(setup, scale=measured.scale)
    found = plan(work, setup)
    print(report.text(found))
    if arguments.json is not None:
        more = {} if measured is None else {"measured": dataclasses.asdict(measured)}
        arguments.json.write_text(report.to_json(found, **more), encoding="utf-8")
        print(arguments.json)
