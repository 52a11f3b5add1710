"""A small image model that knows scenes from labelled pictures, in the place of one that needs a download."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.depth.scale import DepthScale
from gep.data.sampler import Sample
from gep.data.scene_files import Textures
from gep.data.scenes import SceneConfig, draw_scenes
from gep.models.teacher import ImageModel

SCALE = DepthScale.between(1.0, 12.0)
"""Depths of scenes [m]."""
_MEAN, _STD = 0.45, 0.2
_CHUNK = 64


@dataclass(frozen=True, eq=False)
class ScenePictures:
    """Pictures of scenes with their masks and depth: a `SampleSource`."""

    image: np.ndarray
    """(N, H, W) uint8."""
    mask: np.ndarray
    """(N, H, W) uint8."""
    depth: np.ndarray
    """(N, H, W) float32 m."""

    @classmethod
    def draw(cls, count: int, textures: Textures, config: SceneConfig, seed: int) -> ScenePictures:
        """The views at the begin and at the end of each window of `count` scenes' recordings."""
        rng = np.random.default_rng([seed, 77])
        parts: list[tuple[np.ndarray, ...]] = []
        for first in range(0, count, _CHUNK):
            scenes = draw_scenes(min(_CHUNK, count - first), *textures, config, rng)
            see = scenes.layers.watch()
            for step in range(0, len(scenes.layers.t_us), config.window_us // config.step_us):
                parts.append(((see(step) * 255).round().byte().numpy(), *scenes.truth(step)))
        return cls(*(np.concatenate(column) for column in zip(*parts)))

    def __len__(self) -> int:
        return len(self.image)

    def sample(self, index: int, rng: np.random.Generator | None) -> Sample:
        """One picture, as it is."""
        maps = {"image": self.image[index], "mask": self.mask[index], "depth": self.depth[index]}
        return {"key": f"scene {index}", **maps}


def collate_pictures(samples: Sequence[Sample]) -> dict[str, Any]:
    """Samples of `ScenePictures` -> batch: image uint8 (B, H, W), mask uint8, depth float32."""
    arrays = {name: np.stack([sample[name] for sample in samples]) for name in ("image", "mask", "depth")}
    return {"key": [sample["key"] for sample in samples]} | {name: torch.from_numpy(a) for name, a in arrays.items()}


class SceneTeacherTask(nn.Module):
    """Masks and depth of pictures from an image model's tokens, by a linear map each.

    Args:
        model: three-channel image encoder.
        num_classes: of the masks.
    """

    def __init__(self, model: ImageModel, num_classes: int):
        super().__init__()
        self.model = model
        self.num_classes = num_classes
        self.read = nn.Linear(model.encoder.embed_dim, num_classes + 1)

    def maps(self, image: Tensor) -> Tensor:
        """(B, H, W) uint8 -> (B, num_classes + 1, H, W): class logits, and the scaled depth."""
        size = image.shape[-2:]
        tokens, _ = self.model.encoder((image / 255)[:, None].expand(-1, 3, -1, -1))
        # What the stages compare is the layer-normed tokens: so they are what is read here.
        read = self.read(F.layer_norm(tokens, tokens.shape[-1:]))
        grid = read.transpose(1, 2).unflatten(2, self.model.encoder.grid(*size))
        return F.interpolate(grid, size, mode="bilinear")

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """{"loss", "segmentation", "depth"} of a batch."""
        maps = self.maps(batch["image"])
        segmentation = F.cross_entropy(maps[:, :-1], batch["mask"].long())
        error = F.smooth_l1_loss(maps[:, -1], SCALE.to_target(batch["depth"]), beta=0.02, reduction="none")
        # The background is most of a picture, and its depth is nearly always the same.
        weight = 1 + 3 * (batch["mask"] > 0).float()
        depth = (weight * error).sum() / weight.sum()
        loss = segmentation + 8 * depth
        return {"loss": loss, "segmentation": segmentation.detach(), "depth": depth.detach()}


def build_model(size: tuple[int, int]) -> ImageModel:
    """An untrained `nano` image model without classes."""
    return ImageModel({"arch": "nano", "in_chans": 3, "img_size": size, "mean": [_MEAN] * 3, "std": [_STD] * 3})
