"""The models' settings as they stand in YAML, and the models built from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from gep.models.backbone import Backbone
from gep.models.encoder import EventEncoder
from gep.models.presets import backbone_preset, preset
from gep.models.sparse import check_keep
from gep.models.teacher import FrozenVFM


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The frozen image model whose space everything speaks."""

    name: str = ""
    """timm:<name>, open_clip:<arch>/<tag> or export:<folder>; empty = the encoder preset's own"""
    file: str | None = None
    """local weights (safetensors or a state dict) for a timm or open_clip name; null = from the Hub"""
    pool: Literal["mean", "cls"] = "mean"
    """pooled feature of a timm model: mean of the patch tokens, or the class token"""
    image_size: int = 0
    """side that images are resized to before the model sees them [px]; 0 = taken as they are"""
    random: bool = False
    """random weights, for trying a configuration out without a download; never for real runs"""

    def spec(self, encoder_preset: str | None = None) -> str:
        """The model's name, or that of the preset's own; ValueError where there is neither."""
        name = self.name or (preset(encoder_preset).teacher if encoder_preset else None)
        if not name:
            raise ValueError(
                f"teacher.name is empty and the encoder preset {encoder_preset!r} has no teacher of its own; "
                "name one: timm:<name>, open_clip:<arch>/<tag> or export:<folder>"
            )
        return name

    def build(self, *, encoder_preset: str | None = None, device: torch.device | str = "cpu") -> FrozenVFM:
        """The frozen model on `device`.

        Raises:
            ValueError: no name, and the preset has none; or weights that cannot be had (see FrozenVFM).
        """
        return FrozenVFM.from_spec(
            self.spec(encoder_preset),
            file=self.file,
            image_size=self.image_size or None,
            pool=self.pool,
            pretrained=not self.random,
            device=device,
        )


@dataclass(frozen=True, kw_only=True)
class CachedTeacherConfig(TeacherConfig):
    """The frozen image model, asked once about every picture."""

    cache: str = ""
    """folder in which the model's tokens of all pictures are kept, written before the first step; empty = none"""
    cache_dtype: Literal["bf16", "fp32"] = "bf16"
    """numbers in the cache: bf16 takes half the room of fp32, which rounds nothing"""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The event encoder that stage 1 trains."""

    preset: str = "nano"
    """nano, small, base, small_dinov3 or clip_b16"""
    arch: str = ""
    """any timm vit_* instead of the preset's architecture"""
    init: Literal["teacher", "random"] = "teacher"
    """start as a copy of the teacher where shapes allow, or from random weights"""
    head_hidden: int = 0
    """hidden width of the head into the teacher's pooled space; 0 = one linear layer"""
    drop_path: float = 0.0
    """stochastic depth rate of the last block"""
    keep: float | int | str = 1.0
    """share of the patches that is encoded, the most active first; "active" = all that hold events; 1 = dense"""

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def build(
        self, *, in_chans: int, size: tuple[int, int], head_dim: int | None, background: float = 0.0
    ) -> EventEncoder:
        """A randomly initialised encoder.

        Args:
            in_chans: channels of the representation.
            size: (height, width) of the input.
            head_dim: width of the teacher's pooled space; None = no head.
            background: what the representation gives a pixel without events; read only where `keep` is not 1.
        """
        return EventEncoder(
            arch=self.arch or preset(self.preset).arch,
            in_chans=in_chans,
            img_size=size,
            head_dim=head_dim,
            head_hidden=self.head_hidden,
            drop_path=self.drop_path,
            keep=self.keep,
            background=background if check_keep(self.keep) != 1.0 else 0.0,
        )


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The transformer that stage 2 trains."""

    preset: str = "nano"
    """nano, small (the paper's) or base: width, depth and heads together"""
    width: int = 0
    """features of a token inside; 0 = the preset's"""
    depth: int = 0
    """layers; 0 = the preset's"""
    heads: int = 0
    """attention heads; 0 = the preset's"""
    order: Literal["frame", "token"] = "frame"
    """full attention inside a frame and causal across frames, or strictly causal in raster order"""
    span: int = 0
    """frames that a frame can look back on, itself included; 0 = all"""

    def build(self, token_dim: int) -> Backbone:
        """A randomly initialised backbone over tokens of `token_dim` features."""
        sizes = backbone_preset(self.preset)
        given = {"width": self.width, "depth": self.depth, "heads": self.heads}
        sizes.update({name: value for name, value in given.items() if value})
        return Backbone(token_dim, **sizes, order=self.order, span=self.span or None)
