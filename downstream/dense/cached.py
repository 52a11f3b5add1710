"""Maps of frozen features in memory: a head is then trained without running the encoder again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from downstream.dense.task import DenseTask
from gep.accelerator import to_device
from gep.data.paired import Recordings, collate
from gep.data.sampler import Batch, Batches, Sample
from gep.engine import TrainConfig
from gep.evaluate import collect


@dataclass(frozen=True, eq=False)
class CachedMaps:
    """The maps and targets of N samples, on the CPU."""

    keys: tuple[str, ...]
    levels: tuple[Tensor, ...]
    """L maps (N, D_l, h, w) float32."""
    targets: Tensor
    """(N, H, W)."""
    target: str
    """The batch's key of the targets."""
    size: tuple[int, int]
    padded: tuple[int, int]

    @classmethod
    def of(
        cls, task: DenseTask, source: Recordings, accelerator: Accelerator, *, batch_size: int, title: str | None = None
    ) -> CachedMaps:
        """Computes the maps of a whole set, each sample on one rank.

        Args:
            task: with frozen features.
            source: samples, read without augmentation.
            accelerator: decides device, ranks and precision.
            batch_size: samples a batch, on each rank.
            title: of a progress bar.
        """
        sizes: list[tuple[int, int]] = []
        target = task.problem.target

        def rows(batch: Batch) -> dict[str, Tensor]:
            maps = task.maps(batch)
            sizes[:] = [tuple(maps.size), tuple(maps.padded)]
            return {**{f"level{i}": level for i, level in enumerate(maps.levels)}, target: batch[target]}

        found = collect(rows, source, collate=collate, batch_size=batch_size, accelerator=accelerator, title=title)
        targets = found.pop(target)
        return cls(source.listing.keys, tuple(found.values()), targets, target, *sizes)

    def __len__(self) -> int:
        return len(self.keys)

    def sample(self, index: int, rng: np.random.Generator | None) -> Sample:
        """The number alone: `collate` gathers a batch in one copy."""
        return {"index": index}

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """A batch as the task takes it, with "maps" in place of events."""
        rows = torch.tensor([sample["index"] for sample in samples])
        return {"key": [self.keys[i] for i in rows.tolist()], **self.maps(rows), self.target: self.targets[rows]}

    def maps(self, rows: Tensor) -> dict[str, Any]:
        """{"maps": …} of the samples `rows` (int64), for `DenseTask.maps`."""
        levels = [level[rows] for level in self.levels]
        return {"maps": {"levels": levels, "size": self.size, "padded": self.padded}}

    def join(self, batch: Batch) -> Batch:
        """A batch of the same set with its maps, found by its keys, on the batch's device."""
        rows = torch.tensor([self._place[key] for key in batch["key"]])
        return batch | to_device(self.maps(rows), batch["t_us"].device)

    @cached_property
    def _place(self) -> dict[str, int]:
        return {key: index for index, key in enumerate(self.keys)}

    def batches(self, train: TrainConfig) -> Batches:
        """What `engine.fit` iterates over: the samples and order of the same run without a cache."""
        return Batches.of_run(self, self.collate, dataclasses.replace(train, num_workers=0, threads=0))

    def parts(self, batch_size: int) -> Iterator[list[Tensor]]:
        """The maps of all samples in order, a batch at a time."""
        for start in range(0, len(self), batch_size):
            yield [level[start : start + batch_size] for level in self.levels]
