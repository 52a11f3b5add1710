"""`gep predict`: what a segmentation, depth or recognition model says of a recording or of a labelled data set."""

from __future__ import annotations

import argparse
import json

import torch

from downstream.common import write_json
from downstream.dense.model import KIND as DENSE
from downstream.dense.model import DenseModel
from downstream.dense.predict import predict_data, predict_recording
from downstream.dense.settings import PredictOptions, data_of
from downstream.recognition.model import KIND as CLASSIFIER
from downstream.recognition.model import GEPClassifier
from downstream.recognition.predict import as_json, recognise, table
from gep import config, export
from gep.data.registry import list_recordings
from gep.events.io import open_events

_OF_MAPS = ("data", "start_ms", "stop_ms", "step_ms", "rectify_map", "raw", "fps", "npz")


def run(arguments: argparse.Namespace) -> None:
    """Does what the command line asks for, by the kind of the model.

    Raises:
        ValueError: options without effect, or a model that answers nothing by itself.
    """
    if not arguments.data and arguments.options:
        raise ValueError(f"{arguments.options[0]} has no effect on a recording; name a data set with --data")
    folder = export.fetch(arguments.model)
    kind = export.kind_of(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == CLASSIFIER:
        _classes(arguments, GEPClassifier.from_pretrained(folder).to(device))
    elif kind == DENSE:
        _maps(arguments, DenseModel.from_pretrained(folder).to(device))
    else:
        raise ValueError(
            f"{arguments.model} holds a model of kind {kind!r}; gep predict takes the export/ of a segmentation or "
            "depth run, or the classifier/ of a recognition run (gep embed takes encoders, gep render generators)"
        )


def _classes(arguments: argparse.Namespace, model: GEPClassifier) -> None:
    """A table on the screen, and everything as JSON where asked for."""
    if idle := [name for name in _OF_MAPS if getattr(arguments, name) not in (None, False, 0.0)]:
        given = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise ValueError(f"{given} has no effect with a recognition model, which answers for whole recordings")
    if arguments.out is not None and arguments.out.suffix != ".json":
        raise ValueError(f"-o {arguments.out}: a recognition model's answer is written as .json")
    with open_events(arguments.path, height=arguments.height, width=arguments.width) as source:
        found = recognise(model, source)
    print(table(model, found))
    if arguments.out is not None:
        write_json(arguments.out, dict(as_json(model, found)))
        print(arguments.out)


def _maps(arguments: argparse.Namespace, model: DenseModel) -> None:
    """A film or pictures."""
    if arguments.out is None:
        raise ValueError("-o is needed: the film (.mp4, .gif), or a folder of PNGs (no suffix)")
    if arguments.data and (arguments.start_ms or arguments.step_ms or arguments.stop_ms is not None):
        raise ValueError("--start-ms, --stop-ms and --step-ms have no effect with --data: its labels say when")
    if arguments.data and (arguments.rectify_map or arguments.raw):
        raise ValueError("--rectify-map and --raw have no effect with --data: the data set has its own maps")
    shown = {"fps": arguments.fps, "npz": arguments.npz}
    if arguments.data:
        options = config.load(PredictOptions, arguments.options)
        chosen = {name: getattr(options, name) for name in config.given(arguments.options)}
        data = data_of(model, {"name": arguments.data, "root": str(arguments.path), **chosen})
        listing = list_recordings(arguments.data, arguments.path, arguments.split, data)
        print(listing.describe())
        print(json.dumps(predict_data(model, listing, arguments.out, data=data, **shown), indent=2))
    else:
        times = {f"{name}_us": round(1000 * getattr(arguments, f"{name}_ms")) for name in ("start", "step")}
        stop_us = None if arguments.stop_ms is None else round(1000 * arguments.stop_ms)
        with open_events(arguments.path, height=arguments.height, width=arguments.width) as source:
            view = {"rectify_map": arguments.rectify_map, "raw": arguments.raw}
            count = predict_recording(model, source, arguments.out, stop_us=stop_us, **times, **view, **shown)
        print(f"{count:,} predictions")
    print(arguments.out)
