"""`python -m tests.faults --kills 50`: runs killed at random moments and resumed; exit status 1 on any difference."""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a process that forks has one thread
os.environ["ACCELERATE_USE_CPU"] = "true"

import torch

from tests.faults import forks, jobs, others
from tests.faults.kills import Tally, torment


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="how many, spread over the scenarios")
    parser.add_argument("--seed", type=int, default=0, help="decides all moments")
    parser.add_argument("--match", default="", help="only kills and checks whose name holds this regular expression")
    parser.add_argument("--keep", type=Path, help="a new folder for all files, which then stay")
    args = parser.parse_args()
    if not any(re.search(args.match, name) for name in (*others.CHECKS, *(one.name for one in jobs.SCENARIOS))):
        parser.error(f"--match {args.match}: no kill or check has such a name")
    torch.set_num_threads(1)
    chosen = [scenario for scenario in jobs.SCENARIOS if re.search(args.match, scenario.name)]
    begun, tallies = time.monotonic(), []
    # A kill loses nothing that is in the system's hands, on a disk or not; a slow disk would only cost time.
    in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=in_memory) as temporary:
        folder = args.keep or Path(temporary)
        world = folder / "world"
        world.mkdir(parents=True)
        status, _ = forks.run(lambda: jobs.make_world(world), world, folder / "log")
        if status != 0:
            print((folder / "log").read_text())
            return 1
        for number, scenario in enumerate(chosen):
            kills = args.kills // len(chosen) + (number < args.kills % len(chosen))
            if kills:
                tallies.append(torment(scenario, kills, world, folder / str(number), args.seed))
        outcomes = {
            name: _outcome(check, world, folder / re.sub(r"\W+", "_", name))
            for name, check in others.CHECKS.items()
            if re.search(args.match, name)
        }
    _print(tallies, outcomes, time.monotonic() - begun)
    bad = [tally for tally in tallies if tally.faults or not tally.kills == tally.resumed == tally.equal]
    return int(bool(bad or any(outcomes.values())))


def _outcome(check: others.Check, world: Path, folder: Path) -> str:
    """What went wrong in a check, or nothing."""
    folder.mkdir()
    try:
        check(world, folder)
    except (AssertionError, TimeoutError) as error:
        return str(error) or "assertion"
    return ""


def _print(tallies: list[Tally], outcomes: dict[str, str], seconds: float) -> None:
    print(f"{'killed by SIGKILL':24} {'kills':>6} {'resumed':>8} {'bit-equal':>10} {'faults':>7}")
    for tally in tallies:
        print(f"{tally.name:24} {tally.kills:6} {tally.resumed:8} {tally.equal:10} {len(tally.faults):7}")
    kills, faults = sum(tally.kills for tally in tallies), sum(len(tally.faults) for tally in tallies)
    resumed, equal = sum(tally.resumed for tally in tallies), sum(tally.equal for tally in tallies)
    print(f"{'all':24} {kills:6} {resumed:8} {equal:10} {faults:7}")
    for name, fault in outcomes.items():
        print(f"{name:24} {'FAULT' if fault else 'as it should be'}")
    wrong = sum(map(bool, outcomes.values()))
    print(f"{len(outcomes)} other faults, {wrong} not as they should be; {seconds:.0f} s")
    for name, fault in outcomes.items():
        if fault:
            print(f"\nFAULT in {name}: {fault}")
    for tally in tallies:
        for fault in tally.faults:
            print(f"\nFAULT in {tally.name}: {fault}")


if __name__ == "__main__":
    sys.exit(main())
