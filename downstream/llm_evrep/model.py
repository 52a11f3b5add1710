"""EvRep: a representation and a generator as one module and one folder, from a recording to an image."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from downstream.llm_evrep.generator import EvGen, frame_scale
from downstream.llm_evrep.gep_init import GEPGenerator
from gep import export
from gep.events import represent as representations
from gep.events.frames import PerSource
from gep.events.frames import frames as frames_of
from gep.events.prepare import INPUT_KEYS, windows_of
from gep.events.represent import Representation
from gep.events.types import EventBatch, Events

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


class EvRep(nn.Module):
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

    def __init__(
        self,
        represent: Representation | PerSource,
        generator: EvGen | GEPGenerator,
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
    def from_config(cls, config: Mapping[str, Any]) -> EvRep:
        """A randomly initialised model of `config` (the property, or an export's config.json)."""
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
            title=f"LLM-EvRep: {config['generator']['name']} generator on {config['representation']['name']}",
            summary=_SUMMARY,
            config={key: value for key, value in config.items() if key not in ("metrics", "data")},
            data=self.data,
            metrics=self.metrics,
            usage=_USAGE.format(name=Path(folder).name),
        )
        return export.save_folder(folder, kind=KIND, config=config, state=self.state_dict(), card=card)

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], *, revision: str | None = None, local_files_only: bool = False
    ) -> EvRep:
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
            raise ValueError(f"{folder / export.CONFIG} does not describe an EvRep ({error}): export again") from error
        export.load_strict(model, state, source=str(folder))
        return model.eval()


def generator_from_config(config: Mapping[str, Any]) -> EvGen | GEPGenerator:
    """A randomly initialised generator of the `config` that one of the two classes stated.

    Raises:
        ValueError: another name.
    """
    kinds = {"unet": EvGen, "gep": GEPGenerator}
    if config["name"] not in kinds:
        raise ValueError(f"unknown generator {config['name']!r}: choose one of {', '.join(kinds)}")
    return kinds[config["name"]].from_config(config)
