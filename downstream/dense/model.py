"""DenseModel: features and a head as one module and one folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from downstream.dense.features import DenseFeatures, FeatureMaps, HistogramFeatures, features_from_config
from downstream.dense.heads import Head, build_head
from gep import export
from gep.export_schema import (
    BACKBONE,
    ENCODER,
    INPUT,
    RECORDED,
    REPRESENTATION,
    Check,
    listed,
    one_of,
    optional,
    plain_json,
    record,
    variants,
    whole,
)
from gep.pretrained import Pretrained

KIND = "dense"
"""`kind` of the folder that `save_pretrained` writes."""
Task = Literal["segmentation", "depth"]
_KINDS = ("segmentation", "depth")
_SUMMARY = {
    "segmentation": "Semantic segmentation of event-camera recordings",
    "depth": "Monocular depth from event-camera recordings",
}
_USAGE = """
from downstream.dense.model import DenseModel

model = DenseModel.from_pretrained("{name}")  # a folder or a Hub id
output = model.predict_frames(frames, t_us)  # (B, T, C, H, W), (B, T) int64 µs -> (B, {out}, H, W)
"""


_DENSE: dict[str, Check] = {
    "name": one_of("dense"),
    "representation": REPRESENTATION,
    "encoder": ENCODER,
    "backbone": optional(BACKBONE),
    "num_levels": whole(1, 64),
}
_HISTOGRAM: dict[str, Check] = {
    "name": one_of("histogram"),
    "representation": REPRESENTATION,
    "patch_size": listed(whole(1, 256), 2, 2),
    "windows": whole(1, 4096),
}
_HEAD: dict[str, Check] = {
    "name": one_of("linear", "upernet", "dpt"),
    "out": whole(1, 65_536),
    "width": whole(0, 4096),
}
_FIELDS: dict[str, Check] = {
    "task_kind": one_of(*_KINDS),
    "task": record({}, others=plain_json),
    "input": INPUT,
    "features": variants(
        {
            # Earlier exports have no encoder_maps.
            "dense": record(_DENSE | {"encoder_maps": one_of(True, False)}, tuple(_DENSE)),
            "histogram": record(_HISTOGRAM, tuple(_HISTOGRAM)),
        }
    ),
    "head": record(_HEAD, tuple(_HEAD)),
    **RECORDED,
}


class DenseModel(Pretrained):
    """Outputs at every pixel from the windows of a recording.

    Args:
        features: frames -> maps of tokens.
        head: maps -> outputs, built by `build_head` for `features.channels`.
        kind: "segmentation" or "depth".
        input_settings: how a recording becomes the frames it was trained on (height, width, fit, windows, window_us,
            num_events …), plain JSON; any height and width.
        task: what the outputs mean (classes and palette, or the depth scale), plain JSON.
        data, metrics: of the training, for the record and the model card.
    """

    export_kind = KIND
    config_schema = record(_FIELDS, tuple(_FIELDS))

    def __init__(
        self,
        features: DenseFeatures | HistogramFeatures,
        head: Head,
        *,
        kind: Task,
        input_settings: Mapping[str, Any],
        task: Mapping[str, Any],
        data: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if kind not in _KINDS:
            raise ValueError(f"kind={kind!r} is no dense task: choose one of {', '.join(_KINDS)}")
        self.features = features
        self.head = head
        self.kind: Task = kind
        self.input_settings, self.task = dict(input_settings), dict(task)
        self.data, self.metrics = dict(data or {}), dict(metrics or {})

    @classmethod
    def _build(cls, config: Mapping[str, Any]) -> DenseModel:
        features = features_from_config(config["features"])
        head = config["head"]
        return cls(
            features,
            build_head(head["name"], features.channels, head["out"], width=head["width"]),
            kind=config["task_kind"],
            input_settings=config["input"],
            task=config["task"],
            data=config["data"],
            metrics=config["metrics"],
        )

    @property
    def config(self) -> dict[str, Any]:
        """Everything needed to rebuild the model, as JSON."""
        return {
            "task_kind": self.kind,
            "task": dict(self.task),
            "input": dict(self.input_settings),
            "features": self.features.config,
            "head": dict(self.head.config),
            "data": self.data,
            "metrics": self.metrics,
        }

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.head.parameters()).device

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """(B, out, H, W) float32 raw outputs at the canvas' size; `batch` as `gep.data.paired.collate` gives it."""
        return self.predict_frames(self.features.frames(batch), batch["t_us"][..., 1])

    def predict_frames(self, frames: Tensor, t_us: Tensor | None = None) -> Tensor:
        """Raw outputs for the last window.

        Args:
            frames: (B, T, C, H, W) represented windows of any size.
            t_us: (B, T) int64 end of each window [µs]; only a backbone asks for it.
        Returns:
            (B, out, H, W) float32.
        """
        return self.from_levels(self.features(frames, t_us))

    def from_levels(self, maps: FeatureMaps) -> Tensor:
        """(B, out, H, W) float32 from features computed before: bilinear to the padded canvas, then cropped."""
        output = self.head(maps.levels).float()
        if output.shape[-2:] != maps.padded:
            output = F.interpolate(output, size=maps.padded, mode="bilinear")
        return output[..., : maps.size[0], : maps.size[1]]

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
            title=f"GEP {self.kind}: {self.features.config['name']} features, {self.head.config['name']} head",
            summary=f"{_SUMMARY[self.kind]}, on the features of Generative Event Pretraining (arXiv 2603.23032).",
            config={key: value for key, value in config.items() if key not in ("metrics", "data")},
            data=self.data,
            metrics=self.metrics,
            usage=_USAGE.format(name=name or Path(folder).name, out=self.head.config["out"]),
        )
        return export.save_folder(folder, kind=KIND, config=config, state=self.state_dict(), card=card)
