"""Floating point operations of products (matrices, convolutions, attention), two a multiply-accumulate.

Everything else (norms, activations, losses) is left to the estimate of memory traffic, as is customary for MFU.
"""

from __future__ import annotations

from typing import NamedTuple

from gep.plan.towers import Tower


class Flops(NamedTuple):
    """Operations of a forward pass and of the backward pass that follows it."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: Flops) -> Flops:  # type: ignore[override]
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def times(self, factor: float) -> Flops:
        """So many passes."""
        return Flops(factor * self.forward, factor * self.backward)

    @property
    def frozen(self) -> Flops:
        """Without a backward pass."""
        return Flops(self.forward)

    @property
    def total(self) -> float:
        """Both passes."""
        return self.forward + self.backward


def linear(weights: float, rows: float, *, to_input: bool = True, to_weights: bool = True) -> Flops:
    """A linear map of `weights` entries on `rows` rows; backward for its input, its weights, or both."""
    forward = 2 * weights * rows
    return Flops(forward, forward * (to_input + to_weights))


def attention(length: float, features: float, *, keys: float | None = None) -> Flops:
    """Scores and their weighted sum over `length` tokens, each with so many keys on the mean (None = with all).

    The backward pass counts twice the forward; kernels that do the scores again for it do more.
    """
    forward = 4 * length * (length if keys is None else keys) * features
    return Flops(forward, 2 * forward)


def blocks(tower: Tower, *, keys: float | None = None) -> Flops:
    """All transformer blocks, one image or sequence."""
    parts = (
        linear(block.weights, tower.length) + attention(tower.length, block.attention, keys=keys)
        for block in tower.blocks
    )
    return sum(parts, Flops())


def blocks_again(tower: Tower, *, keys: float | None = None) -> float:
    """Operations of the blocks' second forward pass under activation checkpointing.

    It ends where nothing more is needed: before the last product, unless a learned gain follows.
    """
    last = sum(0 if block.scaled else block.hidden * block.width for block in tower.blocks)
    return blocks(tower, keys=keys).forward - 2 * last * tower.length


def stem(tower: Tower) -> Flops:
    """The patch embedding, one image; nothing flows back into the image."""
    parts = (linear(conv.macs, 1, to_input=index > 0) for index, conv in enumerate(tower.convs))
    return sum(parts, Flops())


def tower_flops(tower: Tower) -> Flops:
    """Stem and blocks of a ViT, one image."""
    return stem(tower) + blocks(tower)


def backbone_flops(
    tower: Tower, token_dim: int, modalities: int, *, keys: float | None, next_head: bool, image_head: bool
) -> Flops:
    """The backbone, one sequence.

    Args:
        tower: from `backbone_tower`.
        token_dim: features D of the tokens it reads and predicts.
        modalities: kinds of frames, each with a map of its own in the next head.
        keys: that a token attends to, the mean; None = all of the sequence, as under a mask.
        next_head, image_head: whether a loss reads them; both are computed anyway.
    """
    size = tower.width * token_dim
    heads = linear(modalities * size, tower.length) if next_head else linear(modalities * size, tower.length).frozen
    heads += linear(size, tower.length) if image_head else linear(size, tower.length).frozen
    return linear(size, tower.length, to_input=False) + blocks(tower, keys=keys) + heads


def contrast_flops(candidates: int, pooled: int, *, softmax: bool = True) -> Flops:
    """The contrastive term of one sample: against all images, and (softmax) its image against all event features."""
    return Flops(2 * candidates * pooled, 2 * candidates * pooled).times(2 if softmax else 1)


def similarity_flops(tokens: int, width: int) -> Flops:
    """The similarity-structure term of a window: three token-by-token matrices, the teacher's own without gradient."""
    one = 2 * tokens * tokens * width
    return Flops(3 * one, 3 * one)
