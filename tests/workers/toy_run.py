"""A small training program in the shape of a run.py, for tests that need processes of their own.

python tests/workers/toy_run.py run_dir=DIR train.steps=40 ...
accelerate launch --cpu --num_processes 2 tests/workers/toy_run.py run_dir=DIR ...
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gep import config, distributed
from gep.checkpoint import prepare_run_dir
from gep.engine import TrainConfig, fit, make_accelerator
from gep.optim import OptimConfig


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """A toy run."""

    run_dir: str
    """run folder"""
    task: Literal["regression", "contrastive"] = "regression"
    """which toy"""
    dropout: float = 0.1
    """dropout probability"""
    delay: float = 0.0
    """pause per step [s], so that a signal finds the run at work"""
    nan_step: int = 0
    """step whose targets hold a NaN, counted from 1; 0 = none"""
    nan_rank: int = 0
    """rank that meets it"""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=20, batch_size=16, log_every=3))
    """length, batches, saving"""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-2, warmup_steps=3))
    """optimiser"""


class Regression(nn.Module):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 1))

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        loss = F.mse_loss(self.net(batch["x"]), batch["y"])
        return {"loss": loss, "rmse": loss.detach().sqrt()}


class Contrastive(nn.Module):
    """InfoNCE one way; negatives from all ranks and, through `context`, all micro-batches of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

    def embed(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return F.normalize(self.a(batch["x"]), dim=-1), F.normalize(self.b(batch["x"].tanh()), dim=-1)

    def context(self, micro_batches: list[dict[str, Any]]) -> list[tuple[Tensor, Tensor]]:
        return [self.embed(batch) for batch in micro_batches]

    def forward(self, batch: dict[str, Any], context: Any = None, index: int = 0) -> dict[str, Tensor]:
        pairs = [None] if context is None else list(context)
        pairs[index] = self.embed(batch)  # this micro-batch with gradient, the others as constants
        a, b = (torch.cat(parts) for parts in zip(*pairs))
        rows = torch.arange(len(a)) + distributed.rank() * len(a)
        loss = F.cross_entropy(10 * a @ distributed.gather_with_grad(b).T, rows)
        # Every forward gives the whole loss, but only a share of its gradient; the engine averages where the
        # shares have to be summed.
        return {"loss": loss + (len(pairs) - 1) * (loss - loss.detach())}


def make_batches(cfg: ToyConfig, rank: int, world: int) -> Callable[[int], Iterator[list[dict[str, Any]]]]:
    """batches(start) over seeded data; the union over ranks and micro-batches depends on the step alone."""
    train = cfg.train

    def batches(start: int) -> Iterator[list[dict[str, Any]]]:
        for step in itertools.count(start):
            generator = torch.Generator().manual_seed(1000 + step)
            x = torch.randn(train.batch_size, 8, generator=generator)
            y = x.sum(1, keepdim=True).sin()
            keys = [f"s{step}_{i}" for i in range(train.batch_size)]
            if step + 1 == cfg.nan_step:
                y[cfg.nan_rank * train.batch_size // world] = float("nan")
            size = train.batch_size // (world * train.accumulate)
            first = rank * size * train.accumulate
            rows = [slice(first + m * size, first + (m + 1) * size) for m in range(train.accumulate)]
            time.sleep(cfg.delay)
            yield [{"x": x[r], "y": y[r], "key": keys[r]} for r in rows]

    return batches


def main(argv: list[str] | None = None) -> dict[str, float]:
    torch.set_num_threads(1)
    cfg = config.load(ToyConfig, argv)
    accelerator = make_accelerator(cfg.train, cfg.run_dir)
    run_dir = prepare_run_dir(cfg.run_dir, cfg)
    task = Regression(cfg.dropout) if cfg.task == "regression" else Contrastive()

    def evaluate(task: nn.Module, step: int) -> dict[str, float]:
        # Drawing shows that a resumed run's generator is where the uninterrupted run's is.
        return {"weights": sum(float(p.sum()) for p in task.parameters()), "draw": torch.rand(()).item()}

    last = fit(
        task,
        make_batches(cfg, distributed.rank(), distributed.world_size()),
        train=cfg.train,
        optim=cfg.optim,
        accelerator=accelerator,
        run_dir=run_dir,
        evaluate=evaluate,
    )
    accelerator.end_training()
    return last


if __name__ == "__main__":
    config.run_cli(main)
