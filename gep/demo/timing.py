"""How long each step of the demo takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from gep import distributed


@dataclass
class Stopwatch:
    """Names each step when it begins and keeps its seconds."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        if distributed.is_main():
            print(f"── {step}", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[step] = round(time.perf_counter() - start, 1)
