"""Frames of recorded, simulated and mixed batches, put back in the order of the samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gep.events.frames import Grouped, PerSource, frames
from gep.events.represent import Histogram, TimeSurface, VoxelGrid
from gep.events.types import EventBatch, Events
from tests.test_stills import stills


def recorded(num: int, seed: int = 0) -> EventBatch:
    rng = np.random.default_rng(seed)
    windows = [
        Events.from_arrays(np.sort(rng.integers(0, 9000, 300)), rng.integers(0, 11, 300), rng.integers(0, 12, 300),
                           rng.integers(0, 2, 300), height=12, width=11)
        for _ in range(num)
    ]  # fmt: skip
    return EventBatch.from_windows(windows, np.tile([[0, 9000]], (num, 1)))


@pytest.mark.parametrize("represent", [Histogram(), Histogram(log1p=True, scale=0.5), VoxelGrid(3), TimeSurface(5e3)])
def test_one_source(represent) -> None:
    events, still = recorded(6), stills()
    assert torch.equal(frames(represent, events), represent(events))
    made = frames(represent, still)
    assert made.shape == (8, represent.channels, 12, 11) and torch.equal(made, represent(still.events()))


@pytest.mark.parametrize("represent", [Histogram(log1p=True), VoxelGrid(3)])
def test_a_mix_is_put_back_in_order(represent) -> None:
    first, second, still = recorded(4, 1), recorded(2, 2), stills(3)
    mix = Grouped.of([first, still, second], [[4, 1], [0, 5, 2], [3]], [0, 2, 1], windows=2)
    assert len(mix) == 12 and (mix.height, mix.width) == (12, 11) and mix.device.type == "cpu"
    parts = {0: represent(first), 1: represent(second), 2: represent(still.events())}
    expected = [parts[2][0:2], parts[0][2:4], parts[2][4:6], parts[1][0:2], parts[0][0:2], parts[2][2:4]]
    assert torch.equal(frames(represent, mix), torch.cat(expected))
    assert torch.equal(frames(represent, mix.to("cpu", non_blocking=True)), torch.cat(expected))


def test_a_source_has_its_own_statistics() -> None:
    first, still = recorded(2), stills(1)
    each = PerSource((Histogram(scale=1.0), Histogram(scale=3.0), Histogram(log1p=True)))
    mix = Grouped.of([first, still], [[1], [0]], [2, 1], windows=2)
    expected = torch.cat([3 * still.counts(), Histogram()(first).log1p()])
    assert torch.equal(frames(each, mix), expected) and each.channels == 2
    # Events that are no mix are the first source's: what a mixed run is evaluated on.
    assert torch.equal(frames(each, first), Histogram()(first))
    with pytest.raises(ValueError, match="source 5 has no representation"):
        frames(each, Grouped.of([first], [[0]], [5], windows=2))
    with pytest.raises(ValueError, match="differ in kind or channels"):
        PerSource((Histogram(), TimeSurface()))


def test_refuses() -> None:
    with pytest.raises(ValueError, match="4 windows for 1 samples"):
        Grouped.of([recorded(4)], [[0]], [0], windows=2)
    with pytest.raises(ValueError, match="each sample once"):
        Grouped.of([recorded(2), recorded(2)], [[0], [2]], [0, 1], windows=2)
    other = EventBatch.from_windows([Events.empty(5, 5)] * 2)
    with pytest.raises(ValueError, match="canvases differ"):
        Grouped.of([recorded(2), other], [[0], [1]], [0, 1], windows=2)
