"""How a run is set up: its length and precision, and the accelerator that carries it."""

import argparse
import ctypes
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradientAccumulationPlugin
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gep import distributed
from gep.cpu import use_fast_kernels
from gep.logs import check_trackers

# What accelerate's prepare leaves on a module it does not wrap.
PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared")

_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length of the run, batches, precision, and what is written when."""

    steps: int = 1000
    """optimiser steps of the run"""
    batch_size: int = 64
    """samples per optimiser step, over all processes and micro-batches"""
    accumulate: int = 1
    """micro-batches per optimiser step on each process"""
    seed: int = 0
    """seed of initial weights, dropout and data order"""
    num_workers: int = 0
    """data loading processes per training process; 0 loads in the training process"""
    threads: int = 0
    """data threads a process in place of num_workers: faster for shards and .arrow recordings"""
    log_every: int = 10
    """steps between lines of metrics.jsonl"""
    eval_every: int = 0
    """steps between evaluations; 0 evaluates only at the end"""
    save_every: int = 500
    """steps between checkpoints; 0 saves only at the end"""
    keep_checkpoints: int = 2
    """newest checkpoints to keep; 0 keeps all"""
    precision: Literal["no", "bf16", "fp16", "auto"] = "no"
    """mixed precision; auto = bf16 where the device computes in it; `accelerate launch --mixed_precision` wins"""
    ema: float = 0.0
    """decay of a moving average of the trained weights, which is then evaluated and exported; 0 = off, 0.999 usual"""
    trackers: list[str] = field(default_factory=list)
    """further logs: tensorboard, trackio, wandb"""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on from the newest checkpoint; never refuses a run folder that holds results"""
    compile: bool = False
    """torch.compile the task"""
    checkpointing: bool = False
    """keep a block's input alone and run it again when going backward: less memory, a third more work"""
    progress: bool = True
    """show progress on stderr"""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a whole number >= 1")
        for name in ("seed", "num_workers", "threads", "eval_every", "save_every", "keep_checkpoints"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a whole number >= 0")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; give a decay in [0, 1), 0 = off")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}; "
                "all micro-batches must be of one size"
            )
        check_trackers(self.trackers)


def make_accelerator(
    train: TrainConfig, run_dir: str | os.PathLike[str], *, find_unused_parameters: bool = False
) -> Accelerator:
    """The accelerator a run needs; also seeds all ranks alike, so that the weights made next are equal.

    May be called again in the same process, for another stage or precision.

    Args:
        train: precision, trackers, seed and batch size.
        run_dir: where trackers that write files put them.
        find_unused_parameters: True if some parameters take no part in some steps (several processes only).
    Raises:
        ValueError: fp16 without a GPU, or a batch size that does not divide over the processes.
    """
    _start_cpu_processes()
    _keep_freed_memory()
    use_fast_kernels()
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    precision = precision_of(train.precision) if launched == "no" else launched
    # One process may run several stages: the process group stays, the precision may change.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=_on_cpus_only(),
        log_with=list(train.trackers) or None,
        project_dir=str(run_dir),
        step_scheduler_with_optimizer=False,
        # fit counts micro-batches itself; accelerate must not divide by its own count as well.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters, gradient_as_bucket_view=True)
        ],
    )
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("train.precision=fp16 needs a GPU; on a CPU use bf16 or no")
    share = accelerator.num_processes * train.accumulate
    if train.batch_size % share:
        raise ValueError(
            f"train.batch_size {train.batch_size} does not divide over {accelerator.num_processes} processes "
            f"x {train.accumulate} micro-batches; give a multiple of {share}"
        )
    # DDP's prefix stays out of checkpoints, so that a run can go on with another number of processes.
    accelerator.register_save_state_pre_hook(_save_bare_names)
    accelerator.register_load_state_pre_hook(_load_bare_names)
    distributed.seed_all(train.seed)
    return accelerator


def precision_of(asked: str) -> str:
    """ "no", "bf16" or "fp16" as asked; "auto" is bf16 on a GPU or CPU with instructions for it, else "no"."""
    if asked != "auto":
        return asked
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if cpu_bf16() else "no"


def cpu_bf16() -> list[str]:
    """Which of its bf16 instructions this machine's CPU has: "amx_bf16", "avx512_bf16"; none where that is unknown."""
    if not _CPU_INFO.is_file():
        return []
    flags = next((line.split() for line in _CPU_INFO.read_text().splitlines() if line.startswith("flags")), [])
    return [name for name in ("amx_bf16", "avx512_bf16") if name in flags]


def set_up_blocks(task: nn.Module, train: TrainConfig) -> None:
    """Turns activation checkpointing and compilation of a task on, as `train` says; warns where it has no effect."""
    if train.checkpointing and not set_checkpointing(task, True):
        warnings.warn(f"train.checkpointing=true has no effect: {type(task).__name__} has no blocks", stacklevel=2)
    if train.compile:
        # A graph that does not compile falls back to eager with a warning instead of ending the run.
        torch._dynamo.config.suppress_errors = True
        task.compile()


def set_checkpointing(task: nn.Module, on: bool) -> int:
    """Activation checkpointing in all parts that offer `set_grad_checkpointing`; returns how many they are."""
    setters = [getattr(part, "set_grad_checkpointing", None) for part in task.modules()]
    for setter in (offered := [setter for setter in setters if callable(setter)]):
        setter(on)
    return len(offered)


def to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Mapping):
        return {name: to_device(item, device) for name, item in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "to"):
        return [to_device(item, device) for item in value]
    return value.to(device, non_blocking=True) if hasattr(value, "to") else value


def can_defer(accelerator: Accelerator, inner: torch.optim.Optimizer) -> bool:
    """Whether the device itself can skip a bad step: fused AdamW on CUDA, unsharded, no loss scaler."""
    plain = accelerator.distributed_type in (DistributedType.NO, DistributedType.MULTI_GPU)
    fused = bool(inner.defaults.get("fused"))
    return accelerator.device.type == "cuda" and plain and fused and accelerator.scaler is None


def gather_parameters(task: nn.Module) -> None:
    """Make FSDP2's sharded parameters whole, so that a trained task can be exported; on every rank."""
    for module in task.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and hasattr(parameter, "full_tensor"):
                whole = parameter.full_tensor().detach()
                module._parameters[name] = nn.Parameter(whole, requires_grad=parameter.requires_grad)


def _on_cpus_only() -> bool:
    """True for several processes without a GPU, which accelerate would leave unconnected."""
    has_gpu = torch.cuda.is_available() or torch.xpu.is_available()
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not has_gpu


def _start_cpu_processes() -> None:
    """Make `accelerate launch --cpu --num_processes N` (or a config file saying so) start N processes.

    accelerate (seen in 1.15.0) starts one, unless under MPI: it then becomes torchrun for N of itself.
    """
    alone = not {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"} & set(os.environ)
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    # accelerate sets MASTER_ADDR where it was asked for more than one process.
    if PartialState._shared_state or not (alone and on_cpu and "MASTER_ADDR" in os.environ):
        return
    parent = psutil.Process().parent()
    count = _asked_processes(parent.cmdline() if parent else [])
    if count > 1:
        sys.stdout.flush()
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        os.execv(sys.executable, [sys.executable, *launcher, *sys.argv])


def _asked_processes(words: list[str]) -> int:
    """The N of an `accelerate launch` command line; 1 where it is none.

    Raises:
        ValueError: several machines; each would train alone, in one folder.
    """
    # Both `accelerate launch` and `python -m accelerate.commands.launch`.
    place = next((i for i, word in enumerate(words) if word in ("launch", "accelerate.commands.launch")), None)
    if place is None or not any("accelerate" in word for word in words[: place + 1]):
        return 1
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", type=int)
    parser.add_argument("--num_machines", "--num-machines", type=int)
    parser.add_argument("--config_file", "--config-file")
    options, _ = parser.parse_known_args(words[place + 1 :])
    if options.config_file:
        with open(options.config_file, encoding="utf-8") as file:
            given = yaml.safe_load(file)
        for name in ("num_processes", "num_machines"):
            if getattr(options, name) is None:
                setattr(options, name, given.get(name))
    if (options.num_machines or 1) > 1:
        raise ValueError(
            f"--num_machines {options.num_machines} with --cpu: accelerate starts one process there, and each machine "
            "would train alone; leave --cpu out, as docs/SCALE.md shows"
        )
    return options.num_processes or 1


def _save_bare_names(models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
    for index, (model, state) in enumerate(zip(models, weights)):
        if isinstance(model, DistributedDataParallel):
            weights[index] = {name.removeprefix("module."): value for name, value in state.items()}


def _load_bare_names(models: list[nn.Module], folder: str) -> None:
    models[:] = [m.module if isinstance(m, DistributedDataParallel) else m for m in models]


def set_up_deepspeed(accelerator: Accelerator, train: TrainConfig, clip_norm: float) -> None:
    """DeepSpeed counts, clips and divides by itself: give it fit's numbers."""
    settings = accelerator.deepspeed_plugin.deepspeed_config
    settings["train_micro_batch_size_per_gpu"] = train.batch_size // (accelerator.num_processes * train.accumulate)
    settings["gradient_accumulation_steps"] = 1
    settings["gradient_clipping"] = clip_norm


def _keep_freed_memory() -> None:
    """Lets glibc keep what tensors on the CPU give back, instead of returning it to the kernel.

    By default each large tensor is mapped afresh, and the kernel zeroes its pages every step: a seventh of the step
    of the `nano` preset (docs/LOG.md).
    """
    if sys.platform == "linux" and not torch.cuda.is_available():
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            trim_threshold, mmap_threshold = -1, -3
            mallopt(mmap_threshold, 1 << 30)
            mallopt(trim_threshold, (1 << 31) - 1)
