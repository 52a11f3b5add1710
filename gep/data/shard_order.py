"""The order of samples that lie in shards: shuffled, every one once an epoch, each lane reading few shards in sequence.

A lane is one data worker of one rank. What position p of the endless stream holds is a function of (seed, p) and of
how positions fall to lanes, so that any process computes it and resuming is arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

LaneOf = Callable[[np.ndarray], np.ndarray]
_STREAM = 0x7368  # keeps this order's draws apart from others of the same seed


class ShardOrder:
    """Position -> index over N samples that lie in shards; each epoch (N positions) its own order.

    In an epoch the shards are permuted and their samples put end to end; each lane gets a contiguous piece, as long as
    the number of positions it owns, and shuffles it by moving no sample further than about `buffer` places. So a lane
    reads about shards ÷ lanes shards, one after the other, and keeps few of them open.

    Unlike `gep.data.sampler.Order`, the order depends on the number of ranks and workers, through `lane_of`.

    Args:
        shard: int64 (N,), the shard each sample lies in.
        seed: of the permutations.
        lane_of: int64 (n,) positions -> int64 (n,) lanes >= 0; a pure function.
        buffer: reach of the shuffle inside a lane, samples.
    Raises:
        ValueError: no samples, or a buffer < 1.
    """

    def __init__(self, shard: np.ndarray, seed: int, lane_of: LaneOf, buffer: int = 4096):
        if len(shard) == 0 or buffer < 1:
            raise ValueError(f"an order needs samples and a buffer >= 1, got {len(shard)} and {buffer}")
        self.seed, self.lane_of, self.buffer = seed, lane_of, buffer
        self._by_shard = np.argsort(shard, kind="stable")
        self._counts = np.unique(np.asarray(shard), return_counts=True)[1].astype(np.int64)
        self._epoch = -1
        self._indices = np.empty(0, dtype=np.int64)

    def __call__(self, position: int) -> int:
        epoch, place = divmod(position, len(self._by_shard))
        if epoch != self._epoch:
            self._indices, self._epoch = self.epoch(epoch), epoch
        return int(self._indices[place])

    def epoch(self, epoch: int) -> np.ndarray:
        """int64 (N,): the indices at positions epoch·N, …, (epoch + 1)·N − 1, a permutation of 0 … N − 1."""
        num = len(self._by_shard)
        rng = np.random.default_rng([_STREAM, self.seed, epoch])
        sequence = self._sequence(rng.permutation(len(self._counts)))
        lanes = np.asarray(self.lane_of(np.arange(epoch * num, (epoch + 1) * num, dtype=np.int64)))
        # Sorting by (lane, place in the lane + a draw below `buffer`) is a shuffle of bounded reach in every lane.
        owners = np.sort(lanes, kind="stable")
        starts = np.concatenate([[True], owners[1:] != owners[:-1]])
        first = np.maximum.accumulate(np.where(starts, np.arange(num), 0))
        drawn = np.arange(num) - first + rng.random(num) * min(self.buffer, num)
        shuffled = sequence[np.lexsort((drawn, owners))]
        indices = np.empty(num, dtype=np.int64)
        indices[np.argsort(lanes, kind="stable")] = shuffled
        return indices

    def _sequence(self, shards: np.ndarray) -> np.ndarray:
        """The samples of the shards, put end to end in the given order."""
        counts = self._counts[shards]
        starts = (np.cumsum(self._counts) - self._counts)[shards]
        places = np.arange(len(self._by_shard)) - np.repeat(np.cumsum(counts) - counts, counts)
        return self._by_shard[np.repeat(starts, counts) + places]
