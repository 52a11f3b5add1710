"""What the tasks share: features of a batch, a fresh start, results on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from downstream.dense.features import HasParts
from gep.data.images import StillImages
from gep.data.paired import Recordings, collate
from gep.evaluate import collect
from gep.events.frames import frames as frames_of
from gep.hub import GEPModel
from gep.models.sparse import mean_token

Feature = Literal["all", "last"]
Pool = Literal["mean", "mean_std", "mean_max"]


@dataclass(frozen=True)
class WindowFeatures:
    """What a model says after each of T windows of a recording."""

    window: Tensor
    """(B, T, K): window t alone for an encoder; for a backbone, window t with all windows before it"""
    image: Tensor
    """(B, T, D): mean token in the image model's space, as `GEPModel.classify` takes it"""
    encoder: Tensor
    """(B, T, D): the encoder's mean token of window t alone, of encoded patches only"""
    has_past: bool
    """whether window t has seen the windows before it"""

    def pooled(self, feature: Feature, upto: int | None = None) -> Tensor:
        """One feature a recording.

        Args:
            feature: "all" = mean over the windows; "last" = the last window.
            upto: use the first so many windows only.
        Returns:
            (B, K) float32.
        """
        window = self.window[:, :upto]
        return window[:, -1] if feature == "last" else window.mean(dim=1)

    def in_image_space(self) -> Tensor:
        """(B, D) for zero-shot: the image predicted after the last window, or the encoder's mean over windows."""
        return self.image[:, -1] if self.has_past else self.image.mean(dim=1)

    def early(self, upto: int) -> Tensor:
        """What a model knows after `upto` windows: its newest state if that has seen the past, else the mean."""
        return self.pooled("last" if self.has_past else "all", upto)


def pool_tokens(tokens: Tensor, pool: Pool, real: Tensor | None = None) -> Tensor:
    """(…, N, D) tokens -> (…, D) their mean, or (…, 2 D) with the standard deviation or maximum over N beside it.

    An object that fills a few tokens of many hardly moves the mean.

    Args:
        real: (…, N) bool, the tokens that count, at least one each; None = all. One token alone has deviation 0.
    """
    mean = mean_token(tokens, real)
    if pool == "mean":
        return mean
    if real is None:
        return torch.cat([mean, tokens.std(dim=-2) if pool == "mean_std" else tokens.amax(dim=-2)], dim=-1)
    out = ~real[..., None]
    if pool == "mean_std":
        squares = (tokens - mean[..., None, :]).masked_fill(out, 0.0).square().sum(dim=-2)
        # The root of 0 has no gradient.
        beside = (squares / (real.sum(dim=-1, keepdim=True) - 1).clamp_min(1)).clamp_min(1e-12).sqrt()
    else:
        beside = tokens.masked_fill(out, -torch.inf).amax(dim=-2)
    return torch.cat([mean, beside], dim=-1)


def window_features(
    model: HasParts, batch: dict[str, Any], *, use_backbone: bool = True, pool: Pool = "mean"
) -> WindowFeatures:
    """Features of every window of a batch.

    Of an encoder that leaves patches out the encoded tokens are pooled; of a backbone all, as it reads all and says
    something of every place.

    Args:
        model: exported model; its backbone is used where it has one.
        batch: as `gep.data.paired.collate` gives it.
        use_backbone: False reads the encoder alone.
        pool: how the tokens of a window become one feature.
    """
    frames = frames_of(model.represent, batch["events"])
    tokens, _ = model.encoder(frames)
    tokens = tokens.float().unflatten(0, (-1, batch["windows"]))
    real = model.encoder.real(frames)
    real = None if real is None else real.unflatten(0, (-1, batch["windows"]))
    encoder_mean = mean_token(tokens, real)
    if model.backbone is None or not use_backbone:
        return WindowFeatures(pool_tokens(tokens, pool, real), encoder_mean, encoder_mean, has_past=False)
    tokens = F.layer_norm(tokens, tokens.shape[-1:])
    output = model.backbone(
        tokens,
        torch.zeros(tokens.shape[:2], dtype=torch.int64, device=tokens.device),
        batch["t_us"][..., 1],
        model.encoder.grid(*frames.shape[-2:]),
    )
    image, hidden = output.image.float(), output.hidden.float()
    # The hidden state knows more than the image it predicts; both together probe best (docs/LOG.md).
    window = torch.cat([pool_tokens(image, pool), pool_tokens(hidden, pool)], dim=-1)
    return WindowFeatures(window, image.mean(dim=2), encoder_mean, has_past=True)


def pixel_features(batch: dict[str, Any], cells: tuple[int, int], represent: Any) -> Tensor:
    """Counted events on a coarse grid, per window and channel: the baseline that learns nothing.

    Args:
        batch: as `collate` gives it.
        cells: rows and columns of the grid.
        represent: ragged batch -> (B·T, C, H, W).
    Returns:
        (B, T · C · rows · columns) float32.
    """
    frames = frames_of(represent, batch["events"])
    pooled = F.adaptive_avg_pool2d(frames, cells).unflatten(0, (-1, batch["windows"]))
    return pooled.flatten(1)


def extract(
    model: GEPModel,
    source: Recordings | StillImages,
    accelerator: Accelerator,
    *,
    batch_size: int,
    use_backbone: bool = True,
    pool: Pool = "mean",
    title: str | None = None,
) -> tuple[WindowFeatures, Tensor]:
    """Features of every recording of a set, in its order, on the CPU of every rank.

    Returns:
        The features (B = len(source)) and the labels int64 (B,).
    """
    model.eval()
    has_past = model.backbone is not None and use_backbone

    def rows(batch: dict[str, Any]) -> dict[str, Tensor]:
        features = window_features(model, batch, use_backbone=use_backbone, pool=pool)
        return {
            "window": features.window,
            "image": features.image,
            "encoder": features.encoder,
            "label": batch["label"],
        }

    found = collect(rows, source, collate=collate, batch_size=batch_size, accelerator=accelerator, title=title)
    window, image, encoder = (found[name].float() for name in ("window", "image", "encoder"))
    return WindowFeatures(window, image, encoder, has_past), found["label"]


def reinitialise(model: GEPModel, seed: int) -> None:
    """Gives encoder and backbone fresh random weights: the from-scratch baseline of the same architecture."""
    torch.manual_seed(seed)
    model.encoder = type(model.encoder)(**model.encoder.config).to(model.device)
    if model.backbone is not None:
        model.backbone = type(model.backbone)(**model.backbone.config).to(model.device)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """A file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
