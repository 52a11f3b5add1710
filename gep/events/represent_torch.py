"""The representations in torch scatter operations, for CUDA and other devices; same numbers as the kernels.

No step waits for the device. Float additions run in any order on CUDA, so that voxel grids repeat to float
rounding there; counts and latest events repeat exactly.
"""

from __future__ import annotations

import torch

from gep.events.types import EventBatch


def _window(batch: EventBatch) -> torch.Tensor:
    sizes = batch.offsets[1:] - batch.offsets[:-1]
    index = torch.arange(len(batch), device=batch.device)
    return torch.repeat_interleave(index, sizes, output_size=batch.num_events)


def _span(batch: EventBatch) -> torch.Tensor:
    return (batch.t1 - batch.t0).clamp(min=1)


def _pixel(batch: EventBatch) -> torch.Tensor:
    return batch.y.long() * batch.width + batch.x.long()


def counts(batch: EventBatch, bins: int, out: torch.Tensor) -> None:
    """Events per (polarity, bin, pixel) into a zeroed (B, 2 * bins, H, W) float32 buffer."""
    window = _window(batch)
    channel = window * 2 + batch.p
    if bins > 1:
        # Whole numbers: a bin edge must not depend on rounding.
        k = (batch.t - batch.t0[window]) * bins // _span(batch)[window]
        channel = channel * bins + k.clamp(0, bins - 1)
    cell = channel * (batch.height * batch.width) + _pixel(batch)
    # Whole numbers again: float32 would stop counting at 2**24, and add in another order each time.
    tally = torch.zeros(out.numel(), dtype=torch.int32, device=out.device)
    tally.index_add_(0, cell, torch.ones_like(cell, dtype=torch.int32))
    out.copy_(tally.view_as(out))


def voxels(batch: EventBatch, bins: int, split_polarity: bool, out: torch.Tensor) -> None:
    """Temporally bilinear sums into a (B, bins or 2 * bins, H, W) float32 buffer, whatever it holds."""
    window, values = _window(batch), out.zero_().view(-1)
    elapsed, span = (batch.t - batch.t0[window]), _span(batch)[window]
    gaps = bins - 1
    first = (elapsed * gaps // span).clamp(0, max(gaps - 1, 0))
    later = (elapsed.double() * (gaps / span.double()) - first).float()
    channel = (window * 2 + batch.p if split_polarity else window) * bins + first
    sign = torch.ones_like(later) if split_polarity else batch.p.float() * 2 - 1
    for cell, share in _shares(batch, channel):
        share = share * sign
        values.index_add_(0, cell, share * (1 - later))
        if bins > 1:
            values.index_add_(0, cell + batch.height * batch.width, share * later)


def _shares(batch: EventBatch, channel: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(cell, weight) of each pixel an event is spread over: one, or four when rectified."""
    height, width = batch.height, batch.width
    base = channel * (height * width)
    if not batch.rectified:
        return [(base + _pixel(batch), torch.ones_like(base, dtype=torch.float32))]
    inside = (batch.x > -1) & (batch.x < width) & (batch.y > -1) & (batch.y < height)
    x, y = torch.where(inside, batch.x, 0.0), torch.where(inside, batch.y, 0.0)
    column, row = x.floor(), y.floor()
    right, down = x - column, y - row
    shares = []
    for dy, weight_y in ((0, 1 - down), (1, down)):
        for dx, weight_x in ((0, 1 - right), (1, right)):
            c, r = column.long() + dx, row.long() + dy
            valid = inside & (c >= 0) & (c < width) & (r >= 0) & (r < height)
            cell = base + r.clamp(0, height - 1) * width + c.clamp(0, width - 1)
            shares.append((cell, torch.where(valid, weight_y * weight_x, 0.0)))
    return shares


def _last_event(batch: EventBatch, split: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the latest event of each cell, clamped to 0, and where there is one: (B, 1 or 2, H * W)."""
    channels = 2 if split else 1
    window = _window(batch)
    channel = window * 2 + batch.p if split else window
    cell = channel * (batch.height * batch.width) + _pixel(batch)
    shape = (len(batch), channels, batch.height * batch.width)
    last = torch.full(shape, -1, dtype=torch.int64, device=batch.device)
    order = torch.arange(batch.num_events, device=batch.device)
    last.view(-1).scatter_reduce_(0, cell, order, reduce="amax")
    return last.clamp(min=0), last >= 0


def latest(batch: EventBatch, out: torch.Tensor) -> None:
    """Relative time of the latest event into a zeroed (B, 2, H, W) float32 buffer."""
    if batch.num_events == 0:
        return
    last, there = _last_event(batch, split=True)
    elapsed = batch.t[last] - batch.t0[:, None, None] + 1
    value = elapsed.double() / _span(batch)[:, None, None].double()
    out.copy_(torch.where(there, value, 0.0).view_as(out))


def surface(batch: EventBatch, tau_us: float, out: torch.Tensor) -> None:
    """Exponentially decayed latest times into a zeroed (B, 2, H, W) float32 buffer."""
    if batch.num_events == 0:
        return
    last, there = _last_event(batch, split=True)
    value = ((batch.t[last] - batch.t1[:, None, None]).double() / tau_us).exp()
    out.copy_(torch.where(there, value, 0.0).view_as(out))


def tencode(batch: EventBatch, out: torch.Tensor) -> None:
    """Colour of the latest event into a zeroed (B, 3, H, W) float32 buffer."""
    if batch.num_events == 0:
        return
    last, there = _last_event(batch, split=False)
    green = (batch.t1[:, None, None] - batch.t[last]) * 255 // _span(batch)[:, None, None]
    on = batch.p[last] * 255
    colour = torch.cat([on, green, 255 - on], dim=1)
    out.copy_(torch.where(there, colour, 0).view_as(out))


def quantiles(counts: torch.Tensor, fraction: float) -> torch.Tensor:
    """Quantile of the nonzero values of each row of whole-numbered (R, M) float32 counts -> (R,)."""
    ordered = counts.sort(dim=1).values
    num = (counts > 0).sum(dim=1)
    position = fraction * (num - 1).clamp(min=0).double()
    below = position.floor()
    zeros = counts.shape[1] - num
    at = (zeros + below.long()).clamp(max=counts.shape[1] - 1)
    low = ordered.gather(1, at[:, None])[:, 0]
    high = ordered.gather(1, (at + 1).clamp(max=counts.shape[1] - 1)[:, None])[:, 0]
    return (low.double() + (high - low).double() * (position - below)).float()
