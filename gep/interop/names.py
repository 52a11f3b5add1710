"""What the ViT layouts have in common: where in a file the encoder is, its blocks, patch and positions."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping

from torch import Tensor

from gep.interop.table import Conversion

PATCH = "patch_embed.proj.weight"


def find_prefix(state: Collection[str], anchor: str, prefix: str | None, prefer: tuple[str, ...]) -> str:
    """What every name of the encoder begins with.

    Args:
        state: names in the file.
        anchor: a name that every encoder of the layout has.
        prefix: given by the user; None = looked for.
        prefer: endings of a prefix to take where there are several.
    Raises:
        ValueError: no encoder there, or several and none of them preferred.
    """
    found = sorted(name[: -len(anchor)] for name in state if name == anchor or name.endswith("." + anchor))
    if prefix is not None:
        prefix = prefix if not prefix or prefix.endswith(".") else prefix + "."
        found = [name for name in found if name == prefix]
    for ending in prefer:
        found = [name for name in found if name.endswith(ending)] or found
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"the file holds {len(found)} encoders, under {', '.join(map(repr, found))}: give --prefix")
    under = "" if prefix is None else f" under {prefix!r}"
    shown = ", ".join(sorted(state)[:4])
    raise ValueError(f"the file has no {anchor}{under}, so it is not of this layout (it has {shown}, …)")


def under_prefix(state: Mapping[str, Tensor], prefix: str) -> tuple[Conversion, dict[str, Tensor]]:
    """The encoder's tensors with their names from the prefix on, and those of the rest of the file."""
    inside = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    return Conversion(inside), {name: value for name, value in state.items() if not name.startswith(prefix)}


def shapes(state: Mapping[str, Tensor], patch: str = PATCH, block: str = r"blocks\.(?:\d+\.)?(\d+)\.") -> list[int]:
    """Width, depth, side of a patch and input channels of a ViT.

    Raises:
        ValueError: patches that are not square.
    """
    width, channels, side, other = state[patch].shape
    if side != other:
        raise ValueError(f"{patch} has patches of {side}x{other}: only square ones are known")
    numbers = [int(match.group(1)) for name in state if (match := re.match(block, name))]
    return [width, 1 + max(numbers, default=-1), side, channels]


def square(count: int, what: str) -> int:
    """Side of a square grid of `count` positions; ValueError where it is none."""
    side = math.isqrt(count)
    if side * side != count or not count:
        raise ValueError(f"{what} has {count} positions, which are no square grid")
    return side


def grid_of(size: tuple[int, int], patch: int) -> tuple[int, int]:
    """Tokens (h, w) of an input of (H, W) pixels; ValueError where the patch does not fit."""
    if size[0] % patch or size[1] % patch or min(size) < patch:
        up = [max(1, -(-side // patch)) * patch for side in size]
        raise ValueError(f"size {size[0]}x{size[1]} is no multiple of the patch of {patch}: give {up[0]}x{up[1]}")
    return size[0] // patch, size[1] // patch
