"""GEPModel: encoder, optional backbone and everything their input needs, as one module and one folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from gep import export
from gep.events.prepare import INPUT_KEYS, InputSettings, windows_of
from gep.events.represent import Representation, build, describe
from gep.events.types import EventBatch, Events
from gep.models import PRESETS, Backbone, EventEncoder, FrozenVFM, KVCache
from gep.stream import EventStream

KIND = "gep"
"""`kind` of the folder that `save_pretrained` writes."""
_SUMMARY = """Features of event-camera recordings in the space of a frozen image model, by Generative Event
Pretraining (arXiv 2603.23032)."""
_USAGE = """
from gep.events.io import read_events
from gep.hub import GEPModel

model = GEPModel.from_pretrained("{name}")  # a folder or a Hub id
encoded = model.encode(read_events("recording.bin", height=34, width=34))
encoded.tokens, encoded.pooled, encoded.t_us  # (1, T, N, D), (1, T, D), (1, T) µs
"""

Recordings: TypeAlias = Events | Sequence[Events] | EventBatch
"""One recording, several, or a batch of B * T windows (sample-major) that have the input's size already."""


class Encoded(NamedTuple):
    """B recordings of T windows, encoded."""

    tokens: Tensor
    """(B, T, N, D) patch tokens in raster order."""
    pooled: Tensor
    """(B, T, D) their mean."""
    t_us: Tensor
    """(B, T) int64 end of each window [µs], the time the backbone knows a window by."""


class GEPOutput(NamedTuple):
    """Encoder and, where there is one, backbone over B sequences of T windows."""

    tokens: Tensor
    """(B, T, N, D) of the encoder."""
    pooled: Tensor
    """(B, T, D) their mean."""
    hidden: Tensor | None
    """(B, T, N, width) of the backbone, which has seen the windows up to this one."""
    next: Tensor | None
    """(B, T, N, D) predicted layer-normed tokens of the next window."""
    image: Tensor | None
    """(B, T, N, D) predicted layer-normed tokens of the paired image."""


class GEPModel(nn.Module, ModelHubMixin, library_name="gep", license="apache-2.0"):
    """Event encoder with its representation and input size, and a backbone after stage 2.

    Every argument is plain JSON, as in an export's config.json; `from_parts` takes the objects themselves.

    Args:
        encoder: keywords of EventEncoder.
        representation: {"name", "params"} for gep.events.represent.build.
        input: the keys of INPUT_KEYS; see InputSettings.
        backbone: keywords of Backbone; None = encoder alone.
        classes: names of the teacher's classes, for `classify`.
        teacher: spec of the model it was aligned with, for the record.
        data, metrics: of the training, for the record and the model card.
    """

    def __init__(
        self,
        *,
        encoder: Mapping[str, Any],
        representation: Mapping[str, Any],
        input: Mapping[str, Any],
        backbone: Mapping[str, Any] | None = None,
        classes: Sequence[str] | None = None,
        teacher: str | None = None,
        data: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if missing := sorted(set(INPUT_KEYS) ^ set(input)):
            raise ValueError(f"input settings {missing} are missing or unknown: exactly {list(INPUT_KEYS)} are needed")
        self.represent: Representation = build(representation["name"], representation["params"])
        self.encoder = EventEncoder(**encoder)
        self.backbone = None if backbone is None else Backbone(**backbone)
        self.classes = None if classes is None else list(classes)
        self.class_head = None if classes is None else nn.Linear(self.encoder.embed_dim, len(self.classes))
        self.input_settings: dict[str, Any] = {key: input[key] for key in INPUT_KEYS}
        self.teacher, self.data, self.metrics = teacher, dict(data or {}), dict(metrics or {})
        if self.represent.channels != self.encoder.in_chans:
            raise ValueError(
                f"representation {representation['name']} has {self.represent.channels} channels, the "
                f"encoder takes {self.encoder.in_chans}: set in_chans to it"
            )
        self.encoder.grid(input["height"], input["width"])

    @classmethod
    def from_parts(
        cls,
        encoder: EventEncoder,
        represent: Representation,
        input: InputSettings,
        *,
        backbone: Backbone | None = None,
        teacher: FrozenVFM | None = None,
    ) -> GEPModel:
        """A model around trained parts, which it holds, not copies; the teacher's class head is copied."""
        head = None if teacher is None else teacher.class_head
        model = cls(
            encoder=encoder.config,
            representation=describe(represent),
            input={key: getattr(input, key) for key in INPUT_KEYS},
            classes=None if head is None else teacher.classes,
            # A folder's path means nothing elsewhere.
            teacher=None if teacher is None or teacher.spec.startswith("export:") else teacher.spec,
        )
        model.encoder, model.backbone = encoder, backbone
        if head is not None:
            model.class_head.load_state_dict(head.state_dict())
            model.class_head.requires_grad_(False).to(model.device)
        return model

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GEPModel:
        """A randomly initialised model of `config` (the property, or an export's config.json)."""
        return cls(**config)

    @property
    def config(self) -> dict[str, Any]:
        """Everything needed to rebuild the model, as JSON."""
        return {
            "encoder": dict(self.encoder.config),
            "representation": describe(self.represent),
            "input": dict(self.input_settings),
            "backbone": None if self.backbone is None else dict(self.backbone.config),
            "classes": self.classes,
            "teacher": self.teacher,
            "data": self.data,
            "metrics": self.metrics,
        }

    @property
    def preset(self) -> str | None:
        """Name of the encoder preset with this architecture, None where it is no preset's."""
        return next((name for name, preset in PRESETS.items() if preset.arch == self.encoder.config["arch"]), None)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(
        self, frames: Tensor, t_us: Tensor | None = None, *, backbone: bool = True, cache: KVCache | None = None
    ) -> GEPOutput:
        """Encode every window, then run the backbone causally over them.

        Args:
            frames: (B, T, C, H, W) represented windows.
            t_us: (B, T) int64 end of each window [µs]; None = windows of `window_us` one after the other.
            backbone: False leaves the backbone out.
            cache: of the windows before these, extended in place; needs t_us.
        Raises:
            ValueError: there is a backbone, and neither t_us nor a window length says when the windows end.
        """
        tokens, pooled = self.encoder(frames.flatten(0, 1))
        tokens, pooled = (x.unflatten(0, frames.shape[:2]) for x in (tokens, pooled))
        if self.backbone is None or not backbone:
            return GEPOutput(tokens, pooled, None, None, None)
        if t_us is None:
            if not self.input_settings["window_us"]:
                raise ValueError("t_us is needed: this model's windows have no fixed length (window_us = 0)")
            t_us = torch.arange(1, frames.shape[1] + 1, device=frames.device) * self.input_settings["window_us"]
            t_us = t_us.expand(frames.shape[:2])
        modality = torch.zeros(frames.shape[:2], dtype=torch.int64, device=frames.device)
        out = self.backbone(tokens, modality, t_us, self.encoder.grid(*frames.shape[-2:]), cache=cache)
        return GEPOutput(tokens, pooled, *out)

    def frames(
        self, events: Recordings, bounds: np.ndarray | None = None, windows: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cut, fit and represent recordings as in training.

        Args:
            events: one recording, several, or B * T windows (sample-major) that have the input's size
                already.
            bounds: (T, 2) or (B, T, 2) integer µs [t0, t1) of the windows; None = as the model was trained.
            windows: T instead of the model's own number.
        Returns:
            frames: (B, T, C, H, W) float32 on the model's device.
            bounds: (B, T, 2) int64 µs.
        Raises:
            ValueError: no recording, both bounds and windows, or windows that do not divide up.
        """
        batch, count = windows_of(events, self.input_settings, bounds=bounds, num=windows)
        batch = batch.to(self.device)
        edges = torch.stack([batch.t0, batch.t1], dim=-1).unflatten(0, (count, -1))
        return self.represent(batch).unflatten(0, (count, -1)), edges

    @torch.no_grad()
    def encode(self, events: Recordings, bounds: np.ndarray | None = None, windows: int | None = None) -> Encoded:
        """Tokens of recordings, in evaluation mode and without gradients; arguments as `frames`."""
        frames, edges = self.frames(events, bounds, windows)
        out = self.predict_frames(frames, edges[..., 1], backbone=False)
        return Encoded(out.tokens, out.pooled, edges[..., 1])

    @torch.no_grad()
    def predict(self, events: Recordings, bounds: np.ndarray | None = None, windows: int | None = None) -> GEPOutput:
        """`forward` on recordings, in evaluation mode and without gradients; arguments as `frames`."""
        frames, edges = self.frames(events, bounds, windows)
        return self.predict_frames(frames, edges[..., 1])

    @torch.no_grad()
    def predict_frames(
        self, frames: Tensor, t_us: Tensor, *, backbone: bool = True, cache: KVCache | None = None
    ) -> GEPOutput:
        """`forward` in evaluation mode and without gradients."""
        training = [module for module in self.modules() if module.training]
        for module in training:
            module.training = False
        try:
            return self(frames, t_us, backbone=backbone, cache=cache)
        finally:
            for module in training:
                module.training = True

    def stream(
        self,
        height: int,
        width: int,
        *,
        span: int | None = None,
        window_us: int = 0,
        t0_us: int | None = None,
        backbone: bool = True,
    ) -> EventStream:
        """Windows of a recording as its events come in; arguments and errors as gep.stream.EventStream."""
        return EventStream(self, height, width, span=span, window_us=window_us, t0_us=t0_us, backbone=backbone)

    def classify(self, pooled: Tensor) -> Tensor | None:
        """Logits (…, K) of the teacher's classes from mean tokens (…, D); None without classes."""
        return None if self.class_head is None else self.class_head(pooled.to(self.device))

    @torch.no_grad()
    def zero_shot(self, events: Recordings, vectors: Tensor | None = None) -> Tensor:
        """Class scores of recordings without labelled events.

        Args:
            events: as `frames`.
            vectors: (K, P) unit vectors of classes in the teacher's pooled space (`FrozenVFM.text`); None
                = the teacher's own classes, read from the image predicted after the last window, or,
                without a backbone, from the mean over the windows.
        Returns:
            (B, K): logits, or cosines with `vectors`.
        Raises:
            ValueError: no vectors, and the export has no classes.
        """
        out = self.predict(events)
        if vectors is not None:
            embedded = F.normalize(self.encoder.embed(out.pooled.mean(1)), dim=-1)
            return embedded @ vectors.to(embedded).T
        logits = self.classify(out.pooled.mean(1) if out.image is None else out.image[:, -1].mean(1))
        if logits is None:
            raise ValueError("this export has no classes (its teacher knew none): give class vectors")
        return logits

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        metrics: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        config: None = None,
        model_card_kwargs: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write config.json, model.safetensors and README.md; `push_to_hub` calls this too.

        Args:
            folder: written whole or not at all; an earlier export in it is replaced.
            metrics, data: kept in the config and shown in the card; None = those the model has.
            config, model_card_kwargs: what huggingface_hub's push_to_hub passes; the first must be None,
                the second may hold `metrics` and `data`.
        Raises:
            See gep.export.save_folder.
        """
        if config is not None:
            raise ValueError("the config of a GEPModel follows from its parts: leave `config` out")
        extra = dict(model_card_kwargs or {})
        metrics, data = metrics or extra.pop("metrics", None), data or extra.pop("data", None)
        if extra:
            raise ValueError(f"model_card_kwargs {sorted(extra)} are not used: only metrics and data are")
        self.metrics = self.metrics if metrics is None else export.plain(metrics)
        self.data = self.data if data is None else export.plain(data)
        settings = self.config
        shown = {key: value for key, value in settings.items() if key not in ("metrics", "data")}
        stage = "encoder (stage 1)" if self.backbone is None else "encoder and backbone (stage 2)"
        card = export.model_card(
            title=f"GEP {self.preset or self.encoder.config['arch']}: event {stage}",
            summary=_SUMMARY,
            config=shown,
            data=self.data,
            metrics=self.metrics,
            usage=_USAGE.format(name=Path(folder).name),
        )
        return export.save_folder(folder, kind=KIND, config=settings, state=self.state_dict(), card=card)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> GEPModel:
        """Load an export strictly, on the CPU and in evaluation mode.

        Args:
            name: folder, or id of a model on the Hugging Face Hub.
            revision, token, cache_dir, force_download, local_files_only: of the Hub download.
        Raises:
            FileNotFoundError, ValueError: see gep.export.fetch and load_folder.
        """
        place = {"cache_dir": cache_dir, "force_download": force_download}
        folder = export.fetch(name, revision=revision, token=token, local_files_only=local_files_only, **place)
        config, state = export.load_folder(folder, KIND)
        try:
            model = cls.from_config(config)
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"{folder / export.CONFIG} does not describe a GEPModel ({error}): export again"
            ) from error
        export.load_strict(model, state, source=str(folder))
        if model.class_head is not None:
            model.class_head.requires_grad_(False)
        return model.eval()
