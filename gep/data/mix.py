"""Several sources by weight: which source a position of the stream takes, and which of its samples, is arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from gep.data.listing import Listing
from gep.data.sampler import DescribedSource, LaneOf, Order, Sample, SampleSource

_BLOCK = 1000  # positions in which the weights hold exactly (to 1/1000)
_STREAM = 0x6D6978  # keeps the choice of sources apart from the orders inside them


class Mixed:
    """A sample source made of others; each goes through its own epochs, whatever the others do.

    Args:
        sources: name -> source, in order; a sample gains `origin`, its source's place in it.
        weights: one a source, relative to each other.
    Raises:
        ValueError: a weight too small to be held.
    """

    def __init__(self, sources: Mapping[str, DescribedSource], weights: Mapping[str, float]):
        self.names, self.sources = tuple(sources), tuple(sources.values())
        self.quotas = quotas(np.array([weights[name] for name in self.names], np.float64))
        if self.quotas.min() < 1:
            name = self.names[int(self.quotas.argmin())]
            raise ValueError(f"data.mix.{name}.weight={weights[name]}: less than 1 in {_BLOCK} samples; raise it")
        self.starts = np.concatenate([[0], np.cumsum([len(source) for source in self.sources])])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def listing(self) -> Listing:
        """The first source's."""
        return self.sources[0].listing  # type: ignore[attr-defined]  # packed tokens have none

    def describe(self) -> str:
        """A line a source."""
        parts = zip(self.names, self.sources, self.quotas)
        lines = [f"{quota / _BLOCK:.1%} {name}: {source.describe()}" for name, source, quota in parts]
        return "\n  ".join(["a mix of", *lines])

    def sample(self, index: int, rng: np.random.Generator | None) -> Sample:
        origin = int(np.searchsorted(self.starts, index, side="right")) - 1
        sample = self.sources[origin].sample(index - int(self.starts[origin]), rng)
        return {**sample, "key": f"{self.names[origin]}/{sample['key']}", "origin": origin}

    def order(self, seed: int, lane_of: LaneOf) -> MixOrder:
        """See `MixOrder`."""
        return MixOrder(self, seed, lane_of)


class MixOrder:
    """Position -> sample: every block of 1,000 positions holds each source by its weight, in shuffled places."""

    def __init__(self, mixed: Mixed, seed: int, lane_of: LaneOf):
        self.quotas, self.starts, self.seed = mixed.quotas, mixed.starts, seed
        self._block, self._places = -1, np.empty((2, 0), np.int64)
        self._orders = [
            source_order(source, seed + number, self._lanes(number, lane_of))
            for number, source in enumerate(mixed.sources)
        ]

    def __call__(self, position: int) -> int:
        block, place = divmod(position, _BLOCK)
        if block != self._block:
            self._block, self._places = block, self._draw(block)
        origin, nth = self._places[:, place].tolist()
        own = block * int(self.quotas[origin]) + nth
        return int(self.starts[origin]) + self._orders[origin](own)

    def _draw(self, block: int) -> np.ndarray:
        """(2, 1000): the source of each place, and how many of that source stand before it in the block."""
        origin = np.repeat(np.arange(len(self.quotas)), self.quotas)
        origin = np.random.default_rng([_STREAM, self.seed, block]).permutation(origin)
        nth = np.zeros_like(origin)
        for number in range(len(self.quotas)):
            chosen = origin == number
            nth[chosen] = np.arange(chosen.sum())
        return np.stack([origin, nth])

    def _lanes(self, number: int, lane_of: LaneOf) -> LaneOf:
        quota = int(self.quotas[number])

        def lanes(own: np.ndarray) -> np.ndarray:
            """Lanes of a source's own positions, through the places that they have in the whole stream."""
            blocks, inverse = np.unique(own // quota, return_inverse=True)
            places = np.stack([np.flatnonzero(self._draw(int(block))[0] == number) for block in blocks])
            return lane_of(blocks[inverse] * _BLOCK + places[inverse, own % quota])

        return lanes


def quotas(weights: np.ndarray) -> np.ndarray:
    """Positions of 1,000 that each source gets: the weights' shares, rounded by largest remainder."""
    exact = weights / weights.sum() * _BLOCK
    counts = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[: _BLOCK - int(counts.sum())]] += 1
    return counts


def source_order(source: SampleSource, seed: int, lane_of: LaneOf) -> Callable[[int], int]:
    """A source's own order where it has one, else a permutation an epoch."""
    own = getattr(source, "order", None)
    return Order(len(source), seed) if own is None else own(seed, lane_of)
