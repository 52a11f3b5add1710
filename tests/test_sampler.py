"""Index-addressed batches: resume is arithmetic, ranks share one global batch, evaluation visits everything once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gep.data.sampler import Batches, EvaluationBatches, Order


class Numbers:
    """Sample i is (i, a draw of its own generator)."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, rng: np.random.Generator | None) -> dict:
        return {"index": index, "noise": None if rng is None else float(rng.random())}


def collate(samples) -> dict:
    return {"index": [s["index"] for s in samples], "noise": [s["noise"] for s in samples]}


def take(batches: Batches, start: int, count: int) -> list:
    return list(itertools.islice(batches(start), count))


def test_every_epoch_visits_everything_once() -> None:
    order = Order(7, seed=1)
    epochs = [[order(epoch * 7 + place) for place in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and epochs[0] != epochs[1]
    assert order(3) == epochs[0][3]


def test_resuming_is_arithmetic() -> None:
    make = lambda: Batches(Numbers(10), collate=collate, batch_size=4, seed=2)  # noqa: E731
    assert take(make(), 5, 4) == take(make(), 0, 9)[5:]


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_micro_batches_share_one_global_batch(workers: int) -> None:
    whole = take(Batches(Numbers(50), collate=collate, batch_size=8, seed=3), 0, 5)
    ranks = [
        take(
            Batches(
                Numbers(50), collate=collate, batch_size=8, seed=3, accumulate=2, rank=rank, world_size=2,
                num_workers=workers if rank == 0 else 0,
            ),
            0,
            5,
        )
        for rank in range(2)
    ]  # fmt: skip
    for step in range(5):
        parts = [micro for rank in ranks for micro in rank[step]]
        assert len(parts) == 4
        for name in ("index", "noise"):
            assert [value for part in parts for value in part[name]] == whole[step][0][name]


def test_batches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 6"):
        Batches(Numbers(50), collate=collate, batch_size=8, accumulate=3, world_size=2)
    with pytest.raises(ValueError, match="more than the 5 training samples"):
        Batches(Numbers(5), collate=collate, batch_size=8)


@pytest.mark.parametrize("count, world", [(1, 2), (9, 2), (12, 3), (13, 4)])
def test_evaluation_visits_each_once_over_ranks(count: int, world: int) -> None:
    ranks = [
        list(EvaluationBatches(Numbers(count), collate=collate, batch_size=3, rank=rank, world_size=world))
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len({len(rank[b][0]) for rank in ranks}) == 1 for b in range(len(ranks[0])))
    seen = [int(mark) for batches in ranks for marks, _ in batches for mark in marks if mark >= 0]
    assert sorted(seen) == list(range(count))
    for batches in ranks:
        for marks, batch in batches:
            assert all(mark in (-1, index) for mark, index in zip(marks, batch["index"]))
            assert batch["noise"] == [None] * len(marks)


def test_threads_give_the_same_batches_and_end_with_the_stream():
    import threading

    from tests.test_mix import Numbers, keys

    def take(**how):
        stream = Batches(Numbers("a", 40), collate=keys, batch_size=8, accumulate=2, seed=3, **how)(5)
        found = [next(stream) for _ in range(12)]
        stream.close()
        return found

    assert take(threads=2) == take()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("data")]
    with pytest.raises(ValueError, match="use one of the two"):
        Batches(Numbers("a", 40), collate=keys, batch_size=8, threads=1, num_workers=1)
