"""`python -m tests.fuzz --inputs 20000`: mutated recordings through every reader; exit status 1 on any failure."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.fuzz import run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000, help="how many inputs")
    parser.add_argument("--seed", type=int, default=0, help="decides all mutations")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--only", type=int, help="run this one input here and print what happens")
    parser.add_argument("--keep", type=Path, help="with --only: a folder for the input's files")
    parser.add_argument("--match", default="", help="only recordings whose name contains this")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--plant", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        run.worker(args.seed, *map(int, args.worker.split(",")), plant=args.plant, match=args.match)
        return 0
    if args.only is not None:
        kind, text = run.one(args.seed, args.only, args.keep, args.match)
        print(f"{kind}: {text}")
        return int(kind == "FAILURE")
    report = run.fuzz(args.inputs, seed=args.seed, workers=args.workers, match=args.match)
    for (name, kind), count in sorted(report.outcomes.items()):
        print(f"{name:24} {kind:10} {count:6}")
    match = f" --match {args.match}" if args.match else ""
    for number, text in sorted(report.failures.items()):
        print(f"\nFAILURE in input {number} (python -m tests.fuzz --seed {args.seed}{match} --only {number})\n{text}")
    speed = report.inputs / report.seconds
    print(f"\n{report.inputs:,} inputs, {len(report.failures)} failures, {report.seconds:.0f} s ({speed:.0f} a second)")
    return int(bool(report.failures) or report.inputs < args.inputs)


if __name__ == "__main__":
    sys.exit(main())
