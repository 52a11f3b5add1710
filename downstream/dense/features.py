"""From a batch to maps of tokens at several depths, and the counted events that stand in for them as a baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gep.events import represent as representations
from gep.events.frames import frames as frames_of
from gep.events.represent import Representation
from gep.models import Backbone, EventEncoder
from gep.models.vit import spread_depths


class FeatureMaps(NamedTuple):
    """What a head reads of the last window of B recordings."""

    levels: list[Tensor]
    """L maps (B, D_l, h, w) float32, shallow to deep."""
    size: tuple[int, int]
    """(H, W) of the canvas, before padding."""
    padded: tuple[int, int]
    """(H', W') >= (H, W), multiples of the patch; (h, w) = padded / patch."""


class HasParts(Protocol):
    """What features are made of; a GEPModel is such."""

    @property
    def represent(self) -> Representation: ...

    @property
    def encoder(self) -> EventEncoder: ...

    @property
    def backbone(self) -> Backbone | None: ...


class HasPatch(Protocol):
    """What the features of a baseline are made of; a GEPModel is such, too."""

    @property
    def represent(self) -> Representation: ...

    @property
    def encoder(self) -> EventEncoder | _Patch: ...


@dataclass(frozen=True)
class Parts:
    """Represented events, encoder and backbone without the rest of a GEPModel, whose input has a size of its own."""

    represent: Representation
    encoder: EventEncoder
    backbone: Backbone | None


@dataclass(frozen=True)
class _Patch:
    """All that a baseline takes from an encoder."""

    patch_size: tuple[int, int]


@dataclass(frozen=True)
class _PatchParts:
    represent: Representation
    encoder: _Patch


class DenseFeatures(nn.Module):
    """Maps of the encoder at several depths, with the backbone's beside them or in their place where it is used.

    They are whole where the encoder leaves patches out, too: its learned token stands there, at every depth.

    Level l is the encoder's map of the last window at depth l; with a backbone, which has read all windows up to
    it, its state at the same relative depth is concatenated, and at the deepest level the image it predicts too.

    Args:
        model: its parts are held, not copied; the gradients of the two heads that nothing reads are turned off.
        use_backbone: False reads the encoder alone, and of T windows only the last.
        num_levels: depths L, spread evenly over the encoder's blocks, the last always the final one.
        encoder_maps: False leaves the encoder's maps out where a backbone is used, whose states hold them too: a
            narrower map for a linear head on few labels.
    Raises:
        ValueError: more levels than the encoder has blocks.
    """

    def __init__(
        self, model: HasParts, *, use_backbone: bool = True, num_levels: int = 4, encoder_maps: bool = True
    ) -> None:
        super().__init__()
        self.represent = model.represent
        self.encoder = model.encoder
        self.backbone = model.backbone if use_backbone else None
        self.num_levels = num_levels
        self.encoder_maps = encoder_maps or self.backbone is None
        self.patch_size: tuple[int, int] = self.encoder.patch_size
        if not 1 <= num_levels <= self.encoder.num_layers:
            raise ValueError(
                f"num_levels={num_levels}, the encoder has {self.encoder.num_layers} blocks: "
                f"give 1 … {self.encoder.num_layers}"
            )
        channels = [self.encoder.embed_dim] * num_levels
        self.depths: list[int] = []
        if self.backbone is not None:
            self.depths = spread_depths(self.backbone.num_layers, num_levels)
            channels = [self.encoder_maps * dim + self.backbone.width for dim in channels]
            channels[-1] += self.backbone.token_dim
            # Not read: DDP would wait for its gradient.
            self.backbone.next_head.requires_grad_(False)
        if self.encoder.head is not None:
            self.encoder.head.requires_grad_(False)
        self.channels: tuple[int, ...] = tuple(channels)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DenseFeatures:
        """Randomly initialised features of `config` (the property)."""
        represent = representations.build(config["representation"]["name"], config["representation"]["params"])
        backbone = None if config["backbone"] is None else Backbone(**config["backbone"])
        return cls(
            Parts(represent, EventEncoder(**config["encoder"]), backbone),
            num_levels=config["num_levels"],
            encoder_maps=config.get("encoder_maps", True),
        )

    @property
    def config(self) -> dict[str, Any]:
        """Everything needed to rebuild the module, as JSON."""
        return {
            "name": "dense",
            "representation": representations.describe(self.represent),
            "encoder": dict(self.encoder.config),
            "backbone": None if self.backbone is None else dict(self.backbone.config),
            "num_levels": self.num_levels,
            "encoder_maps": self.encoder_maps,
        }

    def frames(self, batch: dict[str, Any]) -> Tensor:
        """(B, T, C, H, W) float32 represented windows of a batch, as `gep.data.paired.collate` gives it."""
        return frames_of(self.represent, batch["events"]).unflatten(0, (-1, batch["windows"]))

    def forward(self, frames: Tensor, t_us: Tensor | None = None) -> FeatureMaps:
        """Maps of the last window.

        Args:
            frames: (B, T, C, H, W) represented windows of any size.
            t_us: (B, T) int64 end of each window [µs]; only a backbone asks for it.
        Raises:
            ValueError: a backbone without t_us.
        """
        frames, size = pad_to_multiple(frames, self.patch_size, self.encoder.background)
        padded = (frames.shape[-2], frames.shape[-1])
        grid = self.encoder.grid(*padded)
        levels = self.encoder.intermediates(frames[:, -1], self.num_levels)
        if self.backbone is not None:
            past = self._past(frames[:, :-1], t_us, levels[-1], grid)
            levels = self.join(levels, past)
        return FeatureMaps([level.float().mT.unflatten(-1, grid) for level in levels], size, padded)

    def join(self, own: list[Tensor], seen: list[Tensor]) -> list[Tensor]:
        """What the head reads of the encoder's maps L (B, N, D) and the backbone's L (B, N, K), float32."""
        if not self.encoder_maps:
            return [state.float() for state in seen]
        return [torch.cat([level.float(), state.float()], dim=-1) for level, state in zip(own, seen, strict=True)]

    def _past(self, earlier: Tensor, t_us: Tensor | None, last: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """What the backbone says of the last window's tokens (B, N, D), having read the earlier ones: L (B, N, K)."""
        if t_us is None:
            raise ValueError("t_us is needed: the backbone knows a window by its end")
        tokens = last.float()[:, None]
        if earlier.shape[1]:
            before = self.encoder(earlier.flatten(0, 1))[0].float().unflatten(0, earlier.shape[:2])
            tokens = torch.cat([before, tokens], dim=1)
        modality = torch.zeros(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
        assert self.backbone is not None
        output, states = self.backbone.intermediates(tokens, modality, t_us, grid, self.depths)
        seen = [state[:, -1] for state in states]
        # As in downstream.common: the hidden state knows more than the image that it predicts.
        seen[-1] = torch.cat([seen[-1].float(), output.image[:, -1].float()], dim=-1)
        return seen


class HistogramFeatures(nn.Module):
    """The represented windows themselves, a patch's pixels as the channels of its token: nothing is learned.

    Args:
        model: its representation and patch are taken over.
        windows: T.
    """

    def __init__(self, model: HasPatch, *, windows: int) -> None:
        super().__init__()
        self.represent, self.encoder, self.backbone = model.represent, None, None
        self.patch_size: tuple[int, int] = model.encoder.patch_size
        self.windows = windows
        self.channels: tuple[int, ...] = (windows * self.represent.channels * math.prod(self.patch_size),)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> HistogramFeatures:
        """The module of `config` (the property)."""
        represent = representations.build(config["representation"]["name"], config["representation"]["params"])
        rows, columns = config["patch_size"]
        return cls(_PatchParts(represent, _Patch((rows, columns))), windows=config["windows"])

    @property
    def config(self) -> dict[str, Any]:
        """Everything needed to rebuild the module, as JSON."""
        return {
            "name": "histogram",
            "representation": representations.describe(self.represent),
            "patch_size": list(self.patch_size),
            "windows": self.windows,
        }

    def frames(self, batch: dict[str, Any]) -> Tensor:
        """(B, T, C, H, W) float32 represented windows of a batch, as `gep.data.paired.collate` gives it."""
        return frames_of(self.represent, batch["events"]).unflatten(0, (-1, batch["windows"]))

    def forward(self, frames: Tensor, t_us: Tensor | None = None) -> FeatureMaps:
        """One level (B, T · C · ph · pw, h, w), channels in the order window, channel, row and column in the patch.

        Args:
            frames: (B, T, C, H, W) represented windows of any size.
            t_us: not read.
        Raises:
            ValueError: another number of windows.
        """
        if frames.shape[1] != self.windows:
            raise ValueError(f"{frames.shape[1]} windows, the histogram features were made for {self.windows}")
        frames, size = pad_to_multiple(frames, self.patch_size)
        padded = (frames.shape[-2], frames.shape[-1])
        ph, pw = self.patch_size
        cells = frames.unflatten(-1, (-1, pw)).unflatten(-3, (-1, ph))  # (B, T, C, h, ph, w, pw)
        level = cells.permute(0, 1, 2, 4, 6, 3, 5).flatten(1, 4)
        return FeatureMaps([level.float()], size, padded)


def pad_to_multiple(frames: Tensor, patch: tuple[int, int], value: float = 0.0) -> tuple[Tensor, tuple[int, int]]:
    """Rows and columns of one value at the bottom and right, up to multiples of the patch.

    Args:
        frames: (…, H, W).
        patch: (rows, columns) of a patch.
        value: of the new pixels; what an encoder that leaves patches out takes for no events.
    Returns:
        (…, H', W'), and (H, W).
    """
    height, width = frames.shape[-2:]
    down, right = -height % patch[0], -width % patch[1]
    if down or right:
        frames = F.pad(frames, (0, right, 0, down), value=value)
    return frames, (height, width)


def features_from_config(config: Mapping[str, Any]) -> DenseFeatures | HistogramFeatures:
    """The features of a `config` that one of the two classes stated.

    Raises:
        ValueError: another name.
    """
    kinds: dict[str, type[DenseFeatures] | type[HistogramFeatures]]
    kinds = {"dense": DenseFeatures, "histogram": HistogramFeatures}
    if config["name"] not in kinds:
        raise ValueError(f"unknown features {config['name']!r}: choose one of {', '.join(kinds)}")
    return kinds[config["name"]].from_config(config)
