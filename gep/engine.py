"""fit(): the only optimisation loop. Steps, accumulation, clipping, learning rate, logging, saving, resuming.

A task is a plain nn.Module whose forward(batch) returns {"loss": scalar, further scalars to log}. What a
task needs beyond that (cached negatives, counts over the whole batch) it computes in
`context(micro_batches)`.
"""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from gep import checkpoint, distributed, run_lock
from gep.accelerator import (
    PREPARED,
    TrainConfig,
    can_defer,
    gather_parameters,
    make_accelerator,
    set_checkpointing,
    set_up_blocks,
    set_up_deepspeed,
    to_device,
)
from gep.guards import FiniteWatch, StopSignal
from gep.logs import Clock, JsonlWriter, Meters, Progress
from gep.optim import Average, OptimConfig, lr_at, make_optimizer, param_groups

Batch = dict[str, Any]
BatchesFrom = Callable[[int], Iterator[Sequence[Batch]]]
Evaluate = Callable[[nn.Module, int], Mapping[str, float]]

__all__ = ["TrainConfig", "fit", "make_accelerator"]

_WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
_PLAIN = (*_WHOLE, DistributedType.FSDP)
# With several GPUs, ranks ask each other about a stop signal this often [steps]: asking waits for the device.
_STOP_EVERY = 10


def fit(
    task: nn.Module,
    batches: BatchesFrom,
    *,
    train: TrainConfig,
    optim: OptimConfig,
    accelerator: Accelerator,
    run_dir: str | os.PathLike[str],
    groups: list[dict[str, Any]] | None = None,
    evaluate: Evaluate | None = None,
    _deferred: bool | None = None,
) -> dict[str, float]:
    """Train a task, from the newest checkpoint of the run folder if there is one.

    The gradient of a step is the mean over its micro-batches and over ranks. A resumed run writes the same
    metrics.jsonl, bit for bit on a CPU, as one that was never interrupted. The first SIGTERM or SIGINT ends
    the run after the current step with a checkpoint and exit code 0.

    Args:
        task: forward(batch) -> {"loss": scalar, ...}; with a method `context`, forward(batch, context=,
            index=).
        batches: batches(start_step) iterates over steps start_step, start_step + 1, ...; an item is the list
            of train.accumulate micro-batches (dicts) of this rank. Whatever has .to(device) is moved there.
        train: length, precision, what is written when.
        optim: optimiser and schedule.
        accelerator: from make_accelerator; on return it is free for the next task.
        run_dir: the run's folder.
        groups: parameter groups with "lr_scale"; default param_groups(task, ...) from optim.
        evaluate: evaluate(task, step) -> numbers, called on every rank without grad and in eval mode.
    Returns:
        The last logged values and the last evaluation, with "step". Under train.ema the task is left with the
        averaged weights.
    Raises:
        NonFiniteError: a loss or gradient norm that is not a number; the weights did not take that step.
        CheckpointError: a checkpoint could not be written, or none can be read.
        ValueError: other settings than the run was begun with, another run in its folder, or batches of the wrong form.
    """
    run_dir = Path(run_dir)
    with run_lock.held(run_dir):
        checkpoint.refuse_overwrite(run_dir, train.resume)
        distributed.seed_all(train.seed, per_rank=True)
        if groups is None:
            groups = param_groups(task, lr=optim.lr, weight_decay=optim.weight_decay, layer_decay=optim.layer_decay)
        run = _Run(task, groups, train, optim, accelerator, run_dir, _deferred)
        try:
            run.resume()
            with StopSignal() as stop, Progress(train.steps, start=run.step, enabled=train.progress) as progress:
                stopped_at = run.loop(batches, evaluate, stop, progress)
        finally:
            run.release()
    if stopped_at is not None:
        _say(f"{stop.name or 'stopped'}: step {run.step} is saved in {stopped_at}; the same command goes on")
        accelerator.end_training()
        raise SystemExit(0)
    if train.progress and run.step > run.begun:
        _say(f"{run.clock.data_wait:.1%} of the training time was waiting for data")
    run.average.swap()
    gather_parameters(task)
    return run.last


class _Run:
    """One training run: the prepared task and optimiser, and everything a checkpoint has to hold."""

    def __init__(
        self,
        task: nn.Module,
        groups: list[dict[str, Any]],
        train: TrainConfig,
        optim: OptimConfig,
        accelerator: Accelerator,
        run_dir: Path,
        deferred: bool | None,
    ) -> None:
        self.task, self.train, self.optim = task, train, optim
        self.accelerator, self.run_dir = accelerator, run_dir
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        if self.deepspeed:
            set_up_deepspeed(accelerator, train, optim.clip_norm)
        set_up_blocks(task, train)
        # accelerate puts its own forward on the module: remember what was there.
        self._own = {name: task.__dict__[name] for name in PREPARED if name in task.__dict__}
        # A checkpoint holds the weights, two moments of each, and their average.
        self.size_hint = (3 + bool(train.ema)) * sum(p.numel() * p.element_size() for p in task.parameters())
        inner = make_optimizer(groups, optim)
        self.model, self.optimizer = accelerator.prepare(task, inner)
        if accelerator.scaler is None and accelerator.distributed_type in _PLAIN:
            # Here accelerate's wrapper only passes the step on, after looking for a package on disk (0.2 ms).
            self.optimizer = inner
        self.average = Average(task, train.ema)
        if train.ema:
            if accelerator.distributed_type not in _WHOLE:
                raise ValueError(
                    f"train.ema={train.ema}: sharded weights are not averaged; use plain DDP, or train.ema=0"
                )
            accelerator.register_for_checkpointing(self.average)
        deferred = can_defer(accelerator, inner) if deferred is None else deferred
        fp16 = accelerator.mixed_precision == "fp16"
        self.watch = FiniteWatch(accelerator.device, inner, deferred=deferred, fp16=fp16)
        self.meters, self.clock = Meters(), Clock()
        self.step = 0
        self.last: dict[str, float] = {}
        settings = {
            "train": dataclasses.asdict(train),
            "optim": dataclasses.asdict(optim),
            "launch": {"mixed_precision": accelerator.mixed_precision},
        }
        self.settings = json.loads(json.dumps(settings))

    def resume(self) -> None:
        """Take up the newest checkpoint, cut the logs back to it, and start the trackers."""
        saved = checkpoint.resume(self.accelerator, self.run_dir, self.settings) or {}
        self.step = self.begun = saved.get("step", 0)
        self.last = saved.get("last", {})
        self.meters.load_state_dict(saved.get("meters", []))
        self.metrics = JsonlWriter(self.run_dir / "metrics.jsonl", keep=saved.get("metrics_bytes", 0))
        self.speed = JsonlWriter(self.run_dir / "speed.jsonl", keep=saved.get("speed_bytes", 0))
        if self.step >= self.train.steps:
            _say(f"{self.run_dir}: all {self.train.steps} steps are done already, not training again")
        elif self.step:
            _say(f"{self.run_dir}: resuming after step {self.step}")
        if self.train.trackers and self.step < self.train.steps:
            scalars = {f"{group}.{k}": v for group, values in self.settings.items() for k, v in values.items()}
            scalars = {k: v for k, v in scalars.items() if isinstance(v, str | int | float)}
            self.accelerator.init_trackers("gep", config=scalars)

    def loop(
        self, batches: BatchesFrom, evaluate: Evaluate | None, stop: StopSignal, progress: Progress
    ) -> Path | None:
        """Steps until the last one, or until a stop signal: then the checkpoint made is returned.

        Where they are due in the same step, logging comes before evaluating, and that before saving.
        """
        train = self.train
        self.task.train()
        # Starting a DataLoader draws from torch's generator, and a resumed run starts one more: give it back.
        with torch.random.fork_rng(devices=[]):
            stream = iter(batches(self.step)) if self.step < train.steps else iter(())
        while self.step < train.steps:
            with self.clock.waiting(), torch.random.fork_rng(devices=[]):
                micro_batches = _next(stream, self.step, train)
            self.update(to_device(micro_batches, self.accelerator.device), stop.requested)
            progress.advance()
            log_due = self._due(train.log_every)
            eval_due = evaluate is not None and self._due(train.eval_every)
            stopping = self._agree_to_stop(stop.requested)
            save_due = stopping or self._due(train.save_every)
            if log_due or eval_due or save_due:
                self.watch.confirm()
            if log_due:
                self.log(progress)
            with self.clock.pausing():
                if evaluate is not None and eval_due:
                    self.evaluate(evaluate)
                if save_due:
                    folder = self.save()
            if stopping:
                return folder
        return None

    def update(self, micro_batches: Sequence[Batch], stop: bool) -> None:
        """One optimiser step: learning rate, gradients of all micro-batches, the guard, the update."""
        lr = lr_at(self.step, self.train.steps, self.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        keys = [list(batch.get("key", ())) for batch in micro_batches]
        losses = self._backward(micro_batches, keys, stop)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.optim.clip_norm or math.inf)
        if hasattr(norm, "full_tensor"):  # FSDP2
            norm = norm.full_tensor()
        norm = torch.as_tensor(0.0 if norm is None else norm)
        if not self.deepspeed:
            self.watch.observe(self.step + 1, losses, norm, keys, stop=stop)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.meters.add({"grad_norm": norm})
        self.step += 1
        self.average.update(self.step)

    def _backward(self, micro_batches: Sequence[Batch], keys: list[list[str]], stop: bool) -> list[Tensor]:
        hasty, count = self.deepspeed, len(micro_batches)
        make_context = getattr(self.task, "context", None)
        if make_context is not None:
            if self.accelerator.is_fsdp2:  # no forward of the root is there to gather its parameters
                self.model.unshard()
            with torch.no_grad(), self.accelerator.autocast():
                context = make_context(micro_batches)
        losses = []
        for index, batch in enumerate(micro_batches):
            is_last = index == count - 1
            self.accelerator.sync_gradients = is_last
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                values = self.model(batch, context=context, index=index) if make_context else self.model(batch)
                loss = _loss_of(self.task, values)
                losses.append(loss.detach())
                if hasty:  # DeepSpeed takes the step inside backward
                    self.watch.observe(self.step + 1, losses[-1:], losses[-1], keys[index : index + 1], stop=stop)
                self.accelerator.backward(loss / count)
            self.meters.add(values)
        return losses

    def log(self, progress: Progress) -> None:
        """Means since the last line to metrics.jsonl, rates to speed.jsonl, both to the trackers."""
        line = {
            "step": self.step,
            **self.meters.means_and_reset(),
            "lr": lr_at(self.step - 1, self.train.steps, self.optim),
        }
        rates = self.clock.lap(self.step, self.train.batch_size)
        self.metrics.write(line)
        self.speed.write(rates)
        self.accelerator.log({**line, "samples_per_s": rates["samples_per_s"]}, step=self.step)
        progress.note(loss=line["loss"], samples_per_s=rates["samples_per_s"])
        self.last |= line

    def evaluate(self, evaluate: Evaluate) -> None:
        """The task's own evaluation as a line of its own in metrics.jsonl, names under eval/."""
        self.task.eval()
        if self.accelerator.is_fsdp2:  # evaluation may go past the root's forward, which gathers its parameters
            self.model.unshard()
        self.average.swap()
        with torch.no_grad():
            found = evaluate(self.task, self.step)
        self.average.swap()
        if self.accelerator.is_fsdp2:
            self.model.reshard()
        self.task.train()
        found = {name if name.startswith("eval/") else f"eval/{name}": float(value) for name, value in found.items()}
        self.metrics.write({"step": self.step, **found})
        self.accelerator.log(found, step=self.step)
        self.last |= {"step": self.step, **found}

    def save(self) -> Path:
        """A checkpoint of this step."""
        trainer = {
            "step": self.step,
            "metrics_bytes": self.metrics.offset,
            "speed_bytes": self.speed.offset,
            "world_size": distributed.world_size(),
            "settings": self.settings,
            "last": self.last,
        }
        return checkpoint.save(
            self.accelerator,
            self.run_dir,
            self.step,
            trainer=trainer,
            meters=self.meters.state_dict(),
            keep=self.train.keep_checkpoints,
            size_hint=self.size_hint,
        )

    def release(self) -> None:
        """Close the trackers; leave the task as a plain module and the accelerator free for another one."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []
        if self.train.checkpointing:
            set_checkpointing(self.task, False)
        for name in PREPARED:
            self.task.__dict__.pop(name, None)
        self.task.__dict__.update(self._own)
        self.accelerator._custom_objects = [o for o in self.accelerator._custom_objects if o is not self.average]
        self.accelerator.free_memory()

    def _due(self, every: int) -> bool:
        return self.step == self.train.steps or (every > 0 and self.step % every == 0)

    def _agree_to_stop(self, requested: bool) -> bool:
        if distributed.world_size() == 1:
            return requested
        if not self.watch.deferred:
            return self.watch.stop_voted
        return self.step % _STOP_EVERY == 0 and distributed.all_agree(requested)


def _next(stream: Iterator[Sequence[Batch]], step: int, train: TrainConfig) -> Sequence[Batch]:
    try:
        micro_batches = next(stream)
    except StopIteration:
        raise ValueError(f"the batches ended after step {step} of {train.steps}; batches(start) must go on") from None
    is_list = isinstance(micro_batches, list | tuple)
    if not is_list or len(micro_batches) != train.accumulate:
        found = f"{len(micro_batches)} of them" if is_list else type(micro_batches).__name__
        raise ValueError(
            f"batches must yield a list of {train.accumulate} micro-batches (train.accumulate), not {found}"
        )
    return micro_batches


def _loss_of(task: nn.Module, values: Any) -> Tensor:
    if not isinstance(values, Mapping) or not isinstance(values.get("loss"), Tensor):
        raise ValueError(f"{type(task).__name__}.forward must return a dict with a scalar tensor 'loss'")
    return values["loss"]


def _say(message: str) -> None:
    if distributed.is_main():
        print(message, file=sys.stderr, flush=True)
