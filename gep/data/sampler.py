"""Batches addressed by index: which samples step s takes, and their randomness, are functions of (seed, s).

That makes resuming arithmetic, and makes the global batch of a step the same for any number of ranks. (Shards are split
by rank: there a run resumes exactly on as many ranks as before.)
"""

from __future__ import annotations

import atexit
import pickle
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from gep import distributed
from gep.data.bad import BadSample
from gep.events.types import EventFormatError

Sample = dict[str, Any]
Batch = dict[str, Any]
LaneOf = Callable[[np.ndarray], np.ndarray]
"""Positions int64 (n,) -> the lane of each: which data worker of which rank reads it."""
_TRIES = 100
_LANES = 8
_STREAM = 0x6765  # keeps the samples' randomness apart from the order's, which has the same seed


class SampleSource(Protocol):
    """A map-style set of samples; `rng=None` asks for the one deterministic version used in evaluation."""

    def __len__(self) -> int: ...

    def sample(self, index: int, rng: np.random.Generator | None) -> Sample: ...


class DescribedSource(SampleSource, Protocol):
    """A sample source that says what it holds."""

    def describe(self) -> str: ...


class Order:
    """An endless shuffled stream over N samples: position -> index, each epoch its own permutation.

    Args:
        num_samples: N.
        seed: of the permutations.
    """

    def __init__(self, num_samples: int, seed: int):
        self.num_samples = num_samples
        self.seed = seed
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def __call__(self, position: int) -> int:
        epoch, place = divmod(position, self.num_samples)
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
            self._epoch = epoch
        return int(self._permutation[place])


class Batches:
    """What `engine.fit` iterates over: for each optimiser step, this rank's list of micro-batches.

    Args:
        source: samples.
        collate: list of samples -> batch.
        batch_size: samples of one optimiser step over all ranks and micro-batches.
        accumulate: micro-batches a rank runs for one step.
        seed: of order and augmentation.
        rank, world_size: this process and how many there are.
        num_workers: data processes; 0 loads in the training process. Has no effect on the values.
        threads: data threads of this process in place of worker processes: no batch is copied between processes, which
            is faster where decoding is (shards, `.arrow`). Has no effect on the values.
        max_bad: share of the samples that may be unreadable; each is named and replaced by another one.
    Raises:
        ValueError: the batch does not divide over ranks and micro-batches, or is larger than the set.
    """

    def __init__(
        self,
        source: SampleSource,
        *,
        collate: Callable[[Sequence[Sample]], Batch],
        batch_size: int,
        accumulate: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        threads: int = 0,
        max_bad: float = 0.0,
    ):
        if batch_size % (world_size * accumulate):
            raise ValueError(
                f"train.batch_size={batch_size} (of all ranks together) does not divide over {world_size} ranks × "
                f"{accumulate} micro-batches; use a multiple of {world_size * accumulate}"
            )
        if len(source) < batch_size:
            raise ValueError(f"train.batch_size={batch_size} is more than the {len(source)} training samples; lower it")
        self.source, self.collate = source, collate
        self.batch_size, self.accumulate = batch_size, accumulate
        self.seed, self.rank, self.world_size = seed, rank, world_size
        if num_workers and threads:
            raise ValueError(f"train.num_workers={num_workers} and train.threads={threads}: use one of the two")
        self.num_workers, self.threads, self.max_bad = num_workers, threads, max_bad

    @classmethod
    def of_run(
        cls, source: SampleSource, collate: Callable[[Sequence[Sample]], Batch], train: Any, max_bad: float = 0.0
    ) -> Batches:
        """This rank's batches by a run's `TrainConfig` (batch_size, accumulate, seed, num_workers)."""
        return cls(
            source,
            collate=collate,
            batch_size=train.batch_size,
            accumulate=train.accumulate,
            seed=train.seed,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            num_workers=train.num_workers,
            threads=train.threads,
            max_bad=max_bad,
        )

    def __call__(self, start_step: int) -> Iterator[list[Batch]]:
        """Yields the micro-batches of steps start_step, start_step + 1, … without end."""
        stream = self._stream(start_step)
        # Data workers ignore SIGTERM, so an interpreter that exits with a stream still open would wait for them.
        atexit.register(_close, weakref.ref(stream))
        return stream

    def _stream(self, start_step: int) -> Generator[list[Batch], None, None]:
        micro_batches: Iterator[Batch]
        reader = _Reader(self.source, self.collate, self.seed, self.max_bad)
        if self.threads:
            micro_batches = _in_threads(reader, self._requests(start_step), self.threads)
        elif self.num_workers == 0:
            micro_batches = (_pinned(reader[request]) for request in self._requests(start_step))
        else:
            micro_batches = iter(
                DataLoader(
                    reader,
                    batch_size=None,
                    sampler=_Requests(self, start_step),
                    num_workers=self.num_workers,
                    pin_memory=torch.cuda.is_available(),
                    worker_init_fn=distributed.ignore_signals,
                    multiprocessing_context="spawn" if torch.cuda.is_available() else None,
                )
            )
        while True:
            yield [next(micro_batches) for _ in range(self.accumulate)]

    def lane_of(self, positions: np.ndarray) -> np.ndarray:
        """The lane of each position, for sources whose order is split by reader (shards).

        A rank has eight, taken in turn by its micro-batches: 1, 2, 4 or 8 workers each have lanes of their own, and
        the order does not depend on how many they are. It does depend on the number of ranks.
        """
        micro = self.batch_size // (self.world_size * self.accumulate)
        step, within = np.divmod(positions, self.batch_size)
        rank, rest = np.divmod(within, micro * self.accumulate)
        return rank * _LANES + (step * self.accumulate + rest // micro) % _LANES

    def _requests(self, start_step: int) -> Iterator[list[tuple[int, int]]]:
        own = getattr(self.source, "order", None)
        order = Order(len(self.source), self.seed) if own is None else own(self.seed, self.lane_of)
        micro = self.batch_size // (self.world_size * self.accumulate)
        step = start_step
        while True:
            first = step * self.batch_size + self.rank * micro * self.accumulate
            for part in range(self.accumulate):
                positions = range(first + part * micro, first + (part + 1) * micro)
                yield [(position, order(position)) for position in positions]
            step += 1


def _in_threads(reader: _Reader, requests: Iterator[list[tuple[int, int]]], threads: int) -> Iterator[Batch]:
    """Batches in the order of the requests, a few of them made ahead.

    Each thread has a copy of the reader, as a worker process would: open recordings and maps are nobody else's.
    """
    copies, own = pickle.dumps(reader), threading.local()

    def copy_reader() -> None:
        own.reader = pickle.loads(copies)

    def read(request: list[tuple[int, int]]) -> Batch:
        return _pinned(own.reader[request])

    with ThreadPoolExecutor(threads, "data", initializer=copy_reader) as pool:
        pending: deque[Future[Batch]] = deque()
        try:
            for request in requests:
                pending.append(pool.submit(read, request))
                if len(pending) > 2 * threads:
                    yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _pinned(batch: Batch) -> Batch:
    """The batch in page-locked memory where there is a GPU: only from there a copy does not hold up the host."""
    if not torch.cuda.is_available():
        return batch
    return {name: value.pin_memory() if hasattr(value, "pin_memory") else value for name, value in batch.items()}


class _Generator:
    """numpy's generator of a sample, made when it is first drawn from: seeding one is dear, and some never draw."""

    def __init__(self, *entropy: int):
        self._entropy = entropy

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._made, name)
        setattr(self, name, value)
        return value

    @cached_property
    def _made(self) -> np.random.Generator:
        return np.random.default_rng(self._entropy)


def _close(stream: weakref.ref[Generator[list[Batch], None, None]]) -> None:
    alive = stream()
    if alive is not None:
        alive.close()


class _Requests:
    """`DataLoader` wants a sampler object; its length is unknown, as the stream has no end."""

    def __init__(self, batches: Batches, start_step: int):
        self.batches, self.start_step = batches, start_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.batches._requests(self.start_step)


class _Reader(TorchDataset):
    """Requests of (position, index) -> batch; an unreadable sample is named, counted and replaced."""

    def __init__(
        self, source: SampleSource, collate: Callable[[Sequence[Sample]], Batch], seed: int, max_bad: float = 0.0
    ):
        self.source, self.collate, self.seed, self.max_bad = source, collate, seed, max_bad
        self._seen, self._bad = 0, set[str]()

    def __getitem__(self, request: Sequence[tuple[int, int]]) -> Batch:
        return self.collate([self._sample(position, index) for position, index in request])

    def _sample(self, position: int, index: int) -> Sample:
        self._seen += 1
        chosen = index
        for attempt in range(_TRIES):
            try:
                rng = cast(np.random.Generator, _Generator(_STREAM, self.seed, position))
                return self.source.sample(chosen, rng)
            except (BadSample, EventFormatError) as error:
                if attempt == 0:
                    self._count(error)
            # Drawn by the position, so that any process replaces a sample by the same one; anywhere in the set, as the
            # neighbours of a sample in a damaged shard are damaged too.
            chosen = int(np.random.default_rng([_STREAM, self.seed, position, attempt]).integers(len(self.source)))
        raise ValueError(f"none of {_TRIES} samples drawn at random can be read; check the data set")

    def _count(self, error: ValueError) -> None:
        if str(error) in self._bad:
            return
        self._bad.add(str(error))
        # In a small set one fault does not stop a run: the share is that of at least a thousand samples.
        if len(self._bad) > self.max_bad * max(len(self.source), 1000):
            raise ValueError(
                f"{len(self._bad)} of {len(self.source)} samples cannot be read, more than "
                f"data.max_bad_fraction={self.max_bad:g}: {error}"
            ) from error
        warnings.warn(f"skipped unreadable sample {len(self._bad)} (of {self._seen} read): {error}", stacklevel=2)


class EvaluationBatches:
    """Every sample of a set once, over all ranks, without randomness.

    Args:
        source: samples.
        collate: list of samples -> batch.
        batch_size: samples a batch, on each rank.
        rank, world_size: this process and how many there are.
        indices: the samples to visit; all by default.

    Iterating gives `(indices int64 (b,), batch)`; every rank sees the same number of batches, so that
    collectives inside the loop match: ranks without a sample left repeat the last one, marked by index −1.
    """

    def __init__(
        self,
        source: SampleSource,
        *,
        collate: Callable[[Sequence[Sample]], Batch],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        indices: Sequence[int] | None = None,
    ):
        self.source, self.collate, self.batch_size = source, collate, batch_size
        self.rank, self.world_size = rank, world_size
        self.indices = list(range(len(source))) if indices is None else list(indices)

    def __len__(self) -> int:
        return -(-len(self.indices) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[tuple[np.ndarray, Batch]]:
        width = self.batch_size * self.world_size
        for start in range(0, len(self.indices), width):
            row = self.indices[start : start + width]
            mine = row[self.rank :: self.world_size]
            count = -(-len(row) // self.world_size)
            padded = mine + [row[-1]] * (count - len(mine))
            marks = np.array(mine + [-1] * (count - len(mine)), dtype=np.int64)
            yield marks, self.collate([self.source.sample(index, None) for index in padded])
