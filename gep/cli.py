"""`gep demo | natural | scenes | info | render | predict | embed | convert | shard | plan | import | export | app`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gep import __version__, config
from gep.app.command import add_command as add_app
from gep.interop.command import add_commands as add_interop


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

    natural = commands.add_parser(
        "natural", help="from image sets to recordings of real objects, no real event trained on"
    )
    natural.add_argument("--cifar10", type=Path, required=True, help="labelled images: parquet files or a folder")
    natural.add_argument("--photos", type=Path, required=True, help="further pictures: a folder")
    natural.add_argument("--objects", type=Path, required=True, help="recordings of objects, a file or folder a class")
    natural.add_argument("--frames", type=Path, help="a recording with pictures, to be looked up by its events")
    natural.add_argument("--out", type=Path, default=Path("runs/natural"), help="folder of the results (%(default)s)")
    natural.add_argument("--fast", action="store_true", help="a few steps of everything; numbers mean little")
    natural.add_argument("--seed", type=int, default=0, help="of everything (%(default)s)")
    natural.epilog = "Further settings of stage 1 as dotted.key=value, anywhere on the line."
    natural.set_defaults(run=_natural)

    scenes = commands.add_parser("scenes", help="recordings of simulated scenes with masks and depth maps")
    scenes.add_argument("out", type=Path, help="a new folder, to be read with data.name=scenes data.root=OUT")
    scenes.add_argument("--train", type=int, default=800, help="scenes to learn from (%(default)s)")
    scenes.add_argument("--val", type=int, default=50, help="scenes to choose the best step by (%(default)s)")
    scenes.add_argument("--test", type=int, default=200, help="scenes to test on (%(default)s)")
    scenes.add_argument("--size", type=int, default=48, help="rows and columns of the sensor (%(default)s)")
    scenes.add_argument("--windows", type=int, default=4, help="windows of 40 ms in a recording (%(default)s)")
    scenes.add_argument("--seed", type=int, default=0, help="of everything (%(default)s)")
    scenes.set_defaults(run=_scenes)

    info = commands.add_parser("info", help="what a recording, a data set, shards or an exported model holds")
    info.add_argument("path", type=Path, help="a recording, a data set's root, a folder of shards, or an export")
    _add_reading(info)
    info.set_defaults(run=_info)

    render = commands.add_parser("render", help="draw a recording: PNG, GIF or MP4")
    render.add_argument("path", type=Path, help="a recording")
    render.add_argument("-o", "--out", type=Path, required=True, help="the picture (.png) or film (.gif, .mp4)")
    render.add_argument("--windows", type=int, help="PNG: windows side by side (6)")
    render.add_argument("--window-ms", type=float, help="film: events shown in a frame (33)")
    render.add_argument("--fps", type=float, default=30.0, help="film: frames a second (%(default)s)")
    render.add_argument("--slowdown", type=float, default=1.0, help="film: times slower than life (%(default)s)")
    render.add_argument("--with", dest="beside", choices=("llm_evrep",), help="images of a model beside the events")
    render.add_argument("--model", help="--with: the exported model, or its Hub id")
    _add_view(render, "--with: ")
    render.epilog = (
        "A model says itself which events it reads at a time; one that was trained on parts of recordings draws the "
        "whole recording (--windows 1), and wants to be told the length of a part (--window-ms) for a film."
    )
    _add_reading(render)
    render.set_defaults(run=_render)

    predict = commands.add_parser("predict", help="segmentation, depth or classes of a recording or a labelled set")
    predict.add_argument("model", help="export/ of a segmentation or depth run, classifier/ of recognition, a Hub id")
    predict.add_argument("path", type=Path, help="a recording; with --data the data set's root")
    predict.add_argument(
        "-o", "--out", type=Path, help="the film (.mp4, .gif), or a folder of PNGs (no suffix); classes: a .json"
    )
    predict.add_argument("--data", help="name of the data set that path holds: every sample, with its ground truth")
    predict.add_argument("--split", default="test", help="--data: its split (%(default)s)")
    predict.add_argument("--start-ms", type=float, default=0.0, help="recording: begin, from the first event")
    predict.add_argument("--stop-ms", type=float, help="recording: end, from the first event; default: all of it")
    predict.add_argument("--step-ms", type=float, default=0.0, help="recording: between predictions; default: a window")
    _add_view(predict, "recording: ")
    predict.add_argument("--fps", type=float, default=0.0, help="film: frames a second; default: as fast as life")
    predict.add_argument("--npz", action="store_true", help="also write the maps themselves")
    predict.epilog = (
        "With --data: its options as key=value (subsampling=ess, clip=false, …), anywhere on the line; others are as "
        "in the model's training. A model with num_events reads the last so many events before each time of a "
        "recording; with --data, as in evaluation, the last so many of each sample's own span, which may hold fewer."
    )
    _add_reading(predict)
    predict.set_defaults(run=_predict)

    embed = commands.add_parser("embed", help="tokens of every window of a recording, of any length, as .npy")
    embed.add_argument("path", type=Path, help="a recording")
    embed.add_argument("-o", "--out", type=Path, required=True, help="the .npy; NAME.times.npy is written beside it")
    embed.add_argument("--model", required=True, help="the export of stage 1 or 2, or a Hub id")
    embed.add_argument(
        "--what", choices=("tokens", "pooled", "hidden", "next", "image"), default="tokens",
        help="of the encoder: tokens, pooled; of the backbone: hidden, next, image (%(default)s)",
    )  # fmt: skip
    embed.add_argument("--span", type=int, help="windows the backbone looks back on; default: as trained")
    embed.add_argument("--window-ms", type=float, default=0.0, help="length of a window; default: as trained")
    embed.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="(%(default)s)")
    _add_reading(embed)
    embed.set_defaults(run=_embed)

    convert = commands.add_parser("convert", help="write a recording in another format, told by the suffix")
    convert.add_argument("source", type=Path, help="a recording")
    convert.add_argument("target", type=Path, help="the file to write, .arrow being gep's own format")
    convert.add_argument(
        "--compression", choices=("lz4", "zstd", "gzip", "none"), help=".arrow and .h5: how it is packed"
    )
    convert.add_argument("--recover", action="store_true", help="of a damaged recording, convert the sound prefix")
    convert.add_argument("--from-zero", action="store_true", help="count times from the first event")
    _add_reading(convert)
    convert.set_defaults(run=_convert)

    shard = commands.add_parser("shard", help="pack a data set into WebDataset shards")
    shard.add_argument("dataset", help="name of the data set, as in data.name")
    shard.add_argument("out", type=Path, help="folder of the shards; a run that was cut off goes on there")
    shard.add_argument("--root", required=True, help="folder that holds the data set")
    shard.add_argument("--split", default="train", help="(%(default)s)")
    shard.add_argument("--workers", type=int, default=1, help="processes; the output does not depend on it")
    shard.add_argument("--samples", type=int, default=1000, help="samples a shard (%(default)s)")
    shard.add_argument("--past-ms", type=float, default=0.0, help="video sets: events to keep from before each span")
    shard.add_argument("--future-ms", type=float, default=0.0, help="and from after it (data.jitter_us)")
    shard.add_argument("--compression", choices=("lz4", "zstd", "none"), default="lz4", help="(%(default)s)")
    shard.add_argument("--seed", type=int, default=0, help="of the order of the samples; -1 = as listed (%(default)s)")
    shard.add_argument("--skip-bad", action="store_true", help="leave unreadable recordings out, and list them")
    shard.epilog = "Further data options as key=value (data.* in --help of a stage), anywhere on the line."
    shard.set_defaults(run=_shard)

    _add_plan(commands)
    add_interop(commands)
    add_app(commands)

    # argparse does not take positionals on both sides of an option, so these are collected by hand.
    arguments, rest = parser.parse_known_args(argv)
    arguments.options = [item for item in rest if "=" in item and not item.startswith("-")]
    wrong = [item for item in rest if item not in arguments.options]
    if wrong or (arguments.options and arguments.command not in ("shard", "natural", "predict", "plan", "import")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    config.run_cli(lambda: arguments.run(arguments))


def _demo(arguments: argparse.Namespace) -> None:
    from gep.demo.pipeline import FAST, FULL, Demo

    size = FAST if arguments.fast else FULL
    results = Demo(arguments.out, nmnist=arguments.nmnist, size=size, seed=arguments.seed).run()
    print(json.dumps(results["recognition"], indent=2))
    print(f"\n{arguments.out / 'results.json'}\n{arguments.out / 'report.html'}: open it in a browser")


def _scenes(arguments: argparse.Namespace) -> None:
    from gep.data.scene_files import write_scenes
    from gep.data.scenes import SceneConfig
    from gep.demo.textures import scene_textures

    size = arguments.size
    settings = SceneConfig(height=size, width=size, focal_px=1.25 * size, windows=arguments.windows)
    counts = {name: getattr(arguments, name) for name in ("train", "val", "test") if getattr(arguments, name)}
    write_scenes(arguments.out, counts, scene_textures(arguments.seed), config=settings, seed=arguments.seed)
    print(f"{arguments.out}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


def _natural(arguments: argparse.Namespace) -> None:
    from gep.demo.natural import FAST, FULL, Natural, table

    results = Natural(
        cifar10=arguments.cifar10,
        photos=arguments.photos,
        objects=arguments.objects,
        frames=arguments.frames,
        out=arguments.out,
        size=FAST if arguments.fast else FULL,
        seed=arguments.seed,
        options=arguments.options,
    ).run()
    print(table(results))
    print(json.dumps({name: results[name] for name in ("teacher", "frames") if name in results}, indent=2))
    print(arguments.out / "results.json")


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--height", type=int, help="sensor rows, where the file does not say")
    parser.add_argument("--width", type=int, help="sensor columns, likewise")


def _add_view(parser: argparse.ArgumentParser, scope: str) -> None:
    parser.add_argument(
        "--rectify-map", type=Path, help=f"{scope}the camera's rectify map; default: rectify_map.h5 beside it"
    )
    parser.add_argument("--raw", action="store_true", help=f"{scope}leave events as they are, also without a map")


def _add_plan(commands: argparse._SubParsersAction) -> None:
    plan = commands.add_parser("plan", help="memory, time and disk that a pretraining run needs, from its config")
    plan.add_argument("config", nargs="*", help="YAML files of a stage, as its run.py takes them")
    plan.add_argument("--stage", type=int, choices=(1, 2), help="where the fields that are set do not tell")
    plan.add_argument("--stage1", action="append", default=[], metavar="FILE", help="stage 2: its stage-1 config")
    plan.add_argument("--gpus", type=int, default=1, help="devices that share a batch (%(default)s)")
    plan.add_argument("--device", default="auto", help="h200, h100, a100-80, rtx4090, l40s, cpu, …; default: this one")
    plan.add_argument("--sharding", choices=("ddp", "fsdp"), default="ddp", help="(%(default)s)")
    plan.add_argument("--mfu", type=float, default=0.0, help="share of the peak, in place of the assumed rates")
    plan.add_argument("--events", type=float, default=30_000, help="events a window, where cut by time (%(default)s)")
    plan.add_argument("--measure", action="store_true", help="calibrate by a few real steps here; needs no data")
    plan.add_argument("--batch", type=int, default=0, help="--measure: samples a step; default: what is affordable")
    plan.add_argument("--json", type=Path, metavar="FILE", help="also write everything there")
    plan.epilog = "Fields of the config as dotted.key=value, anywhere on the line."
    plan.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> None:
    from gep.plan.command import run

    # Between the YAML files, dotted options are positionals too.
    run(arguments, [*arguments.config, *arguments.options])


def _info(arguments: argparse.Namespace) -> None:
    from gep.data.describe import describe_path

    print(describe_path(arguments.path, height=arguments.height, width=arguments.width))


def _render(arguments: argparse.Namespace) -> None:
    from gep.events.io import open_events
    from gep.events.render import strip, video

    still = arguments.out.suffix.lower() == ".png"
    film = {"fps": arguments.fps, "slowdown": arguments.slowdown}
    if arguments.beside:
        _render_beside(arguments, still, film)
    elif arguments.model or arguments.rectify_map or arguments.raw:
        raise ValueError("--model, --rectify-map and --raw have no effect on events alone; add --with llm_evrep")
    else:
        with open_events(arguments.path, height=arguments.height, width=arguments.width) as source:
            if still:
                windows = 6 if arguments.windows is None else arguments.windows
                strip(source.read(), windows=windows).save(arguments.out)
            else:
                window_ms = 33.0 if arguments.window_ms is None else arguments.window_ms
                video(source, arguments.out, window_us=round(1000 * window_ms), **film)
    print(arguments.out)


def _render_beside(arguments: argparse.Namespace, still: bool, film: dict[str, Any]) -> None:
    import torch

    from downstream.llm_evrep.model import EvRep
    from downstream.llm_evrep.render import draw_film, draw_strip
    from gep.events.io import open_events

    if not arguments.model:
        raise ValueError("--with llm_evrep needs --model: the export of a downstream/llm_evrep run, or a Hub id")
    model = EvRep.from_pretrained(arguments.model).to("cuda" if torch.cuda.is_available() else "cpu")
    view = {"rectify_map": arguments.rectify_map, "raw": arguments.raw}
    with open_events(arguments.path, height=arguments.height, width=arguments.width) as source:
        if still:
            draw_strip(model, source, windows=arguments.windows, **view).save(arguments.out)
        else:
            window_us = round(1000 * (arguments.window_ms or 0.0))
            draw_film(model, source, arguments.out, window_us=window_us, **film, **view)


def _predict(arguments: argparse.Namespace) -> None:
    from downstream.predict import run

    run(arguments)


def _embed(arguments: argparse.Namespace) -> None:
    import torch

    from gep.embed import embed
    from gep.events.io import open_events
    from gep.hub import GEPModel

    model = GEPModel.from_pretrained(arguments.model).to("cuda" if torch.cuda.is_available() else "cpu")
    options = {name: getattr(arguments, name) for name in ("what", "span", "dtype")}
    with open_events(arguments.path, height=arguments.height, width=arguments.width) as source:
        written = embed(model, source, arguments.out, window_us=round(1000 * arguments.window_ms), **options)
    print(f"{arguments.out}: {written}")


def _convert(arguments: argparse.Namespace) -> None:
    from gep.events.io.convert import convert

    size = {"height": arguments.height, "width": arguments.width}
    options = {name: getattr(arguments, name) for name in ("recover", "from_zero", "compression")}
    count = convert(arguments.source, arguments.target, **size, **options)
    print(f"{arguments.target}: {count:,} events, {arguments.target.stat().st_size:,} bytes")


def _shard(arguments: argparse.Namespace) -> None:
    from gep.data.config import SourceConfig
    from gep.data.registry import list_recordings
    from gep.data.shard_write import write_shards

    options = config.load(SourceConfig, [f"name={arguments.dataset}", *arguments.options])
    listing = list_recordings(arguments.dataset, arguments.root, arguments.split, options)
    print(listing.describe())
    write_shards(
        listing,
        arguments.out,
        workers=arguments.workers,
        samples_per_shard=arguments.samples,
        past_us=round(1000 * arguments.past_ms),
        future_us=round(1000 * arguments.future_ms),
        compression=arguments.compression,
        shuffle_seed=None if arguments.seed < 0 else arguments.seed,
        skip_bad=arguments.skip_bad,
    )
    split = "" if arguments.split == "train" else f" data.train_split={arguments.split}"
    print(f"{arguments.out}: data.name=shards data.root={arguments.out}{split}")


if __name__ == "__main__":
    main()
