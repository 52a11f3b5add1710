"""Which patches of a window are encoded, and the way back from their tokens to the whole map."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gep.events.represent import EventImage, Representation

ACTIVE = "active"
"""`keep` of an encoder that reads every patch with events, and no other."""
_ROUND = 8


class Kept(NamedTuple):
    """The patches of B windows that are encoded."""

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nothing calls
    """(B, K) int64, ascending places in raster order, none twice."""
    real: Tensor | None
    """(B, K) bool, False = padding that no token may attend to; None = all are real."""


def check_keep(keep: float | str) -> float | str:
    """A valid `keep` as it is stored: a float in (0, 1], or "active".

    Raises:
        ValueError: anything else.
    """
    if keep == ACTIVE:
        return ACTIVE
    if isinstance(keep, int | float) and not isinstance(keep, bool) and 0 < keep <= 1:
        return float(keep)
    raise ValueError(f"encoder.keep={keep!r}: give a fraction in (0, 1] (1 = dense), or {ACTIVE!r}")


def background_of(represent: Representation) -> float:
    """The value that a representation gives a pixel without events."""
    return 1.0 if isinstance(represent, EventImage) else 0.0


@torch.no_grad()
def patch_activity(x: Tensor, patch: tuple[int, int], background: float = 0.0) -> Tensor:
    """How much a represented window holds in each patch; with a `Histogram` that is its number of events.

    Args:
        x: (B, C, H, W) float represented windows, before any normalisation.
        patch: (rows, columns) of a patch, which divide H and W.
        background: what a pixel without events holds.
    Returns:
        (B, N) float32 >= 0, raster order: the sum over pixels and channels of |x - background|.
    """
    mass = (x.float() - background).abs() if background else x.float().abs()
    # Whole counts stay whole: equal patches are equal to the bit, and the tie is broken by place.
    return mass.unflatten(-1, (-1, patch[1])).unflatten(-3, (-1, patch[0])).sum(dim=(1, 3, 5)).flatten(1)


def choose(activity: Tensor, keep: float | str, num_prefix: int = 0) -> Kept:
    """The most active patches; of equally active ones those that come first in raster order.

    With a fraction their number is the same for all windows, ceil(keep * N), whether or not so many hold events: no
    shape depends on the data. With "active" it is that of the window with most, rounded up so that the sequence, its
    prefix included, has a multiple of 8 tokens (at most all); asking how many waits for the device. A window without
    events keeps its first patch, as a sequence of nothing has no meaning.

    Args:
        activity: (B, N) float.
        keep: fraction in (0, 1], or "active".
        num_prefix: class and register tokens of a sequence.
    """
    num = activity.shape[1]
    order = activity.argsort(dim=1, descending=True, stable=True)
    if not isinstance(keep, str):
        # The tolerance keeps 0.1 * 30 at 3.
        return Kept(order[:, : math.ceil(keep * num - 1e-9)].sort(dim=1).values, None)
    active = activity > 0
    active = active.scatter(1, order[:, :1], True)
    most = int(active.sum(dim=1).max()) + num_prefix
    index = order[:, : min(num, -(-most // _ROUND) * _ROUND - num_prefix)].sort(dim=1).values
    return Kept(index, active.gather(1, index))


def real_map(kept: Kept, num: int) -> Tensor:
    """(B, N) bool of all N places: True where a token was encoded."""
    real = torch.ones_like(kept.index, dtype=torch.bool) if kept.real is None else kept.real
    return torch.zeros(len(real), num, dtype=torch.bool, device=real.device).scatter(1, kept.index, real)


def fill(tokens: Tensor, kept: Kept, empty: Tensor, num: int) -> Tensor:
    """The whole map: encoded tokens at their places, `empty` everywhere else.

    Args:
        tokens: (B, K, D); empty: (D,).
    Returns:
        (B, N, D), raster order, in the tokens' dtype.
    """
    empty = empty.to(tokens.dtype)
    if kept.real is not None:
        tokens = torch.where(kept.real[..., None], tokens, empty)
    index = kept.index[..., None].expand(tokens.shape)
    return empty.expand(len(tokens), num, -1).scatter(1, index, tokens)


def mean_token(tokens: Tensor, real: Tensor | None) -> Tensor:
    """Mean of the real tokens.

    Args:
        tokens: (…, N, D) float.
        real: (…, N) bool with at least one True each; None = all.
    Returns:
        (…, D).
    """
    if real is None:
        return tokens.mean(dim=-2)
    return tokens.masked_fill(~real[..., None], 0.0).sum(dim=-2) / real.sum(dim=-1, keepdim=True)
