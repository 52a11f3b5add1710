"""Packed tokens as samples: addressed by index like recordings, and laid out as sequences for stage 2."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from gep.data.bad import BadSample
from gep.data.mix import source_order
from gep.data.sampler import Batch, LaneOf, Sample, SampleSource
from gep.data.sequence import LAYOUTS, SequenceConfig, lay_out
from gep.data.token_store import DTYPES, TokenStore


class TokenSamples:
    """The samples of one part of a folder of tokens; views of the mapped files, nothing is copied.

    A sample holds `events` (T, N, D) and, if asked for, `images` (J, N, D), both as stored (bfloat16 as int16), `t_us`
    int64 (T, 2), `label`, `key`, whether it is a `clip`, its `dtype`, and of a sparse encoder `real` bool (T, N).

    Args:
        store: complete.
        part: its number in the plan.
        pick: windows that a training sample keeps, drawn as `data.pick` says; 0 = all.
        paired: whether samples hold images.
    Raises:
        ValueError: images are asked for, and there are none.
    """

    def __init__(self, store: TokenStore, part: int, *, pick: int = 0, paired: bool = True):
        plan = store.plan
        self.store, self.part, self.pick, self.paired = store, part, pick, paired
        self.windows, self.dtype, self.facts = plan.windows, DTYPES[plan.dtype], plan.parts[part]
        self.per_shard = plan.per_shard(part)
        if paired and not self.facts.num_images:
            raise ValueError(
                f"tokens={store.folder}: {self.facts.source} was packed without images; pack it with the layouts and "
                "losses of this run (sequence, loss.image), or set loss.image=0 and sequence.events alone"
            )

    def __len__(self) -> int:
        return self.facts.num_samples

    def describe(self) -> str:
        """One line for people."""
        return f"{self.facts.describe}, packed tokens"

    def sample(self, index: int, rng: np.random.Generator | None) -> Sample:
        """Sample `index`; `rng=None` gives all windows.

        Raises:
            BadSample: it could not be read when the tokens were packed.
        """
        number, row = divmod(index, self.per_shard)
        shard = self.store.shard(self.part, number)
        key, windows = shard.key(row), self.windows
        if shard.bad[row]:
            raise BadSample(key, f"{self.store.folder}: {key}: could not be read when the tokens were packed")
        tokens, t_us = shard.tokens[row], shard.t_us[row]
        sample: Sample = {"key": key, "label": int(shard.label[row]), "clip": self.facts.clip, "dtype": self.dtype}
        if self.paired:
            sample["images"] = tokens[windows:]
        # Without a draw a slice and no index array: only the latter copies.
        kept = slice(windows) if rng is None else self._picked(rng)
        sample |= {"events": tokens[kept], "t_us": t_us[kept]}
        if shard.real is not None:
            sample["real"] = shard.real[row][kept]
        return sample

    def _picked(self, rng: np.random.Generator) -> slice | np.ndarray:
        if not 0 < self.pick < self.windows:
            return slice(self.windows)
        return np.sort(rng.choice(self.windows, self.pick, replace=False))


class TokenSequences:
    """Adds to each sample of packed tokens its `layout`, drawn as `Sequences` does."""

    def __init__(self, source: SampleSource, config: SequenceConfig):
        self.source, self.config = source, config
        odds = np.array(config.odds)
        self._odds, self._likeliest, self._mixed = odds / odds.sum(), int(odds.argmax()), config.is_mixed

    def __len__(self) -> int:
        return len(self.source)

    def order(self, seed: int, lane_of: LaneOf) -> Callable[[int], int]:
        """The order of the samples."""
        return source_order(self.source, seed, lane_of)

    def sample(self, index: int, rng: np.random.Generator | None) -> Sample:
        sample = self.source.sample(index, rng)
        drawn = rng if self._mixed else None
        sample["layout"] = self._likeliest if drawn is None else int(drawn.choice(len(self._odds), p=self._odds))
        return sample


def collate_tokens(samples: Sequence[Sample]) -> Batch:
    """Samples of `TokenSequences` -> batch; as `collate_sequences`, but with tokens for events and images.

    Returns:
        `events` (B, T, N, D) and `images` (B, J, N, D) in the stored dtype, `real` bool (B, T, N) of a sparse encoder,
        and the frames' layout as `collate_sequences` gives it.
    """
    first = samples[0]
    windows = len(first["t_us"])
    plans = [_frames(sample["layout"], windows, sample["clip"]) for sample in samples]
    length = max(plan.shape[1] for plan in plans)
    # Padding repeats the last frame, so that every index and time in the batch stays a legal one.
    plan = np.stack([plan[:, np.minimum(np.arange(length), plan.shape[1] - 1)] for plan in plans])
    t_us = np.stack([sample["t_us"] for sample in samples])
    valid = np.arange(length) < np.array([[plan.shape[1]] for plan in plans])
    arrays = {
        "modality": plan[:, 0],
        "source": plan[:, 1],
        "frame_t_us": np.take_along_axis(t_us.reshape(len(samples), -1), plan[:, 2], axis=1),
        "valid": valid,
        "pair": np.stack([np.arange(windows) * sample["clip"] for sample in samples]),
        "t_us": t_us,
    }
    batch: Batch = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    batch |= {"key": [sample["key"] for sample in samples], "windows": windows, "padded": not bool(valid.all())}
    batch["label"] = torch.tensor([sample["label"] for sample in samples])
    batch["events"] = torch.from_numpy(_stacked([sample["events"] for sample in samples])).view(first["dtype"])
    if "images" in first:
        batch["images"] = torch.from_numpy(_stacked([sample["images"] for sample in samples])).view(first["dtype"])
    if "real" in first:
        batch["real"] = torch.from_numpy(_stacked([sample["real"] for sample in samples]))
    return batch


@functools.lru_cache(maxsize=256)
def _frames(layout: int, windows: int, clip: bool) -> np.ndarray:
    """int64 (3, F): modality and source of each frame, and where in the (T, 2) window bounds its time stands."""
    places = np.arange(2 * windows).reshape(windows, 2)
    pair, image_places = (np.arange(windows), places[:, 1]) if clip else (np.zeros(windows, np.int64), places[-1:, 1])
    return np.stack(list(lay_out(LAYOUTS[layout], places, pair, image_places).values()))


def _stacked(arrays: list[np.ndarray]) -> np.ndarray:
    """One copy, from the mapped files into the batch; stills among clips repeat their one image."""
    count = max(len(array) for array in arrays)
    out = np.empty((len(arrays), count, *arrays[0].shape[1:]), arrays[0].dtype)
    for row, array in zip(out, arrays):
        row[: len(array)] = array
        row[len(array) :] = array[-1]
    return out
