"""The layout of timm's own ViT checkpoints."""

from __future__ import annotations

import math

from timm.layers import resample_abs_pos_embed
from torch import Tensor

from gep.interop.names import grid_of, shapes, square
from gep.interop.table import Conversion

_HEADS = ("head.", "head_dist.", "attn_pool.", "fc_norm.")
_NOT_NEEDED = ("mask_token", "dist_token")


def convert(weights: Conversion, size: tuple[int, int] | None, names: set[str]) -> tuple[int, int]:
    """Take a timm ViT over; positions are resampled as timm does for `size`.

    Args:
        weights: tensors by timm's names; consumed.
        size: (H, W) [px] of the input; None = that of the positions in the file, or 224x224 where it has none.
        names: of the tensors that the architecture has.
    Returns:
        The size.
    Raises:
        ValueError: positions that are no square grid.
    """
    state = weights.rest
    patch = shapes(state)[2]
    if (positions := state.get("pos_embed")) is not None:
        prefix = _prefix(positions.shape[1], state)
        side = square(positions.shape[1] - prefix, "pos_embed")
        size = size or (side * patch, side * patch)
        weights.move("pos_embed", "pos_embed", *resampled(positions.float(), side, grid_of(size, patch), prefix))
    size = size or (224, 224)
    grid_of(size, patch)
    for name in [name for name in state if name in names]:
        weights.move(name, name)
    weights.ignore_under(_HEADS, "of the classifier")
    for name in _NOT_NEEDED:
        if name in state:
            weights.ignore(name, "pretraining only")
    return size


def resampled(positions: Tensor, side: int, grid: tuple[int, int], prefix: int) -> tuple[Tensor, str]:
    """Positions (1, prefix + side², D) for another grid as timm and open_clip resample them, and how."""
    if grid == (side, side):
        return positions, ""
    positions = resample_abs_pos_embed(positions, list(grid), [side, side], num_prefix_tokens=prefix)
    return positions, f"resampled from {side}x{side} to {grid[0]}x{grid[1]}"


def _prefix(count: int, state: dict[str, Tensor]) -> int:
    """Positions that belong to class and register tokens: all of them, the class token's alone, or none."""
    cls = int("cls_token" in state)
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    fits = [n for n in (0, cls, cls + registers) if n < count and math.isqrt(count - n) ** 2 == count - n]
    return fits[0] if fits else 0
