"""GEPClassifier: a model and a linear classifier on its pooled features, as one module and one folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from downstream.common import Feature, Pool, WindowFeatures, window_features
from gep import export
from gep.events.prepare import INPUT_KEYS, windows_of
from gep.export_schema import (
    BACKBONE,
    ENCODER,
    INPUT_FIELDS,
    RECORDED,
    REPRESENTATION,
    listed,
    one_of,
    optional,
    record,
    text,
    whole,
)
from gep.hub import GEPModel, Recordings
from gep.pretrained import Pretrained

KIND = "classifier"
"""`kind` of the folder that `save_pretrained` writes."""
_SUMMARY = "Recognition from event-camera recordings, on the features of Generative Event Pretraining (2603.23032)."
_USAGE = """
from downstream.recognition.model import GEPClassifier
from gep.events.io import read_events

model = GEPClassifier.from_pretrained("{name}")  # a folder or a Hub id
found = model.predict(read_events("recording.raw"))
print(model.classes[found.whole[0].argmax()], found.whole, found.windows)  # probabilities (1, K), (1, T, K)
"""
_MODEL = record(
    {
        "encoder": ENCODER,
        "representation": REPRESENTATION,
        "input": record(INPUT_FIELDS, INPUT_KEYS),
        "backbone": optional(BACKBONE),
    },
    ("encoder", "representation", "input", "backbone"),
)


class Classes(NamedTuple):
    """Probabilities of K classes for B recordings of T windows."""

    whole: Tensor
    """(B, K) of the recording, as the classifier was trained."""
    windows: Tensor
    """(B, T, K) of each window; with a backbone, of it and all windows before it."""
    t_us: Tensor
    """(B, T, 2) int64 begin and end of each window [µs]."""


class GEPClassifier(Pretrained):
    """Encoder, backbone where there is one, and a linear classifier of recordings.

    Args:
        model: what it reads; its backbone is used where it has one.
        classes: K names, in label order.
        feature: "all" = the mean over the windows is classified; "last" = the last window.
        pool: how the tokens of a window become one feature.
        sample_us: length of the parts of recordings that it was trained on [µs]; 0 = whole ones.
        data, metrics: of the training, for the record and the model card.
    """

    export_kind = KIND
    config_schema = record(
        {
            "model": _MODEL,
            "classes": listed(text(), 1, 100_000),
            "feature": one_of("all", "last"),
            "pool": one_of("mean", "mean_std", "mean_max"),
            "sample_us": whole(0, 10**15),
            **RECORDED,
        },
        ("model", "classes", "feature", "pool", "sample_us"),
    )

    def __init__(
        self,
        model: GEPModel,
        classes: Sequence[str],
        *,
        feature: Feature,
        pool: Pool = "mean",
        sample_us: int = 0,
        data: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.classes = [str(name) for name in classes]
        self.feature: Feature = feature
        self.pool: Pool = pool
        self.sample_us = sample_us
        self.data, self.metrics = dict(data or {}), dict(metrics or {})
        dim = feature_dim(model, pool)
        self.head = nn.Linear(dim, len(self.classes), device=model.device)

    @classmethod
    def _build(cls, config: Mapping[str, Any]) -> GEPClassifier:
        return cls(GEPModel(**config["model"]), **{key: value for key, value in config.items() if key != "model"})

    @property
    def config(self) -> dict[str, Any]:
        """Everything needed to rebuild the model, as JSON."""
        inner = self.model.config
        return {
            "model": {key: inner[key] for key in ("encoder", "representation", "input", "backbone")},
            "classes": list(self.classes),
            "feature": self.feature,
            "pool": self.pool,
            "sample_us": self.sample_us,
            "data": self.data,
            "metrics": self.metrics,
        }

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """(B, K) logits of a batch as `gep.data.paired.collate` gives it."""
        return self._whole(self.features(batch))

    def features(self, batch: dict[str, Any]) -> WindowFeatures:
        """What is classified, of every window of a batch."""
        return window_features(self.model, batch, pool=self.pool)

    @torch.no_grad()
    def predict(self, events: Recordings, bounds: np.ndarray | None = None) -> Classes:
        """Class probabilities of recordings, whole and window by window; call `eval()` first after training.

        Args:
            events, bounds: as `GEPModel.frames`: None cuts windows as in training, from the first event on.
        """
        batch, count = windows_of(events, self.model.input_settings, bounds=bounds)
        t_us = torch.stack([batch.t0, batch.t1], dim=-1).unflatten(0, (count, -1))
        features = self.features(
            {"events": batch.to(self.device), "windows": t_us.shape[1], "t_us": t_us.to(self.device)}
        )
        of_windows = self.head(features.window).float().softmax(dim=-1)
        return Classes(self._whole(features).float().softmax(dim=-1).cpu(), of_windows.cpu(), t_us.cpu())

    def _whole(self, features: WindowFeatures) -> Tensor:
        return self.head(features.pooled(self.feature))

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        metrics: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> Path:
        """Write config.json, model.safetensors and README.md; see Pretrained.save_pretrained."""
        self.metrics = self.metrics if metrics is None else export.plain(metrics)
        self.data = self.data if data is None else export.plain(data)
        config = self.config
        card = export.model_card(
            title=f"GEP recognition: {len(self.classes)} classes",
            summary=_SUMMARY,
            config={key: value for key, value in config.items() if key not in ("metrics", "data")},
            data=self.data,
            metrics=self.metrics,
            usage=_USAGE.format(name=name or Path(folder).name),
        )
        return export.save_folder(folder, kind=KIND, config=config, state=self.state_dict(), card=card)


def feature_dim(model: GEPModel, pool: Pool, *, use_backbone: bool = True) -> int:
    """Channels of a window's feature (`WindowFeatures.window`)."""
    backbone = model.backbone if use_backbone else None
    dim = model.encoder.embed_dim + (0 if backbone is None else backbone.width)
    return dim if pool == "mean" else 2 * dim
