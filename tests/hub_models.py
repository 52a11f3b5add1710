"""The smallest model of every kind that goes to a Hub."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch

from downstream.dense.features import HistogramFeatures
from downstream.dense.heads import build_head
from downstream.dense.model import DenseModel
from downstream.llm_evrep.generator import build_generator
from downstream.llm_evrep.model import EvRep
from downstream.recognition.model import GEPClassifier
from gep.events.represent import EventImage, Histogram
from gep.hub import GEPModel
from gep.models import EventEncoder, ImageModel
from gep.pretrained import Pretrained

INPUT = {"height": 36, "width": 36, "fit": "pad", "windows": 1, "window_us": 50_000, "num_events": 0}
NANO = {"arch": "nano", "in_chans": 3, "img_size": [36, 36]}


def gep(seed: int = 0) -> GEPModel:
    torch.manual_seed(seed)
    encoder = EventEncoder("nano", 2, (36, 36))
    return GEPModel.from_parts(encoder, Histogram(), SimpleNamespace(**INPUT)).eval()


def dense() -> DenseModel:
    features = HistogramFeatures(gep(), windows=1)
    head = build_head("linear", features.channels, 3)
    return DenseModel(
        features, head, kind="segmentation", input_settings=INPUT, task={"classes": ["a", "b", "c"]}
    ).eval()


def evrep() -> EvRep:
    return EvRep(EventImage(), build_generator("nano", in_chans=3), input_settings=INPUT).eval()


def classifier() -> GEPClassifier:
    return GEPClassifier(gep(), ["left", "right"], feature="last").eval()


MODELS: dict[str, Callable[[], Pretrained]] = {
    "gep": gep,
    "dense": dense,
    "evrep": evrep,
    "classifier": classifier,
    "image": lambda: ImageModel(NANO, ["cat", "dog"]).eval(),
}
