"""The layout of facebookresearch/dinov2, which GEP's released event encoders have too."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from gep.interop.names import PATCH, grid_of, shapes, square
from gep.interop.table import Conversion

_SIZES = {(384, 12): "small", (768, 12): "base", (1024, 24): "large", (1536, 40): "giant"}
# Blocks are numbered blocks.<i>, or blocks.<chunk>.<i> in checkpoints of the training code.
_BLOCK = re.compile(r"blocks\.(?:\d+\.)?(\d+)\.(.+)")
_PARTS = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "mlp.w12", "mlp.w3")
_KNOWN = {f"{part}.{kind}" for part in _PARTS for kind in ("weight", "bias")} | {"ls1.gamma", "ls2.gamma"}
_RENAMED = (("mlp.w12.", "mlp.fc1."), ("mlp.w3.", "mlp.fc2."))
HEADS = ("dino_head.", "ibot_head.")


def convert(weights: Conversion, size: tuple[int, int] | None) -> tuple[str, tuple[int, int]]:
    """Rename a DINOv2 ViT to timm's names; positions are resampled as DINOv2's own forward does for `size`.

    Args:
        weights: tensors by DINOv2's names; consumed.
        size: (H, W) [px] of the input; None = that of the positions in the file.
    Returns:
        timm's name of the architecture, and the size.
    Raises:
        ValueError: no released size, patch or number of registers.
    Source: Oquab et al. 2023 (arXiv 2304.07193), Darcet et al. 2023 (arXiv 2309.16588); names and the rule of the
        positions as in facebookresearch/dinov2 (Apache-2.0).
    """
    state = weights.rest
    width, depth, patch, _ = shapes(state)
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    if (width, depth) not in _SIZES or patch != 14 or registers not in (0, 4):
        known = ", ".join(f"{name} ({w} wide, {d} blocks)" for (w, d), name in _SIZES.items())
        raise ValueError(
            f"the file's ViT is {width} wide with {depth} blocks, patch {patch} and {registers} registers; known are "
            f"{known}, with patch 14 and 0 or 4 registers"
        )
    arch = f"vit_{_SIZES[width, depth]}_patch14_{'reg4_' if registers else ''}dinov2"
    for name in ("cls_token", "pos_embed"):
        if name not in state:
            raise ValueError(f"the file has no {name}: it is no complete DINOv2 encoder")
    side = square(state["pos_embed"].shape[1] - 1, "pos_embed")
    size = size or (side * patch, side * patch)
    grid = grid_of(size, patch)
    prefix, positions = state["pos_embed"][:, :1].float(), state["pos_embed"][:, 1:].float()
    how = "" if grid == (side, side) else f"resampled from {side}x{side} to {grid[0]}x{grid[1]}"
    if how:
        positions = resample(positions, side, grid, smooth=bool(registers))
    if registers:
        # timm adds no position to the class token of these models, so that it carries its own.
        weights.move("cls_token", "cls_token", state["cls_token"].float() + prefix, "its position added")
        weights.move("register_tokens", "reg_token")
        weights.move("pos_embed", "pos_embed", positions, "; ".join(filter(None, ["class position taken out", how])))
    else:
        weights.move("cls_token", "cls_token")
        weights.move("pos_embed", "pos_embed", torch.cat([prefix, positions], dim=1), how)
    for name in (PATCH, "patch_embed.proj.bias", "norm.weight", "norm.bias"):
        if name in state:
            weights.move(name, name)
    for name in list(state):
        match = _BLOCK.fullmatch(name)
        if match and match.group(2) in _KNOWN:
            target = f"blocks.{match.group(1)}.{match.group(2)}"
            for old, new in _RENAMED:
                target = target.replace(old, new)
            weights.move(name, target)
    if "mask_token" in state:
        weights.ignore("mask_token", "pretraining only")
    weights.ignore_under(HEADS, "pretraining only")
    return arch, size


def resample(positions: Tensor, side: int, grid: tuple[int, int], *, smooth: bool) -> Tensor:
    """Positions of another grid by DINOv2's rule.

    Args:
        positions: (1, side², D) without that of the class token.
        side: of the square grid that they are for.
        grid: (h, w) wanted.
        smooth: True = models with registers: antialiased, to the exact size. False = those without: not antialiased, by
            the factor (h + 0.1) / side, which also moves the sampling points.
    Returns:
        (1, h w, D).
    """
    image = positions.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if smooth:
        image = F.interpolate(image, size=grid, mode="bicubic", antialias=True)
    else:
        factors = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
        image = F.interpolate(image, scale_factor=factors, mode="bicubic")
    return image.permute(0, 2, 3, 1).flatten(1, 2)
