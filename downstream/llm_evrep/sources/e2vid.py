"""E2VID: grey video from events by a recurrent U-Net, with the names and shapes of the published checkpoint.

Source: Rebecq et al., High Speed and High Dynamic Range Video with an Event Camera, TPAMI 2019, arXiv 1906.07165, and
the layout of its checkpoint. E2VID_lightweight.pth.tar is a file of torch.save with `arch` ("E2VIDRecurrent"), `model`
(options) and `state_dict`: 74 tensors `unetrecurrent.<module>.…`, of 5 bins, 32 channels, 3 encoders, 2 residual
blocks, batch normalisation and transposed convolutions. Only the layout was consulted, no file was at hand here.

Stated deviations from the authors' own inference: no margin beside the padding to a multiple of 8, no unsharp mask,
and the contrast is stretched by the last image alone, not by a running median over a video.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.llm_evrep.sources.weights import check_state, fit_state, read_checkpoint
from downstream.llm_evrep.sources.windows import robust_range, voxels

GET = (
    "Download E2VID_lightweight.pth.tar (project page https://rpg.ifi.uzh.ch/E2VID.html; the address is in the README "
    "of https://github.com/uzh-rpg/rpg_e2vid) and name it: e2vid:<file>"
)
_PREFIX = "unetrecurrent."
_LOW, _HIGH = 0.5, 99.5  # percentiles that become black and white
State = tuple[Tensor, Tensor]
"""Hidden and cell of a ConvLSTM."""


class _Conv(nn.Module):
    """Convolution, normalisation where there is one, rectifier where it is wanted."""

    def __init__(self, conv: nn.Conv2d | nn.ConvTranspose2d, name: str, norm: bool, relu: bool = True):
        super().__init__()
        self.add_module(name, conv)
        self.norm_layer = nn.BatchNorm2d(conv.out_channels) if norm else None
        self.name, self.relu = name, relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.get_submodule(self.name)(x)
        x = x if self.norm_layer is None else self.norm_layer(x)
        return F.relu(x) if self.relu else x


class _Upsampled(_Conv):
    """Twice the size by bilinear interpolation, then a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))


class ConvLSTM(nn.Module):
    """Convolutional LSTM of one step.

    Args:
        inputs, hidden: channels.
        kernel: side of the convolution, odd.
    """

    def __init__(self, inputs: int, hidden: int, kernel: int = 3):
        super().__init__()
        self.hidden = hidden
        self.Gates = nn.Conv2d(inputs + hidden, 4 * hidden, kernel, padding=kernel // 2)

    def forward(self, x: Tensor, state: State | None) -> State:
        """(hidden, cell) of x (B, inputs, H, W) and the step before; None = zeros."""
        if state is None:
            zeros = x.new_zeros(len(x), self.hidden, *x.shape[-2:])
            state = (zeros, zeros)
        let_in, keep, let_out, new = self.Gates(torch.cat([x, state[0]], dim=1)).chunk(4, dim=1)
        cell = keep.sigmoid() * state[1] + let_in.sigmoid() * new.tanh()
        return let_out.sigmoid() * cell.tanh(), cell


class _Encoder(nn.Module):
    """Half the size and twice the channels, with a memory."""

    def __init__(self, inputs: int, norm: bool):
        super().__init__()
        self.conv = _Conv(nn.Conv2d(inputs, 2 * inputs, 5, 2, 2, bias=not norm), "conv2d", norm)
        self.recurrent_block = ConvLSTM(2 * inputs, 2 * inputs)

    def forward(self, x: Tensor, state: State | None) -> State:
        return self.recurrent_block(self.conv(x), state)


class ResidualBlock(nn.Module):
    """relu(x + conv(relu(conv(x)))), each convolution normalised where there is normalisation."""

    def __init__(self, channels: int, norm: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=not norm)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=not norm)
        self.bn1, self.bn2 = (nn.BatchNorm2d(channels) if norm else None for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        y = F.relu(y if self.bn1 is None else self.bn1(y))
        y = self.conv2(y)
        return F.relu(x + (y if self.bn2 is None else self.bn2(y)))


class UNetRecurrent(nn.Module):
    """The network: head, recurrent encoders, residual blocks, decoders with skips that are added, prediction.

    Args:
        num_bins: of the voxel grids.
        num_encoders: halvings.
        base_num_channels: of the head; doubled by every encoder.
        num_residual_blocks: at the smallest size.
        norm: whether there is batch normalisation.
        use_upsample_conv: interpolation and a convolution in the decoders; else transposed convolutions.
    """

    def __init__(
        self,
        *,
        num_bins: int = 5,
        num_encoders: int = 3,
        base_num_channels: int = 32,
        num_residual_blocks: int = 2,
        norm: bool = True,
        use_upsample_conv: bool = False,
    ):
        super().__init__()
        self.num_bins, self.multiple = num_bins, 2**num_encoders
        widths = [base_num_channels * 2**number for number in range(num_encoders + 1)]
        self.head = _Conv(nn.Conv2d(num_bins, widths[0], 5, padding=2), "conv2d", norm=False)
        self.encoders = nn.ModuleList(_Encoder(width, norm) for width in widths[:-1])
        self.resblocks = nn.ModuleList(ResidualBlock(widths[-1], norm) for _ in range(num_residual_blocks))
        self.decoders = nn.ModuleList(_decoder(width, norm, use_upsample_conv) for width in widths[:0:-1])
        self.pred = _Conv(nn.Conv2d(widths[0], 1, 1, bias=not norm), "conv2d", norm, relu=False)

    def forward(self, x: Tensor, states: list[State] | None = None) -> tuple[Tensor, list[State]]:
        """One window.

        Args:
            x: (B, num_bins, H, W) normalised voxel grid, sides multiples of `multiple`.
            states: of the window before; None = the first.
        Returns:
            (B, 1, H, W) in (0, 1), and the states for the next window.
        """
        x = head = self.head(x)
        found: list[State] = []
        for encoder, state in zip(self.encoders, states or itertools.repeat(None)):
            found.append(encoder(x, state))
            x = found[-1][0]
        for block in self.resblocks:
            x = block(x)
        for decoder, (skip, _) in zip(self.decoders, reversed(found)):
            x = decoder(x + skip)
        return self.pred(x + head).sigmoid(), found


def _decoder(width: int, norm: bool, upsample: bool) -> nn.Module:
    if upsample:
        return _Upsampled(nn.Conv2d(width, width // 2, 5, padding=2, bias=not norm), "conv2d", norm)
    conv = nn.ConvTranspose2d(width, width // 2, 5, 2, 2, output_padding=1, bias=not norm)
    return _Conv(conv, "transposed_conv2d", norm)


def load_e2vid(file: str | os.PathLike[str]) -> UNetRecurrent:
    """The network of a checkpoint, in evaluation mode on the CPU.

    Raises:
        FileNotFoundError: no such file; the message says what to download.
        ValueError: a file of another layout, of options that are not built here, or of other tensors.
    """
    held = read_checkpoint(file, model="E2VID", get=GET)
    if not isinstance(held, Mapping) or not {"model", "state_dict"} <= set(held):
        keys = sorted(map(str, held))[:5] if isinstance(held, Mapping) else type(held).__name__
        raise ValueError(f"{file}: no checkpoint of E2VID, which holds arch, model and state_dict; found {keys}. {GET}")
    if held.get("arch", "E2VIDRecurrent") != "E2VIDRecurrent":
        raise ValueError(f"{file}: arch is {held['arch']!r}; E2VIDRecurrent is built here. {GET}")
    network = UNetRecurrent(**_options(held["model"], file))
    state = check_state(held["state_dict"], file)
    # A name without the prefix is left as it is, and so reported as unexpected.
    fit_state(network, {name.removeprefix(_PREFIX): value for name, value in state.items()}, source=str(file))
    return network.eval().requires_grad_(False)


def _options(model: object, file: str | os.PathLike[str]) -> dict[str, Any]:
    if not isinstance(model, Mapping) or "num_bins" not in model:
        raise ValueError(f"{file}: model={model!r} are no options of E2VID (num_bins and others)")
    norm = str(model.get("norm", "none"))
    for name, value, known in (
        ("norm", norm, ("BN", "none", "None")),
        ("skip_type", model.get("skip_type", "sum"), ("sum",)),
        ("recurrent_block_type", model.get("recurrent_block_type", "convlstm"), ("convlstm",)),
    ):
        if value not in known:
            raise ValueError(f"{file}: model.{name}={value!r}; only {' or '.join(known)} is built here. {GET}")
    numbers = {"num_bins": 5, "num_encoders": 4, "base_num_channels": 32, "num_residual_blocks": 2}  # its defaults
    found: dict[str, Any] = {name: int(model.get(name, default)) for name, default in numbers.items()}
    return {**found, "norm": norm == "BN", "use_upsample_conv": bool(model.get("use_upsample_conv", True))}


def normalised(grid: Tensor) -> Tensor:
    """A voxel grid whose nonzero values have mean 0 and standard deviation 1, sample by sample; zeros stay.

    Args:
        grid: (B, C, H, W). Where all nonzero values are equal they become 0.
    Returns:
        (B, C, H, W).
    """
    some = grid != 0
    count = some.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)
    mean = grid.sum(dim=(1, 2, 3), keepdim=True) / count
    centred = torch.where(some, grid - mean, 0)
    deviation = (centred.square().sum(dim=(1, 2, 3), keepdim=True) / count).sqrt()
    return centred / torch.where(deviation > 1e-6, deviation, 1)


def padded(x: Tensor, multiple: int) -> tuple[Tensor, slice, slice]:
    """Zeros around (…, H, W) up to sides that are multiples, one more above and left where they are odd.

    Returns:
        The larger tensor, and the rows and columns of the old one in it.
    """
    height, width = x.shape[-2:]
    rows, cols = -height % multiple, -width % multiple
    top, left = -(-rows // 2), -(-cols // 2)
    larger = F.pad(x, (left, cols - left, top, rows - top))
    return larger, slice(top, top + height), slice(left, left + width)


def stretched(image: Tensor) -> Tensor:
    """An image whose 0.5th percentile is black and whose 99.5th is white, sample by sample; flat ones stay as they are.

    Args:
        image: (B, 1, H, W).
    Returns:
        (B, 1, H, W) in [0, 1].
    """
    low, high = (bound.view(-1, 1, 1, 1) for bound in robust_range(image, _LOW, _HIGH))
    wide = high - low > 1e-6
    return torch.where(wide, (image - low) / torch.where(wide, high - low, 1), image).clamp(0, 1)


class E2VIDSource:
    """The image that E2VID has after the last window of a sample, its contrast stretched, grey.

    Args:
        file: the checkpoint.
        device: on which it computes.
    """

    needs_images = False

    def __init__(self, file: str, *, device: torch.device | str = "cpu"):
        self.name, self.device = f"e2vid:{file}", torch.device(device)
        self.network = load_e2vid(file).to(self.device)

    @torch.no_grad()
    def images(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, 3, H, W) float32 in [0, 1], on the batch's device."""
        grids = voxels(batch, self.network.num_bins)
        states, image = None, grids
        for grid in grids.to(self.device).unbind(dim=1):
            x, rows, cols = padded(normalised(grid), self.network.multiple)
            image, states = self.network(x, states)
        return stretched(image[..., rows, cols]).expand(-1, 3, -1, -1).contiguous().to(grids.device)
