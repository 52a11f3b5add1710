"""State dicts filled by names and shapes, and a batch to reconstruct: for the tests of E2VID and E2HQV."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor

from gep.data.paired import collate
from gep.events.types import Events


class Layout:
    """A state dict that is filled by names and shapes."""

    def __init__(self, seed: int, gain: float = 1.0):
        self.state: OrderedDict[str, Tensor] = OrderedDict()
        self.generator, self.gain = torch.Generator().manual_seed(seed), gain

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def weight(self, name: str, *shape: int, bias: int = 0) -> None:
        fan_in = max(1, int(np.prod(shape[1:])))
        self.state[f"{name}.weight"] = self.gain * self.random(*shape) / fan_in**0.5
        if bias:
            self.state[f"{name}.bias"] = 0.3 * self.random(bias)

    def norm(self, name: str, channels: int, *, running: bool = False) -> None:
        self.state[f"{name}.weight"] = 1 + 0.3 * self.random(channels)
        self.state[f"{name}.bias"] = 0.3 * self.random(channels)
        if running:
            self.state[f"{name}.running_mean"] = 0.3 * self.random(channels)
            self.state[f"{name}.running_var"] = 0.5 + self.random(channels).abs()
            self.state[f"{name}.num_batches_tracked"] = torch.tensor(7)


def make_batch(height: int, width: int, windows: int = 3, num: int = 300) -> dict:
    rng = np.random.default_rng(5)
    samples = []
    for _ in range(2):
        cuts = []
        for number in range(windows):
            t = np.sort(rng.integers(1000 * number, 1000 * (number + 1), num))
            x, y, p = rng.integers(0, width, num), rng.integers(0, height, num), rng.integers(0, 2, num)
            cuts.append(Events.from_arrays(t, x, y, p, height=height, width=width))
        bounds = np.array([(1000 * number, 1000 * (number + 1)) for number in range(windows)])
        samples.append({"key": "k", "events": cuts, "t_us": bounds, "label": 0})
    return collate(samples)
