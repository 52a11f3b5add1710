"""One step of the simulator's pixels: numba on the CPU, torch elsewhere, with the same numbers.

Only the few pixels in which something happens are followed, event by event.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numba
import numpy as np
import torch

from gep.events.sensor import Draws, Pixels, is_on

Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""pixel (n,) int64, t (n,) int64 µs after the begin of the step, and on (n,) bool of the events."""


@dataclass
class State:
    """What the pixels of a chunk remember between steps, all (n,)."""

    level: torch.Tensor
    difference: torch.Tensor
    """Level minus stored level."""
    hold: torch.Tensor
    """Time from the begin of the coming step until a pixel leaves its reset, µs; <= 0 where it has."""


def advance(
    state: State,
    level: torch.Tensor,
    brightness: torch.Tensor,
    duration: int,
    sensor: Pixels,
    draws: Draws,
    step: int,
) -> Found:
    """Moves the state over one step, in which every level goes linearly to its new value.

    Args:
        state: changed in place.
        level: (n,) the levels at the step's end.
        brightness: (n,) at the step's end, which decides how much noise there is.
        duration: of the step, µs.
        sensor: the pixels.
        draws: what is random about them.
        step: which one, for the noise.
    """
    rise = torch.sub(level, state.level, out=state.level)
    leak = sensor.leak(duration)
    if is_on(leak):
        rise = rise + draws.threshold_on * leak
    state.level = level
    noise = draws.noise.at(step, sensor, brightness)
    on_cpu = rise.device.type == "cpu"
    return (_advance_numba if on_cpu else _advance_torch)(state, rise, duration, sensor, draws, noise)


def _advance_torch(
    state: State, rise: torch.Tensor, duration: int, sensor: Pixels, draws: Draws, noise: Found
) -> Found:
    before = state.difference
    state.difference = before + rise
    busy = (state.difference >= draws.threshold_on) | (state.difference <= draws.threshold_off)
    refractory, cap = sensor.refractory_us, sensor.max_events_per_step
    if is_on(refractory):
        busy |= state.hold > 0
    noise_pixel, noise_t, noise_on = noise
    busy[noise_pixel] = True

    pixel = busy.nonzero()[:, 0]
    slope = rise[pixel] / duration
    difference, now = before[pixel], state.hold[pixel].clamp_min(0)
    goal = torch.where(slope > 0, draws.threshold_on[pixel], draws.threshold_off[pixel])
    fired = torch.zeros_like(pixel)
    cursor = torch.searchsorted(noise_pixel, pixel)
    # A guard behind the last candidate, so that looking at the next one always works.
    noise_pixel = torch.nn.functional.pad(noise_pixel, (0, 1), value=-1)
    noise_t = torch.nn.functional.pad(noise_t, (0, 1), value=math.inf)
    noise_on = torch.nn.functional.pad(noise_on, (0, 1))
    found = [(pixel[:0], pixel[:0], noise_on[:0])]
    while len(pixel):
        crossing = torch.where(slope == 0, math.inf, now + (goal - difference) / slope)
        crossing = torch.maximum(crossing, now)  # rounding may put it a little before
        at_noise = torch.where(noise_pixel[cursor] == pixel, noise_t[cursor], math.inf)
        by_noise = at_noise < crossing
        t = torch.minimum(crossing, at_noise)

        over = (t >= duration).nonzero()[:, 0]
        rest = (duration - now[over]).clamp_min(0)
        state.difference[pixel[over]] = difference[over] + slope[over] * rest
        state.hold[pixel[over]] = now[over] - duration

        going = (t < duration).nonzero()[:, 0]
        pixel, slope, difference, now, goal, fired, cursor, t, by_noise = (
            v[going] for v in (pixel, slope, difference, now, goal, fired, cursor, t, by_noise)
        )
        fires = ~by_noise | (t >= now)  # noise is lost on a pixel in reset
        on = torch.where(by_noise, noise_on[cursor], slope > 0)
        found.append((pixel[fires], t[fires].long(), on[fires]))
        difference = torch.where(fires, 0, difference)
        now = torch.where(fires, t + (refractory[pixel] if isinstance(refractory, torch.Tensor) else refractory), now)
        cursor = cursor + by_noise
        if cap:
            fired = fired + fires
            now = torch.where(fired >= cap, now.clamp_min(duration), now)
    pixels, times, polarities = (torch.cat(column) for column in zip(*found))
    return pixels, times, polarities


def _advance_numba(
    state: State, rise: torch.Tensor, duration: int, sensor: Pixels, draws: Draws, noise: Found
) -> Found:
    refractory = sensor.refractory_us
    if not isinstance(refractory, torch.Tensor):
        refractory = torch.tensor([refractory]).to(rise)
    real = rise.numpy().dtype.type
    difference, hold, on, off = (
        v.numpy() for v in (state.difference, state.hold, draws.threshold_on, draws.threshold_off)
    )
    noise_pixel, noise_t, noise_on = (v.numpy() for v in noise)
    size, start, cursor, parts = max(4096, len(rise) // 8), 0, 0, []
    while start < len(rise):
        out = (torch.empty(size, dtype=torch.int64), torch.empty(size, dtype=torch.int64), torch.empty(size).bool())
        start, cursor, count = _follow(
            rise.numpy(), difference, hold, on, off, refractory.numpy(), noise_pixel, noise_t, noise_on,
            real(duration), sensor.max_events_per_step, start, cursor, *(v.numpy() for v in out),
        )  # fmt: skip
        parts.append(tuple(v[:count] for v in out))
        size *= 2
    pixel, t, positive = parts[0] if len(parts) == 1 else (torch.cat(column) for column in zip(*parts))
    return pixel, t, positive


@numba.njit(nogil=True, cache=True)
def _follow(
    rise, difference, hold, threshold_on, threshold_off, refractory, noise_pixel, noise_t, noise_on,
    duration, cap, start, cursor, out_pixel, out_t, out_on,
):  # fmt: skip
    """Pixels from `start` on until the output is full; (next pixel, next candidate, events)."""
    zero, inf = rise.dtype.type(0), rise.dtype.type(np.inf)
    num_noise, count, room = len(noise_pixel), 0, len(out_pixel)
    for pixel in range(start, len(rise)):
        after = difference[pixel] + rise[pixel]
        noisy = cursor < num_noise and noise_pixel[cursor] == pixel
        goes = hold[pixel] <= zero and not noisy
        if goes and after < threshold_on[pixel] and after > threshold_off[pixel]:
            difference[pixel] = after
            continue
        first, first_cursor, fired = count, cursor, 0
        slope, gap, now = rise[pixel] / duration, difference[pixel], max(hold[pixel], zero)
        goal = threshold_on[pixel] if slope > zero else threshold_off[pixel]
        pause = refractory[pixel] if len(refractory) > 1 else refractory[0]
        while True:
            crossing = inf if slope == zero else max(now + (goal - gap) / slope, now)
            at_noise = noise_t[cursor] if cursor < num_noise and noise_pixel[cursor] == pixel else inf
            by_noise = at_noise < crossing
            t = at_noise if by_noise else crossing
            if t >= duration:
                break
            if not by_noise or t >= now:  # noise is lost on a pixel in reset
                if count == room:
                    return pixel, first_cursor, first
                out_pixel[count], out_t[count] = pixel, int(t)
                out_on[count] = noise_on[cursor] if by_noise else slope > zero
                count += 1
                fired += 1
                gap, now = zero, t + pause
            if by_noise:
                cursor += 1
            if cap > 0 and fired >= cap:
                now = max(now, duration)
        difference[pixel] = gap + slope * max(duration - now, zero)
        hold[pixel] = now - duration
    return len(rise), cursor, count
