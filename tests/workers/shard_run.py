"""One rank that reads shards with two data workers and writes down what each step held: see tests/test_shards.py."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import time

from gep.data.config import DataConfig
from gep.data.paired import Recordings, collate
from gep.data.sampler import Batches
from gep.data.shards import open_shards


def batches(url: str, rank: int, num_workers: int) -> Batches:
    """Batches of 8 over two ranks, in two micro-batches each, with augmentation left at its defaults."""
    config = DataConfig(height=24, width=32, windows=2, window_us=0)
    source = Recordings(open_shards(url), config, paired=True, targets=True)
    return Batches(
        source, collate=collate, batch_size=8, accumulate=2, seed=5, rank=rank, world_size=2, num_workers=num_workers
    )


def describe(step: list[dict]) -> dict:
    """Keys of a step's samples, and a hash of the tensors they became."""
    tensors = [
        tensor for micro in step for tensor in (micro["events"].t, micro["events"].x, micro["image"], micro["mask"])
    ]
    digest = hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()
    return {"keys": [key for micro in step for key in micro["key"]], "hash": digest}


def main(url: str, rank: int, first: int, steps: int, pause: float, path: str) -> None:
    """Steps first, …, steps − 1, a line each."""
    run = batches(url, rank, num_workers=2)(first)
    with open(path, "a") as file:
        for step in itertools.islice(run, steps - first):
            file.write(json.dumps(describe(step)) + "\n")
            file.flush()
            time.sleep(pause)
    run.close()  # ends the data workers, which ignore the signal that would end them at exit


if __name__ == "__main__":
    url, rank, first, steps, pause, path = sys.argv[1:]
    main(url, int(rank), int(first), int(steps), float(pause), path)
