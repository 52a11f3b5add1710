"""train.ema: the average against a float64 loop, evaluated, left in the task, resumed bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_engine import OPTIM, TRAIN, lines, loader_batches, run
from torch import nn

from gep.optim import Average
from tests.workers.toy_run import Regression

EMA = replace(TRAIN, ema=0.6)


class Recording(Regression):
    """Keeps the weights after every step: those that the next step's forward sees."""

    def forward(self, batch):
        if self.training:
            self.__dict__.setdefault("seen", []).append([p.detach().double() for p in self.parameters()])
        return super().forward(batch)


def weights(task: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in task.parameters()]


def test_average_is_the_written_out_recursion(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = Recording()
    run(tmp_path / "ema", task, train=EMA)
    torch.manual_seed(0)
    raw = Regression()
    run(tmp_path / "raw", raw)
    # The average changes nothing about training itself.
    strip = [{k: v for k, v in line.items() if k != "seconds"} for line in lines(tmp_path / "ema")]
    assert strip == lines(tmp_path / "raw")
    states = [*task.seen[1:], [p.double() for p in weights(raw)]]
    expected = task.seen[0]
    for step, state in enumerate(states, 1):
        decay = min(0.6, step / (step + 9))
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, state)]
    assert len(states) == 12
    for value, wanted, last in zip(task.parameters(), expected, raw.parameters()):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-7)
        assert not torch.equal(value, last)


def test_evaluation_sees_the_average_and_training_goes_on_from_the_weights(tmp_path: Path) -> None:
    found = []
    train = replace(EMA, eval_every=4)
    _, task = run(tmp_path, train=train, evaluate=lambda task, step: found.append(weights(task)) or {"x": float(step)})
    assert len(found) == 3
    assert all(torch.equal(a, b) for a, b in zip(found[-1], weights(task))), "what is exported was evaluated"
    _, other = run(tmp_path / "other", train=EMA)
    assert all(torch.equal(a, b) for a, b in zip(weights(other), weights(task)))


def test_resumed_average_is_bit_equal(tmp_path: Path) -> None:
    train = replace(EMA, eval_every=3)
    batches = loader_batches(train)
    evaluate = lambda task, step: {"norm": float(sum(p.sum() for p in weights(task)))}  # noqa: E731
    _, whole = run(tmp_path / "whole", train=train, batches=batches, evaluate=evaluate)
    with pytest.raises(SystemExit):
        run(tmp_path / "cut", train=train, batches=lambda start: batches(start, kill_at=6), evaluate=evaluate)
    _, cut = run(tmp_path / "cut", train=train, batches=batches, evaluate=evaluate)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(cut)))
    one, two = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut"))
    assert one == two
    # A finished run hands out the average again, and its accelerator is free of it.
    _, again = run(tmp_path / "cut", train=train, batches=batches, evaluate=evaluate)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again)))
    with pytest.raises(ValueError, match="train.ema"):
        run(tmp_path / "cut", train=replace(train, ema=0.5), batches=batches, evaluate=evaluate)


def test_frozen_parameters_have_no_average_and_swapping_twice_changes_no_bit() -> None:
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    average = Average(module, 0.9)
    assert len(average.values) == 1
    with torch.no_grad():
        module.weight.mul_(1.1)
    average.update(1)  # decay 1 / 10
    before = weights(module), [value.clone() for value in average.values]
    average.swap()
    assert torch.equal(module.weight, before[1][0]) and torch.equal(average.values[0], before[0][0])
    average.swap()
    assert torch.equal(module.weight, before[0][0])
    off = Average(module, 0.0)
    off.update(1), off.swap()
    assert not off.values and torch.equal(module.weight, before[0][0])


def test_a_decay_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match="ema is 1.0"):
        replace(TRAIN, ema=1.0)
    assert OPTIM.lr and TRAIN.ema == 0
