"""A model as a plain function of tensors: what the exported file takes, gives, and which sizes fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Kind = Literal["gep", "dense", "llm_evrep"]


@dataclass(frozen=True)
class Graph:
    """A module with tensors in and out, and the shapes that it takes."""

    module: nn.Module
    """In evaluation mode, without gradients."""
    inputs: tuple[str, ...]
    """Names: "frames", and "t_us" where a backbone reads them."""
    outputs: tuple[str, ...]
    """Names of what it gives."""
    lead: tuple[int, ...]
    """Axes of frames between the batch and the rows: (C,), (T, C) or (T · C,)."""
    unit: tuple[int, int]
    """(rows, columns) that the size is a multiple of."""
    size: tuple[int, int]
    """(H, W) that it is exported for."""

    def example(self, batch: int, size: tuple[int, int], seed: int = 0) -> tuple[Tensor, ...]:
        """Random inputs: frames in [0, 1), and windows of 50 ms."""
        frames = torch.rand(batch, *self.lead, *size, generator=torch.Generator().manual_seed(seed))
        if "t_us" not in self.inputs:
            return (frames,)
        return frames, 50_000 * torch.arange(1, self.lead[0] + 1).repeat(batch, 1)


def graph_of(model: Any, kind: Kind, size: tuple[int, int] | None = None) -> Graph:
    """The part of a model that other runtimes can run: represented windows in, tensors out.

    Args:
        model: GEPModel (its encoder), DenseModel or EvRep (its generator), as `kind` says.
        kind: of the exported folder.
        size: (H, W) [px]; None = as trained, rounded up to what the model is a multiple of.
    Raises:
        ValueError: a size that does not fit.
    """
    lead: tuple[int, ...]
    outputs: tuple[str, ...]
    if kind == "gep":
        module, lead, unit = model.encoder, (model.encoder.in_chans,), model.encoder.patch_size
        outputs = ("tokens", "pooled")
    elif kind == "dense":
        channels = model.features.represent.channels
        lead, unit, outputs = (model.input_settings["windows"], channels), model.features.patch_size, ("output",)
        module = _Dense(model)
    else:
        module, lead, outputs = model.generator, (model.generator.in_chans,), ("image",)
        encoder = getattr(module, "encoder", None)
        unit = (2 ** (len(module.down) - 1),) * 2 if encoder is None else encoder.patch_size
    timed = kind == "dense" and model.features.backbone is not None
    trained = model.input_settings["height"], model.input_settings["width"]
    if size is None:
        size = -(-trained[0] // unit[0]) * unit[0], -(-trained[1] // unit[1]) * unit[1]
    elif size[0] % unit[0] or size[1] % unit[1] or min(size) < 1:
        raise ValueError(f"size {size[0]}x{size[1]} is no multiple of {unit[0]}x{unit[1]}, which this model takes")
    inputs = ("frames", "t_us") if timed else ("frames",)
    wrapped = (_Timed if timed else _Untimed)(module).requires_grad_(False).eval()
    return Graph(wrapped, inputs, outputs, lead, (unit[0], unit[1]), (size[0], size[1]))


class _Dense(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, frames: Tensor, t_us: Tensor | None = None) -> Tensor:
        return self.model.predict_frames(frames, t_us)


class _Untimed(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, frames: Tensor) -> Any:
        return self.module(frames)


class _Timed(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, frames: Tensor, t_us: Tensor) -> Any:
        return self.module(frames, t_us)
