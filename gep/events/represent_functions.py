"""Dense images of event windows, as pure functions over a ragged batch.

Every function takes an `EventBatch` of B windows and returns (B, C, H, W) float32 on its device, filled in
one pass over all events: by numba kernels on the CPU, by torch scatter operations elsewhere, with the same
numbers. Channel order is index = polarity: OFF before ON. T = t1 - t0 comes from the window's bounds, never
from its events (and counts as 1 µs where the bounds coincide), so that an empty window, a single event and
equal times need no special case. Absolute times are subtracted as int64 before anything becomes float.

All take `out`, a contiguous (B, C, H, W) float32 buffer on the batch's device to overwrite and return.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch

from gep.events import represent_numba, represent_torch
from gep.events.types import EventBatch


def _prepare(
    batch: EventBatch, channels: int, out: torch.Tensor | None, rectified: bool = False, clear: bool = True
) -> tuple[EventBatch, torch.Tensor, ModuleType]:
    if batch.rectified and not rectified:
        raise ValueError("rectified (float) coordinates are taken by voxel_grid only; round them to int16")
    # The loops index without checks: values from outside would be written anywhere in memory.
    if not batch.checked:
        batch = batch.validate()
    shape = (len(batch), channels, batch.height, batch.width)
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=batch.device)
    else:
        same = out.dtype == torch.float32 and out.device == batch.device and out.is_contiguous()
        if tuple(out.shape) != shape or not same:
            raise ValueError(
                f"out must be contiguous float32 {shape} on {batch.device}, "
                f"got {out.dtype} {tuple(out.shape)} on {out.device}"
            )
    if clear:
        out.zero_()
    return batch, out, represent_numba if batch.device.type == "cpu" else represent_torch


def histogram(
    batch: EventBatch, *, log1p: bool = False, scale: float = 1.0, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Events per polarity and pixel.

    Args:
        batch: B windows.
        log1p: whether to take log(1 + count).
        scale: factor on the result.

    Returns:
        (B, 2, H, W) float32 counts, channel = p.
    """
    return stacked_histogram(batch, 1, log1p=log1p, scale=scale, out=out)


def stacked_histogram(
    batch: EventBatch, bins: int, *, log1p: bool = False, scale: float = 1.0, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Events per polarity, temporal bin and pixel; bin = min(floor(bins (t - t0) / T), bins - 1).

    Args:
        batch: B windows.
        bins: temporal bins of equal duration; the edges are exact (whole-number arithmetic).
        log1p: whether to take log(1 + count).
        scale: factor on the result.

    Returns:
        (B, 2 * bins, H, W) float32 counts, channel = p * bins + bin.
    """
    check_positive("bins", bins)
    batch, out, path = _prepare(batch, 2 * bins, out)
    path.counts(batch, bins, out)
    if log1p:
        out.log1p_()
    return out.mul_(scale) if scale != 1 else out


def voxel_grid(
    batch: EventBatch, bins: int, *, split_polarity: bool = False, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Events shared between the two nearest of `bins` instants: s max(0, 1 - |b - tau|).

    tau = (bins - 1)(t - t0) / T, s = +1 for ON and -1 for OFF. Rectified (float32) coordinates are shared
    bilinearly between the four nearest pixels too; what falls outside the image is lost.

    Args:
        batch: B windows.
        bins: instants, from t0 to t1.
        split_polarity: keep the polarities apart, both with s = +1.

    Returns:
        (B, bins, H, W) float32, or (B, 2 * bins, H, W) with channel = p * bins + bin.

    Source: Zhu et al., arXiv 1812.08156, eq. 1-2.
    """
    check_positive("bins", bins)
    batch, out, path = _prepare(batch, bins * (1 + split_polarity), out, rectified=True, clear=False)
    path.voxels(batch, bins, split_polarity, out)
    return out


def time_surface(batch: EventBatch, tau_us: float, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """exp((M - t1) / tau_us) of each pixel's latest time M; 0 where there was no event.

    Args:
        batch: B windows.
        tau_us: decay time in µs.

    Returns:
        (B, 2, H, W) float32 in [0, 1], channel = p; events older than 87 tau_us vanish, as exp leaves
        float32's normal range there.

    Source: Lagorce et al. 2017 (HOTS), with the window's end as the reference time.
    """
    check_positive("tau_us", tau_us)
    batch, out, path = _prepare(batch, 2, out)
    path.surface(batch, tau_us, out)
    return out


def latest_timestamp(batch: EventBatch, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """(t - t0 + 1) / T of each pixel's latest event; 0 where there was none.

    The added µs keeps an event at t0 apart from none, and makes 1 the last µs before t1.

    Returns:
        (B, 2, H, W) float32 in [0, 1], channel = p.
    """
    batch, out, path = _prepare(batch, 2, out)
    path.latest(batch, out)
    return out


def tencode(batch: EventBatch, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Colour of each pixel's latest event on black: ON (255, g, 0), OFF (0, g, 255).

    g = floor(255 (t1 - t) / T). The values are whole, so that `.to(torch.uint8)` loses nothing.

    Returns:
        (B, 3, H, W) float32 in [0, 255], channels red, green, blue.

    Source: Huang et al., Tencode, arXiv 2109.00210.
    """
    batch, out, path = _prepare(batch, 3, out)
    path.tencode(batch, out)
    return out


def event_image(batch: EventBatch, *, percentile: float = 99.0, out: torch.Tensor | None = None) -> torch.Tensor:
    """Counts as ink on white: the polarity with more events at a pixel paints it, ON red, OFF blue.

    Ink is n = min(c, q) / q, q the percentile of that window's and polarity's nonzero counts (linearly
    interpolated); ON takes n off green and blue, OFF off red and green. ON paints where both count alike.

    Args:
        batch: B windows.
        percentile: in (0, 100]; GEP has 99 for N-ImageNet and N-Caltech101, 95 for DDD17 and MVSEC,
            90 for DSEC.

    Returns:
        (B, 3, H, W) float32 in [0, 1], channels red, green, blue; white is 1.

    Source: GEP, arXiv 2603.23032.
    """
    check_percentile(percentile)
    batch, out, path = _prepare(batch, 3, out)
    counts = torch.zeros(len(batch), 2, batch.height, batch.width, device=batch.device)
    path.counts(batch, 1, counts)
    ceiling = path.quantiles(counts.view(2 * len(batch), -1), percentile / 100)
    # Counts are whole: 1 is below any quantile of nonzero ones, and stands in where there are none.
    ceiling = ceiling.clamp(min=1).view(-1, 2, 1, 1)
    ink = counts.minimum(ceiling) / ceiling
    on_paints = counts[:, 1] >= counts[:, 0]
    out[:, 0] = 1 - torch.where(on_paints, 0.0, ink[:, 0])
    out[:, 1] = 1 - torch.where(on_paints, ink[:, 1], ink[:, 0])
    out[:, 2] = 1 - torch.where(on_paints, ink[:, 1], 0.0)
    return out


def check_positive(name: str, value: float) -> None:
    """Raises ValueError unless the parameter is positive and finite (and `bins` whole)."""
    if name == "bins" and not (isinstance(value, int) and not isinstance(value, bool)):
        raise ValueError(f"bins must be a whole number, got {value!r}")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


def check_percentile(value: float) -> None:
    """Raises ValueError unless the percentile is in (0, 100]."""
    if not 0 < value <= 100:
        raise ValueError(f"percentile must be in (0, 100], got {value!r}")
