"""EvRep: a representation and a generator as one module and one folder, from a recording to an image."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from downstream.llm_evrep.generator import EvGen, frame_scale
from downstream.llm_evrep.gep_init import GEPGenerator
from gep import export
from gep.events import represent as representations
from gep.events.frames import PerSource
from gep.events.frames import frames as frames_of
from gep.events.prepare import INPUT_KEYS, windows_of
from gep.events.represent import Representation
from gep.events.types import EventBatch, Events
from gep.export_schema import (
    ENCODER,
    INPUT,
    RECORDED,
    REPRESENTATION,
    Check,
    listed,
    one_of,
    real,
    record,
    text,
    variants,
    whole,
)
from gep.pretrained import Pretrained

Generator: TypeAlias = EvGen | GEPGenerator

KIND = "llm_evrep"
"""`kind` of the folder that `save_pretrained` writes."""
_SUMMARY = "Images of event-camera recordings for frozen multimodal language models, by LLM-EvRep (arXiv 2502.14273)."
_USAGE = """
from torchvision.transforms.functional import to_pil_image

from downstream.llm_evrep.model import EvRep
from gep.events.io import read_events

model = EvRep.from_pretrained("{name}")  # a folder or a Hub id
image = model.from_events(read_events("recording.bin", height=34, width=34))  # (1, 3, H, W) in [0, 1]
to_pil_image(image[0]).save("image.png")
"""


_WIDTH, _IN_CHANS = whole(8, 4096), whole(1, 4096)
_UNET: dict[str, Check] = {
    "name": one_of("unet"),
    "in_chans": _IN_CHANS,
    "widths": listed(_WIDTH, 1, 8),
    "depths": listed(whole(0, 64), 1, 8),
    "expand": listed(whole(1, 16), 1, 8),
    "fused": whole(0, 8),
    "decoder_depth": whole(1, 64),
}
_GEP: dict[str, Check] = {
    "name": one_of("gep"),
    "encoder": ENCODER,
    "windows": whole(1, 4096),
    "num_levels": whole(1, 64),
    "widths": listed(_WIDTH, 3, 3),
    "frame_scale": real(-1e6, 1e6),
}
_FIELDS: dict[str, Check] = {
    "representation": REPRESENTATION,
    "input": INPUT,
    "generator": variants({"unet": record(_UNET, tuple(_UNET)), "gep": record(_GEP, tuple(_GEP))}),
    "reader": text(),
    **RECORDED,
}


class EvRep(Pretrained):
    """Images of events.

    Args:
        represent: events -> channels; of a mix, the first source's is exported.
        generator: frames -> images; held, not copied.
        input_settings: how a recording becomes the windows it was trained on: at least INPUT_KEYS, plain JSON.
        reader: name of the language model it was trained with, for the record; empty = none.
        data, metrics: of the training, for the record and the model card.
    Raises:
        ValueError: settings that are missing, or a generator for another number of channels.
    """

    export_kind = KIND
    config_schema = record(_FIELDS, tuple(_FIELDS))

    def __init__(
        self,
        represent: Representation | PerSource,
        generator: Generator,
        *,
        input_settings: Mapping[str, Any],
        reader: str = "",
        data: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if missing := [key for key in INPUT_KEYS if key not in input_settings]:
            raise ValueError(f"input settings {missing} are missing: at least {list(INPUT_KEYS)} are needed")
        channels = input_settings["windows"] * represent.channels
        if generator.in_chans != channels:
            raise ValueError(
                f"{input_settings['windows']} windows of {represent.channels} channels are {channels}, the generator "
                f"takes {generator.in_chans}: build it with in_chans={channels}"
            )
        self.represent, self.generator = represent, generator
        self.input_settings: dict[str, Any] = dict(input_settings)
        self.reader = reader
        self.data, self.metrics = dict(data or {}), dict(metrics or {})

    @classmethod
    def _build(cls, config: Mapping[str, Any]) -> EvRep:
        return cls(
            representations.build(config["representation"]["name"], config["representation"]["params"]),
            generator_from_config(config["generator"]),
            input_settings=config["input"],
            reader=config["reader"],
            data=config["data"],
            metrics=config["metrics"],
        )

    @property
    def config(self) -> dict[str, Any]:
        """Everything needed to rebuild the model, as JSON."""
        first = self.represent.of(0) if isinstance(self.represent, PerSource) else self.represent
        return {
            "representation": representations.describe(first),
            "input": dict(self.input_settings),
            "generator": dict(self.generator.config),
            "reader": self.reader,
            "data": self.data,
            "metrics": self.metrics,
        }

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """(B, 3, H, W) float32 in [0, 1], of a batch as `gep.data.paired.collate` gives it."""
        return self.images(self.frames(batch))

    def frames(self, batch: dict[str, Any]) -> Tensor:
        """(B, T · C, H, W) float32 represented windows of a batch, window by window, Tencode scaled to [0, 1]."""
        windows = frames_of(self.represent, batch["events"])
        return frame_scale(self.represent) * windows.unflatten(0, (-1, batch["windows"])).flatten(1, 2)

    def images(self, frames: Tensor) -> Tensor:
        """(B, T · C, H, W) frames -> (B, 3, H, W) float32 in [0, 1]."""
        return self.generator(frames)

    @torch.no_grad()
    def from_events(self, events: Events | Sequence[Events] | EventBatch, bounds: np.ndarray | None = None) -> Tensor:
        """Images of recordings, in evaluation mode and without gradients.

        Args:
            events: one recording, several, or B * T windows (sample-major) that have the canvas' size already.
            bounds: (T, 2) or (B, T, 2) integer µs [t0, t1) of the windows; None = cut as in training.
        Returns:
            (B, 3, H, W) float32 in [0, 1] on the model's device.
        Raises:
            ValueError: see `gep.events.prepare.windows_of`.
        """
        batch, count = windows_of(events, self.input_settings, bounds=bounds)
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            return self({"events": batch.to(self.device), "windows": len(batch) // count})
        finally:
            for module, mode in modes.items():
                module.training = mode

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
            title=f"LLM-EvRep: {config['generator']['name']} generator on {config['representation']['name']}",
            summary=_SUMMARY,
            config={key: value for key, value in config.items() if key not in ("metrics", "data")},
            data=self.data,
            metrics=self.metrics,
            usage=_USAGE.format(name=name or Path(folder).name),
        )
        return export.save_folder(folder, kind=KIND, config=config, state=self.state_dict(), card=card)


def generator_from_config(config: Mapping[str, Any]) -> Generator:
    """A randomly initialised generator of the `config` that one of the two classes stated.

    Raises:
        ValueError: another name.
    """
    kinds: dict[str, type[Generator]] = {"unet": EvGen, "gep": GEPGenerator}
    if config["name"] not in kinds:
        raise ValueError(f"unknown generator {config['name']!r}: choose one of {', '.join(kinds)}")
    return kinds[config["name"]].from_config(config)
