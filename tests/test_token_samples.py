"""Samples of packed tokens, from hand-made stores: order, layouts, mixes, bad samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gep.data.bad import BadSample
from gep.data.mix import Mixed
from gep.data.sampler import Batches
from gep.data.sequence import LAYOUTS, SequenceConfig, Sequences
from gep.data.token_samples import TokenSamples, TokenSequences, collate_tokens
from gep.data.token_store import TokenPart, TokenPlan, TokenStore, finish, prepare, write_shard


def store_of(folder: Path, parts: dict[str, tuple[int, int]], bad: tuple[int, ...] = ()) -> TokenStore:
    """Three windows of 2 × 1 tokens of 4 features; every token is its sample's number. parts: name -> (N, J)."""
    made = tuple(TokenPart("train", name, name, num, images, images > 1) for name, (num, images) in parts.items())
    plan = TokenPlan(key={}, parts=made, windows=3, grid=(2, 1), dim=4, sparse=False, dtype="bf16", shard_bytes=1000)
    for shard in prepare(folder, plan):
        rows = torch.arange(shard.start, shard.stop)
        frames = 3 + made[shard.part].num_images
        tensors = {
            "tokens": rows[:, None, None, None].expand(-1, frames, 2, 4).to(torch.bfloat16).contiguous(),
            "t_us": (rows[:, None, None] * 1000 + torch.tensor([[0, 10], [10, 20], [20, 30]])).contiguous(),
            "label": rows % 10,
            "bad": torch.tensor([int(row) in bad for row in rows], dtype=torch.uint8),
        }
        write_shard(folder, plan, shard, tensors, [f"größe/{int(row)}" for row in rows])
    assert finish(folder, plan)
    return TokenStore(folder)


def test_batches_are_addressed_by_index(tmp_path: Path) -> None:
    source = TokenSequences(TokenSamples(store_of(tmp_path, {"one": (50, 1)}), 0), SequenceConfig(interleave=1))
    assert len(list(tmp_path.glob("*.safetensors"))) == 8  # seven samples of 129 bytes each

    def numbers(start: int, count: int, **more: int) -> list[list[float]]:
        stream = Batches(source, collate=collate_tokens, batch_size=8, seed=3, **more)(start)
        found = [next(stream)[0] for _ in range(count)]
        assert all(batch["events"].dtype == torch.bfloat16 and batch["events"].shape == (8, 3, 2, 4) for batch in found)
        return [batch["events"][:, 0, 0, 0].tolist() + batch["modality"].flatten().tolist() for batch in found]

    whole = numbers(0, 9)
    assert numbers(4, 5) == whole[4:] and numbers(0, 9, threads=1) == whole
    assert len({x for batch in whole[:6] for x in batch[:8]}) == 48  # an epoch without repeats


def test_layouts_equal_those_of_recordings(tmp_path: Path) -> None:
    """Stills and clips, all layouts, against `lay_out` on every sample by itself."""
    store = store_of(tmp_path, {"still": (6, 1), "clip": (6, 3)})
    parts = [TokenSamples(store, number) for number in (0, 1)]

    class Plain:
        """The same samples as recordings would give them."""

        def sample(self, index: int, rng: object) -> dict:
            sample = parts[index % 2].sample(index, None)
            images = torch.from_numpy(sample["images"]).numpy()
            named = {"images": images} if sample["clip"] else {"image": images[0]}
            return {"key": sample["key"], "label": sample["label"], "t_us": sample["t_us"], "events": [], **named}

    for layout in range(len(LAYOUTS)):
        config = SequenceConfig(**{name: float(name == LAYOUTS[layout]) for name in LAYOUTS})
        plain = [Sequences(Plain(), config).sample(index, None) for index in range(6)]
        mine = [TokenSequences(parts[index % 2], config).sample(index, None) for index in range(6)]
        found = collate_tokens(mine)
        for name in ("modality", "source", "frame_t_us", "pair", "t_us"):
            for row, sample in enumerate(plain):
                assert found[name][row].tolist() == sample[name].tolist(), (LAYOUTS[layout], name)
        assert found["valid"].all() and not found["padded"]
    # One batch of all layouts: shorter rows repeat their last frame.
    mine = [{**parts[index % 2].sample(index, None), "layout": index} for index in range(4)]
    found = collate_tokens(mine)
    assert found["padded"] and found["valid"].sum(dim=1).tolist() == [4, 4, 6, 3]
    assert found["modality"][0].tolist() == [0, 0, 0, 1, 1, 1] and found["frame_t_us"][0, -1] == 30
    assert found["images"].shape == (4, 3, 2, 4) and found["images"][:, :, 0, 0].float().tolist() == [
        [float(index)] * 3 for index in range(4)
    ]


def test_a_mix_and_bad_samples(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"still": (40, 1), "clip": (40, 3)}, bad=(7,))
    mixed = Mixed({"still": TokenSamples(store, 0), "clip": TokenSamples(store, 1)}, {"still": 3, "clip": 1})
    with pytest.raises(BadSample, match="größe/7: could not be read when the tokens were packed"):
        mixed.sample(7, None)
    stream = Batches(TokenSequences(mixed, SequenceConfig()), collate=collate_tokens, batch_size=20, max_bad=0.01)(0)
    with pytest.warns(UserWarning, match="skipped unreadable sample"):
        keys = [key for _ in range(20) for key in next(stream)[0]["key"]]
    assert not any(key.endswith("/7") for key in keys)
    assert sum(key.startswith("still/") for key in keys) / len(keys) == pytest.approx(0.75, abs=0.05)
    with pytest.raises(ValueError, match="none was packed without images"):
        TokenSamples(store_of(tmp_path / "none", {"none": (4, 0)}), 0)
