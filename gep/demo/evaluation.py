"""The demo's measurements on recordings that nothing was trained on: probes, zero-shot, early recognition, views."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from downstream.common import WindowFeatures, extract, pixel_features, reinitialise
from downstream.metrics import mean_std, top_k_accuracy
from downstream.recognition.task import FinetuneTask, ProbeConfig, kshot, zero_shot
from gep.data.config import DataConfig
from gep.data.fewshot import draw_shots
from gep.data.listing import Listing
from gep.data.paired import Recordings, collate
from gep.data.sampler import Batches
from gep.engine import TrainConfig, fit, make_accelerator
from gep.evaluate import collect
from gep.events.represent import EventImage
from gep.hub import GEPModel
from gep.optim import OptimConfig

if TYPE_CHECKING:
    from gep.demo.pipeline import Size

SHOTS = [1, 2, 5, 20, 50]
_EXAMPLES = 8


@dataclass(frozen=True)
class Found:
    """The `recognition` table of results.json, and the arrays that the report draws."""

    table: dict[str, Any]
    pictures: dict[str, Any]


def evaluate(
    listing: Listing,
    *,
    folder: Path,
    size: Size,
    seed: int,
    timed: Callable[[str], AbstractContextManager[None]],
) -> Found:
    """Loads both exports from disk, as a user would, and measures them.

    Args:
        listing: recordings; labels are used by the probes alone.
        folder: the demo's, with stage1/export and stage2/export.
        size, seed: of the from-scratch baseline.
        timed: names and times each part.
    """
    models = {stage: GEPModel.from_pretrained(folder / stage / "export") for stage in ("stage1", "stage2")}
    data = dataclasses.replace(DataConfig(cache=True), **models["stage1"].input_settings)
    source = Recordings(listing, data, paired=False)
    config = ProbeConfig(shots=SHOTS, seed=seed)
    classes = len(listing.classes)
    accelerator = make_accelerator(TrainConfig(seed=seed, batch_size=64), folder)
    table: dict[str, Any] = {"num_test": len(listing), "list": listing.hash}

    with timed("probes"):
        features: dict[str, WindowFeatures] = {}
        for stage, model in models.items():
            features[stage], labels = extract(model, source, accelerator, batch_size=64, title=stage)
        counted = collect(
            lambda batch: {"pixels": pixel_features(batch, (36, 36), models["stage1"].represent)},
            source,
            collate=collate,
            batch_size=64,
            accelerator=accelerator,
        )["pixels"]
        table["pixels"] = kshot((counted, labels), None, classes, config)
        for stage, found in features.items():
            table[stage] = {
                kind: kshot((found.pooled(kind), labels), None, classes, config) for kind in ("all", "last")
            }
        table["early"] = {
            stage: [_early(found.early(upto), labels, classes, config) for upto in range(1, found.window.shape[1] + 1)]
            for stage, found in features.items()
        }
        table["zero_shot"] = {
            "stage1": zero_shot(models["stage1"], features["stage1"].in_image_space(), labels, listing.classes),
            "stage2": zero_shot(models["stage2"], features["stage2"].in_image_space(), labels, listing.classes),
        }
    with timed("scratch"):
        table["scratch"] = _scratch(models["stage1"], listing, data, folder / "scratch", size, seed)
    with timed("pictures"):
        pictures = _pictures(models["stage2"], source, features, folder)
    return Found(table, pictures)


def _early(features: Tensor, labels: Tensor, classes: int, config: ProbeConfig) -> float | None:
    result = kshot((features, labels), None, classes, dataclasses.replace(config, shots=[5]))["5"]
    return None if result is None else result[0]


def _scratch(
    model: GEPModel, listing: Listing, data: DataConfig, folder: Path, size: Size, seed: int
) -> dict[str, list[float] | None]:
    """The same encoder from random weights, trained on the k labelled recordings a class alone."""
    table: dict[str, list[float] | None] = {}
    for shots in SHOTS:
        accuracies = []
        for draw in range(size.scratch_draws):
            try:
                chosen, rest = draw_shots(listing.labels, shots, seed=seed, draw=draw)
            except ValueError:  # too few recordings of a class
                break
            rest = rest[np.linspace(0, len(rest) - 1, min(len(rest), 200)).astype(int)]
            settings = TrainConfig(
                steps=size.scratch_steps * (12 + shots) // 12,
                batch_size=min(32, len(chosen)),
                seed=seed + draw,
                save_every=0,
                progress=False,
            )
            run = folder / f"{shots}_shots_{draw}"
            accuracies.append(_train_scratch(model, listing, data, chosen, rest, run, settings))
        table[str(shots)] = mean_std(accuracies) if accuracies else None
    return table


def _train_scratch(
    model: GEPModel,
    listing: Listing,
    data: DataConfig,
    chosen: np.ndarray,
    rest: np.ndarray,
    run: Path,
    settings: TrainConfig,
) -> float:
    """Accuracy (%) on `rest` after training on `chosen`; each recording is one frame, which learns faster."""
    data = dataclasses.replace(data, windows=1, window_us=0)
    train, test = (Recordings(listing.subset(part, "part"), data, paired=False) for part in (chosen, rest))
    accelerator = make_accelerator(settings, run)
    fresh = GEPModel.from_config(model.config)
    reinitialise(fresh, settings.seed)
    task = FinetuneTask(fresh, len(listing.classes), feature="all")
    task.start_from(extract(fresh, train, accelerator, batch_size=64)[0].pooled("all"), None)
    fit(
        task,
        Batches.of_run(train, collate, settings),
        train=settings,
        optim=OptimConfig(lr=2e-3, weight_decay=0.05, warmup_steps=10),
        accelerator=accelerator,
        run_dir=run,
    )
    task.eval()
    rows = collect(
        lambda batch: {"logits": task.logits(batch), "label": batch["label"]},
        test,
        collate=collate,
        batch_size=64,
        accelerator=accelerator,
    )
    return top_k_accuracy(rows["logits"], rows["label"])


def _pictures(model: GEPModel, source: Recordings, features: dict[str, WindowFeatures], folder: Path) -> dict[str, Any]:
    """Arrays for the report: a few recordings seen by everyone, and images found from events alone."""
    from gep.models.teacher import FrozenVFM

    count = len(source)
    chosen = [index * count // _EXAMPLES + count // (2 * _EXAMPLES) for index in range(_EXAMPLES)]
    batch = collate([source.sample(index, None) for index in chosen])
    windows = batch["windows"]
    shown = EventImage(percentile=99.0)(batch["events"]).unflatten(0, (-1, windows))
    assert model.backbone is not None
    with torch.no_grad():
        frames = model.represent(batch["events"])
        tokens, _ = model.encoder(frames)
        grid = model.encoder.grid(*frames.shape[-2:])
        tokens = tokens.float().unflatten(0, (-1, windows))
        output = model.backbone(
            F.layer_norm(tokens, tokens.shape[-1:]),
            torch.zeros(tokens.shape[:2], dtype=torch.int64),
            batch["t_us"][..., 1],
            grid,
        )
    views: dict[str, Tensor] = {
        "stage 1,\nwindow 1": tokens[:, 0],
        "stage 1,\nmean": tokens.mean(dim=1),
        "stage 2,\nafter window 1": output.image[:, 0],
        f"stage 2,\nafter window {windows}": output.image[:, -1],
    }
    pictures: dict[str, Any] = {
        "labels": [source.listing.classes[source.listing.labels[index]] for index in chosen],
        "events": shown[:, 0].permute(0, 2, 3, 1).numpy(),
        "events_all": shown.mean(dim=1).permute(0, 2, 3, 1).numpy(),
        "grid": grid,
        "window_ms": model.input_settings["window_us"] / 1000,
    }
    if source.listing.image is not None:
        paired = Recordings(source.listing, source.config, paired=True)
        images = torch.from_numpy(np.stack([paired.sample(index, None)["image"] for index in range(count)]))
        teacher = FrozenVFM.from_spec(f"export:{folder / 'teacher' / 'export'}")
        teacher_tokens, pooled = teacher.features(images)
        views = {"teacher": teacher_tokens[chosen], **views}
        found = F.normalize(features["stage2"].image[:, -1], dim=-1) @ F.normalize(pooled, dim=-1).T
        best = found[chosen].argsort(dim=1, descending=True)[:, :6]
        pictures["image"] = images[chosen, 0].numpy() / 255
        pictures["retrieved"] = images[best, 0].numpy() / 255
        pictures["retrieved_right"] = (best == torch.tensor(chosen)[:, None]).numpy()
    pictures["tokens"] = {name: value.numpy() for name, value in views.items()}
    return pictures
