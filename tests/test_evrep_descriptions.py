"""The frames of a training set described once: by pictures alone, in batches, over ranks, with faults."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import write_nmnist
from torch import Tensor

from downstream.llm_evrep import descriptions
from downstream.llm_evrep.descriptions import describe_frames, frame_of
from downstream.llm_evrep.readers import Answers, CachedReader
from gep import distributed
from gep.data.bad import BadSample
from gep.data.build import build
from gep.data.config import DataConfig, MixedConfig
from gep.data.mix import Mixed
from gep.data.paired import Recordings
from gep.data.registry import list_recordings


class Seeing:
    """Says the brightest value of an image, which `write_nmnist` numbers them by."""

    name, has_weights = "seeing:1", False

    def __init__(self) -> None:
        self.usage: dict[str, float] = {}
        self.sizes: list[int] = []

    def describe(self, images: Tensor, prompt: str, *, on_answer: Callable | None = None) -> list[str]:
        assert images.dtype == torch.uint8
        self.sizes.append(len(images))
        return [str(int(image.max())) for image in images]


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    write_nmnist(tmp_path / "set", digits=tuple(number % 10 for number in range(150)), count=50)
    return DataConfig(root=str(tmp_path / "set"), windows=1, window_us=0, cache=True)


def recordings(config: DataConfig) -> Recordings:
    return Recordings(list_recordings("nmnist", config.root, "train"), config, paired=True)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_pictures_alone_are_read_in_batches_and_asked_about_once(
    config: DataConfig, tmp_path: Path, num_workers: int
) -> None:
    source = recordings(config)
    expected = {key: Path(key).stem.lstrip("0") for key in source.listing.keys}
    wanted = [source.sample(index, None)["image"] for index in (0, 77)]
    assert all(np.array_equal(frame_of(source, index)[1], image) for index, image in zip((0, 77), wanted))
    source._cache.clear()
    for file in source.listing.files:
        file.write_bytes(b"?")  # no recording
    reader = Seeing()
    torch.manual_seed(3)
    cached = CachedReader(reader, Answers(tmp_path / "answers"))
    assert describe_frames(source, cached, "?", num_workers=num_workers) == expected
    assert reader.sizes == [64, 64, 22] and not source._cache
    state = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(state, torch.get_rng_state()), "training goes on as if nothing had been asked"
    assert describe_frames(source, cached, "?") == expected and len(reader.sizes) == 3


def test_what_cannot_be_read_is_left_out_and_said(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = recordings(config)
    picture = Recordings.picture

    def some_bad(self: Recordings, index: int) -> np.ndarray:
        if index in (3, 70):
            raise BadSample(self.listing.keys[index], "damaged")
        return picture(self, index)

    monkeypatch.setattr(Recordings, "picture", some_bad)
    with pytest.warns(UserWarning, match=rf"2 frames cannot be read.*{source.listing.keys[3]}: damaged"):
        found = describe_frames(source, Seeing(), "?")
    assert set(source.listing.keys) - set(found) == {source.listing.keys[3], source.listing.keys[70]}


def test_a_mix_is_described_by_its_own_keys(config: DataConfig) -> None:
    part = MixedConfig(root=config.root, window_us=0)
    mixed = DataConfig(windows=1, mix={"a": part, "b": part})
    source, _ = build(mixed, paired=True)
    assert isinstance(source, Mixed)
    found = describe_frames(source, Seeing(), "?")
    assert len(found) == len(source)
    for index in (0, len(source) - 1):
        sample = source.sample(index, None)
        assert found[sample["key"]] == str(sample["image"].max())


def test_ranks_meet_after_every_batch_and_hear_of_a_failure(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, met = recordings(config), []

    def gathered(value: tuple) -> list:
        met.append(value)
        other = ({f"other {len(met)}": "x"}, [], "the key is not accepted" if len(met) == 2 else "")
        return [value, other]

    monkeypatch.setattr(descriptions, "_BATCH", 10)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather_objects", gathered)
    with pytest.raises(RuntimeError, match="rank 1 could not describe its frames: the key is not accepted"):
        describe_frames(source, Seeing(), "?")
    assert len(met) == 2 and [len(said) for said, _, _ in met] == [10, 10]
    assert list(met[0][0]) == list(source.listing.keys[0:20:2])

    class Failing(Seeing):
        def describe(self, *args: object, **more: object) -> list[str]:
            raise ConnectionError("gone")

    del met[:]
    with pytest.raises(ConnectionError, match="gone"):
        describe_frames(source, Failing(), "?")
    assert met == [({}, [], "gone")], "the others were told before"
