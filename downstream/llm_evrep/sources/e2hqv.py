"""E2HQV: grey video from events by a model of the camera, with the names and shapes of the published checkpoints.

Three networks (Qu et al., AAAI 2024, arXiv 2401.08117). REFE, a U-Net of ConvLSTMs, turns each voxel grid into a map.
TSEM corrects the image before by that map and a learned embedding of how many windows ago the recurrence began. MAFG
reads all of them and estimates positive and negative event terms E and thresholds c, and a constant k carries the
image f over the window: f' = exp(c+ E+ - c- E-) (f + k) - k.

Verified from the public description and repository (https://github.com/VincentQQu/E2HQV; read for names, shapes and
order, no code was taken): the modules' names and shapes, three plain state dicts (EffLstmcn_v*.pth = REFE,
EffEmbedr_v*.pth = TSEM, EffMultiWNet_v*.pth = MAFG), the first image (black), the restart of the image every 20 windows
and of the ConvLSTMs every 40, the states carried on (its correction of 2024-06-27), the result clipped to [0, 1].
Not verified, as neither weights nor the script that makes its voxel grids were at hand: that the grids have ON as +1
and OFF as -1 without further scaling (as in Zhu et al., arXiv 1812.08156, which its README names) and begin and end
with a window's first and last event. Ours: views below 36 pixels a side get a margin of zeros, cut off again.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.llm_evrep.sources.e2vid import ConvLSTM, State
from downstream.llm_evrep.sources.weights import check_state, fit_state, read_checkpoint
from downstream.llm_evrep.sources.windows import voxels

GET = (
    "Download the three files EffLstmcn_v*.pth, EffEmbedr_v*.pth and EffMultiWNet_v*.pth (Google Drive, linked in the "
    "README of https://github.com/VincentQQu/E2HQV) into one folder and name it: e2hqv:<folder>"
)
BINS, FRAME_RUN, STATE_RUN = 5, 20, 40
_SMALLEST = 36  # px: what four poolings by 3, 3, 2 and 2 need
_EMBEDDING = (180, 240)  # px


def _named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def _double(inputs: int, outputs: int, last: int = 0) -> nn.Sequential:
    """Two convolutions, each with normalisation over all channels and SiLU; then one of 1x1 to `last` channels."""
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.GroupNorm(1, outputs), nn.SiLU()]
    if last:
        layers.append(nn.Conv2d(outputs, last, 1, bias=False))
    return _named(double_conv=nn.Sequential(*layers))


def _conv(inputs: int, outputs: int, kernel: int, *, groups: int = 1, act: bool = True) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups), nn.GroupNorm(1, outputs)]
    return _named(convna=nn.Sequential(*layers, *([nn.SiLU()] if act else [])))


class _Dense(nn.Module):
    """Linear map without an offset; it may have no channels."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        bound = max(inputs, 1) ** -0.5
        self.weight = nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class _Squeeze(nn.Module):
    """Channels weighted by what their means say."""

    def __init__(self, channels: int):
        super().__init__()
        # As published: below 12 channels nothing is left between, every weight is sigmoid(0), the file's tensors empty.
        hidden = channels // 12
        self.excitation = nn.Sequential(_Dense(channels, hidden), nn.ReLU(), _Dense(hidden, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excitation(x.mean(dim=(2, 3)))[..., None, None]


class MBConv(nn.Module):
    """Inverted bottleneck with squeeze and excitation; its input is added where the shapes are equal.

    Args:
        inputs, outputs: channels.
        fused: one 3x3 convolution in place of a 1x1 and a depthwise 3x3.
        expansion: of the channels inside.
    """

    def __init__(self, inputs: int, outputs: int, *, fused: bool, expansion: int):
        super().__init__()
        wide = inputs * expansion
        spread = [_conv(inputs, wide, 3)] if fused else [_conv(inputs, wide, 1), _conv(wide, wide, 3, groups=wide)]
        self.mbconv = nn.Sequential(*spread, _Squeeze(wide), _conv(wide, outputs, 1, act=False))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mbconv(x)
        return x + y if x.shape == y.shape else y


def _joined(x: Tensor, skip: Tensor, scale: int) -> Tensor:
    """The skip and x enlarged, with zeros around it where the skip is larger."""
    x = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=True)
    rows, cols = (skip.shape[axis] - x.shape[axis] for axis in (-2, -1))
    return torch.cat([skip, F.pad(x, (cols // 2, cols - cols // 2, rows // 2, rows - rows // 2))], dim=1)


class _Level(nn.Module):
    """A run of MBConv blocks below a pooling or above an enlargement, by its scale."""

    def __init__(self, widths: list[int], scale: int, *, fused: bool, expansion: int, pool: bool):
        super().__init__()
        blocks = {
            f"mbconv_{number}": MBConv(inputs, outputs, fused=fused, expansion=expansion)
            for number, (inputs, outputs) in enumerate(pairwise(widths))
        }
        self.mbd = _named(**({"maxpool": nn.MaxPool2d(scale)} if pool else {}), **blocks)
        self.scale = scale

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        return self.mbd(x if skip is None else _joined(x, skip, self.scale))


_SCALES, _EXPANSIONS, _FUSED = (3, 3, 2, 2), (1, 2, 4, 4), (True, True, False, False)
_DOWN, _UP = (2, 2, 4, 4), (2, 4, 4, 6)  # blocks of each level, from the largest image to the smallest


def _downs(width: int) -> nn.ModuleList:
    levels = nn.ModuleList()
    for level, (scale, expansion, fused, count) in enumerate(zip(_SCALES, _EXPANSIONS, _FUSED, _DOWN)):
        inputs = width * 2**level
        outputs = inputs if level == 3 else 2 * inputs
        levels.append(_Level([inputs] + [outputs] * count, scale, fused=fused, expansion=expansion, pool=True))
    return levels


def _ups(width: int) -> nn.ModuleList:
    levels = nn.ModuleList()
    for level in (3, 2, 1, 0):
        inputs = 2 * width * 2**level
        outputs = inputs // 2 if level == 0 else inputs // 4
        widths = [inputs] * _UP[level] + [outputs]
        scale, expansion, fused = _SCALES[level], _EXPANSIONS[level], _FUSED[level]
        levels.append(_Level(widths, scale, fused=fused, expansion=expansion, pool=False))
    return levels


class TSEM(nn.Module):
    """Temporal shift embedding: the image before, corrected for how far its recurrence has come."""

    def __init__(self) -> None:
        super().__init__()
        self.embeds = nn.Parameter(torch.rand(1, FRAME_RUN, *_EMBEDDING))
        cnn: Any = nn.Module()  # the weights name it so; its parts are given below
        cnn.inc, cnn.downs, cnn.ups = _double(3, 3), _downs(3), _ups(3)
        cnn.out_clean_ie = _double(3, 3, last=1)
        self.cnn = cnn

    def forward(self, image: Tensor, features: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Corrected image and embedding, both (B, 1, H, W), of the image before and REFE's map, `step` windows on."""
        embedding = self.embeds[:, step : step + 1].expand(len(image), -1, -1, -1)
        embedding = F.interpolate(embedding, size=image.shape[-2:], mode="bilinear", align_corners=False)
        maps = [self.cnn.inc(torch.cat([image, features, embedding], dim=1))]
        for down in self.cnn.downs:
            maps.append(down(maps[-1]))
        x = _climb(self.cnn.ups, maps)
        return (image + self.cnn.out_clean_ie(x)).clamp(0, 1), embedding


def _climb(ups: nn.ModuleList, maps: list[Tensor]) -> Tensor:
    x = maps[-1]
    for up, skip in zip(ups, reversed(maps[:-1])):
        x = up(x, skip)
    return x


def _threshold(width: int) -> nn.Sequential:
    layers = [_conv(width, width // 2, 1), _conv(width // 2, 1, 1, act=False), nn.ReLU()]
    return _named(matrix_c_conv=nn.Sequential(*layers))


class MAFG(nn.Module):
    """Model-aided frame generation: the next image by the camera's equation, its quantities estimated."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.inc, self.downs, self.ups = _double(BINS + 3, width), _downs(width), _ups(width)
        self.out_clean_ie_pos, self.out_clean_ie_neg = (_double(width, width, last=1) for _ in range(2))
        self.c_ups = _ups(width)
        self.c_out_pos, self.c_out_neg = (_threshold(width) for _ in range(2))
        self.ce_to_f1: Any = nn.Module()
        self.ce_to_f1.k = nn.Parameter(torch.tensor([0.1]))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, H, W) of x (B, 8, H, W): image, embedding, voxel grid and REFE's map."""
        maps = [self.inc(x)]
        for down in self.downs:
            maps.append(down(maps[-1]))
        events, thresholds = _climb(self.ups, maps), _climb(self.c_ups, maps)
        exponent = self.c_out_pos(thresholds) * self.out_clean_ie_pos(events)
        exponent = exponent - self.c_out_neg(thresholds) * self.out_clean_ie_neg(events)
        return exponent.exp() * (x[:, :1] + self.ce_to_f1.k) - self.ce_to_f1.k


class _LSTMLevel(nn.Module):
    """A ConvLSTM, and two convolutions that are added to what it says."""

    def __init__(self, inputs: int, hidden: int, kernel: int, scale: int):
        super().__init__()
        self.mbd = ConvLSTM(inputs, hidden, kernel)
        self.out = _double(hidden, hidden)
        self.scale = scale

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        hidden, cell = self.mbd(x, state)
        return self.out(hidden) + hidden, (hidden, cell)


class REFE(nn.Module):
    """Recurrent event feature extraction: a U-Net whose every level remembers."""

    def __init__(self) -> None:
        super().__init__()
        widths = [BINS * 2**level for level in range(4)]
        self.inc = _double(BINS, widths[0])
        self.downs = nn.ModuleList(
            _LSTMLevel(widths[level], widths[level + 1], kernel, scale)
            for level, (kernel, scale) in enumerate(zip((5, 3, 3), (3, 3, 2)))
        )
        # As published, what was pooled by 3 at the second level is enlarged by 2, with zeros around it.
        self.ups = nn.ModuleList(
            _LSTMLevel(widths[level] + widths[level - 1], widths[level - 1], 3, scale)
            for level, scale in zip((3, 2, 1), (2, 2, 3))
        )
        self.outc = _double(widths[0], 1)

    def forward(self, x: Tensor, states: list[State] | None = None) -> tuple[Tensor, list[State]]:
        """(B, 1, H, W) of a voxel grid (B, 5, H, W), and the states for the next window; None = the first."""
        before: Sequence[State | None] = states or [None] * 6
        found: list[State] = []
        x = self.inc(x)
        skips = [x]
        downs, ups = (cast(list[_LSTMLevel], list(levels)) for levels in (self.downs, self.ups))
        for level, earlier in zip(downs, before):
            x, state = level(x, earlier)
            x = F.max_pool2d(x, level.scale)
            skips.append(x)
            found.append(state)
        for level, skip, earlier in zip(ups, reversed(skips[:-1]), before[3:]):
            x, state = level(_joined(x, skip, level.scale), earlier)
            found.append(state)
        return self.outc(x), found


class E2HQV(nn.Module):
    """The three networks together."""

    def __init__(self) -> None:
        super().__init__()
        self.refe, self.tsem, self.mafg = REFE(), TSEM(), MAFG()

    def forward(self, grids: Tensor) -> Tensor:
        """The image after the last window.

        Args:
            grids: (B, T, 5, H, W) voxel grids of consecutive windows, sides of at least 36.
        Returns:
            (B, 1, H, W) in [0, 1].
        """
        states: list[State] | None = None
        image = torch.zeros_like(grids[:, 0, :1])
        for number, grid in enumerate(grids.unbind(dim=1)):
            step = number % FRAME_RUN
            if step == 0:
                image = torch.zeros_like(image)
            if number % STATE_RUN == 0:
                states = None
            features, states = self.refe(grid, states)
            corrected, embedding = self.tsem(image, features, step)
            image = self.mafg(torch.cat([corrected, embedding, grid, features], dim=1)).clamp(0, 1)
        return image


FILES = {"refe": "EffLstmcn", "tsem": "EffEmbedr", "mafg": "EffMultiWNet"}
"""Network -> how its file's name begins."""


def load_e2hqv(folder: str | os.PathLike[str]) -> E2HQV:
    """The networks of a folder of published files, in evaluation mode on the CPU.

    Args:
        folder: that holds the three files, or one of them.
    Raises:
        FileNotFoundError: one is not there; the message says what to download.
        ValueError: several versions in one folder, or tensors of another network.
    """
    place = Path(folder).expanduser()
    place = place.parent if place.is_file() else place
    model = E2HQV()
    for name, start in FILES.items():
        found = sorted(place.glob(f"{start}_v*.pth"))
        if not found:
            raise FileNotFoundError(f"E2HQV: no {start}_v*.pth in {place}. {GET}")
        if len(found) > 1:
            raise ValueError(f"{place}: {len(found)} versions of {start} ({found[0].name}, …); keep one in the folder")
        state = check_state(read_checkpoint(found[0], model="E2HQV", get=GET), found[0])
        fit_state(getattr(model, name), state, source=str(found[0]))
    return model.eval().requires_grad_(False)


class E2HQVSource:
    """The image that E2HQV has after the last window of a sample, grey, as it is.

    Args:
        folder: of the three files.
        device: on which it computes.
    """

    needs_images = False

    def __init__(self, folder: str, *, device: torch.device | str = "cpu"):
        self.name, self.device = f"e2hqv:{folder}", torch.device(device)
        self.network = load_e2hqv(folder).to(self.device)

    @torch.no_grad()
    def images(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, 3, H, W) float32 in [0, 1], on the batch's device."""
        grids = voxels(batch, BINS)
        height, width = grids.shape[-2:]
        rows, cols = max(0, _SMALLEST - height), max(0, _SMALLEST - width)
        top, left = rows // 2, cols // 2
        larger = F.pad(grids.to(self.device), (left, cols - left, top, rows - top))
        image = self.network(larger)[..., top : top + height, left : left + width]
        return image.expand(-1, 3, -1, -1).contiguous().to(grids.device)
