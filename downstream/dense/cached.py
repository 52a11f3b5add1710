"""Maps of frozen features in memory: a head is then trained without running the encoder again."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from downstream.dense.task import DenseTask
from gep import distributed
from gep.accelerator import to_device
from gep.data.paired import Recordings, collate
from gep.data.sampler import Batch, Batches, EvaluationBatches, Sample
from gep.engine import TrainConfig

RAM_SHARE = 0.6
"""Of the machine's memory, which maps may take; the rest is for the run, its data and the system."""


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
    @torch.no_grad()
    def of(
        cls,
        task: DenseTask,
        source: Recordings,
        accelerator: Accelerator,
        *,
        batch_size: int,
        total: int | None = None,
        title: str | None = None,
    ) -> CachedMaps:
        """Computes the maps of a whole set, each sample on one rank; every rank keeps all of them, once.

        Args:
            task: with frozen features.
            source: samples, read without augmentation.
            accelerator: decides device, ranks and precision.
            batch_size: samples a batch, on each rank.
            total: samples whose maps are kept in all, of this set and others; None = of this one.
            title: of a progress bar.
        Raises:
            ValueError: the first batch shows that all maps would take more than RAM_SHARE of the memory.
        """
        target = task.problem.target
        batches = EvaluationBatches(
            source,
            collate=collate,
            batch_size=batch_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        hidden = None if title and accelerator.is_main_process else True
        kept: list[Tensor] = []
        for marks, batch in tqdm(batches, desc=title, disable=hidden, leave=False, mininterval=1):
            with accelerator.autocast():
                maps = task.maps(to_device(batch, accelerator.device))
            rows = [*(level.float() for level in maps.levels), batch[target].to(accelerator.device)]
            if not kept:
                _refuse_too_large(sum(row[0].numel() * row.element_size() for row in rows), total or len(source))
                kept = [torch.empty(len(source), *row.shape[1:], dtype=row.dtype) for row in rows]
            marks = accelerator.gather(torch.from_numpy(marks).to(accelerator.device)).cpu()
            for into, row in zip(kept, rows, strict=True):
                into[marks[marks >= 0]] = accelerator.gather(row.contiguous()).cpu()[marks >= 0]
        size, padded = ((int(rows), int(columns)) for rows, columns in (maps.size, maps.padded))
        return cls(source.listing.keys, tuple(kept[:-1]), kept[-1], target, size, padded)

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


def memory() -> int:
    """Bytes of memory that this machine, or the container on it, has."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max" = none
            found.append(int(Path(limit).read_text(encoding="ascii")))
    return min(found)


def _refuse_too_large(sample_bytes: int, samples: int) -> None:
    """Raises ValueError on all ranks alike where maps of so many samples are too many for one of the machines."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))
    needed, there = sample_bytes * samples * ranks, memory()
    problem = None
    if needed > RAM_SHARE * there:
        processes = f" in each of {ranks} processes" if ranks > 1 else ""
        problem = (
            f"cache_features=true: the maps of {samples} samples, {sample_bytes / 2**20:.2f} MiB each{processes}, take "
            f"{needed / 2**30:.2f} GiB, more than {RAM_SHARE:.0%} of this machine's {there / 2**30:.1f} GiB; set "
            "cache_features=false, or learn from fewer samples (fraction)"
        )
    problem = next((found for found in distributed.gather_objects(problem) if found), None)
    if problem:
        raise ValueError(problem)
