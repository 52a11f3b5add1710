"""Running a function over a whole set, on any number of ranks, with the results in the set's own order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from gep.accelerator import to_device
from gep.data.sampler import Batch, EvaluationBatches, Sample, SampleSource


def evenly(count: int, most: int) -> np.ndarray:
    """int64 indices of at most `most` of `count` samples, spread evenly; all of them for most = 0."""
    kept = min(count, most) if most else count
    return np.arange(kept, dtype=np.int64) * count // max(1, kept)


@torch.no_grad()
def collect(
    function: Callable[[Batch], dict[str, Tensor]],
    source: SampleSource,
    *,
    collate: Callable[[Sequence[Sample]], Batch],
    batch_size: int,
    accelerator: Accelerator,
    indices: Sequence[int] | None = None,
    title: str | None = None,
) -> dict[str, Tensor]:
    """Applies `function` to every sample once and returns its rows in order.

    Args:
        function: batch on the accelerator's device -> named tensors of shape (b, …), a row a sample.
        source: samples; visited without randomness, so that two runs of the same weights agree exactly.
        collate: list of samples -> batch.
        batch_size: samples a batch, on each rank.
        accelerator: decides device, ranks and precision.
        indices: the samples to visit, in the order of the result; all by default.
        title: of a progress bar; none without.
    Returns:
        name -> (len(indices), …) on the CPU, equal on all ranks.
    """
    batches = EvaluationBatches(
        source,
        collate=collate,
        batch_size=batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        indices=indices,
    )
    chunks: dict[str, list[Tensor]] = {}
    order: list[np.ndarray] = []
    for marks, batch in tqdm(
        batches,
        desc=title,
        disable=None if title and accelerator.is_main_process else True,
        leave=False,
        mininterval=1,
    ):
        with accelerator.autocast():
            outputs = function(to_device(batch, accelerator.device))
        gathered = accelerator.gather(torch.from_numpy(marks).to(accelerator.device)).cpu().numpy()
        order.append(gathered)
        for name, rows in outputs.items():
            chunks.setdefault(name, []).append(accelerator.gather(rows.contiguous()).cpu()[gathered >= 0])
    visited = np.concatenate(order)
    visited = visited[visited >= 0]
    place_of = {index: row for row, index in enumerate(visited.tolist())}
    place = torch.tensor([place_of[index] for index in batches.indices])
    return {name: torch.cat(parts)[place] for name, parts in chunks.items()}
