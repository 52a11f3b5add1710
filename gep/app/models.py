"""Models by their folders: what kind each is, and the views that it can fill."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from downstream.dense.model import DenseModel
from downstream.dense.pictures import ClassLegend, DepthLegend, metres_text, viridis
from downstream.dense.predict import legend_of
from downstream.dense.streaming import on_sensor, predictions
from downstream.dense.view import view_of
from downstream.llm_evrep.model import EvRep
from downstream.recognition.model import GEPClassifier
from gep import export
from gep.app import html
from gep.app.encoder_views import NEAREST, EncoderViews
from gep.app.images import Images, read_images
from gep.app.recording import Shown
from gep.app.views import View
from gep.data.layout import IGNORE
from gep.events.slicing import into_windows
from gep.hub import GEPModel
from gep.models.teacher import FrozenVFM

_KINDS = ("gep", "dense", "llm_evrep", "classifier")
_BEYOND = 222 / 255  # grey of what a model's canvas did not reach
_LEAST = 0.001  # share of the pixels from which on a class is in the legend
_BARS = 8


class Loaded(NamedTuple):
    """What models can show."""

    views: list[View]
    """In the order of the models, titles told apart by the models' names where two would be the same."""
    window_us: int
    """Length of the windows that the first model which says so was trained on [µs]; 0 = none does."""
    rows: int
    """Of the first model's input [px]."""


def load(names: Sequence[str], *, images: Path | None = None, teacher: str = "", device: str = "cpu") -> Loaded:
    """The views of models.

    Args:
        names: at least one folder or Hub id of an encoder, a dense model, an LLM-EvRep generator or a classifier.
        images: a folder to look for the nearest images in; needs an encoder.
        teacher: the image model that the encoder was aligned with; empty = the one that its export names.
        device: where the models run.
    Raises:
        FileNotFoundError, ValueError: a model that cannot be loaded, or images without what reads them.
    """
    found: list[tuple[str, View]] = []
    settings: list[Mapping[str, Any]] = []
    for name in names:
        folder = export.fetch(name)
        kind = export.kind_of(folder)
        if kind == "gep":
            model = GEPModel.from_pretrained(folder).to(device)
            read = None if images is None else _images(model, name, images, teacher)
            found += [(name, view) for view in EncoderViews(model, read).views()]
            settings.append(model.input_settings)
        elif kind == "dense":
            dense = DenseModel.from_pretrained(folder).to(device)
            found.append((name, dense_view(dense)))
            settings.append(dense.input_settings)
        elif kind == "llm_evrep":
            generator = EvRep.from_pretrained(folder).to(device)
            found.append((name, evrep_view(generator)))
            settings.append(generator.input_settings)
        elif kind == "classifier":
            classifier = GEPClassifier.from_pretrained(folder).to(device)
            found.append((name, recognition_view(classifier)))
            settings.append(classifier.model.input_settings)
        else:
            raise ValueError(f"{folder} holds a model of kind {kind!r}; gep app shows {', '.join(_KINDS)}")
    if images is not None and not any(view.title == NEAREST for _, view in found):
        raise ValueError(f"--images {images} needs an encoder among the models: give the export of stage 1 or 2")
    lengths = [each["window_us"] for each in settings if each["window_us"]]
    return Loaded(_told_apart(found), lengths[0] if lengths else 0, settings[0]["height"])


def _images(model: GEPModel, name: str, folder: Path, teacher: str) -> Images:
    spec = teacher or model.teacher
    if not spec:
        raise ValueError(f"{name} does not say which image model it was aligned with: give --teacher")
    size = (model.input_settings["height"], model.input_settings["width"])
    width = model.encoder.config["head_dim"] or model.encoder.embed_dim
    return read_images(folder, FrozenVFM.from_spec(spec, device=model.device), size, width=width)


def dense_view(model: DenseModel) -> View:
    """Classes over the events, or depth."""
    key = legend_of(model)

    def draw(shown: Shown) -> str:
        source = shown.recording.source
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of windows before the first event: the caption says what is read
            view = view_of(model.input_settings, source, raw=True)
            found = next(predictions(model, source, range(shown.t1, shown.t1 + 1, shown.window_us), view))
        drawn = key.picture(found.values)
        if isinstance(key, ClassLegend):
            counts = np.bincount(found.values.ravel(), minlength=256)
            beyond = int(counts[IGNORE])
            shares = counts / max(found.values.size - beyond, 1)
            seen = [i for i in range(len(key.classes)) if shares[i] > _LEAST]
            rows = [(f"{key.classes[i]} {100 * shares[i]:.0f} %", key.own[i].tolist()) for i in seen]
            if beyond:
                rows.append(("beyond what the model reads", key.colours[-1].tolist()))
            # Events stay visible as darker pixels of their class's colour.
            drawn = drawn.copy()
            drawn[found.events.y, found.events.x] = drawn[found.events.y, found.events.x] // 2
            body = html.picture(drawn, "Classes of the pixels, events darker") + html.legend(rows)
        else:
            assert isinstance(key, DepthLegend)
            ends = key.ticks()
            ticks = [(1 - float(key.place(m)), metres_text(m)) for m in (ends[0], ends[-1], *ends[1:-1])]
            bar = html.ramp(viridis(np.linspace(1, 0, 18)), ticks)
            body = html.picture(drawn, "Depth of the pixels") + bar
        return html.figure(body, f"At the window's end, from {_reads(model.input_settings)}.{_rectified(model)}")

    return View(model.kind.capitalize(), draw)


def evrep_view(model: EvRep) -> View:
    """The image that a language model would be shown."""

    def draw(shown: Shown) -> str:
        settings, recording = model.input_settings, shown.recording
        if settings["num_events"]:
            last = recording.source.before(shown.t1)
            events = recording.events[max(0, last - settings["num_events"]) : last]
            bounds = into_windows(events, settings["windows"]).bounds
        else:
            length = settings["window_us"] or shown.window_us // settings["windows"] or 1
            ends = shown.t1 - length * np.arange(settings["windows"] - 1, -1, -1, dtype=np.int64)
            bounds = np.stack([ends - length, ends], axis=1)
            events = recording.between(int(bounds[0, 0]), int(bounds[-1, 1]))
        image = model.from_events(events, bounds)[0]
        seen = on_sensor(image, (events.height, events.width), settings["fit"]).nan_to_num(_BEYOND)
        drawn = (255 * seen).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
        caption = f"The image for a language model, from {_reads(settings)}.{_rectified(model)}"
        return html.figure(html.picture(drawn, "Image of the events"), caption)

    return View("LLM-EvRep", draw)


def recognition_view(classifier: GEPClassifier) -> View:
    """Classes of a model that was trained on them."""

    def draw(shown: Shown) -> str:
        bounds = shown.past(classifier.model.input_settings["windows"])
        events = shown.recording.between(int(bounds[0, 0]), int(bounds[-1, 1]))
        shares = classifier.predict(events, bounds).whole[0]
        best = shares.argsort(descending=True)[:_BARS].tolist()
        rows = [(classifier.classes[i], float(shares[i]), f"{100 * shares[i]:.0f} %") for i in best]
        read = "this window" if len(bounds) == 1 else f"the last {len(bounds)} windows"
        return html.figure(html.bars(rows), f"By the trained classifier, from {read}.")

    return View("Recognition", draw)


def _reads(settings: Mapping[str, Any]) -> str:
    """What a model reads, for people."""
    if settings["num_events"]:
        return f"the last {settings['num_events']:,} events"
    count = settings["windows"]
    if not settings["window_us"]:
        return "the window" if count == 1 else f"the window in {count} parts"
    each = f"{settings['window_us'] / 1000:g} ms"
    return f"the last {each}" if count == 1 else f"the last {count} windows of {each}"


def _rectified(model: DenseModel | EvRep) -> str:
    moved = model.input_settings.get("rectified", False)
    return " It was trained on rectified events; these are as they are." if moved else ""


def _told_apart(found: Sequence[tuple[str, View]]) -> list[View]:
    """Views whose titles differ."""
    titles = [view.title for _, view in found]
    own = [
        view._replace(title=f"{view.title} · {_short(name)}") if titles.count(view.title) > 1 else view
        for name, view in found
    ]
    seen: dict[str, int] = {}
    for number, view in enumerate(own):
        seen[view.title] = seen.get(view.title, 0) + 1
        if seen[view.title] > 1:
            own[number] = view._replace(title=f"{view.title} ({seen[view.title]})")
    return own


def _short(name: str) -> str:
    """The last part of a name that says something."""
    parts = [part for part in Path(name).parts if part not in ("export", "classifier", "finetune", "/")]
    return parts[-1] if parts else name
