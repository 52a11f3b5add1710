"""What packed tokens depend on, and what has no effect on them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gep import export
from gep.data.config import DataConfig
from gep.data.images import StillImages
from gep.data.paired import Recordings
from gep.events.represent import describe
from gep.hub import GEPModel
from gep.models.config import TeacherConfig

# What changes no token of the version that is packed: places, the choice of the list (whose hash is in the key), and
# what is drawn anew for every training sample.
_FREE = {"name", "root", "train_split", "eval_split", "holdout", "cache", "cache_dir", "max_bad_fraction", "mix"}
_FREE |= {"pick", "augment", "jitter_us", "images"}
_FREE_IMAGES = {"path", "image_column", "label_column", "streaming", "buffer", "held_rows"}
_FREE_IMAGES |= {"crop", "crop_aspect", "flip", "vary"}


def key_of(data: DataConfig, model: GEPModel, teacher: TeacherConfig | None) -> dict[str, str]:
    """What tokens are made from besides the recordings: name -> value, to be compared and shown.

    Args:
        data: with the export's input settings taken over.
        teacher: None = its tokens are not read.
    """
    key = {"model": _model_hash(model)}
    if teacher is not None:
        key["teacher"] = _teacher_key(teacher, model.preset)
    values: dict[str, Any] = {f"data.{name}": getattr(data, name) for name in ("height", "width", "windows")}
    for name, source in data.sources().items():
        prefix = f"data.mix.{name}" if data.mix else "data"
        values |= {f"{prefix}.{k}": v for k, v in _fields(source).items() if k not in _FREE}
        if source.name == "images":
            images = {k: v for k, v in _fields(source.images).items() if k not in _FREE_IMAGES}
            values |= {f"{prefix}.images.{k}": dataclasses.asdict(v) if k == "sensor" else v for k, v in images.items()}
        if data.mix:
            values[f"{prefix}.represent"] = dict(data.mix[name].represent)
    return key | {name: json.dumps(value, sort_keys=True) for name, value in values.items()}


def lists_of(train: Mapping[str, Recordings | StillImages], held: Recordings | StillImages) -> dict[str, str]:
    """Hashes of the lists of samples."""
    lists = {f"list train {name}": source.listing.hash for name, source in train.items()}
    return lists | {f"list eval {next(iter(train))}": held.listing.hash}


def warn_idle(data: DataConfig) -> None:
    """Warns of settings that have no effect on packed tokens, which are the same every epoch."""
    idle = []
    for name, source in data.sources().items():
        prefix = f"data.mix.{name}" if data.mix else "data"
        usual = _fields(type(source.augment)())
        changed = {k: v for k, v in _fields(source.augment).items() if v != usual[k]}
        idle += [f"{prefix}.augment.{k}={v}" for k, v in changed.items()]
        idle += [f"{prefix}.jitter_us={source.jitter_us}"] * bool(source.jitter_us)
        idle += [f"{prefix}.num_events={source.num_events} (cut at random)"] * bool(source.num_events)
        idle += [f"{prefix}.images (filmed anew)"] * (source.name == "images")
    if idle:
        warnings.warn(
            f"no effect on packed tokens, which are of each sample's one unchanged version: {', '.join(idle)}; set "
            "tokens= (empty) for tokens on the fly",
            stacklevel=2,
        )


def _fields(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def weights_of(teacher: TeacherConfig, encoder_preset: str | None) -> Path | None:
    """The local file of an image model's weights; None where its name alone says which they are."""
    kind, _, name = teacher.spec(encoder_preset).partition(":")
    if kind == "export":
        return export.fetch(name) / export.WEIGHTS
    return None if teacher.file is None else Path(teacher.file).expanduser()


def _teacher_key(teacher: TeacherConfig, encoder_preset: str | None) -> str:
    """What an image model's tokens depend on, without building it; an exported one is known by its weights."""
    spec, file = teacher.spec(encoder_preset), weights_of(teacher, encoder_preset)
    digest = hashlib.sha256(json.dumps([teacher.image_size, teacher.random]).encode())
    if file is not None:
        with open(file, "rb") as stream:
            while part := stream.read(1 << 24):
                digest.update(part)
    return f"{'export' if spec.startswith('export:') else spec} {digest.hexdigest()[:16]}"


def _model_hash(model: GEPModel) -> str:
    """First 16 hex digits of a SHA-256 over the encoder, its settings and its representation."""
    digest = hashlib.sha256(json.dumps([model.encoder.config, describe(model.represent)], sort_keys=True).encode())
    for name, value in sorted(model.encoder.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
