"""DenseModel: features and a head as one module and one folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.dense.features import DenseFeatures, FeatureMaps, HistogramFeatures, features_from_config
from downstream.dense.heads import build_head
from gep import export

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


class DenseModel(nn.Module):
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

    def __init__(
        self,
        features: DenseFeatures | HistogramFeatures,
        head: nn.Module,
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
    def from_config(cls, config: Mapping[str, Any]) -> DenseModel:
        """A randomly initialised model of `config` (the property, or an export's config.json)."""
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
    ) -> Path:
        """Write config.json, model.safetensors and README.md.

        Args:
            folder: written whole or not at all; an earlier export in it is replaced.
            metrics, data: kept in the config and shown in the card; None = those the model has.
        Returns:
            The folder.
        Raises:
            See gep.export.save_folder.
        """
        self.metrics = self.metrics if metrics is None else export.plain(metrics)
        self.data = self.data if data is None else export.plain(data)
        config = self.config
        card = export.model_card(
            title=f"GEP {self.kind}: {self.features.config['name']} features, {self.head.config['name']} head",
            summary=f"{_SUMMARY[self.kind]}, on the features of Generative Event Pretraining (arXiv 2603.23032).",
            config={key: value for key, value in config.items() if key not in ("metrics", "data")},
            data=self.data,
            metrics=self.metrics,
            usage=_USAGE.format(name=Path(folder).name, out=self.head.config["out"]),
        )
        return export.save_folder(folder, kind=KIND, config=config, state=self.state_dict(), card=card)

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], *, revision: str | None = None, local_files_only: bool = False
    ) -> DenseModel:
        """Load an export strictly, on the CPU and in evaluation mode.

        Args:
            name: folder, or id of a model on the Hugging Face Hub.
            revision, local_files_only: of the Hub download.
        Raises:
            FileNotFoundError, ValueError: see gep.export.fetch and load_folder.
        """
        folder = export.fetch(name, revision=revision, local_files_only=local_files_only)
        config, state = export.load_folder(folder, KIND)
        try:
            model = cls.from_config(config)
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"{folder / export.CONFIG} does not describe a DenseModel ({error}): export again"
            ) from error
        export.load_strict(model, state, source=str(folder))
        return model.eval()
