"""Named encoder sizes, each with the image model it is meant to start from."""

from collections.abc import Mapping
from typing import NamedTuple


class Preset(NamedTuple):
    """An encoder architecture, its usual input size and its teacher."""

    arch: str
    """`EventEncoder(arch=…)`."""
    img_size: tuple[int, int]
    """(H, W) [px], a multiple of the patch."""
    teacher: str | None
    """Spec for `FrozenVFM.from_spec`; None where only an exported stand-in fits (export:<folder>)."""


PRESETS: Mapping[str, Preset] = {
    "nano": Preset("nano", (36, 36), None),
    "small": Preset("vit_small_patch14_reg4_dinov2", (224, 224), "timm:vit_small_patch14_reg4_dinov2.lvd142m"),
    "base": Preset("vit_base_patch14_reg4_dinov2", (224, 224), "timm:vit_base_patch14_reg4_dinov2.lvd142m"),
    "small_dinov3": Preset("vit_small_patch16_dinov3", (224, 224), "timm:vit_small_patch16_dinov3.lvd1689m"),
    "clip_b16": Preset("vit_base_patch16_clip_224", (224, 224), "open_clip:ViT-B-16/laion2b_s34b_b88k"),
}


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: the name is not one of PRESETS.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown encoder preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


BACKBONES: Mapping[str, dict[str, int]] = {
    "nano": {"width": 96, "depth": 3, "heads": 4},
    "small": {"width": 384, "depth": 12, "heads": 6},
    "base": {"width": 768, "depth": 12, "heads": 12},
}
"""Sizes by name; "small" is the one of the paper."""


def backbone_preset(name: str) -> dict[str, int]:
    """Width, depth and heads of a named size.

    Raises:
        ValueError: the name is not one of BACKBONES.
    """
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone preset {name!r}: choose one of {', '.join(BACKBONES)}")
    return dict(BACKBONES[name])
