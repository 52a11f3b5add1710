"""What a reader says of the RGB frames of a training set, asked once, before training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from downstream.llm_evrep.readers.base import Reader
from gep import distributed
from gep.data.bad import BadSample
from gep.data.mix import Mixed
from gep.data.paired import Recordings
from gep.data.sampler import SampleSource
from gep.events.types import EventFormatError

_BATCH = 64


def describe_frames(
    source: SampleSource, reader: Reader, prompt: str, *, num_workers: int = 0, progress: bool = False
) -> dict[str, str]:
    """A description of each sample's unaugmented frame; each rank asks about its share.

    Of recordings the pictures alone are read, not the events. Frames that cannot be read are left out, with a warning:
    training replaces their samples too.

    Args:
        source: paired samples.
        reader: a `CachedReader`, so that what was answered before is not asked again.
        prompt: what it is asked.
        num_workers: processes that read pictures, on each rank.
        progress: show a bar on stderr.
    Returns:
        sample key -> text, equal on all ranks.
    Raises:
        Whatever the reader raises; on the other ranks a RuntimeError, so that none waits.
    """
    rank, ranks = distributed.rank(), distributed.world_size()
    # Ranks meet after each batch: one's failure ends all of them soon, and none waits long for another.
    count = -(-len(source) // (ranks * _BATCH))
    batches = [range(rank, len(source), ranks)[k * _BATCH : (k + 1) * _BATCH] for k in range(count)]
    found: dict[str, str] = {}
    faults: list[str] = []
    shown = progress and distributed.is_main()
    with tqdm(total=len(source), desc="describing frames", disable=None if shown else True, leave=False) as bar:
        pictures = _pictures(source, batches, num_workers)
        for _ in range(count):
            texts: dict[str, str] = {}
            failure: Exception | None = None
            try:
                keys, images, bad = next(pictures)
                if keys:
                    texts = dict(zip(keys, reader.describe(images, prompt), strict=True))
            except Exception as error:  # an endpoint's, a file's: the other ranks are to hear of it
                failure, bad = error, []
            parts = distributed.gather_objects((texts, bad, "" if failure is None else str(failure)))
            if failure is not None:
                raise failure
            for other, (said, unread, message) in enumerate(parts):
                if message:
                    raise RuntimeError(f"rank {other} could not describe its frames: {message}")
                found |= said
                faults += unread
                bar.update(len(said) + len(unread))
    if faults and distributed.is_main():
        warnings.warn(f"{len(faults)} frames cannot be read and stay undescribed; the first: {faults[0]}", stacklevel=2)
    return found


def _pictures(
    source: SampleSource, batches: Sequence[range], num_workers: int
) -> Iterator[tuple[list[str], Tensor, list[str]]]:
    loader = DataLoader(
        _Frames(source),
        batch_size=None,
        sampler=batches,
        num_workers=num_workers,
        worker_init_fn=distributed.ignore_signals,
        multiprocessing_context="spawn" if num_workers and torch.cuda.is_available() else None,
    )
    # A DataLoader draws from torch's generator: a run that asks goes on as one that did not have to.
    with torch.random.fork_rng(devices=[]):
        return iter(loader)


class _Frames(Dataset):
    """Samples -> (keys of those that can be read, uint8 (n, 3, H, W), what is wrong with the others)."""

    def __init__(self, source: SampleSource):
        self.source = source

    def __getitem__(self, indices: Sequence[int]) -> tuple[list[str], Tensor, list[str]]:
        frames, faults = [], []
        for index in indices:
            try:
                frames.append(frame_of(self.source, index))
            except (BadSample, EventFormatError) as error:
                faults.append(str(error))
        images = np.stack([image for _, image in frames]) if frames else np.empty((0, 3, 1, 1), np.uint8)
        return [key for key, _ in frames], torch.from_numpy(images), faults


def frame_of(source: SampleSource, index: int) -> tuple[str, np.ndarray]:
    """Key and frame uint8 (3, H, W) of a sample on the canvas, without randomness.

    Raises:
        BadSample, EventFormatError: it cannot be read.
    """
    if isinstance(source, Mixed):
        origin = int(np.searchsorted(source.starts, index, side="right")) - 1
        key, image = frame_of(source.sources[origin], index - int(source.starts[origin]))
        return f"{source.names[origin]}/{key}", image
    if isinstance(source, Recordings) and source.listing.image is not None:
        return source.listing.keys[index], source.picture(index)
    sample = source.sample(index, None)
    return sample["key"], sample["image"]
