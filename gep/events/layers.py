"""Textured planes in space before a moving camera: pictures, labels and depth that are exact at any time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from gep.events.sensor import SensorModel, light
from gep.events.stepping import blur


@dataclass(frozen=True, eq=False)
class Layer:
    """One plane in each of B scenes."""

    texture: torch.Tensor
    """(B, H0, W0) float in [0, 1]."""
    alpha: torch.Tensor | None
    """(B, H0, W0) float in [0, 1], 0 = see-through, also beyond the texture; None = opaque and without an end."""
    homography: torch.Tensor
    """(B, S, 3, 3) float: sensor pixel (x, y, 1) -> (u, v, 1) / Z, with (u, v) the texture's pixel and Z its depth [m]
    along the optical axis at each time. The scale of the matrix is what carries the depth."""

    @cached_property
    def sampled(self) -> torch.Tensor:
        """(B, 1 or 2, H0, W0): the texture; with an opacity, colour times opacity and opacity.

        Sampled together, so that what lies under see-through texels does not bleed into the border.
        """
        if self.alpha is None:
            return self.texture[:, None]
        return torch.stack([self.texture * self.alpha, self.alpha], dim=1)


@dataclass(frozen=True, eq=False)
class Truth:
    """What the pixels of B scenes show at one time."""

    layer: torch.Tensor
    """(B, height, width) int64: index of the nearest layer that is more than half opaque there."""
    depth: torch.Tensor
    """(B, height, width) float: its depth [m]."""


@dataclass(frozen=True, eq=False)
class Layers:
    """Scenes of planes, the farthest first; a `View` for the simulator.

    The light of a pixel is composited from far to near. The layers' depths must not overlap where they overlap on the
    sensor: the order holds for all pixels and times.
    """

    layers: tuple[Layer, ...]
    """The first is opaque."""
    t_us: torch.Tensor
    """(S,) int64 µs, ascending; CPU."""
    height: int
    """Sensor rows."""
    width: int
    """Sensor columns."""
    haze: float = 0.0
    """Extinction of the air [1/m]: a share exp(-haze Z) of a plane's light arrives, the rest is `airlight`."""
    airlight: float = 0.5
    """Brightness of the air, in [0, 1]."""

    def __post_init__(self) -> None:
        if not self.layers or self.layers[0].alpha is not None:
            raise ValueError("the first layer is the background: it must be there, and have alpha=None")
        shapes = {layer.homography.shape for layer in self.layers}
        if shapes != {(len(self), len(self.t_us), 3, 3)}:
            raise ValueError(f"homographies of {sorted(map(tuple, shapes))} do not fit {len(self)} scenes and "
                             f"{len(self.t_us)} times")  # fmt: skip

    def __len__(self) -> int:
        return len(self.layers[0].texture)

    @property
    def device(self) -> torch.device:
        """Where the pictures are made."""
        return self.layers[0].texture.device

    def watch(
        self, part: slice = slice(None), sensors: Sequence[SensorModel] | None = None
    ) -> Callable[[int], torch.Tensor]:
        """Index of a time -> (n, height, width): what the scenes `part` look like, to a sensor's optics if given."""
        layers = [_part(layer, part) for layer in self.layers]

        def seen(step: int) -> torch.Tensor:
            picture: torch.Tensor | None = None
            for layer in layers:
                colour, alpha, depth = self._look(layer, step)
                if self.haze:  # Koschmieder's law
                    colour = torch.lerp(torch.full_like(colour, self.airlight), colour, torch.exp(-self.haze * depth))
                picture = colour if picture is None else picture + alpha * (colour - picture)
            assert picture is not None  # there is a background
            picture = picture.clamp(0, 1)
            if sensors is None:
                return picture
            return blur(light(sensors, picture), [sensor.blur_px for sensor in sensors], "border")

        return seen

    def truth(self, step: int, part: slice = slice(None)) -> Truth:
        """What the pixels show at a time."""
        _, _, depth = self._look(_part(self.layers[0], part), step)
        index = torch.zeros(depth.shape, dtype=torch.int64, device=depth.device)
        for number, layer in enumerate(self.layers[1:], 1):
            _, alpha, own = self._look(_part(layer, part), step)
            here = torch.as_tensor(alpha > 0.5, device=own.device)
            index, depth = index.masked_fill(here, number), torch.where(here, own, depth)
        return Truth(index, depth)

    def _look(self, layer: Layer, step: int) -> tuple[torch.Tensor, torch.Tensor | float, torch.Tensor]:
        """Colour, opacity and depth of one layer at every pixel, each (n, height, width)."""
        matrix = layer.homography[:, step].to(layer.texture)[..., None, None]
        x = torch.arange(self.width, device=self.device, dtype=matrix.dtype)
        y = torch.arange(self.height, device=self.device, dtype=matrix.dtype)[:, None]
        # Planes of u, of v and of 1 / Z, each written as a whole, then (u, v) seen as pairs.
        planes = matrix.new_empty(3, len(matrix), self.height, self.width)
        for row, plane in enumerate(planes):
            torch.add(matrix[:, row, 0] * x, matrix[:, row, 1] * y, out=plane)
            plane += matrix[:, row, 2]
        near = planes[2]
        # A plane ends at its horizon, where 1 / Z is 0; behind the camera nothing is seen.
        before = near > 1e-6
        near = near.clamp_min(1e-6)
        rows, columns = layer.texture.shape[1:]
        for plane, size in ((planes[0], columns), (planes[1], rows)):
            plane.mul_(2).div_(near).add_(1).div_(size).sub_(1)
        grid = planes[:2].permute(1, 2, 3, 0)
        if layer.alpha is None:
            colour = F.grid_sample(layer.sampled, grid, padding_mode="reflection", align_corners=False)[:, 0]
            return colour, 1.0, 1 / near
        both = F.grid_sample(layer.sampled, grid, padding_mode="zeros", align_corners=False)
        alpha = both[:, 1] * before
        return both[:, 0] / both[:, 1].clamp_min(1e-6), alpha, 1 / near


def _part(layer: Layer, part: slice) -> Layer:
    alpha = None if layer.alpha is None else layer.alpha[part]
    return Layer(layer.texture[part], alpha, layer.homography[part])
