"""`gep import` and `gep export`: from the command line to a folder or a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gep.interop.graphs import Kind


def add_commands(commands: argparse._SubParsersAction) -> None:
    """The two commands' options."""
    into = commands.add_parser("import", help="encoder weights of DINOv2, DINOv3, GEP, timm or open_clip as an export")
    into.add_argument("file", type=Path, help=".safetensors, or a .pth (read with weights_only=True)")
    into.add_argument("out", type=Path, help="folder of the export, for GEPModel.from_pretrained and the stages")
    into.add_argument("--layout", required=True, choices=("dinov2", "dinov3", "gep", "timm", "open_clip"))
    into.add_argument("--arch", default="", help="timm: its name of the architecture, vit_…")
    into.add_argument("--prefix", help="what the encoder's names begin with; default: looked for")
    into.add_argument("--quick-gelu", action="store_true", help="open_clip: OpenAI's and others of that activation")
    into.add_argument("--height", type=int, help="rows of the input, a multiple of the patch; default: the layout's")
    into.add_argument("--width", type=int, help="columns, likewise")
    into.add_argument("--representation", default="", help="of the events; default: by the number of channels")
    into.add_argument("--fit", choices=("pad", "resize"), default="resize", help="other sensors' size (%(default)s)")
    into.add_argument("--windows", type=int, default=1, help="windows of a recording (%(default)s)")
    into.add_argument("--window-ms", type=float, default=0.0, help="length of a window; 0 = equal parts (%(default)s)")
    into.add_argument("--num-events", type=int, default=0, help="only so many, from the middle; 0 = all (%(default)s)")
    into.add_argument("--normalise", choices=("auto", "none"), default="auto", help="as the image model (%(default)s)")
    into.add_argument("--allow-leftover", action="store_true", help="leave tensors out that the layout does not know")
    into.epilog = "Parameters of --representation as key=value (bins=20), anywhere on the line."
    into.set_defaults(run=_import)

    out = commands.add_parser("export", help="a model for other runtimes, checked against PyTorch after writing")
    out.add_argument("model", help="an exported encoder, dense model or LLM-EvRep generator, or a Hub id")
    out.add_argument("out", type=Path, help="the file to write (.onnx, .pt, .pt2)")
    out.add_argument("--format", required=True, choices=("onnx", "torchscript", "exported-program"))
    out.add_argument("--height", type=int, help="rows of the input; default: as trained")
    out.add_argument("--width", type=int, help="columns, likewise")
    out.add_argument("--fixed-size", action="store_true", help="do not try for a dynamic height and width")
    out.set_defaults(run=_export)


def _size(arguments: argparse.Namespace) -> tuple[int, int] | None:
    if (arguments.height is None) != (arguments.width is None):
        raise ValueError("--height and --width go together: give both")
    return None if arguments.height is None else (arguments.height, arguments.width)


def _import(arguments: argparse.Namespace) -> None:
    import yaml

    from gep.interop.encoder import import_encoder

    params = {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in arguments.options)}
    imported = import_encoder(
        arguments.file,
        arguments.layout,
        arch=arguments.arch,
        prefix=arguments.prefix,
        quick_gelu=arguments.quick_gelu,
        size=_size(arguments),
        representation=arguments.representation,
        params=params,
        input={
            "fit": arguments.fit,
            "windows": arguments.windows,
            "window_us": round(1000 * arguments.window_ms),
            "num_events": arguments.num_events,
        },
        normalise=arguments.normalise,
        allow_leftover=arguments.allow_leftover,
    )
    print(imported.table)
    for note in imported.notes:
        print(note)
    imported.model.save_pretrained(arguments.out)
    print(f"{arguments.out}: {imported.model.encoder.config['arch']}, {imported.model.encoder.in_chans} channels")


def _export(arguments: argparse.Namespace) -> None:
    from gep import export
    from gep.interop.graphs import graph_of
    from gep.interop.runtimes import write

    folder = export.fetch(arguments.model)
    kind, model = _loaded(folder, export.kind_of(folder))
    graph = graph_of(model, kind, _size(arguments))
    print(write(graph, arguments.out, arguments.format, dynamic_size=not arguments.fixed_size))
    print(f"in: {', '.join(graph.inputs)}; out: {', '.join(graph.outputs)}; sides a multiple of {graph.unit}")


def _loaded(folder: Path, kind: str) -> tuple[Kind, Any]:
    from downstream.dense.model import DenseModel
    from downstream.llm_evrep.model import EvRep
    from gep.hub import GEPModel

    classes: dict[Kind, Any] = {"gep": GEPModel, "dense": DenseModel, "llm_evrep": EvRep}
    for known, model in classes.items():
        if kind == known:
            return known, model.from_pretrained(folder)
    raise ValueError(f"{folder} holds a model of kind {kind!r}; gep export takes {', '.join(classes)}")
