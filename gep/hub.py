"""GEPModel: encoder, optional backbone and everything their input needs, as one module and one folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gep import export
from gep.events.prepare import INPUT_KEYS, InputSettings, windows_of
from gep.events.represent import Representation, build, describe
from gep.events.types import EventBatch, Events
from gep.export_schema import BACKBONE, CLASSES, ENCODER, INPUT_FIELDS, RECORDED, REPRESENTATION, optional, record, text
from gep.models import PRESETS, Backbone, EventEncoder, FrozenVFM, KVCache
from gep.models.words import Templates, class_vectors, text_tower
from gep.pretrained import Pretrained
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


class GEPModel(Pretrained):
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

    _text: FrozenVFM | None = None
    export_kind = KIND
    config_schema = record(
        {
            "encoder": ENCODER,
            "representation": REPRESENTATION,
            "input": record(INPUT_FIELDS, INPUT_KEYS),
            "backbone": optional(BACKBONE),
            "classes": optional(CLASSES),
            "teacher": optional(text(200, r"(timm|open_clip):[^\s:]+", "timm:<name> or open_clip:<arch>/<tag>")),
            **RECORDED,
        },
        needed=("encoder", "representation", "input"),
    )

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
        self.class_head = None if self.classes is None else nn.Linear(self.encoder.embed_dim, len(self.classes))
        if self.class_head is not None:
            self.class_head.requires_grad_(False)  # the teacher's
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
            classes=None if teacher is None or head is None else teacher.classes,
            # A folder's path means nothing elsewhere.
            teacher=None if teacher is None or teacher.spec.startswith("export:") else teacher.spec,
        )
        model.encoder, model.backbone = encoder, backbone
        if head is not None and model.class_head is not None:
            model.class_head.load_state_dict(head.state_dict())
            model.class_head.to(model.device)
        return model

    @classmethod
    def _build(cls, config: Mapping[str, Any]) -> GEPModel:
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
    def zero_shot(
        self,
        events: Recordings,
        vectors: Tensor | Sequence[str] | None = None,
        *,
        templates: Templates = None,
        file: str | os.PathLike[str] | None = None,
    ) -> Tensor:
        """Class scores of recordings without labelled events.

        Args:
            events: as `frames`.
            vectors: (K, P) unit vectors of classes in the teacher's pooled space, or K prompts in words for its text
                tower (open_clip teachers; see `word_vectors`); None = the teacher's own classes, read from the image
                predicted after the last window, or, without a backbone, from the mean over the windows.
            templates, file: of `word_vectors`.
        Returns:
            (B, K): logits, or cosines with `vectors`.
        Raises:
            ValueError: no vectors, and the export has no classes; words, and it was aligned with no text tower.
        """
        if vectors is not None and not isinstance(vectors, Tensor):
            vectors = self.word_vectors(vectors, templates=templates, file=file)
        elif templates is not None or file is not None:
            raise ValueError("templates and file have no effect without words: give class names as strings")
        out = self.predict(events)
        if vectors is not None:
            embedded = F.normalize(self.encoder.embed(out.pooled.mean(1)), dim=-1)
            return embedded @ vectors.to(embedded).T
        logits = self.classify(out.pooled.mean(1) if out.image is None else out.image[:, -1].mean(1))
        if logits is None:
            raise ValueError("this export has no classes (its teacher knew none): give class vectors")
        return logits

    def word_vectors(
        self, words: Sequence[str], *, templates: Templates = None, file: str | os.PathLike[str] | None = None
    ) -> Tensor:
        """(K, P) unit vectors of classes named in words; the teacher's text tower is loaded once and kept.

        Args:
            words, templates: as gep.models.words.class_vectors.
            file: the teacher's weights, instead of a download; read where the tower is not loaded yet.
        Raises:
            ValueError, FileNotFoundError: see gep.models.words.
        """
        if self._text is None:
            self._text = text_tower(self.teacher, self.encoder, file)
        return class_vectors(self._text, words, templates)

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
        settings = self.config
        shown = {key: value for key, value in settings.items() if key not in ("metrics", "data")}
        stage = "encoder (stage 1)" if self.backbone is None else "encoder and backbone (stage 2)"
        card = export.model_card(
            title=f"GEP {self.preset or self.encoder.config['arch']}: event {stage}",
            summary=_SUMMARY,
            config=shown,
            data=self.data,
            metrics=self.metrics,
            usage=_USAGE.format(name=name or Path(folder).name),
        )
        return export.save_folder(folder, kind=KIND, config=settings, state=self.state_dict(), card=card)
