"""What a reader says of the RGB frames of a training set, asked once, before training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from downstream.llm_evrep.readers.base import Reader
from gep import distributed
from gep.data.bad import BadSample
from gep.data.sampler import SampleSource
from gep.events.types import EventFormatError

_BATCH = 64


def describe_frames(source: SampleSource, reader: Reader, prompt: str, *, progress: bool = False) -> dict[str, str]:
    """A description of each sample's unaugmented frame; each rank asks about its share.

    Samples that cannot be read are left out: training replaces them too.

    Args:
        source: paired samples.
        reader: a `CachedReader`, so that what was answered before is not asked again.
        prompt: what it is asked.
        progress: show it on stderr.
    Returns:
        sample key -> text, equal on all ranks.
    Raises:
        Whatever the reader raises; on the other ranks a RuntimeError, so that none waits.
    """
    share = range(distributed.rank(), len(source), distributed.world_size())
    found: dict[str, str] = {}
    failure: Exception | None = None
    try:
        hidden = None if progress and distributed.is_main() else True
        with tqdm(total=len(share), desc="describing frames", disable=hidden, mininterval=1, leave=False) as bar:
            for keys, images, count in _batches(source, share):
                if keys:
                    texts = reader.describe(torch.from_numpy(np.stack(images)), prompt)
                    found.update(zip(keys, texts, strict=True))
                bar.update(count)
    except Exception as error:  # an endpoint's, a file's: the other ranks are to hear of it
        failure = error
    parts: list[tuple[dict[str, str], str]] = distributed.gather_objects((found, str(failure) if failure else ""))
    if failure is not None:
        raise failure
    for rank, (_, message) in enumerate(parts):
        if message:
            raise RuntimeError(f"rank {rank} could not describe its frames: {message}")
    return {key: text for part, _ in parts for key, text in part.items()}


def _batches(source: SampleSource, share: range) -> Iterator[tuple[list[str], list[Any], int]]:
    """(keys, uint8 images (3, H, W), samples tried) of the readable samples."""
    for start in range(0, len(share), _BATCH):
        part = share[start : start + _BATCH]
        keys, images = [], []
        for index in part:
            try:
                sample = source.sample(index, None)
            except (BadSample, EventFormatError):
                continue
            keys.append(sample["key"])
            images.append(sample["image"])
        yield keys, images, len(part)
