"""A batch of still images that become events where the model trains: what workers send in place of events."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from gep.events.camera import CameraPath
from gep.events.sensor import SensorModel
from gep.events.simulate import simulate_batch, simulate_counts
from gep.events.stepping import Outside
from gep.events.types import EventBatch

REC709 = (0.2126, 0.7152, 0.0722)
"""Weights of red, green and blue in the luminance (ITU-R BT.709)."""


@dataclass(frozen=True, eq=False)
class StillBatch:
    """R recordings of B still images in motion, each cut into W windows, to be simulated on the device it is on.

    R is a multiple of B: where a sample keeps a few windows of a long recording, each is a recording of its own, so
    that only these are simulated. A recording depends on its own seed, image, path and sensor, never on the others in
    the batch. Times count from the begin of each recording. Images and paths move with `to`; the rest is small and
    stays on the CPU, where the randomness of a recording is drawn from its seed.
    """

    images: torch.Tensor
    """(B, C, H0, W0) uint8, C = 1 or 3 (RGB)."""
    homography: torch.Tensor
    """(R, S, 3, 3) float32, canvas pixel -> image pixel at each time; recordings image by image."""
    t_us: torch.Tensor
    """(S,) int64 µs, the path's times; CPU."""
    bounds: torch.Tensor
    """(W, 2) or (R, W, 2) int64 µs, [begin, end) of each window in its recording; CPU."""
    seeds: torch.Tensor
    """(R,) int64; CPU."""
    sensors: tuple[SensorModel, ...]
    """One for all recordings, or R."""
    height: int
    """Canvas rows."""
    width: int
    """Canvas columns."""
    outside: Outside = "reflection"
    """What lies beyond an image."""

    def __post_init__(self) -> None:
        images, recordings = self.images, len(self.homography)
        if images.ndim != 4 or images.dtype != torch.uint8 or images.shape[1] not in (1, 3):
            raise ValueError(f"stills must be uint8 (B, 1 or 3, H0, W0), got {images.dtype} {tuple(images.shape)}")
        if len(images) == 0 or recordings % len(images) or len(self.seeds) != recordings:
            raise ValueError(
                f"{recordings} camera paths and {len(self.seeds)} seeds for {len(images)} stills; give as many paths "
                "as seeds, the same number for each still"
            )
        if len(self.sensors) not in (1, recordings):
            raise ValueError(f"{len(self.sensors)} sensors for {recordings} recordings; give one, or one a recording")

    def __len__(self) -> int:
        """Windows in all, R * W: those of an image stand together, in order."""
        return len(self.homography) * self.bounds.shape[-2]

    @property
    def device(self) -> torch.device:
        """Where the events will be made."""
        return self.images.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> StillBatch:
        """The same batch on another device."""
        move: dict[str, Any] = {"device": device, "non_blocking": non_blocking}
        return dataclasses.replace(self, images=self.images.to(**move), homography=self.homography.to(**move))

    def pin_memory(self) -> StillBatch:
        """The same batch in page-locked memory (DataLoader calls this)."""
        return dataclasses.replace(self, images=self.images.pin_memory(), homography=self.homography.pin_memory())

    def light(self) -> torch.Tensor:
        """(B, H0, W0) float32 in [0, 1]: the images' luminance (Rec. 709), as encoded in the pictures."""
        images = self.images.float()
        if images.shape[1] == 3:
            weights = torch.tensor(REC709, device=images.device)[:, None, None]
            images = (images * weights).sum(1)
        else:
            images = images[:, 0]
        return (images / 255).clamp_(max=1)

    @torch.compiler.disable
    @torch.no_grad()
    def events(self) -> EventBatch:
        """The R * W windows' events, on this device."""
        # Under autocast the optics' blur would be computed in 8 bits.
        with torch.autocast(self.device.type, enabled=False):
            return simulate_batch(bounds=self.bounds, **self._scene())

    @torch.compiler.disable
    @torch.no_grad()
    def counts(self) -> torch.Tensor:
        """(R * W, 2, height, width) float32: the histograms of `events()`, without making the events."""
        with torch.autocast(self.device.type, enabled=False):
            return simulate_counts(bounds=self.bounds, **self._scene()).flatten(0, 1)

    def _scene(self) -> dict[str, Any]:
        return {
            "images": self.light().repeat_interleave(len(self.homography) // len(self.images), dim=0),
            "path": CameraPath(self.t_us, self.homography),
            "sensor": self.sensors[0] if len(self.sensors) == 1 else self.sensors,
            "height": self.height,
            "width": self.width,
            "outside": self.outside,
            "seeds": self.seeds.tolist(),
        }
