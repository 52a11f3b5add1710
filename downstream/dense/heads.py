"""Heads from maps of tokens to a map of outputs: linear, in the way of UPerNet, and in the way of DPT."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gep.models.vit import spread_depths

HeadName = Literal["linear", "upernet", "dpt"]
_POOLED = (1, 2, 3, 6)  # cells a side of UPerNet's pyramid pooling
_SCALES = 4  # x4, x2, x1 and x1/2 of the token grid


class Standardise(nn.Module):
    """Zero mean and unit variance for every channel of every level; the identity until `fit`.

    Args:
        channels: D_l of each level.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.register_buffer("mean", torch.zeros(sum(self.channels)))
        self.register_buffer("std", torch.ones(sum(self.channels)))

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """L maps (B, D_l, h, w) -> the same, standardised."""
        means, stds = (x[:, None, None].split(self.channels) for x in (self.mean, self.std))
        return [(level - mean) / std for level, mean, std in zip(levels, means, stds, strict=True)]

    @torch.no_grad()
    def fit(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """Takes mean and population standard deviation over all samples and positions; 1 where a channel is constant.

        Args:
            batches: levels (B, D_l, h, w) of each batch.
        Raises:
            ValueError: no batch.
        """
        count, mean, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for levels in batches:
            values = torch.cat([level.double().transpose(0, 1).flatten(1) for level in levels])
            own = values.mean(dim=1)
            total = count + values.shape[1]
            # Chan et al. 1979: squares about each batch's own mean, which no large mean can swallow.
            squares = squares + (values - own[:, None]).square().sum(dim=1)
            squares = squares + (own - mean).square() * (count * values.shape[1] / total)
            mean = mean + (own - mean) * (values.shape[1] / total)
            count = total
        if not count:
            raise ValueError("no batch to take the mean and standard deviation of the features from")
        std = (squares / count).sqrt()
        std = torch.where(std > 1e-6 * mean.abs(), std, torch.ones_like(std))
        self.mean.copy_(mean)
        self.std.copy_(std)


class Head(nn.Module):
    """From the levels of features to a map of outputs."""

    config: dict[str, Any]
    """Name, outputs and width, from which `build_head` makes an equal one."""


class LinearHead(Head):
    """1x1 convolution on all levels, standardised and concatenated.

    Args:
        channels: D_l of each level.
        out: output channels.
    """

    def __init__(self, channels: Sequence[int], out: int) -> None:
        super().__init__()
        self.config = {"name": "linear", "out": out, "width": 0}
        self.standardise = Standardise(channels)
        self.predict = _prediction(sum(channels), out)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """L maps (B, D_l, h, w) -> (B, out, h, w)."""
        return self.predict(torch.cat(self.standardise(levels), dim=1))


class UPerHead(Head):
    """Pyramid pooling, top-down sums and fusion over four scales that a ViT's maps of one scale are brought to.

    Args:
        channels: D_l of each level.
        out: output channels.
        width: channels inside, even and >= 16.
    Source: Xiao et al. 2018, "Unified Perceptual Parsing" (arXiv 1807.10221); the four scales as Bao et al. 2022,
        "BEiT" (arXiv 2106.08254). Group norm in place of batch norm.
    """

    def __init__(self, channels: Sequence[int], out: int, *, width: int = 256) -> None:
        super().__init__()
        self.config = {"name": "upernet", "out": out, "width": width}
        _check_width(width)
        self.standardise = Standardise(channels)
        self.taken = _levels_of_scales(len(channels))
        dims = [channels[i] for i in self.taken]
        self.scales = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(dims[0], width, 2, stride=2),
                    _norm(width),
                    nn.GELU(),
                    nn.ConvTranspose2d(width, width, 2, stride=2),
                ),
                nn.ConvTranspose2d(dims[1], width, 2, stride=2),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )
        self.pooled = nn.ModuleList(
            [nn.Sequential(nn.AdaptiveAvgPool2d(cells), _conv(dims[3], width, 1)) for cells in _POOLED]
        )
        self.bottleneck = _conv(dims[3] + len(_POOLED) * width, width, 3)
        self.laterals = nn.ModuleList([_conv(dim, width, 1) for dim in (width, width, dims[2])])
        self.smooth = nn.ModuleList([_conv(width, width, 3) for _ in self.laterals])
        self.fuse = _conv(_SCALES * width, width, 3)
        self.predict = _prediction(width, out)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """L maps (B, D_l, h, w) -> (B, out, 4 h, 4 w)."""
        levels = self.standardise(levels)
        *maps, deepest = [scale(levels[i]) for scale, i in zip(self.scales, self.taken)]
        pooled = [_resize(pool(deepest), deepest.shape[-2:]) for pool in self.pooled]
        down = self.bottleneck(torch.cat([deepest, *pooled], dim=1))
        tops = [down]
        for lateral, finer in zip(reversed(self.laterals), reversed(maps)):
            down = lateral(finer) + _resize(down, finer.shape[-2:])
            tops.insert(0, down)
        tops = [*(smooth(top) for smooth, top in zip(self.smooth, tops)), tops[-1]]
        return self.predict(self.fuse(torch.cat([_resize(top, tops[0].shape[-2:]) for top in tops], dim=1)))


class DPTHead(Head):
    """Maps reassembled at four scales and fused from coarse to fine by residual convolutions.

    The finest fusion stays at x4 of the token grid: with patches of 6 to 16 pixels that is close to the pixels.

    Args:
        channels: D_l of each level.
        out: output channels.
        width: channels inside, even and >= 16.
    Source: Ranftl et al. 2021, "Vision Transformers for Dense Prediction" (arXiv 2103.13413). Group norm in place
        of batch norm.
    """

    def __init__(self, channels: Sequence[int], out: int, *, width: int = 256) -> None:
        super().__init__()
        self.config = {"name": "dpt", "out": out, "width": width}
        _check_width(width)
        self.standardise = Standardise(channels)
        self.taken = _levels_of_scales(len(channels))
        resample = (
            nn.ConvTranspose2d(width, width, 4, stride=4),
            nn.ConvTranspose2d(width, width, 2, stride=2),
            nn.Identity(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
        )
        self.reassemble = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(channels[i], width, 1), scale, nn.Conv2d(width, width, 3, padding=1, bias=False)
                )
                for i, scale in zip(self.taken, resample)
            ]
        )
        self.lateral = nn.ModuleList([_Residual(width) for _ in range(_SCALES - 1)])
        self.fusion = nn.ModuleList([_Residual(width) for _ in range(_SCALES)])
        self.project = nn.ModuleList([nn.Conv2d(width, width, 1) for _ in range(_SCALES)])
        self.last = _conv(width, width // 2, 3)
        self.predict = _prediction(width // 2, out)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """L maps (B, D_l, h, w) -> (B, out, 4 h, 4 w)."""
        levels = self.standardise(levels)
        maps = [reassemble(levels[i]) for reassemble, i in zip(self.reassemble, self.taken)]
        fused = maps[-1]
        for scale in reversed(range(_SCALES)):
            if scale < _SCALES - 1:
                fused = fused + self.lateral[scale](maps[scale])
            finer = maps[max(scale - 1, 0)].shape[-2:]
            fused = self.project[scale](_resize(self.fusion[scale](fused), finer))
        return self.predict(self.last(fused))


class _Residual(nn.Module):
    """x + two pre-activated 3x3 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = _norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = _norm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(F.relu(x)))
        return x + self.norm2(self.conv2(F.relu(y)))


def build_head(name: HeadName, channels: Sequence[int], out: int, *, width: int = 256) -> Head:
    """A head for the levels that features state.

    Args:
        name: "linear", "upernet" or "dpt".
        channels: D_l of each level (`features.channels`).
        out: output channels.
        width: channels inside "upernet" and "dpt", even and >= 16; "linear" has none.
    Returns:
        A module: L maps (B, D_l, h, w) -> (B, out, s h, s w), s = 1 ("linear") or 4.
    Raises:
        ValueError: unknown name, or a width that does not fit.
    """
    if name == "linear":
        return LinearHead(channels, out)
    heads: dict[str, Callable[..., Head]] = {"upernet": UPerHead, "dpt": DPTHead}
    if name not in heads:
        raise ValueError(f"unknown head {name!r}: choose one of linear, {', '.join(heads)}")
    return heads[name](channels, out, width=width)


def _levels_of_scales(num: int) -> list[int]:
    """Which of `num` levels each of the four scales is made of, the shallowest for the finest."""
    return [depth - 1 for depth in spread_depths(num, _SCALES)]


def _check_width(width: int) -> None:
    if width < 16 or width % 2:
        raise ValueError(f"head width={width} must be even and at least 16; half of it is normalised in groups of 8")


def _norm(width: int) -> nn.GroupNorm:
    # At least 8 channels a group: a map of one cell still has something to normalise over.
    return nn.GroupNorm(max(n for n in range(1, 33) if width % n == 0 and width // n >= 8), width)


def _conv(dim: int, width: int, size: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(dim, width, size, padding=size // 2, bias=False), _norm(width), nn.ReLU())


def _prediction(dim: int, out: int) -> nn.Conv2d:
    conv = nn.Conv2d(dim, out, 1)
    nn.init.normal_(conv.weight, std=0.01)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return x if x.shape[-2:] == tuple(size) else F.interpolate(x, size=tuple(size), mode="bilinear")
