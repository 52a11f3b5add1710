"""EvGen: a U-Net of EfficientNetV2 blocks from represented events to an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import GroupNormAct
from timm.models._efficientnet_blocks import EdgeResidual, InvertedResidual, SqueezeExcite
from torch import Tensor, nn

from downstream.dense.features import pad_to_multiple
from gep.events.frames import PerSource
from gep.events.represent import Representation, Tencode

PRESETS: dict[str, dict[str, Any]] = {
    # 36 to 48 pixels on two cores.
    "nano": {"widths": (8, 24, 48), "depths": (0, 1, 2), "expand": (1, 1, 4), "fused": 2, "decoder_depth": 1},
    # EfficientNetV2-S' own widths, depths and kinds of block in its first five stages.
    "small": {
        "widths": (24, 48, 64, 128, 160),
        "depths": (2, 4, 4, 6, 9),
        "expand": (1, 4, 4, 4, 6),
        "fused": 3,
        "decoder_depth": 2,
    },
}
_GROUP = 8
# Statistics of a sample's own: with batch norm, ranks and batch sizes would give different images.
norm_act = partial(GroupNormAct, group_size=_GROUP, act_layer=nn.SiLU)


class EvGen(nn.Module):
    """U-Net: stages of blocks with max-pooling between them, then bilinear enlargement and skip connections.

    Args:
        in_chans: channels of the input, windows times channels of the representation.
        widths: channels of each stage, from full resolution down, multiples of 8.
        depths: blocks of each stage; 0 in the first leaves it the stem's convolution.
        expand: expansion of each stage's blocks.
        fused: how many of the upper stages have Fused-MBConv blocks; the others have MBConv with squeeze-and-excite.
        decoder_depth: blocks of each stage on the way up.
    Raises:
        ValueError: lists of different lengths, a stage without blocks, or a width that is no multiple of 8.
    Source: LLM-EvRep, arXiv 2502.14273, Sec. 3; blocks of EfficientNetV2, arXiv 2104.00298, from timm.
    """

    def __init__(
        self,
        in_chans: int,
        *,
        widths: Sequence[int],
        depths: Sequence[int],
        expand: Sequence[int],
        fused: int,
        decoder_depth: int,
    ) -> None:
        super().__init__()
        if not len(widths) == len(depths) == len(expand) >= 1:
            raise ValueError(
                f"widths={list(widths)}, depths={list(depths)}, expand={list(expand)}: give each stage one of each"
            )
        if any(width % _GROUP for width in widths):
            raise ValueError(f"widths={list(widths)}: each must be a multiple of {_GROUP}, the group of the norm")
        self.config: dict[str, Any] = {
            "name": "unet",
            "in_chans": int(in_chans),
            "widths": [int(width) for width in widths],
            "depths": [int(depth) for depth in depths],
            "expand": [int(ratio) for ratio in expand],
            "fused": int(fused),
            "decoder_depth": int(decoder_depth),
        }
        if min(depths[1:], default=1) < 1 or min(depths[0], decoder_depth - 1) < 0:
            raise ValueError(f"depths={list(depths)}, decoder_depth={decoder_depth}: only the first of depths may be 0")
        kinds = [number < fused for number in range(len(widths))]
        self.in_chans = in_chans
        self.stem = conv_norm_act(in_chans, widths[0], 3)
        before = [widths[0], *widths[:-1]]
        self.down = nn.ModuleList(stage(*args) for args in zip(before, widths, depths, expand, kinds, strict=True))
        upward = range(len(widths) - 2, -1, -1)
        self.narrow = nn.ModuleList(conv_norm_act(widths[i + 1], widths[i], 1) for i in upward)
        self.up = nn.ModuleList(stage(2 * widths[i], widths[i], decoder_depth, expand[i], kinds[i]) for i in upward)
        self.to_image = ToImage(widths[0])
        initialise(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> EvGen:
        """A randomly initialised generator of `config` (the attribute)."""
        return cls(**{key: value for key, value in config.items() if key != "name"})

    def forward(self, frames: Tensor) -> Tensor:
        """The image of represented events.

        Args:
            frames: (B, in_chans, H, W) float, about [0, 1], of any size; 0 = no event.
        Returns:
            (B, 3, H, W) float32 in [0, 1].
        Raises:
            ValueError: another number of channels.
        """
        check_channels(frames, self.in_chans)
        cell = 2 ** (len(self.down) - 1)
        x, (height, width) = pad_to_multiple(frames, (cell, cell))
        x = self.stem(channels_last_on_cpu(x))
        skips: list[Tensor] = []
        for number, blocks in enumerate(self.down):
            x = blocks(F.max_pool2d(x, 2) if number else x)
            skips.append(x)
        skips.pop()
        for narrow, blocks in zip(self.narrow, self.up, strict=True):
            x = blocks(beside(narrow(x), skips.pop()))
        return self.to_image(x[..., :height, :width])


class ToImage(nn.Module):
    """Features to an image in [0, 1], mid-grey at the start.

    Args:
        channels: of the features.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, 3, H, W) float32 in [0, 1]."""
        # bfloat16 has 8 bits of mantissa: the steps of the image would be visible.
        return self.conv(x).float().sigmoid()


def build_generator(preset: str, *, in_chans: int) -> EvGen:
    """A randomly initialised generator.

    Args:
        preset: "nano" (small images on a CPU) or "small" (EfficientNetV2-S' scale).
        in_chans: channels of its input, windows times channels of the representation.
    Raises:
        ValueError: unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown generator preset {preset!r}: choose one of {', '.join(PRESETS)}")
    return EvGen(in_chans, **PRESETS[preset])


def stage(channels: int, width: int, depth: int, expand: int, fused: bool) -> nn.Sequential:
    """`depth` blocks, (B, channels, H, W) -> (B, width, H, W), those that keep the width residual.

    A block has `expand` times as many channels inside as at the narrower of its ends.
    """
    common: dict[str, Any] = {"act_layer": nn.SiLU, "norm_layer": norm_act}
    # EfficientNet squeezes to a quarter of the block's width, timm counts from the expanded one.
    squeeze: Any = partial(SqueezeExcite, rd_ratio=0.25 / expand)
    blocks: list[nn.Module] = []
    for number in range(depth):
        before = width if number else channels
        ratio = expand * min(before, width) / before
        if fused:
            blocks.append(EdgeResidual(before, width, exp_ratio=ratio, **common))
        else:
            blocks.append(InvertedResidual(before, width, exp_ratio=ratio, se_layer=squeeze, **common))
    return nn.Sequential(*blocks)


def conv_norm_act(channels: int, width: int, kernel: int) -> nn.Sequential:
    """Convolution of the same size, group norm and SiLU."""
    return nn.Sequential(nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False), norm_act(width))


def enlarged(low: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) brought to (B, C, H, W), bilinear."""
    return F.interpolate(low, size=size, mode="bilinear", align_corners=False)


def beside(low: Tensor, skip: Tensor) -> Tensor:
    """(B, C, h, w) enlarged to the size of (B, K, H, W), and both concatenated: (B, C + K, H, W)."""
    return torch.cat([enlarged(low, (skip.shape[-2], skip.shape[-1])), skip.to(low.dtype)], dim=1)


def frame_scale(represent: Representation | PerSource) -> float:
    """What represented events are multiplied by to be a generator's frames: Tencode's 0 … 255 become [0, 1]."""
    first = represent.of(0) if isinstance(represent, PerSource) else represent
    return 1 / 255 if isinstance(first, Tencode) else 1.0


def channels_last_on_cpu(x: Tensor) -> Tensor:
    """`x`, on a CPU in the memory format in which narrow convolutions are a quarter faster."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


def check_channels(frames: Tensor, in_chans: int) -> None:
    """ValueError where frames are not (B, in_chans, H, W)."""
    if frames.ndim != 4 or frames.shape[1] != in_chans:
        raise ValueError(
            f"frames of shape {tuple(frames.shape)}: the generator takes (B, {in_chans}, H, W), windows times the "
            "channels of the representation it was built for"
        )


def initialise(module: nn.Module) -> None:
    """He's start for every convolution, and an image's last layer near zero."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    for part in module.modules():
        if isinstance(part, ToImage):
            # Not zero: then no gradient would pass in the first step.
            nn.init.normal_(part.conv.weight, std=0.005)
