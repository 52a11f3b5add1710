"""`gep demo | info | render`: the command line for people; training goes through the stages' own run.py."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from gep import __version__, config


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script `gep`."""
    parser = argparse.ArgumentParser(prog="gep", description=__doc__)
    parser.add_argument("--version", action="version", version=f"gep {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="both stages, probes and a report, on a CPU and without a download")
    demo.add_argument("--nmnist", type=Path, help="root of real N-MNIST recordings to evaluate on")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the results (%(default)s)")
    demo.add_argument("--fast", action="store_true", help="a few steps of everything; numbers mean little")
    demo.add_argument("--seed", type=int, default=0, help="of everything (%(default)s)")
    demo.set_defaults(run=_demo)

    info = commands.add_parser("info", help="what a recording or an exported model is")
    info.add_argument("path", type=Path, help="a recording, or an export folder")
    info.set_defaults(run=_info)

    render = commands.add_parser("render", help="draw a recording as PNG, one picture a window")
    render.add_argument("path", type=Path, help="a recording")
    render.add_argument("-o", "--out", type=Path, required=True, help="the picture, .png")
    render.add_argument("--windows", type=int, default=6, help="windows side by side (%(default)s)")
    render.set_defaults(run=_render)

    arguments = parser.parse_args(argv)
    config.run_cli(lambda: arguments.run(arguments))


def _demo(arguments: argparse.Namespace) -> None:
    from gep.demo.pipeline import FAST, FULL, Demo

    size = FAST if arguments.fast else FULL
    results = Demo(arguments.out, nmnist=arguments.nmnist, size=size, seed=arguments.seed).run()
    print(json.dumps(results["recognition"], indent=2))
    print(f"\n{arguments.out / 'results.json'}\n{arguments.out / 'report.html'}: open it in a browser")


def _info(arguments: argparse.Namespace) -> None:
    from gep.events.io import read_events

    path: Path = arguments.path
    if path.is_dir():
        print((path / "config.json").read_text(encoding="utf-8"))
        return
    events = read_events(path)
    seconds = events.duration_us / 1e6
    rate = len(events) / seconds if seconds else 0.0
    share = 100 * float(events.p.mean()) if len(events) else 0.0
    print(
        f"{path}: {len(events):,} events in {seconds:.6f} s ({rate / 1e6:.3f} M/s), {share:.1f}% ON, "
        f"sensor {events.height} × {events.width} (height × width)"
    )


def _render(arguments: argparse.Namespace) -> None:
    from gep.events.io import read_events
    from gep.events.render import strip

    strip(read_events(arguments.path), windows=arguments.windows).save(arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
