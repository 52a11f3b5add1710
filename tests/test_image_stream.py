"""Image sets that are read as a stream: order, resuming, held-out and unreadable rows."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from gep.data.bad import BadSample
from gep.data.image_stream import StillStream, StreamBatches
from gep.data.images import StillImages
from gep.data.paired import collate
from tests.test_images import _own_cache, config, parquet, picture, png  # noqa: F401 - a fixture that is used by all

datasets = pytest.importorskip("datasets")
pq = pytest.importorskip("pyarrow.parquet")
CLASSES = ["bird", "cat", "dog"]


def stream(tmp_path: Path, files: int, rows: int, **data) -> tuple[StillStream, StillImages]:
    for number in range(files):
        parquet(tmp_path / f"train-{number:05d}.parquet", range(number * rows, (number + 1) * rows - number))
    parquet(tmp_path / "test-00000.parquet", range(500, 505))
    return StillStream.split(
        config(tmp_path, images={"streaming": True, "buffer": 6}, **{"eval_split": "test", **data})
    )


def steps(source: StillStream, start: int, num: int, **options) -> list[list[dict]]:
    batches = StreamBatches(source, collate=collate, **{"batch_size": 4, "seed": 5, **options})(start)
    return list(itertools.islice(batches, num))


def same(a: list[list[dict]], b: list[list[dict]]) -> bool:
    pairs = [(x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True)]
    return all(x["key"] == y["key"] and torch.equal(x["image"], y["image"]) for x, y in pairs) and all(
        torch.equal(x["events"].homography, y["events"].homography) for x, y in pairs
    )


@pytest.mark.parametrize(("files", "world"), [(1, 1), (3, 1), (3, 2), (2, 2)])
def test_a_resumed_stream_goes_on_as_if_nothing_had_been(tmp_path: Path, files: int, world: int) -> None:
    train, _ = stream(tmp_path, files, 10)
    for rank in range(world):
        options = {"rank": rank, "world_size": world, "accumulate": 2}
        whole = steps(train, 0, 12, **options)  # more than an epoch
        for start in (1, 3, 9):
            assert same(steps(train, start, 12 - start, **options), whole[start:])
    assert same(steps(train, 2, 3, num_workers=2), steps(train, 2, 3))


@pytest.mark.parametrize(("files", "world"), [(3, 1), (3, 2), (2, 2)])
def test_an_epoch_of_a_stream_is_every_row_once(tmp_path: Path, files: int, world: int) -> None:
    train, held = stream(tmp_path, files, 10)
    total = sum(10 - number for number in range(files))
    assert train.length == total and len(held) == 5 and held.listing.classes == tuple(CLASSES)
    assert held.listing.labels.tolist() == [seed % 3 for seed in range(500, 505)]
    epochs = [[key for rank in range(world) for key, *_ in train.one_pass(1, epoch, rank, world)] for epoch in (0, 1)]
    assert all(len(set(keys)) == len(keys) == total for keys in epochs)
    assert epochs[0] != epochs[1] and set(epochs[0]) == set(epochs[1])
    for rank in range(world):
        lengths = [len(list(train.one_pass(1, epoch, rank, world))) for epoch in range(3)]
        served = [key for key, *_ in itertools.islice(train.endless(1, rank, world, 0), sum(lengths[:2]))]
        expected = [key for epoch in (0, 1) for key, *_ in train.one_pass(1, epoch, rank, world)]
        assert served == expected
        assert train._length(rank, world) in (lengths[0], None)


def test_without_an_evaluation_split_rows_are_kept_apart(tmp_path: Path) -> None:
    train, held = stream(tmp_path, 2, 40, eval_split="")
    apart = set(held.listing.keys)
    seen = {key for key, *_ in itertools.islice(train.endless(0, 0, 1, 0), 200)}
    assert 0.1 * 79 < len(apart) < 0.5 * 79 and not apart & seen and len(apart | seen) == 79
    batches = steps(train, 0, 30)
    assert same(steps(train, 25, 5), batches[25:])
    sample = held.sample(0, None)
    assert sample["image"].shape == (3, 16, 16) and "streamed rows" in train.describe()


def test_an_unreadable_row_of_a_stream_is_replaced(tmp_path: Path) -> None:
    parquet(tmp_path / "train-0.parquet", range(8), bad=(3,))
    parquet(tmp_path / "test-0.parquet", range(2))
    train, _ = StillStream.split(config(tmp_path, eval_split="test", images={"streaming": True}))
    with pytest.warns(UserWarning, match="not a readable picture"):
        batches = steps(train, 0, 2, max_bad=0.1)
    assert [len(part["key"]) for step in batches for part in step] == [4, 4]
    with pytest.raises(ValueError, match="max_bad_fraction"):
        steps(train, 0, 2)


def test_an_empty_row_of_a_stream_is_a_bad_sample(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone.png")
    parquet(tmp_path / "train-0.parquet", range(8), cells={3: None, 6: {"bytes": None, "path": gone}})
    parquet(tmp_path / "test-0.parquet", range(4), cells={1: None})
    with pytest.warns(UserWarning, match="1 of 4 rows to evaluate hold no picture"):
        train, held = StillStream.split(config(tmp_path, eval_split="test", images={"streaming": True, "buffer": 4}))
    assert held.listing.labels.tolist() == [0, 2, 0]
    rows = list(train.one_pass())
    assert [bool(row[1]) for row in rows] == [seed not in (3, 6) for seed in range(8)]
    for row, name in ((rows[3], "row without a picture, number 1"), (rows[6], gone)):
        with pytest.raises(BadSample, match="holds no picture") as caught:
            train.sample_of(row, np.random.default_rng(0))
        assert caught.value.key == name
    # The two are counted once each, however many epochs they come in: 20 here, and 2 in 1,000 are allowed.
    with pytest.warns(UserWarning, match="number 1"):
        batches = steps(train, 0, 40, max_bad=0.002)
    assert all(len(part["key"]) == 4 for step in batches for part in step)
    # Without an evaluation split they are never held out.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, held = StillStream.split(config(tmp_path / "train-0.parquet", holdout=0.6, images={"streaming": True}))
    assert 0 < len(held) < 7 and all(held.sample(index, None) for index in range(len(held)))


def test_labels_of_a_stream(tmp_path: Path) -> None:
    def split(kind: str, **images) -> list[int]:
        path = parquet(tmp_path / f"{kind}.parquet", range(6), kind=kind)
        train, _ = StillStream.split(config(path, holdout=0.5, images={"streaming": True, **images}))
        return [label for *_, label in train.one_pass()]

    assert split("int32") == split("int64", label_column="label") == [0, 1, 2, 0, 1, 2]
    with pytest.raises(ValueError, match="column label are string, which have no numbers"):
        split("string", label_column="label")
    with pytest.warns(UserWarning, match="this stream has no labels"):
        assert split("string") == [-1] * 6


def test_an_unpaired_stream(tmp_path: Path) -> None:
    train, held = StillStream.split(
        config(parquet(tmp_path / "x.parquet", range(12)), images={"streaming": True}), paired=False
    )
    batch = steps(train, 0, 1)[0][0]
    assert "image" not in batch and len(batch["events"]) == 12 and "image" not in held.sample(0, None)
