"""Order over shards: every sample once an epoch for any lanes, few shards a lane, and a real shuffle."""

from __future__ import annotations

import numpy as np
import pytest

from gep.data.shard_order import ShardOrder


def lanes(batch: int, ranks: int, workers: int):
    """Step s of a run: `ranks` × 1 micro-batch, read by worker s % workers of its rank."""
    micro = batch // ranks

    def lane_of(positions: np.ndarray) -> np.ndarray:
        step, place = np.divmod(positions, batch)
        return place // micro * workers + step % workers

    return lane_of


@pytest.mark.parametrize("num, per_shard", [(1, 1), (7, 3), (103, 10), (1000, 64), (250, 1000)])
@pytest.mark.parametrize("batch, ranks, workers", [(1, 1, 1), (8, 2, 2), (8, 4, 3), (64, 2, 5)])
def test_every_sample_once_an_epoch(num: int, per_shard: int, batch: int, ranks: int, workers: int) -> None:
    order = ShardOrder(np.arange(num) // per_shard, 3, lanes(batch, ranks, workers), buffer=20)
    epochs = [[order(epoch * num + place) for place in range(num)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(num)) for epoch in epochs)
    if num > 50:
        assert epochs[0] != epochs[1]


def test_any_process_computes_the_same_and_resumes_anywhere() -> None:
    shard = np.arange(500) // 50
    first, second = (ShardOrder(shard, 9, lanes(8, 2, 2), buffer=64) for _ in range(2))
    stream = [first(position) for position in range(1500)]
    assert [second(position) for position in (1400, 3, 777, 500, 499)] == [stream[i] for i in (1400, 3, 777, 500, 499)]
    assert [ShardOrder(shard, 10, lanes(8, 2, 2), buffer=64)(position) for position in range(500)] != stream[:500]


def test_a_lane_reads_its_share_of_the_shards_in_sequence() -> None:
    num, per_shard, buffer = 8000, 100, 150
    shard, lane_of = np.arange(num) // per_shard, lanes(16, 2, 2)
    indices = ShardOrder(shard, 1, lane_of, buffer).epoch(2)
    owners = lane_of(np.arange(2 * num, 3 * num))
    pieces = [shard[indices[owners == lane]] for lane in range(4)]
    for piece in pieces:
        assert len(np.unique(piece)) <= 80 // 4 + 1
        # Never more shards alive at once than the buffer spans, both ends cut.
        alive = [(np.flatnonzero(piece == s)[0], np.flatnonzero(piece == s)[-1]) for s in np.unique(piece)]
        most = max(sum(begin <= at <= end for begin, end in alive) for at in range(len(piece)))
        assert most <= 2 * buffer // per_shard + 2
    shared = [set(a) & set(b) for i, a in enumerate(pieces) for b in pieces[:i]]
    assert all(len(both) <= 1 for both in shared), "lanes share no more than the shard at their border"


def test_the_shuffle_reaches_about_the_buffer() -> None:
    num, buffer = 20_000, 1000
    order = ShardOrder(np.zeros(num, np.int64), 5, lambda positions: np.zeros_like(positions), buffer)
    moved = np.argsort(order.epoch(0)) - np.arange(num)
    assert np.abs(moved).max() <= buffer
    # A place is the sample's own draw, uniform over the buffer, less the mean of all draws before it.
    assert np.sqrt((moved[buffer:-buffer] ** 2.0).mean()) == pytest.approx(buffer / 12**0.5, rel=0.05)


def test_shards_need_not_be_even_nor_samples_in_order() -> None:
    shard = np.array([5, 2, 5, 5, 9, 2, 9, 9, 9, 5])
    indices = ShardOrder(shard, 0, lambda positions: positions % 1, buffer=1).epoch(0)
    assert sorted(indices) == list(range(10))
    runs = shard[indices][np.concatenate([[True], np.diff(shard[indices]) != 0])]
    assert len(runs) == 3, "with a buffer of one sample each shard is read from end to end"


def test_nothing_to_order_is_refused() -> None:
    with pytest.raises(ValueError, match="needs samples"):
        ShardOrder(np.empty(0, np.int64), 0, lambda positions: positions)
