"""Between log lines nothing asks the device for a value: no item(), no shape that depends on data."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gep.data.sampler import _Generator
from gep.engine import TrainConfig, fit, make_accelerator
from gep.events import represent_functions, represent_torch
from gep.optim import OptimConfig
from gep.plan.measure import _one_device, _synthetic, _task
from gep.plan.workload import read

ROOT = Path(__file__).resolve().parent.parent
STAGES = {1: str(ROOT / "configs/stage1/nmnist.yaml"), 2: str(ROOT / "configs/stage2/nmnist.yaml")}
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default", "is_nonzero")


class Waits(TorchDispatchMode):
    """Names of the operations for which a GPU's host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        by_mask = name.startswith("aten.index") and any(
            isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1:])
        )
        sized = name == "aten.repeat_interleave.Tensor" and (kwargs or {}).get("output_size") is None
        if by_mask or sized or any(part in name for part in WAITING):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def steps_waits(
    task: nn.Module, batch: Sequence[dict[str, Any]], folder: Path, *, deferred: bool = True
) -> list[list[str]]:
    """What each of the steps 2, 3 and 4 of a run asks for; the first is still setting up, the fifth logs."""
    marks: list[int] = []
    waits = Waits()

    def batches(step: int) -> Iterator[Sequence[dict[str, Any]]]:
        while True:
            marks.append(len(waits.found))
            yield batch

    train = TrainConfig(steps=5, batch_size=4, accumulate=len(batch), log_every=5, save_every=0, progress=False, seed=1)
    accelerator = make_accelerator(train, folder)
    keywords: dict[str, Any] = {"train": train, "optim": OptimConfig(lr=1e-4), "accelerator": accelerator}
    with waits:
        fit(task, batches, run_dir=folder, _deferred=deferred, **keywords)
    return [waits.found[begin:end] for begin, end in itertools.pairwise(marks[1:5])]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("options", [(1,), (1, "encoder.keep=0.5"), (2,), (2, "backbone.order=token")])
def test_a_step_waits_for_nothing(
    options: tuple[Any, ...], accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU: torch's operations make the frames.
    monkeypatch.setattr(represent_functions, "represent_numba", represent_torch)
    stage, *changes = options
    work = _one_device(read([STAGES[stage], "teacher.name=export:none", *changes]), 4 // accumulate)
    task, _ = _task(work, "cpu")
    batch = [_synthetic(work, 4 // accumulate, 50)] * accumulate
    assert steps_waits(task, batch, tmp_path) == [[], [], []]


def test_what_waits_is_seen(tmp_path: Path) -> None:
    class Asking(nn.Linear):
        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            y = super().forward(batch["x"])
            y = y[batch["x"][:, :1] > 0] if float(y.detach().sum()) < 1e9 else y
            return {"loss": y.square().mean()}

    batch = [{"x": torch.ones(4, 3)}]
    for found in steps_waits(Asking(3, 1), batch, tmp_path / "asks"):
        assert {"aten._local_scalar_dense.default", "aten.index.Tensor"} <= set(found)
    # On a CPU the guard reads every step.
    assert all(steps_waits(Asking(3, 1), batch, tmp_path / "reads", deferred=False))


def test_a_samples_generator_is_numpys() -> None:
    mine, numpys = _Generator(3, 1, 2), np.random.default_rng([3, 1, 2])
    assert "_made" not in vars(mine)
    assert mine.random() == numpys.random() and mine.integers(9) == numpys.integers(9)
    assert (mine.random(4) == numpys.random(4)).all()
