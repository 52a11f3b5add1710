"""Mixing sources: exact shares, independent epochs, lanes, and the same stream however it is read."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from gep.data.bad import BadSample
from gep.data.mix import Mixed, quotas
from gep.data.sampler import Batches


class Numbers:
    """N samples named after their source."""

    def __init__(self, name: str, count: int, bad: tuple[int, ...] = ()):
        self.name, self.count, self.bad = name, count, bad

    def __len__(self) -> int:
        return self.count

    def describe(self) -> str:
        return f"{self.name}: {self.count}"

    def sample(self, index, rng):
        if index in self.bad:
            raise BadSample(str(index), f"{self.name}.tar: truncated")
        return {"key": f"{index}", "draw": None if rng is None else int(rng.integers(1 << 30))}


def keys(samples):
    return [sample["key"] for sample in samples]


def stream(source, steps, *, world_size=1, num_workers=0, start=0, batch_size=8, accumulate=1, max_bad=0.0):
    """Keys of each step over all ranks, in the order of ranks and micro-batches."""
    ranks = [
        Batches(source, collate=keys, batch_size=batch_size, accumulate=accumulate, seed=3, rank=rank,
                world_size=world_size, num_workers=num_workers, max_bad=max_bad)(start)
        for rank in range(world_size)
    ]  # fmt: skip
    return [[key for rank in ranks for micro in next(rank) for key in micro] for _ in range(steps)]


def test_shares_are_exact_and_rounded_by_largest_remainder():
    assert quotas(np.array([70.0, 20, 10])).tolist() == [700, 200, 100]
    assert quotas(np.array([1.0, 1, 1])).tolist() == [334, 333, 333]
    mixed = Mixed({"a": Numbers("a", 50), "b": Numbers("b", 7)}, {"a": 3, "b": 1})
    seen = Counter(key.split("/")[0] for step in stream(mixed, 250) for key in step)
    assert seen == {"a": 1500, "b": 500}


def test_a_small_source_running_dry_restarts_none_of_the_others():
    mixed = Mixed({"a": Numbers("a", 90), "b": Numbers("b", 5)}, {"a": 1, "b": 1})
    seen = [key for step in stream(mixed, 20) for key in step]
    own = [key for key in seen if key.startswith("a/")]
    first_epoch, repeats = own[:90], Counter(key for key in seen if key.startswith("b/"))
    assert len(set(first_epoch)) == min(90, len(own))  # no sample of a twice before all were seen
    assert max(repeats.values()) - min(repeats.values()) <= 1 and max(repeats.values()) > 5


@pytest.mark.parametrize("world_size, accumulate", [(2, 1), (1, 2), (4, 2)])
def test_the_stream_does_not_depend_on_ranks_and_resumes_anywhere(world_size, accumulate):
    mixed = Mixed({"a": Numbers("a", 50), "b": Numbers("b", 7)}, {"a": 3, "b": 1})
    whole = stream(mixed, 150)
    assert stream(mixed, 150, world_size=world_size, accumulate=accumulate) == whole
    assert stream(mixed, 20, start=130) == whole[130:]


def test_a_weight_below_a_thousandth_is_refused():
    with pytest.raises(ValueError, match=r"data\.mix\.b\.weight=0\.0001"):
        Mixed({"a": Numbers("a", 5), "b": Numbers("b", 5)}, {"a": 1, "b": 1e-4})


class Laned(Numbers):
    """Remembers the lanes it is asked about: each index belongs to the lane of its position."""

    def order(self, seed, lane_of):
        lanes = lane_of(np.arange(self.count))
        ranked = np.argsort(lanes, kind="stable")
        place = np.empty(self.count, np.int64)
        place[ranked] = np.arange(self.count)
        self.lanes = lanes
        return lambda position: int(place[position % self.count])


def test_lanes_of_a_source_in_a_mix_are_those_of_its_places_in_the_whole_stream():
    laned = Laned("b", 300)
    mixed = Mixed({"a": Numbers("a", 50), "b": laned}, {"a": 1, "b": 1})
    batches = Batches(mixed, collate=keys, batch_size=8, world_size=2, rank=0, seed=3)
    order = mixed.order(3, batches.lane_of)
    own = [p for p in range(1000) if order(p) >= 50][:300]  # the places at which b's samples stand
    assert laned.lanes.tolist() == batches.lane_of(np.array(own)).tolist()
    # 8 lanes a rank, its micro-batches in turn
    assert batches.lane_of(np.array([0, 3, 4, 7, 8, 12, 64])).tolist() == [0, 0, 8, 8, 1, 9, 0]


def test_unreadable_samples_are_named_counted_replaced_and_at_last_stop_the_run():
    source = Numbers("a", 40, bad=(7, 8, 30))
    with pytest.warns(
        UserWarning, match=r"skipped unreadable sample 1 \(of \d+ read\): sample (7|8|30): a\.tar: trunc"
    ):
        seen = stream(source, 5, max_bad=0.01)
    assert stream_quiet(source) == seen  # any process replaces by the same ones
    flat = [key for step in seen for key in step]
    assert len(flat) == 40 and not {"7", "8", "30"} & set(flat) and len(set(flat)) >= 37 - 3
    assert sorted(Counter(flat).values())[-4:] != [1, 1, 1, 1]  # three places are filled by others
    with pytest.raises(ValueError, match=r"more than data\.max_bad_fraction=0: sample"):
        stream(source, 5)
    with pytest.raises(ValueError, match=r"5 of 40 samples cannot be read"), pytest.warns(UserWarning):
        stream(Numbers("a", 40, bad=tuple(range(5, 10))), 5, max_bad=0.004)


def stream_quiet(source):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return stream(source, 5, max_bad=0.01)
