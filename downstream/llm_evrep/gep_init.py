"""A generator that starts from GEP: an exported encoder in place of the U-Net's, with a light decoder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from downstream.dense.features import pad_to_multiple
from downstream.llm_evrep.generator import (
    ToImage,
    beside,
    channels_last_on_cpu,
    check_channels,
    conv_norm_act,
    enlarged,
    frame_scale,
    initialise,
    stage,
)
from gep.events.represent import Representation
from gep.hub import GEPModel
from gep.models import EventEncoder

WIDTHS: dict[str, tuple[int, int, int]] = {"nano": (8, 24, 48), "small": (24, 64, 160)}
"""Channels of the decoder at full resolution, at half of it and on the tokens' grid, by the generator's presets."""
_DEPTH = {"full": 1, "half": 1, "grid": 2}  # blocks


class GEPGenerator(nn.Module):
    """Token maps of an event encoder, enlarged to an image beside the input frames at full resolution.

    Args:
        encoder: held, not copied; the gradient of its head, which nothing reads, is turned off.
        windows: T; the encoder sees them one by one, the decoder all of them.
        num_levels: depths of the encoder that are read.
        widths: channels of the decoder at full and half resolution and on the tokens' grid, multiples of 8.
        frame_scale: what frames are multiplied by before the encoder, which was trained on another range of values.
        freeze: whether the encoder stays as it is, in evaluation mode and without gradient.
    Raises:
        ValueError: more levels than the encoder has blocks.
    """

    def __init__(
        self,
        encoder: EventEncoder,
        *,
        windows: int = 1,
        num_levels: int = 4,
        widths: Sequence[int] = WIDTHS["nano"],
        frame_scale: float = 1.0,
        freeze: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= num_levels <= encoder.num_layers:
            raise ValueError(
                f"num_levels={num_levels}, the encoder has {encoder.num_layers} blocks: give 1 … {encoder.num_layers}"
            )
        self.encoder = encoder
        if encoder.head is not None:
            encoder.head.requires_grad_(False)  # DDP would wait for it
        self.windows, self.num_levels, self.frame_scale, self.freeze = windows, num_levels, float(frame_scale), freeze
        self.widths = tuple(int(width) for width in widths)
        self.in_chans = windows * encoder.in_chans
        full, half, grid = self.widths
        self.read = conv_norm_act(windows * num_levels * encoder.embed_dim, grid, 1)
        self.grid_blocks = stage(grid, grid, _DEPTH["grid"], 4, fused=False)
        self.to_half = conv_norm_act(grid, half, 1)
        self.half_blocks = stage(half, half, _DEPTH["half"], 2, fused=True)
        self.to_full = conv_norm_act(half, full, 1)
        self.stem = conv_norm_act(self.in_chans, full, 3)
        self.full_blocks = stage(2 * full, full, _DEPTH["full"], 2, fused=True)
        self.to_image = ToImage(full)
        for name, part in self.named_children():
            if name != "encoder":
                initialise(part)
        if freeze:
            encoder.requires_grad_(False)
            encoder.eval()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GEPGenerator:
        """A randomly initialised generator of `config` (the property)."""
        rest = {key: config[key] for key in ("windows", "num_levels", "widths", "frame_scale")}
        return cls(EventEncoder(**config["encoder"]), **rest)

    @property
    def config(self) -> dict[str, Any]:
        """Everything needed to rebuild the module, as JSON."""
        return {
            "name": "gep",
            "encoder": dict(self.encoder.config),
            "windows": self.windows,
            "num_levels": self.num_levels,
            "widths": list(self.widths),
            "frame_scale": self.frame_scale,
        }

    def forward(self, frames: Tensor) -> Tensor:
        """The image of represented events.

        Args:
            frames: (B, T · C, H, W) float, window by window, of any size.
        Returns:
            (B, 3, H, W) float32 in [0, 1].
        Raises:
            ValueError: another number of channels.
        """
        check_channels(frames, self.in_chans)
        empty = self.encoder.background / self.frame_scale
        frames, (height, width) = pad_to_multiple(frames, self.encoder.patch_size, empty)
        half = -(-frames.shape[-2] // 2), -(-frames.shape[-1] // 2)
        x = self.grid_blocks(self.read(self._tokens(frames)))
        x = self.half_blocks(enlarged(self.to_half(x), half))
        x = self.full_blocks(beside(self.to_full(x), self.stem(channels_last_on_cpu(frames))))
        return self.to_image(x[..., :height, :width])

    def _tokens(self, frames: Tensor) -> Tensor:
        """(B, T · L · D, h, w) maps of all windows and depths."""
        each = (self.frame_scale * frames).unflatten(1, (self.windows, -1)).flatten(0, 1)
        with torch.no_grad() if self.freeze else nullcontext():
            levels = self.encoder.intermediates(each, self.num_levels)
        maps = torch.cat(levels, dim=-1).mT.unflatten(-1, self.encoder.grid(*frames.shape[-2:]))
        return maps.unflatten(0, (-1, self.windows)).flatten(1, 2)

    def train(self, mode: bool = True) -> GEPGenerator:
        """A frozen encoder stays in evaluation mode: its stochastic depth would change what is read."""
        super().train(mode)
        if self.freeze:
            self.encoder.eval()
        return self


def gep_generator(
    name: str | os.PathLike[str], *, preset: str = "nano", windows: int = 1, freeze: bool = False
) -> tuple[GEPGenerator, Representation]:
    """A generator around the encoder of a GEP export, and the representation that it was trained on.

    Args:
        name: folder or Hub id of the export.
        preset: size of the decoder, a key of WIDTHS.
        windows: T of the generator, whatever the export had.
        freeze: see GEPGenerator.
    Raises:
        FileNotFoundError, ValueError: see GEPModel.from_pretrained; or an unknown preset.
    """
    if preset not in WIDTHS:
        raise ValueError(f"unknown generator preset {preset!r}: choose one of {', '.join(WIDTHS)}")
    model = GEPModel.from_pretrained(name)
    generator = GEPGenerator(
        model.encoder,
        windows=windows,
        num_levels=min(4, model.encoder.num_layers),
        widths=WIDTHS[preset],
        frame_scale=1 / frame_scale(model.represent),
        freeze=freeze,
    )
    return generator.train(), model.represent
