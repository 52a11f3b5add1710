"""The representations on the CPU: numba kernels over the ragged batch, each filling a given buffer.

Within a window events are in time order, so that a temporal bin is a stretch of the arrays found by binary
search, and the inner loops need no division; "latest" is the last store. Indices are unsigned: numba then
leaves out the test for negative ones. Counts and event indices live in the float32 output's own memory as
int32 until the last pass.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit

from gep.events.types import EventBatch

_FEW = 2048  # events whose cells and shares stay in the first cache


@njit(nogil=True, cache=True)
def _segment_starts(t, offsets, t0, t1, bins):
    """First event of every (window, bin): bin k begins where bins * (t - t0) >= k * (t1 - t0)."""
    num = len(t0)
    starts = np.empty(num * bins + 1, np.int64)
    starts[num * bins] = offsets[num]
    for window in range(num):
        span = max(t1[window] - t0[window], 1)
        starts[window * bins] = offsets[window]
        for k in range(1, bins):
            edge = t0[window] + (k * span + bins - 1) // bins
            low, high = offsets[window], offsets[window + 1]
            while low < high:
                middle = (low + high) // 2
                if t[middle] < edge:
                    low = middle + 1
                else:
                    high = middle
            starts[window * bins + k] = low
    return starts


@njit(nogil=True, cache=True)
def _count(x, y, p, starts, bins, height, width, counts):
    plane = np.uint64(height * width)
    polarity_stride, w = np.uint64(bins) * plane, np.uint64(width)
    for segment in range(len(starts) - 1):
        window, k = segment // bins, segment % bins
        base = np.uint64(window * 2 * bins + k) * plane
        for i in range(np.uint64(starts[segment]), np.uint64(starts[segment + 1])):
            cell = base + np.uint64(p[i]) * polarity_stride + np.uint64(y[i]) * w + np.uint64(x[i])
            counts[cell] += np.int32(1)


@njit(nogil=True, cache=True)
def _to_float(counts, values):
    for i in range(len(counts)):
        values[i] = np.float32(counts[i])


@njit(nogil=True, cache=True)
def _clear(values, plane, stride):
    """Sets a plane to 0, and that of the other polarity where there is one."""
    values[:plane] = 0
    if stride:
        values[stride : stride + plane] = 0


@njit(nogil=True, cache=True)
def _voxel(t, x, y, p, starts, t0, t1, bins, split, height, width, values):
    gaps = max(bins - 1, 1)
    plane, w = height * width, np.uint32(width)
    # With one bin there is no next one: the fraction is 0 and its share goes to the same cell.
    step = plane if bins > 1 else 0
    stride = bins * plane if split else 0
    channels = 2 * bins if split else bins
    off = np.float32(1) if split else np.float32(-1)
    rise = np.float32(1) - off
    # A few events at a time: first what can be vectorised, then one plane after the other. Where planes lie whole pages
    # apart, a load from one waits for the store to the other.
    cells, former, latter = np.empty(_FEW, np.uint64), np.empty(_FEW, np.float32), np.empty(_FEW, np.float32)
    for segment in range(len(starts) - 1):
        window, k = segment // gaps, segment % gaps
        begin, slope = t0[window], (bins - 1) / max(t1[window] - t0[window], 1)
        base = (window * channels + k) * plane
        here, there = values[base:], values[base + step :]
        # Each plane is cleared just before its first events, which then find it in the cache.
        if k == 0:
            _clear(here, plane, stride)
        if step:
            _clear(there, plane, stride)
        for first in range(starts[segment], starts[segment + 1], _FEW):
            count = min(_FEW, starts[segment + 1] - first)
            last = first + count
            ts, xs, ys, ps = t[first:last], x[first:last], y[first:last], p[first:last]
            for i in range(count):
                sign = off + rise * np.float32(ps[i])
                later = np.float32((ts[i] - begin) * slope - k) * sign
                cell = np.uint32(np.uint32(w * np.uint32(ys[i])) + np.uint32(xs[i]))
                cells[i] = np.uint64(stride) * np.uint64(ps[i]) + np.uint64(cell)
                former[i] = sign - later
                latter[i] = later
            for i in range(count):
                here[cells[i]] += former[i]
            for i in range(count):
                there[cells[i]] += latter[i]


@njit(nogil=True, cache=True)
def _voxel_rectified(t, x, y, p, starts, t0, t1, bins, split, height, width, values):
    values[:] = 0
    gaps = max(bins - 1, 1)
    plane = height * width
    step = plane if bins > 1 else 0
    channels = 2 * bins if split else bins
    for segment in range(len(starts) - 1):
        window, k = segment // gaps, segment % gaps
        begin, slope = t0[window], (bins - 1) / max(t1[window] - t0[window], 1)
        for i in range(starts[segment], starts[segment + 1]):
            # Rectified events may leave the image; in float first, as a far one does not fit an integer.
            if not (-1 < x[i] < width and -1 < y[i] < height):
                continue
            base = (window * channels + k + (bins * np.int64(p[i]) if split else 0)) * plane
            sign = np.float32(1) if split or p[i] else np.float32(-1)
            later = np.float32((t[i] - begin) * slope - k)
            column, row = np.int64(np.floor(x[i])), np.int64(np.floor(y[i]))
            right, down = x[i] - np.float32(column), y[i] - np.float32(row)
            for dy in range(2):
                for dx in range(2):
                    if 0 <= row + dy < height and 0 <= column + dx < width:
                        share = (down if dy else 1 - down) * (right if dx else 1 - right) * sign
                        cell = base + (row + dy) * width + column + dx
                        values[cell] += share * (1 - later)
                        values[cell + step] += share * later


@njit(nogil=True, cache=True)
def _latest_time(t, x, y, p, offsets, origins, scales, height, width, values):
    """values[cell] = scale * (t - origin) of the latest event there, never 0 where there is one."""
    plane, w = np.uint64(height * width), np.uint64(width)
    for window in range(len(origins)):
        base, origin, scale = np.uint64(2 * window) * plane, origins[window], scales[window]
        for i in range(np.uint64(offsets[window]), np.uint64(offsets[window + 1])):
            cell = base + np.uint64(p[i]) * plane + np.uint64(y[i]) * w + np.uint64(x[i])
            values[cell] = np.float32((t[i] - origin) * scale)


@njit(nogil=True, cache=True)
def _drop_vanishing(exponents):
    """Sets exponents whose exp is below float32's normal range to 0, and tells which were kept."""
    keep = np.empty(len(exponents), np.bool_)
    for i in range(len(exponents)):
        keep[i] = -87 < exponents[i] < 0
        exponents[i] = exponents[i] if keep[i] else np.float32(0)
    return keep


@njit(nogil=True, cache=True)
def _zero_unless(keep, values):
    for i in range(len(values)):
        values[i] = values[i] if keep[i] else np.float32(0)


@njit(nogil=True, cache=True)
def _last_event(x, y, offsets, first_cell, window_cells, width, last):
    """last[cell] = 1 + position in its window of the latest event at the pixel, 0 where there is none."""
    w = np.uint64(width)
    for window in range(len(offsets) - 1):
        base = np.uint64(window * window_cells + first_cell)
        begin = np.uint64(offsets[window])
        for i in range(begin, np.uint64(offsets[window + 1])):
            last[base + np.uint64(y[i]) * w + np.uint64(x[i])] = np.int32(i - begin + np.uint64(1))


@njit(nogil=True, cache=True)
def _paint_tencode(t, p, offsets, t0, t1, plane, last, values):
    for window in range(len(t0)):
        begin, span = offsets[window] - 1, max(t1[window] - t0[window], 1)
        red = 3 * window * plane
        for cell in range(red, red + plane):
            event = last[cell + plane]
            if event:
                event += begin
                values[cell] = 255 if p[event] else 0
                values[cell + plane] = 255 * (t1[window] - t[event]) // span
                values[cell + 2 * plane] = 0 if p[event] else 255


@njit(nogil=True, cache=True)
def _quantiles(counts, fraction):
    """Linearly interpolated quantile of each row's nonzero counts (0 for a row of zeros)."""
    result = np.zeros(len(counts), np.float32)
    for row in range(len(counts)):
        tally = np.zeros(int(counts[row].max()) + 1, np.int64)
        for value in counts[row]:
            tally[int(value)] += 1
        num = counts.shape[1] - tally[0]
        if num == 0:
            continue
        position = fraction * (num - 1)
        below = int(np.floor(position))
        seen, value = 0, 0
        while seen <= below:
            value += 1
            seen += tally[value]
        above = value
        while seen <= min(below + 1, num - 1):
            above += 1
            seen += tally[above]
        result[row] = value + (above - value) * (position - below)
    return result


def _arrays(batch: EventBatch) -> tuple[np.ndarray, ...]:
    def array(tensor: torch.Tensor) -> np.ndarray:
        values = tensor.contiguous().numpy()
        return values.view(np.uint16) if values.dtype == np.int16 else values

    fields = (batch.t, batch.x, batch.y, batch.p, batch.offsets, batch.t0, batch.t1)
    return tuple(array(tensor) for tensor in fields)


def _views(out: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    values = out.view(-1).numpy()
    return values.view(np.int32), values


def counts(batch: EventBatch, bins: int, out: torch.Tensor) -> None:
    """Events per (polarity, bin, pixel) into a zeroed (B, 2 * bins, H, W) float32 buffer."""
    t, x, y, p, offsets, t0, t1 = _arrays(batch)
    integers, values = _views(out)
    starts = _segment_starts(t, offsets, t0, t1, bins)
    _count(x, y, p, starts, bins, batch.height, batch.width, integers)
    _to_float(integers, values)


def voxels(batch: EventBatch, bins: int, split_polarity: bool, out: torch.Tensor) -> None:
    """Temporally bilinear sums into a (B, bins or 2 * bins, H, W) float32 buffer, whatever it holds."""
    t, x, y, p, offsets, t0, t1 = _arrays(batch)
    starts = _segment_starts(t, offsets, t0, t1, max(bins - 1, 1))
    kernel = _voxel_rectified if batch.rectified else _voxel
    kernel(t, x, y, p, starts, t0, t1, bins, split_polarity, batch.height, batch.width, _views(out)[1])


def latest(batch: EventBatch, out: torch.Tensor) -> None:
    """Relative time of the latest event into a zeroed (B, 2, H, W) float32 buffer."""
    t, x, y, p, offsets, t0, t1 = _arrays(batch)
    scales = 1 / np.maximum(t1 - t0, 1)
    _latest_time(t, x, y, p, offsets, t0 - 1, scales, batch.height, batch.width, _views(out)[1])


def surface(batch: EventBatch, tau_us: float, out: torch.Tensor) -> None:
    """Exponentially decayed latest times into a zeroed (B, 2, H, W) float32 buffer."""
    t, x, y, p, offsets, _, t1 = _arrays(batch)
    values = _views(out)[1]
    # The exponent must not become 0 in float32, which means none here; exp(-1e-30 ...) is 1 all the same.
    scales = np.full(len(t1), max(1 / tau_us, 1e-30))
    _latest_time(t, x, y, p, offsets, t1, scales, batch.height, batch.width, values)
    # torch's exp is vectorised where numba's is not, but 20 times slower on -inf and on underflow.
    keep = _drop_vanishing(values)
    out.exp_()
    _zero_unless(keep, values)


def tencode(batch: EventBatch, out: torch.Tensor) -> None:
    """Colour of the latest event into a zeroed (B, 3, H, W) float32 buffer."""
    t, x, y, p, offsets, t0, t1 = _arrays(batch)
    last, values = _views(out)
    plane = batch.height * batch.width
    _last_event(x, y, offsets, plane, 3 * plane, batch.width, last)
    _paint_tencode(t, p, offsets, t0, t1, plane, last, values)


def quantiles(counts: torch.Tensor, fraction: float) -> torch.Tensor:
    """Quantile of the nonzero values of each row of whole-numbered (R, M) float32 counts -> (R,)."""
    return torch.from_numpy(_quantiles(counts.contiguous().numpy(), fraction))
