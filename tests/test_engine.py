"""fit(): against a bare loop, under accumulation, interruption, several processes and bad numbers."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gep.engine import TrainConfig, fit, make_accelerator
from gep.guards import FiniteWatch, NonFiniteError
from gep.optim import OptimConfig, lr_at, param_groups
from tests import workers
from tests.workers import toy_run
from tests.workers.toy_run import Contrastive, Regression, ToyConfig, make_batches

TRAIN = TrainConfig(steps=12, batch_size=16, log_every=1, save_every=0, progress=False)
OPTIM = OptimConfig(lr=1e-2, warmup_steps=3, clip_norm=0.5)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def run(folder, task=None, *, train=TRAIN, optim=OPTIM, batches=None, **keywords):
    accelerator = make_accelerator(train, folder)
    task = task if isinstance(task, nn.Module) else (task or Regression)()
    batches = batches or make_batches(ToyConfig(run_dir="", train=train, **keywords.pop("toy", {})), 0, 1)
    return fit(task, batches, train=train, optim=optim, accelerator=accelerator, run_dir=folder, **keywords), task


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_equals_a_bare_loop_bit_for_bit(tmp_path):
    """Same weights after 12 steps as torch alone: warm-up, two groups, clipping, dropout's seed."""
    from gep import distributed

    torch.manual_seed(1)
    start = Regression(0.2)
    reference = Regression(0.2)
    reference.load_state_dict(start.state_dict())
    train = replace(TRAIN, seed=5)
    last, task = run(tmp_path, start, train=train)

    groups = param_groups(reference, lr=OPTIM.lr, weight_decay=OPTIM.weight_decay)
    for group in groups:
        del group["names"]
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, fused=True)
    distributed.seed_all(5, per_rank=True)
    norms, losses = [], []
    for step, (batch,) in zip(range(12), make_batches(ToyConfig(run_dir="", train=train), 0, 1)(0)):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, 12, OPTIM)
        optimizer.zero_grad()
        loss = reference(batch)["loss"]
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(reference.parameters(), 0.5)))
        losses.append(loss.item())
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), reference.parameters()))
    assert [line["loss"] for line in lines(tmp_path)] == losses
    assert [line["grad_norm"] for line in lines(tmp_path)] == norms
    assert [line["lr"] for line in lines(tmp_path)] == [lr_at(s, 12, OPTIM) for s in range(12)]
    assert last == lines(tmp_path)[-1]


@pytest.mark.parametrize("task", [lambda: Regression(0.0), Contrastive])
def test_accumulation_does_not_change_the_objective(tmp_path, task):
    """64 samples as 1 x 64 and as 4 x 16: the same losses, norms and weights."""
    results = []
    for accumulate in (1, 4):
        folder = tmp_path / str(accumulate)
        train = replace(TRAIN, batch_size=64, accumulate=accumulate)
        _, trained = run(folder, task, train=train)
        results.append((lines(folder), [p.detach() for p in trained.parameters()]))
    for one, four in zip(*(r[0] for r in results)):
        assert one["loss"] == pytest.approx(four["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(four["grad_norm"], rel=1e-4)
    for one, four in zip(*(r[1] for r in results)):
        torch.testing.assert_close(one, four, rtol=1e-4, atol=1e-5)


def test_meters_average_between_log_lines_and_evaluation_has_its_own(tmp_path):
    seen = []

    def evaluate(task, step):
        seen.append((step, task.training, torch.is_grad_enabled()))
        return {"accuracy": step / 2}

    run(tmp_path / "each", lambda: Regression(0.0))
    train = replace(TRAIN, log_every=5, eval_every=4)
    last, task = run(tmp_path / "fives", lambda: Regression(0.0), train=train, evaluate=evaluate)
    each = [line["loss"] for line in lines(tmp_path / "each")]
    found = lines(tmp_path / "fives")
    assert [line["step"] for line in found] == [4, 5, 8, 10, 12, 12]
    logged = [line for line in found if "loss" in line]
    means = [sum(part) / len(part) for part in (each[:5], each[5:10], each[10:])]
    assert [line["loss"] for line in logged] == pytest.approx(means, rel=1e-12)
    assert found[0] == {"step": 4, "eval/accuracy": 2.0}
    assert seen == [(4, False, False), (8, False, False), (12, False, False)] and task.training
    assert last == {**found[-2], "eval/accuracy": 6.0}


def loader_batches(train):
    """Batches through a DataLoader, whose start draws from torch's generator."""
    x = torch.randn(train.steps * train.batch_size, 8, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, x.sum(1, keepdim=True))

    def batches(start, kill_at=None):
        rest = torch.utils.data.Subset(data, range(start * train.batch_size, len(data)))
        for step, (x, y) in enumerate(DataLoader(rest, batch_size=train.batch_size), start):
            if step == kill_at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield [{"x": x, "y": y}]

    return batches


def test_sigterm_saves_exits_0_and_the_resumed_run_is_bit_equal(tmp_path, capsys):
    train = replace(TRAIN, log_every=5)
    batches = loader_batches(train)
    evaluate = lambda task, step: {"draw": torch.rand(()).item()}  # noqa: E731
    run(tmp_path / "whole", train=train, batches=batches, evaluate=evaluate)

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        run(tmp_path / "cut", train=train, batches=lambda start: batches(start, kill_at=6), evaluate=evaluate)
    assert caught.value.code == 0
    assert "SIGTERM: step 7 is saved in" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is handler
    assert [line["step"] for line in lines(tmp_path / "cut")] == [5]
    run(tmp_path / "cut", train=train, batches=batches, evaluate=evaluate)
    whole, cut = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut"))
    assert whole == cut

    def never(start):
        raise AssertionError("a finished run asked for batches")

    last, _ = run(tmp_path / "cut", train=train, batches=never)
    assert "all 12 steps are done already" in capsys.readouterr().err
    assert last["step"] == 12 and last["eval/draw"] == lines(tmp_path / "whole")[-1]["eval/draw"]


def test_sigkill_at_any_moment_and_resume_is_bit_equal(tmp_path):
    arguments = [
        "train.steps=150",
        "train.save_every=4",
        "train.log_every=3",
        "train.progress=false",
        "train.batch_size=16",
    ]
    toy_run.main([f"run_dir={tmp_path / 'whole'}", *arguments])
    cut = tmp_path / "cut"
    process = workers.start("toy_run.py", f"run_dir={cut}", "delay=0.02", *arguments)
    metrics = cut / "metrics.jsonl"
    deadline = time.time() + 60
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
        assert time.time() < deadline, "the run did not start"
        time.sleep(0.01)
    time.sleep(random.uniform(0, 1.5))
    process.kill()
    assert process.wait() == -signal.SIGKILL, workers.finish([process])
    assert 0 < len(lines(cut)) < 51
    (cut / "config.yaml").unlink()  # it holds the other run's pause
    toy_run.main([f"run_dir={cut}", *arguments])
    assert metrics.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def assert_same_losses(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_two_processes_give_one_process_its_losses(tmp_path):
    arguments = ["task=contrastive", "train.progress=false", "train.accumulate=2"]
    toy_run.main([f"run_dir={tmp_path / 'one'}", *arguments])
    processes = workers.start_ranks("toy_run.py", f"run_dir={tmp_path / 'two'}", *arguments)
    printed = workers.finish(processes)
    assert [p.returncode for p in processes] == [0, 0], "\n".join(printed)
    assert_same_losses(lines(tmp_path / "one"), lines(tmp_path / "two"))
    trainer = next((tmp_path / "two" / "checkpoints").iterdir()) / "trainer.json"
    assert json.loads(trainer.read_text())["world_size"] == 2


@pytest.mark.slow
def test_accelerate_launch_on_cpus_starts_the_processes_asked_for(tmp_path):
    arguments = ["task=contrastive", "train.progress=false"]
    toy_run.main([f"run_dir={tmp_path / 'one'}", *arguments])
    launcher = [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "--num_processes", "2"]
    script = str(workers.HERE / "toy_run.py")
    env = workers.environment()
    del env["ACCELERATE_USE_CPU"]
    subprocess.run([*launcher, script, f"run_dir={tmp_path / 'two'}", *arguments], check=True, timeout=180, env=env)
    assert_same_losses(lines(tmp_path / "one"), lines(tmp_path / "two"))
    trainer = next((tmp_path / "two" / "checkpoints").iterdir()) / "trainer.json"
    assert json.loads(trainer.read_text())["world_size"] == 2
    # The run goes on with another number of processes: finished here, so only the state is read.
    assert toy_run.main([f"run_dir={tmp_path / 'two'}", *arguments])["step"] == 20


@pytest.mark.slow
def test_ranks_stop_together_on_sigterm_and_on_one_ranks_nan(tmp_path):
    arguments = ["train.steps=500", "delay=0.02", "train.progress=false"]
    processes = workers.start_ranks("toy_run.py", f"run_dir={tmp_path / 'term'}", *arguments)
    metrics = tmp_path / "term" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)  # one rank is enough
    printed = workers.finish(processes)
    assert [p.returncode for p in processes] == [0, 0], "\n".join(printed)
    assert "is saved in" in printed[0] and len(list((tmp_path / "term" / "checkpoints").iterdir())) == 1

    arguments = ["nan_step=7", "nan_rank=1", "train.save_every=2", "train.progress=false"]
    processes = workers.start_ranks("toy_run.py", f"run_dir={tmp_path / 'nan'}", *arguments)
    printed = workers.finish(processes)
    assert [p.returncode for p in processes] == [2, 2], "\n".join(printed)
    for text in printed:
        assert "non-finite loss at step 7" in text and "s6_8, s6_9" in text and "s6_0" not in text


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_non_finite_loss_ends_the_run_before_the_weights_change(tmp_path, deferred, accumulate):
    train = replace(TRAIN, log_every=4, save_every=2, accumulate=accumulate)
    good = replace(train, steps=12)
    weights = []

    class Watched(Regression):
        def forward(self, batch):
            weights.append([p.detach().clone() for p in self.parameters()])
            return super().forward(batch)

    task = Watched(0.0)
    with pytest.raises(NonFiniteError) as caught:
        run(tmp_path / "bad", task, train=good, toy={"nan_step": 7}, _deferred=deferred)
    message = str(caught.value)
    assert "non-finite loss at step 7" in message and "s6_0, s6_1" in message
    assert ("s6_15" in message) == (accumulate == 1)  # only the micro-batch that is to blame
    before = weights[6 * accumulate]
    assert all(torch.equal(a, b) for a, b in zip(before, task.parameters()))
    assert [line["step"] for line in lines(tmp_path / "bad")] == [4]
    kept = sorted(p.name for p in (tmp_path / "bad" / "checkpoints").iterdir())
    assert kept == ["step_000004", "step_000006"]


def test_non_finite_gradient_of_a_finite_loss_names_all_keys(tmp_path):
    class Root(Regression):
        def forward(self, batch):
            # sqrt's slope at 0 is infinite, its value is not.
            return {"loss": (self.net(batch["x"]) * 0).abs().sqrt().sum()}

    with pytest.raises(NonFiniteError, match=r"non-finite gradient norm at step 1 .*s0_0, .*s0_15"):
        run(tmp_path, Root)


def test_fp16_overflow_is_patient_but_not_forever():
    watch = FiniteWatch(torch.device("cpu"), None, deferred=False, fp16=True)
    fine, overflow = torch.tensor(1.0), torch.tensor(float("inf"))
    for step in range(100):
        watch.observe(step, [fine], overflow if step % 10 else fine, [["a"]])
    with pytest.raises(NonFiniteError, match="overflowed 20 steps in a row"):
        for step in range(20):
            watch.observe(step, [fine], overflow, [["a"]])
    with pytest.raises(NonFiniteError, match="non-finite loss"):
        watch.observe(1, [overflow], fine, [["a"]])


def test_groups_scale_the_learning_rate(tmp_path):
    task = nn.Sequential(Regression(0.0))
    task.forward = lambda batch: task[0](batch)
    groups = param_groups(task, lr=OPTIM.lr, weight_decay=0.0, scales={"0.net.0": 0.0})
    frozen, moving = task[0].net[0].weight.clone(), task[0].net[3].weight.clone()
    run(tmp_path, task, groups=groups)
    assert torch.equal(task[0].net[0].weight, frozen) and not torch.equal(task[0].net[3].weight, moving)


def test_several_stages_and_precisions_in_one_process(tmp_path):
    """bf16 then fp32; the task comes back as a plain module each time."""
    bf16 = replace(TRAIN, precision="bf16")
    _, first = run(tmp_path / "bf16", lambda: Regression(0.0), train=bf16)
    _, second = run(tmp_path / "fp32", lambda: Regression(0.0))
    low, full = (lines(tmp_path / name)[0]["loss"] for name in ("bf16", "fp32"))
    assert low != full and low == pytest.approx(full, rel=2e-2)
    assert first.net[0].weight.dtype == torch.float32
    for task in (first, second):
        assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & set(vars(task))
        assert task.net(torch.zeros(1, 8)).dtype == torch.float32
    run(tmp_path / "again", second)  # a trained task can be trained on
    with pytest.raises(ValueError, match=r"fp16 needs a GPU"):
        make_accelerator(replace(TRAIN, precision="fp16"), tmp_path)


def test_what_a_task_or_a_loader_does_wrong_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"the batches ended after step 3 of 12"):
        batches = make_batches(ToyConfig(run_dir="", train=TRAIN), 0, 1)
        run(tmp_path / "1", batches=lambda start: (b for b, _ in zip(batches(start), range(3))))
    with pytest.raises(ValueError, match=r"a list of 1 micro-batches .* not dict"):
        run(tmp_path / "2", batches=lambda start: iter([{"x": 1}]))
    with pytest.raises(ValueError, match=r"Identity\.forward must return a dict"):
        task = nn.Sequential(nn.Linear(1, 1))
        task.forward = lambda batch: 0
        type(task).__name__ = type(task).__name__
        run(tmp_path / "3", type("Identity", (Regression,), {"forward": lambda self, batch: batch["x"].sum()}))
    with pytest.raises(ValueError, match=r"batch_size 10 is not divisible by accumulate 4"):
        TrainConfig(batch_size=10, accumulate=4)
    with pytest.raises(ValueError, match=r"steps is 0; give a whole number >= 1"):
        TrainConfig(steps=0)


def test_tensorboard_is_written(tmp_path):
    pytest.importorskip("tensorboard")
    run(tmp_path, train=replace(TRAIN, trackers=["tensorboard"]))
    assert list(tmp_path.rglob("events.out.tfevents*"))


@pytest.mark.slow
def test_compiled_task_gives_the_same_losses(tmp_path):
    run(tmp_path / "eager", lambda: Regression(0.0))
    run(tmp_path / "compiled", lambda: Regression(0.0), train=replace(TRAIN, compile=True))
    for a, b in zip(lines(tmp_path / "eager"), lines(tmp_path / "compiled")):
        assert a == pytest.approx(b, rel=1e-3)
