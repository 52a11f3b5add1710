"""Pictures of events that need no training, GEP's own ones, and the frame that was recorded beside them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from downstream.llm_evrep.sources.windows import ceiling, whole
from gep.data.config import DataConfig
from gep.events.frames import frames
from gep.events.represent import EventImage, Histogram, Tencode, VoxelGrid

_PERCENTILE = 99.0


class Drawn:
    """One picture of all events of a sample, its T windows taken as one.

    Args:
        name: a key of DRAWINGS.
    """

    needs_images = False

    def __init__(self, name: str):
        self.name, self._draw = name, DRAWINGS[name]

    @torch.no_grad()
    def images(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, 3, H, W) float32 in [0, 1] of a batch of `gep.data.paired.collate`, on its device."""
        return self._draw(batch)


def tencode(batch: Mapping[str, Any]) -> Tensor:
    """Colour of each pixel's latest event on black: ON (1, g, 0), OFF (0, g, 1), g falling from 1 to 0 over the sample.

    Returns:
        (B, 3, H, W) float32 in [0, 1], whole steps of 1/255.

    Source: Huang et al., Tencode, arXiv 2109.00210; the raw input of LLM-EvRep.
    """
    return frames(Tencode(), whole(batch)) / 255


def histogram(batch: Mapping[str, Any]) -> Tensor:
    """Events of both polarities counted, white on black: min(n / q, 1).

    q is the 99th percentile of the sample's nonzero counts, linearly interpolated.

    Returns:
        (B, 3, H, W) float32 in [0, 1], three equal channels.
    """
    counts = frames(Histogram(), whole(batch)).sum(dim=1, keepdim=True)
    return (counts / ceiling(counts, _PERCENTILE)).clamp(max=1).expand(-1, 3, -1, -1).contiguous()


def voxel(batch: Mapping[str, Any]) -> Tensor:
    """Preview of a voxel grid of 3 bins as red (begin), green (middle) and blue (end): 1/2 + clip(v / q, -1, 1) / 2.

    Mid-grey is no event, a channel above it more ON than OFF around its instant. q is the 99th percentile of the
    magnitudes of the sample's nonzero values, linearly interpolated.

    Returns:
        (B, 3, H, W) float32 in [0, 1].

    Source: the grid of Zhu et al., arXiv 1812.08156; the colours are ours.
    """
    grid = frames(VoxelGrid(bins=3), whole(batch))
    return 0.5 + 0.5 * (grid / ceiling(grid, _PERCENTILE)).clamp(-1, 1)


def event_image(batch: Mapping[str, Any]) -> Tensor:
    """GEP's event image: counts as ink on white, ON red, OFF blue; see `gep.events.represent.event_image`.

    Returns:
        (B, 3, H, W) float32 in [0, 1].
    """
    return frames(EventImage(percentile=_PERCENTILE), whole(batch))


DRAWINGS: dict[str, Callable[[Mapping[str, Any]], Tensor]] = {
    "tencode": tencode,
    "histogram": histogram,
    "voxel": voxel,
    "event_image": event_image,
}


class RGB:
    """The image that was recorded beside the events: what the others are measured against."""

    name, needs_images = "rgb", True

    @torch.no_grad()
    def images(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, 3, H, W) float32 in [0, 1].

        Raises:
            ValueError: a batch without images.
        """
        if "image" not in batch:
            raise ValueError(
                "source rgb: the samples hold no image; leave rgb out of sources, or read a set whose recordings have "
                "images beside them (Recordings(..., paired=True))"
            )
        return batch["image"].float() / 255


class LLMEvRep:
    """Images of an exported LLM-EvRep generator.

    Args:
        export: folder or Hub id, as `EvRep.from_pretrained` takes.
        data: what the batches are read by: windows as the export was trained on, or, where that is one, any number of
            them over as long a time, which are then joined.
        device: on which it computes.
    Raises:
        ValueError: data cuts recordings into another number of windows than the export takes.
    """

    needs_images = False

    def __init__(self, export: str, *, data: DataConfig, device: torch.device | str):
        from downstream.llm_evrep.model import EvRep

        self.name = f"llm_evrep:{export}"
        self.model = EvRep.from_pretrained(export).to(device).eval()
        self.device = torch.device(device)
        settings = self.model.input_settings
        self._join = settings["windows"] == 1 < data.windows
        own = {"windows": 1, "window_us": data.windows * data.window_us} if self._join else {}
        given = {name: own.get(name, getattr(data, name, value)) for name, value in settings.items()}
        differing = [name for name, value in settings.items() if given[name] != value]
        message = ", ".join(f"data.{name}={given[name]} ({settings[name]} there)" for name in differing)
        if "windows" in differing:
            raise ValueError(f"source {self.name}: set the data as the export was trained on: {message}")
        if differing:
            warnings.warn(f"source {self.name} was trained on other input: {message}", stacklevel=3)

    @torch.no_grad()
    def images(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, 3, H, W) float32 in [0, 1], on the batch's device."""
        home = batch["events"].device
        events, windows = (whole(batch), 1) if self._join else (batch["events"], batch["windows"])
        moved = {**batch, "events": events.to(self.device), "windows": windows}
        return self.model(moved).float().clamp(0, 1).to(home)
